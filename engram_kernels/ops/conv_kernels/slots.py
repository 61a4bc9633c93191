"""State of the short convolution per slot: a ring of value and scale of the last tokens.

    value  [slots, W, D]   the value rows, in the hidden state's dtype
    scale  [slots, W, H]   as in ops/conv_kernels/state.py, float32
    cursor [slots]         int32, of all layers

S = (K-1) * dilation is the window that the convolution reads, W >= 2 S the ring. The entry ``cursor % W`` is the next
to be written, and there are none before 0. The last W - S tokens of a chunk are written behind the S that are read, so
that these stay as they are until commit_history (serving/history.py) moves the cursor, by any number of accepted
tokens: decode writes one entry a sequence, where a dense state is written anew, and a rejected draft is never read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import next_power_of_2, on_device_of

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "store_conv_kernel": dict(sm_80=(32, 0), sm_90=(32, 0), sm_100=(32, 0), gfx942=(16, 0)),
}


class ConvSlots(NamedTuple):
    """One layer's state of all slots, and the slot of each sequence of a batch; see :class:`EngramState`."""

    value: torch.Tensor  #: [slots, W, D]
    scale: torch.Tensor  #: [slots, W, H]
    cursor: torch.Tensor  #: int32 [slots]
    slots: torch.Tensor  #: int32 [B], -1 for padding


@triton.jit
def slot_cursor(seq, mask, slots_ptr, cursor_ptr, num_slots):
    """Slot of each ``seq`` as int64, its cursor, and whether there is one."""
    slot = tl.load(slots_ptr + seq, mask=mask, other=-1)
    known = (slot >= 0) & (slot < num_slots)
    return slot.to(tl.int64), tl.load(cursor_ptr + slot, mask=known, other=0), known


@triton.jit(do_not_specialize=["seq_len", "num_slots", "num_rows"])
def store_conv_kernel(
    value_ptr,
    scale_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    cursor_ptr,
    ring_value_ptr,
    ring_scale_ptr,
    stride_value_t,
    seq_len,
    num_slots,
    num_rows,
    SPAN: tl.constexpr,
    RING: tl.constexpr,
    RESTART: tl.constexpr,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One of the last num_rows <= RING - SPAN tokens of one sequence, into its entry of the ring.

    Grid (B * num_rows,). The entry is a block of one, as in ops/conv_kernels/state.py. No entry that the window holds
    is written.
    """
    index = tl.program_id(0) + tl.arange(0, 1)[:, None]
    seq = index // num_rows
    follow_predecessor()
    slot, cursor, known = slot_cursor(seq, seq >= 0, slots_ptr, cursor_ptr, num_slots)
    if RESTART:
        cursor = seq * 0
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + seq)
        length = tl.load(cu_seqlens_ptr + seq + 1) - start
    else:
        start, length = seq * seq_len, seq_len + seq * 0
    position = length - num_rows + index % num_rows
    live = known & (position >= 0)
    token = tl.where(live, start + position, 0).to(tl.int64)
    entry = (cursor + position - tl.maximum(length - (RING - SPAN), 0)) % RING
    row = tl.where(live, slot * RING + entry, 0)
    present = live
    if mask_ptr is not None:
        present = present & (tl.load(mask_ptr + token, mask=live, other=0) != 0)
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    mask_h = live & (offs_h < NUM_BRANCHES)
    scale = tl.load(scale_ptr + token * NUM_BRANCHES + offs_h, mask=mask_h, other=0)
    tl.store(ring_scale_ptr + row * NUM_BRANCHES + offs_h, scale, mask=mask_h)
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < HIDDEN_SIZE
        value = tl.load(value_ptr + token * stride_value_t + offs_d, mask=mask_d & present, other=0)
        tl.store(ring_value_ptr + row * HIDDEN_SIZE + offs_d, value, mask=mask_d & live)


def launch_store_conv(ring: ConvSlots, value, scale, mask, cu_seqlens, span: int, restart: bool = False) -> None:
    """One launch; value ``[T, D]`` with dense rows, scale ``[T, H]``; writes the ring's entries in place."""
    batch, capacity = len(ring.slots), ring.value.shape[1]
    longest = len(value) if cu_seqlens is not None else len(value) // max(1, batch)
    num_rows = min(longest, capacity - span)
    if batch * num_rows == 0:
        return
    branches, hidden_size = scale.shape[1], value.shape[1]
    with on_device_of(value):
        store_conv_kernel[(batch * num_rows,)](
            value,
            scale,
            mask,
            cu_seqlens,
            ring.slots,
            ring.cursor,
            ring.value,
            ring.scale,
            value.stride(0),
            longest,
            len(ring.cursor),
            num_rows,
            SPAN=span,
            RING=capacity,
            RESTART=restart,
            NUM_BRANCHES=branches,
            HIDDEN_SIZE=hidden_size,
            BLOCK_H=next_power_of_2(branches),
            BLOCK_D=min(1024, next_power_of_2(hidden_size)),
            num_warps=4,
            enable_fp_fusion=False,
            **dependent_options(),
        )
