"""Mutants of the gradients of gate_residual and gate_conv_residual."""

from .change import mutants

GATE_BACKWARD = """\
mask dropped: end of D @ ops/gate_kernels/backward -k nothing_else and 3-80
- tl.store(row + offs_d, grad_hidden, mask=mask,
+ tl.store(row + offs_d, grad_hidden, mask=mask_row,
mask dropped: branches @ ops/gate_kernels/backward -k nothing_else and 5-7
- live_b = live[:, None] & (offs_b < NUM_BRANCHES)
+ live_b = live[:, None] & (offs_b >= 0)
mask dropped: masked tokens @ ops/gate_kernels/backward -k test_kernel and 13-4-80
- live = live & (tl.load(mask_ptr + token, mask=mask_t, other=0) != 0)
+ live = live
stride swapped: grad @ ops/gate_kernels/backward -k strides
- token_rows(grad_ptr, rows, branch64, stride_grad_t, stride_grad_h, ALIGNED)
+ token_rows(grad_ptr, rows, branch64, stride_grad_h, stride_grad_t, ALIGNED)
32-bit product @ ops/gate_kernels/branch -k gate_gradients_of_tokens_beyond
- (token * stride_t +
+ (token.to(tl.int32) * stride_t.to(tl.int32) +
clamp dropped @ ops/gate_kernels/backward -k flat
- (tl.abs(d) < clamp) | (d == 0)
+ d == 0
slope at zero @ ops/gate_kernels/backward -k flat
- (tl.abs(d) < clamp) | (d == 0)
+ tl.abs(d) < clamp
branch fixed to 0: slope @ ops/gate_kernels/backward -k nothing_else and 3-80
- tl.where(offs_b == branch, d_grad, 0.0)
+ tl.where(offs_b == 0, d_grad, 0.0)
earlier blocks dropped @ ops/gate_kernels/backward -k many_blocks
- product += tl.load(own
+ product += 0.0 * tl.load(own
"""

# What gate_conv_residual alone asks of the same kernel.
GATE_BACKWARD_CONV = """\
conv_eps dropped @ ops/gate_kernels/backward -k test_kernel and 12-4-64
- conv_eps * norm * norm, gate_grad
+ norm * norm, gate_grad
flat slope dropped @ ops/gate_kernels/backward -k window_reaches
- tl.where(slope == 0, 0.0, gate_grad * slope)
+ gate_grad * slope
"""

NORM_GRADIENT = """\
mask dropped @ ops/gate_kernels/weights -k nothing_else and 3-80
- grad_query_norm_ptr.dtype.element_ty), mask=mask)
+ grad_query_norm_ptr.dtype.element_ty), mask=offs >= 0)
norms swapped @ ops/gate_kernels/weights
- tl.load(key_norm_ptr + offs
+ tl.load(query_norm_ptr + offs
last tile skipped: parts @ ops/gate_kernels/weights
- range(0, num_parts, BLOCK_P)
+ range(0, num_parts - num_parts % BLOCK_P, BLOCK_P)
"""

CONV_BACKWARD = """\
mask dropped: masked neighbours @ ops/conv_kernels/backward -k test_kernel
- inside = inside & (tl.load(mask_ptr + source, mask=inside, other=0) != 0)
+ inside = inside
32-bit product @ ops/conv_kernels/backward -k conv_gradients_of_tokens_beyond
- token = token32.to(tl.int64)
+ token = token32
window off by one @ ops/conv_kernels/backward -k test_kernel and 12-4-64
- inside = reached & (source >= start)
+ inside = reached & (source > start)
cu_seqlens ignored: end @ ops/conv_kernels/backward -k test_kernel and 12-4-64
- end = tl.load(cu_seqlens_ptr + seq + 1, mask=known, other=0)
+ end = start * 0 + num_tokens
branch fixed to 0: scale @ ops/conv_kernels/backward -k test_kernel and 12-4-64
- scale_ptr + source * NUM_BRANCHES + branch
+ scale_ptr + source * NUM_BRANCHES
taps reversed @ ops/conv_kernels/backward -k test_kernel and 12-4-64
- offs_w = ((NUM_TAPS - 1 - ahead) * NUM_BRANCHES
+ offs_w = (ahead * NUM_BRANCHES
dilation minus one @ ops/conv_kernels/backward -k test_kernel and 12-4-64
- tl.cast(ahead, tl.int64) * DILATION
+ tl.cast(ahead, tl.int64) * (DILATION - 1)
"""

CONV_GRADIENT = """\
mask dropped @ ops/gate_kernels/weights -k nothing_else and 3-40
- * NUM_TAPS + tap, weight_grad, mask=mask)
+ * NUM_TAPS + tap, weight_grad, mask=offs >= 0)
branch fixed to 0 @ ops/gate_kernels/weights -k test_kernel and 12-4-64
- conv_weight_ptr + branch * stride_weight_h
+ conv_weight_ptr
taps reversed @ ops/gate_kernels/weights -k test_kernel and 12-4-64
- weight_row + tap * stride_weight_k
+ weight_row + (NUM_TAPS - 1 - tap) * stride_weight_k
"""

_GATE = "ops/gate_kernels/backward", ("gate_backward/v41-masked",)
_CONV = "ops/conv_kernels/backward", ("gate_conv_backward/27b-packed",)
MUTANTS = (
    *mutants("gate_backward_kernel", *_GATE, GATE_BACKWARD),
    *mutants("gate_backward_kernel", *_CONV, GATE_BACKWARD_CONV),
    *mutants("norm_gradient_kernel", *_GATE, NORM_GRADIENT),
    *mutants("conv_backward_kernel", *_CONV, CONV_BACKWARD),
    *mutants("conv_gradient_kernel", *_CONV, CONV_GRADIENT),
)
