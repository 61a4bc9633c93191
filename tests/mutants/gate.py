"""Mutants of gate_residual."""

from .change import mutants

# branch_gate, in both kernels that gate.
GATE = """\
mask dropped: end of the hidden state @ branch_gate
- tl.load(hidden_row + offs_d, mask=mask_row & mask_d, other=0).to(tl.float32)
+ tl.load(hidden_row + offs_d, mask=mask_row, other=0).to(tl.float32)
other dropped @ branch_gate
- tl.load(key_row + offs_d, mask=mask_row & mask_d, other=0)
+ tl.load(key_row + offs_d, mask=mask_row & mask_d, other=1)
last tile skipped: sums over D @ branch_gate
- product = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
-     for begin in range(0, HIDDEN_SIZE, BLOCK_D)
+ product = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
eps outside the mean: hidden @ branch_gate -k size_of_eps
- tl.sum(hidden_square, axis=2) / HIDDEN_SIZE + eps
+ (tl.sum(hidden_square, axis=2) + eps) / HIDDEN_SIZE
eps outside the mean: key @ branch_gate -k size_of_eps
- tl.sum(key_square, axis=2) / HIDDEN_SIZE + eps
+ (tl.sum(key_square, axis=2) + eps) / HIDDEN_SIZE
norms swapped: one for both @ branch_gate
- tl.load(key_norm_ptr + offs_h
+ tl.load(query_norm_ptr + offs_h
32-bit product: branch @ branch_gate -k branches_beyond
- offs_h.to(tl.int64) * stride_h
+ offs_h * stride_h
branch fixed to 0: query norm @ branch_gate
- tl.load(query_norm_ptr + offs_h * HIDDEN_SIZE + offs_d
+ tl.load(query_norm_ptr + offs_h * 0 + offs_d
clamp dropped @ branch_gate
- tl.where(magnitude < clamp, clamp, magnitude)
+ magnitude
sign of zero @ branch_gate
- logit = tl.where(d < 0, -root, root)
+ logit = tl.where(d <= 0, -root, root)
"""

GATE_RESIDUAL = """\
mask dropped: end of D @ gate -k test_kernel and 7-4-80
- tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty), mask=mask_row & mask_d)
+ tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty), mask=mask_row)
mask dropped: branches @ gate -k test_kernel and 4-5-7
- mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
+ mask_row = mask_t[:, None, None] & (offs_h >= 0)
mask dropped: value of masked tokens @ gate -k test_kernel_mask
- mask=live[:, None, None] & mask_d, other=0)
+ mask=mask_t[:, None, None] & mask_d, other=0)
mask dropped: bits of masked tokens @ gate -k test_kernel_mask
- result = tl.where(live[:, None, None], result, hidden)
+ result = result
stride swapped @ branch_gate -k views_of_kv
- token_rows(key_ptr, token, offs_h, stride_key_t, stride_key_h, ALIGNED)
+ token_rows(key_ptr, token, offs_h, stride_key_h, stride_key_t, ALIGNED)
32-bit product @ gate -k beyond
- token = tl.program_id(0).to(tl.int64) * BLOCK_T
+ token = tl.program_id(0) * BLOCK_T
last tile skipped: output @ gate
- mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
-     for begin in range(0, HIDDEN_SIZE, BLOCK_D)
+ mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
"""

MUTANTS = mutants("gate_residual_kernel", "gate", ("gate/v41-masked",), GATE, GATE_RESIDUAL)
