"""First pass of gate_conv_residual: what its second pass needs of a token besides the value, two scalars per branch.

    gate   [T, H]   as in gate.py
    scale  [T, H]   gate * rsqrt(mean((gate * value)^2) + conv_eps), so that rms(gate * value) = value * scale

Both float32, zero for masked and padding tokens. T tokens, H branches.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from .branch_gate import (
    addresses_aligned,
    branch_gate,
    few_tokens,
    float32_eps,
    gate_config,
    store_scalars,
    strides_aligned,
    token_rows,
)
from .launch import cdiv

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "gate_scale_kernel": dict(sm_80=(120, 4096), sm_90=(112, 4096), sm_100=(112, 4096), gfx942=(80, 8192)),
    # With loads on their way to shared memory.
    "gate_scale_kernel, few tokens": dict(
        sm_80=(128, 36_864), sm_90=(128, 36_864), sm_100=(128, 36_864), gfx942=(80, 8192)
    ),
}


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def gate_scale_kernel(
    hidden_ptr,
    key_ptr,
    value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    scalars_ptr,
    gate_ptr,
    scale_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    num_tokens,
    num_seqs,
    eps,
    conv_eps,
    clamp,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """First pass, BLOCK_T tokens in one branch: their gates and the scales of their normed values, float32 ``[T, H]``.

    Grid (cdiv(T, BLOCK_T) * H,), branches innermost. A masked or padding token gets zeros, and nothing of it is read.
    """
    eps, conv_eps, clamp = tl.cast(eps, tl.float32), tl.cast(conv_eps, tl.float32), tl.cast(clamp, tl.float32)
    branch = (tl.program_id(0) % NUM_BRANCHES).to(tl.int64)
    token = (tl.program_id(0) // NUM_BRANCHES).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < num_tokens
    live = mask_t
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + token, mask=mask_t, other=0) != 0)
    if cu_seqlens_ptr is not None:
        live = live & (token < tl.load(cu_seqlens_ptr + num_seqs))
    gate, d, hidden_scale, key_scale = branch_gate(
        token,
        branch,
        live,
        hidden_ptr,
        key_ptr,
        query_norm_ptr,
        key_norm_ptr,
        stride_hidden_t,
        stride_hidden_h,
        stride_key_t,
        stride_key_h,
        eps,
        clamp,
        HIDDEN_SIZE,
        COPYSIGN,
        ALIGNED,
        BLOCK_T,
        BLOCK_D,
        STAGES,
    )
    if scalars_ptr is not None:
        store_scalars(scalars_ptr, token, branch, mask_t, d, hidden_scale, key_scale, NUM_BRANCHES)
    value_row = token_rows(value_ptr, token[:, None], 0, stride_value_t, 0, ALIGNED)
    square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
        value = tl.load(value_row + offs_d, mask=live[:, None] & (offs_d < HIDDEN_SIZE), other=0).to(tl.float32)
        square += value * value
    mean = tl.sum(square, axis=1) / HIDDEN_SIZE
    scale = gate * tl.rsqrt(gate * gate * mean + conv_eps)
    # Both at the end: with conv_eps = 0 the scale of a gate that is 0 already would be NaN.
    gate, scale = tl.where(live, gate, 0.0), tl.where(live, scale, 0.0)
    offs_out = token * NUM_BRANCHES + branch
    tl.store(gate_ptr + offs_out, gate, mask=mask_t)
    tl.store(scale_ptr + offs_out, scale, mask=mask_t)


def prepare_gate_scale(hidden, key, value, eps, conv_eps, clamp, zero_gate, num_seqs: int) -> Callable[..., None]:
    """The launch for tensors such as these; hidden and key ``[T, H, D]``, value ``[T, D]``, T at least 1.

    It is one of (hidden, key, value, query_norm, key_norm, mask, cu_seqlens, scalars, gate, scale), and writes gate and
    scale ``[T, H]``, and ``scalars [T, 3, H]`` for the backward pass where they are not None.
    """
    num_tokens, branches, hidden_size = hidden.shape
    config = gate_config(hidden_size, few_tokens(num_tokens))
    strides = (*hidden.stride()[:2], *key.stride()[:2], value.stride(0))
    numbers = (*strides, num_tokens, num_seqs, float32_eps(eps), float32_eps(conv_eps), float(clamp))
    numbers += (branches, hidden_size, zero_gate == "copysign")
    aligned = strides_aligned(hidden, key, value)
    options = dict(
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        STAGES=config.stages,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        grid=(cdiv(num_tokens, config.block_t) * branches,),
        warmup=False,
    )

    def launch(*tensors):
        aligned_now = aligned and addresses_aligned(*tensors[:3])
        gate_scale_kernel.run(*tensors, *numbers, ALIGNED=aligned_now, **options)

    return launch
