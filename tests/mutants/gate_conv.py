"""Mutants of gate_conv_residual."""

from .change import mutants
from .gate import GATE

GATE_SCALE = """\
branch fixed to 0: query norm @ ops/conv_kernels/scale
- norm_rows = (query_norm_ptr + branch * HIDDEN_SIZE,
+ norm_rows = (query_norm_ptr,
mask dropped: gate of masked tokens @ ops/conv_kernels/scale
- tl.store(gate_ptr + offs_out, 0.0)
+ tl.store(gate_ptr + offs_out, 0.5)
mask dropped: masked tokens @ ops/conv_kernels/scale
- live = live & (tl.load(mask_ptr + token) != 0)
+ live = live
stride swapped @ ops/conv_kernels/scale
- offs_out = token * NUM_BRANCHES + branch
+ offs_out = token + branch * num_tokens
window off by one: end of the last sequence @ ops/conv_kernels/scale
- end = tl.load(cu_seqlens_ptr + num_seqs)
+ end = tl.load(cu_seqlens_ptr + num_seqs) - 1
last tile skipped: mean of value @ ops/conv_kernels/scale
- for begin in range(0, HIDDEN_SIZE, BLOCK_D):
+ for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D):
eps outside the mean: value @ ops/conv_kernels/scale
- gate * tl.rsqrt(mean + conv_eps)
+ gate * tl.rsqrt(mean + gate * gate * conv_eps)
mask dropped: scale of masked tokens @ ops/conv_kernels/scale
- tl.store(scale_ptr + offs_out, 0.0)
+ tl.store(scale_ptr + offs_out, 1.0)
a program's second token skipped @ ops/conv_kernels/scale
- num_tokens, tl.num_programs(0) // NUM_BRANCHES):
+ num_tokens, num_tokens):
"""

CONV_RESIDUAL = """\
mask dropped: end of D @ ops/conv_kernels/residual -k test_kernel and 12-3-80
- mask = mask_t[:, None] & mask_d[None, :]
+ mask = mask_t[:, None] & (offs_d >= 0)[None, :]
mask dropped: masked tokens @ ops/conv_kernels/residual
- inside = inside & (tl.load(mask_ptr + source, mask=inside, other=0) != 0)
+ inside = inside
mask dropped: padding @ ops/conv_kernels/residual
- result = tl.where(padding[:, None], hidden, result)
+ result = result
stride swapped: hidden @ ops/conv_kernels/residual -k test_kernel and 12-4-64
- token64[:, None] * stride_hidden_t + branch64 * stride_hidden_h
+ token64[:, None] * stride_hidden_h + branch64 * stride_hidden_t
stride swapped: weight @ ops/conv_kernels/residual
- stride_h, stride_d, stride_k = conv_weight.stride()
+ stride_h, stride_k, stride_d = conv_weight.stride()
32-bit product: branch @ ops/conv_kernels/residual -k branches_beyond
- branch64 = tl.cast(branch, tl.int64)
+ branch64 = branch
32-bit product @ ops/conv_kernels/residual -k beyond
- source64 = source.to(tl.int64)
+ source64 = source
window off by one @ ops/conv_kernels/residual
- (source >= start) & (source >= 0)
+ (source > start) & (source >= 0)
cu_seqlens ignored: start @ ops/conv_kernels/residual
- (source >= start) & (source >= 0)
+ (source >= 0)
cu_seqlens ignored: search @ ops/hash_kernels/sequences
- start = tl.load(cu_seqlens_ptr + seq)
+ start = token * 0
history reversed @ ops/conv_kernels/residual
- slot = seq.to(tl.int64) * SPAN + SPAN + source - start
+ slot = seq.to(tl.int64) * SPAN - 1 - source + start
last tile skipped @ ops/conv_kernels/residual
- mask_t, mask_d = token < num_tokens, offs_d < HIDDEN_SIZE
+ mask_t, mask_d = token < num_tokens, offs_d < HIDDEN_SIZE // BLOCK_D * BLOCK_D
norms swapped: query norm for conv norm @ ops/conv_kernels/residual
- gate, scale, call.conv_norm
+ gate, scale, call.query_norm
branch fixed to 0: few tokens @ ops/conv_kernels/residual
- block // NUM_BRANCHES, block % NUM_BRANCHES
+ block // NUM_BRANCHES, block * 0
branch fixed to 0: conv norm @ ops/conv_kernels/residual
- conv_norm_ptr + branch * HIDDEN_SIZE
+ conv_norm_ptr
branch fixed to 0: weight @ ops/conv_kernels/residual
- conv_weight_ptr + branch64 * stride_weight_h
+ conv_weight_ptr
branch fixed to 0: gate @ ops/conv_kernels/residual
- gate_ptr + token64 * NUM_BRANCHES + branch
+ gate_ptr + token64 * NUM_BRANCHES
taps reversed @ ops/conv_kernels/residual
- tap * stride_weight_k
+ (NUM_TAPS - 1 - tap) * stride_weight_k
dilation minus one @ ops/conv_kernels/residual
- (NUM_TAPS - 1 - tap) * DILATION
+ (NUM_TAPS - 1 - tap) * (DILATION - 1)
"""

ADVANCE_STATE = """\
mask dropped: masked tokens @ ops/conv_kernels/state
- present = present & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
+ present = present
mask dropped: branches @ ops/conv_kernels/state -k in_bounds
- scale, mask=mask_h)
+ scale, mask=offs_h >= 0)
mask dropped: end of D @ ops/conv_kernels/state -k in_bounds
- value, mask=mask_d)
+ value, mask=offs_d >= 0)
stride swapped @ ops/conv_kernels/state
- state_scale_ptr + slot * NUM_BRANCHES + offs_h
+ state_scale_ptr + slot + offs_h * SPAN
32-bit product @ ops/conv_kernels/state -k beyond
- tl.where(inside, start + position, 0).to(tl.int64)
+ tl.where(inside, start + position, 0)
other dropped @ ops/conv_kernels/state
- mask=mask_d & present, other=0)
+ mask=mask_d & present, other=1)
window off by one @ ops/conv_kernels/state
- position = length - SPAN + entry
+ position = length - SPAN - 1 + entry
cu_seqlens ignored @ ops/conv_kernels/state
- start = tl.load(cu_seqlens_ptr + seq)
+ start = seq * 0
history reversed @ ops/conv_kernels/state
- tl.where(inside, 0, position + SPAN)
+ tl.where(inside, 0, -1 - position)
last tile skipped @ ops/conv_kernels/state
- range(0, HIDDEN_SIZE, BLOCK_D)
+ range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
branch fixed to 0 @ ops/conv_kernels/state
- (scale_ptr + token * NUM_BRANCHES + offs_h
+ (scale_ptr + token * NUM_BRANCHES + offs_h * 0
"""

_CONV = "ops/gate_conv", ("gate_conv/27b-packed-state",)
MUTANTS = (
    *mutants("gate_scale_kernel", *_CONV, GATE, GATE_SCALE),
    *mutants("conv_residual_kernel", *_CONV, CONV_RESIDUAL),
    *mutants("advance_state_kernel", *_CONV, ADVANCE_STATE),
)
