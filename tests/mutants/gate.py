"""Mutants of gate_residual."""

from .change import mutants

# branch_gate, in both kernels that gate.
GATE = """\
mask dropped: end of the hidden state @ ops/gate_kernels/branch
- return tl.load(row_ptr + offs_d, mask=offs_d < HIDDEN_SIZE, other=0)
+ return tl.load(row_ptr + offs_d)
other dropped @ ops/gate_kernels/branch
- mask=offs_d < HIDDEN_SIZE, other=0)
+ mask=offs_d < HIDDEN_SIZE, other=1)
last tile skipped: sums over D, rows in registers @ ops/gate_kernels/branch
- for part in tl.static_range((HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D):
-             hidden_square
+ for part in tl.static_range(HIDDEN_SIZE // BLOCK_D):
+             hidden_square
last tile skipped: sums over D @ ops/gate_kernels/branch -k too_wide
- for begin in range(0, HIDDEN_SIZE, BLOCK_D):
-             hidden_square
+ for begin in range(0, HIDDEN_SIZE - BLOCK_D, BLOCK_D):
+             hidden_square
eps outside the mean: hidden @ ops/gate_kernels/branch -k size_of_eps
- tl.fma(ordered_sum(sums[0], 0), MEAN, eps)
+ (ordered_sum(sums[0], 0) + eps) * MEAN
eps outside the mean: key @ ops/gate_kernels/branch -k size_of_eps
- tl.fma(ordered_sum(sums[1], 0), MEAN, eps)
+ (ordered_sum(sums[1], 0) + eps) * MEAN
norms swapped: one for both @ ops/gate_kernels/branch
- widen(row_part(norm_rows[1], begin, HIDDEN_SIZE, BLOCK_D))
+ widen(query_norm)
32-bit product: branch @ ops/gate_kernels/branch -k branches_beyond
- branch * stride_h
+ (branch + token * 0).to(tl.int32) * stride_h.to(tl.int32)
32-bit product: token @ ops/gate_kernels/branch -k tokens_beyond
- (token * stride_t +
+ (token.to(tl.int32) * stride_t.to(tl.int32) +
clamp dropped @ ops/gate_kernels/branch
- tl.where(magnitude < clamp, clamp, magnitude)
+ magnitude
sign of zero @ ops/gate_kernels/branch
- logit = tl.where(d < 0, -root, root)
+ logit = tl.where(d <= 0, -root, root)
a row that overflows: products as they are @ ops/gate_kernels/branch -k overflow
- if (hidden_scale == 0) | (key_scale == 0):
+ if (hidden_scale < 0) | (key_scale < 0):
a row that overflows: not scaled first @ ops/gate_kernels/branch -k overflow
- hidden = widen(row_part(rows[0], begin, HIDDEN_SIZE, TILE)) * hidden_scale
+ hidden = widen(row_part(rows[0], begin, HIDDEN_SIZE, TILE))
"""

GATE_RESIDUAL = """\
branch fixed to 0: query norm @ ops/gate_kernels/residual
- norm_rows = (query_norm_ptr + branch * HIDDEN_SIZE,
+ norm_rows = (query_norm_ptr,
mask dropped: end of D @ ops/gate_kernels/branch -k test_kernel and 7-4-80
- tl.store(row_ptr + offs_d, part, mask=offs_d < HIDDEN_SIZE)
+ tl.store(row_ptr + offs_d, part)
mask dropped: masked tokens @ ops/gate_kernels/residual -k test_kernel_mask
- live = tl.load(mask_ptr + token) != 0
+ live = tl.load(mask_ptr + token) >= 0
mask dropped: bits of masked tokens @ ops/gate_kernels/residual -k test_kernel_mask
- unchanged = row_part(hidden_row, begin, HIDDEN_SIZE, BLOCK_D)
+ unchanged = widen(row_part(hidden_row, begin, HIDDEN_SIZE, BLOCK_D)) + 0.0
stride swapped @ ops/gate_kernels/residual -k views_of_kv
- token_rows(key_ptr, token, branch, stride_key_t, stride_key_h, ALIGNED)
+ token_rows(key_ptr, token, branch, stride_key_h, stride_key_t, ALIGNED)
last tile skipped: output, rows in registers @ ops/gate_kernels/residual
- for part in tl.static_range((HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D):
+ for part in tl.static_range(HIDDEN_SIZE // BLOCK_D):
last tile skipped: output @ ops/gate_kernels/residual -k too_wide
- for begin in range(0, HIDDEN_SIZE, BLOCK_D):
-                     hidden = row_part
+ for begin in range(0, HIDDEN_SIZE - BLOCK_D, BLOCK_D):
+                     hidden = row_part
a program's second token skipped @ ops/gate_kernels/residual
- num_tokens, tl.num_programs(0) // NUM_BRANCHES):
+ num_tokens, num_tokens):
"""

MUTANTS = mutants("gate_residual_kernel", "ops/gate", ("gate/v41-masked",), GATE, GATE_RESIDUAL)
