"""Mutants of gate_residual."""

from .change import mutants

# branch_gate, in both kernels that gate.
GATE = """\
mask dropped: end of the hidden state @ branch_gate
- tl.load(hidden_row + offs_d, mask=live[:, None] & mask_d, other=0).to(tl.float32)
+ tl.load(hidden_row + offs_d, mask=live[:, None], other=0).to(tl.float32)
other dropped @ branch_gate
- tl.load(key_row + offs_d, mask=live[:, None] & mask_d, other=0)
+ tl.load(key_row + offs_d, mask=live[:, None] & mask_d, other=1)
last tile skipped: sums over D @ branch_gate
- product = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
-     for begin in tl.range(0, HIDDEN_SIZE, BLOCK_D, num_stages=STAGES)
+ product = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
+     for begin in tl.range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D, num_stages=STAGES)
eps outside the mean: hidden @ branch_gate -k size_of_eps
- tl.sum(hidden_square, axis=1) / HIDDEN_SIZE + eps
+ (tl.sum(hidden_square, axis=1) + eps) / HIDDEN_SIZE
eps outside the mean: key @ branch_gate -k size_of_eps
- tl.sum(key_square, axis=1) / HIDDEN_SIZE + eps
+ (tl.sum(key_square, axis=1) + eps) / HIDDEN_SIZE
norms swapped: one for both @ branch_gate
- tl.load(key_norm_ptr + offs_w
+ tl.load(query_norm_ptr + offs_w
32-bit product: branch @ branch_gate -k branches_beyond
- branch * stride_h
+ (branch + token * 0).to(tl.int32) * stride_h.to(tl.int32)
32-bit product: token @ branch_gate -k tokens_beyond
- (token * stride_t +
+ (token.to(tl.int32) * stride_t.to(tl.int32) +
branch fixed to 0: query norm @ branch_gate
- tl.load(query_norm_ptr + offs_w
+ tl.load(query_norm_ptr + offs_d
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
mask dropped: value of masked tokens @ gate -k test_kernel_mask
- mask=live_row & mask_d, other=0)
+ mask=mask_row & mask_d, other=0)
mask dropped: bits of masked tokens @ gate -k test_kernel_mask
- result = tl.where(live_row, result, hidden)
+ result = result
stride swapped @ branch_gate -k views_of_kv
- token_rows(key_ptr, token[:, None], branch, stride_key_t, stride_key_h, ALIGNED)
+ token_rows(key_ptr, token[:, None], branch, stride_key_h, stride_key_t, ALIGNED)
last tile skipped: output @ gate
- mask_row, live_row = mask_t[:, None], live[:, None]
-     for begin in range(0, HIDDEN_SIZE, BLOCK_OUT)
+ mask_row, live_row = mask_t[:, None], live[:, None]
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_OUT, BLOCK_OUT)
"""

MUTANTS = mutants("gate_residual_kernel", "gate", ("gate/v41-masked",), GATE, GATE_RESIDUAL)
