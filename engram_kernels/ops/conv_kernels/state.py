"""State of the short convolution between two calls: value and scale of each sequence's last (K-1) * dilation tokens.

    value  [B, S, D]   the value rows, in the hidden state's dtype
    scale  [B, S, H]   gate * rsqrt(mean(v^2) + conv_eps), float32; zero where a token was masked

S = (K-1) * dilation entries, oldest first, zeros before a sequence's start. ``value * scale`` is the normed value that
the convolution reads (ops/gate_conv.py), so the state needs no ``[S, H, D]``.
"""

import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import next_power_of_2

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "advance_state_kernel": dict(sm_80=(32, 0), sm_90=(32, 0), sm_100=(32, 0), gfx942=(16, 0)),
}


@triton.jit(do_not_specialize=["seq_len"])
def advance_state_kernel(
    value_ptr,
    scale_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    state_value_ptr,
    state_scale_ptr,
    new_value_ptr,
    new_scale_ptr,
    stride_value_t,
    seq_len,
    SPAN: tl.constexpr,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One entry of one sequence's new state: a token of this batch, or an entry of the old state moved up.

    Grid (B * SPAN,). The entry is a block of one: Triton 3.9's interpreter widens a scalar condition that it
    broadcasts.
    """
    entry = tl.program_id(0) + tl.arange(0, 1)[:, None]
    seq = entry // SPAN
    follow_predecessor()
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + seq)
        length = tl.load(cu_seqlens_ptr + seq + 1) - start
    else:
        start, length = seq * seq_len, seq_len
    position = length - SPAN + entry - seq * SPAN
    inside = position >= 0
    token = tl.where(inside, start + position, 0).to(tl.int64)
    slot = (seq * SPAN + tl.where(inside, 0, position + SPAN)).to(tl.int64)
    present = inside
    if mask_ptr is not None:
        present = present & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    mask_h = offs_h < NUM_BRANCHES
    new_scale = tl.load(scale_ptr + token * NUM_BRANCHES + offs_h, mask=mask_h & inside, other=0)
    old_scale = tl.load(state_scale_ptr + slot * NUM_BRANCHES + offs_h, mask=mask_h & ~inside, other=0)
    scale = tl.where(inside, new_scale.to(old_scale.dtype), old_scale)
    tl.store(new_scale_ptr + entry.to(tl.int64) * NUM_BRANCHES + offs_h, scale, mask=mask_h)
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < HIDDEN_SIZE
        new_value = tl.load(value_ptr + token * stride_value_t + offs_d, mask=mask_d & present, other=0)
        old_value = tl.load(state_value_ptr + slot * HIDDEN_SIZE + offs_d, mask=mask_d & ~inside, other=0)
        value = tl.where(inside, new_value, old_value)
        tl.store(new_value_ptr + entry.to(tl.int64) * HIDDEN_SIZE + offs_d, value, mask=mask_d)


def launch_advance_state(value, scale, mask, cu_seqlens, shape, span, conv_state, new_state) -> None:
    """One launch; writes the state after these tokens to ``new_state``. ``shape`` is that of the tokens."""
    state_value, state_scale = conv_state
    num_entries = state_value.shape[0] * span
    if num_entries == 0:
        return
    branches, hidden_size = scale.shape[1], value.shape[1]
    advance_state_kernel[(num_entries,)](
        value,
        scale,
        mask,
        cu_seqlens,
        state_value,
        state_scale,
        *new_state,
        value.stride(0),
        shape[-1],
        SPAN=span,
        NUM_BRANCHES=branches,
        HIDDEN_SIZE=hidden_size,
        BLOCK_H=next_power_of_2(branches),
        BLOCK_D=min(1024, next_power_of_2(hidden_size)),
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_options(),
    )
