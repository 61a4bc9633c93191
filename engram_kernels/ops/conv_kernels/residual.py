"""Second pass of gate_conv_residual: the convolution, and what is added to hidden.

    conv  = sum over taps k of weight[k] * conv_norm * (value * scale)[t - (K-1-k) * dilation]
    out   = hidden + gate * value + silu(conv)

in float32, with gate and scale ``[T, H]`` of the first pass (ops/conv_kernels/scale.py). T tokens, H branches, K taps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2
from engram_kernels.launching.launch import Launch
from engram_kernels.ops.gate_kernels.arguments import row_strides
from engram_kernels.ops.hash_kernels.sequences import find_sequence

from .arguments import ConvCall
from .slots import slot_cursor

FEW_TOKENS = 32  # of as many, one program for all branches leaves multiprocessors idle


@dataclass(frozen=True)
class ConvConfig:
    """Tokens, elements of D and branches per program of the second pass, and its warps."""

    block_t: int
    block_d: int
    branches: int
    num_warps: int


@lru_cache
def conv_config(num_tokens: int, hidden_size: int, branches: int) -> ConvConfig:
    """32 tokens share what a tile reads before its first token (9 at K = 4, dilation 3); decode has few tokens.

    These have a program for each branch too, 160 rather than 40 at H = 4 and D = 2560: branches one after the other
    would wait for memory each in turn. Of many tokens a program takes all branches, which share the values it reads. No
    sum runs over T, D or branches here, so all of it may depend on T without changing a bit.
    """
    block_t, block_d = min(32, max(4, next_power_of_2(num_tokens))), min(64, next_power_of_2(hidden_size))
    return ConvConfig(block_t, block_d, 1 if num_tokens <= FEW_TOKENS else branches, 8 if block_t > 8 else 4)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "conv_residual_kernel": dict(sm_80=(152, 256), sm_90=(160, 256), sm_100=(176, 256), gfx942=(88, 256)),
}


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "search_steps", "seq_len", "num_slots"])
def conv_residual_kernel(
    hidden_ptr,
    value_ptr,
    gate_ptr,
    scale_ptr,
    conv_norm_ptr,
    conv_weight_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    state_value_ptr,
    state_scale_ptr,
    slots_ptr,
    cursor_ptr,
    out_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_value_t,
    stride_weight_h,
    stride_weight_d,
    stride_weight_k,
    stride_out_t,
    stride_out_h,
    num_tokens,
    num_seqs,
    search_steps,
    seq_len,
    num_slots,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BRANCHES: tl.constexpr,
):
    """Second pass: BLOCK_T tokens x BLOCK_D elements of the output, of BRANCHES branches (all or one) in turn.

    Grid (cdiv(T, BLOCK_T) * cdiv(D, BLOCK_D) * (H / BRANCHES),), branches innermost, then D. The K tiles of value come
    from memory for the first branch and from the cache for the others. In place is safe: hidden is read where it is
    written and nowhere else.
    """
    SPAN: tl.constexpr = (NUM_TAPS - 1) * DILATION
    # One dimension of the grid: CUDA ends the others at 65,535, which 2 M tokens would exceed.
    BLOCKS_D: tl.constexpr = (HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D
    block, first_branch = tl.program_id(0), 0
    if BRANCHES < NUM_BRANCHES:
        block, first_branch = block // NUM_BRANCHES, block % NUM_BRANCHES
    token = block // BLOCKS_D * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = block % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t, mask_d = token < num_tokens, offs_d < HIDDEN_SIZE
    mask = mask_t[:, None] & mask_d[None, :]
    follow_predecessor()
    seq, start, padding = find_sequence(token, cu_seqlens_ptr, (num_seqs, search_steps, seq_len))
    token64 = token.to(tl.int64)
    if slots_ptr is not None:
        seq_slot, cursor, known = slot_cursor(seq, mask_t & ~padding, slots_ptr, cursor_ptr, num_slots)
    for branch in range(first_branch, first_branch + BRANCHES):
        branch64 = tl.cast(branch, tl.int64)
        conv_norm = tl.load(conv_norm_ptr + branch * HIDDEN_SIZE + offs_d, mask=mask_d, other=0).to(tl.float32)
        weight_ptr = conv_weight_ptr + branch64 * stride_weight_h + offs_d.to(tl.int64) * stride_weight_d
        conv = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for tap in tl.static_range(NUM_TAPS):
            source = token - (NUM_TAPS - 1 - tap) * DILATION
            inside = mask_t & (source >= start) & (source >= 0)
            if mask_ptr is not None:
                inside = inside & (tl.load(mask_ptr + source, mask=inside, other=0) != 0)
            source64 = source.to(tl.int64)
            scale = tl.load(scale_ptr + source64 * NUM_BRANCHES + branch, mask=inside, other=0)
            value_tile = value_ptr + source64[:, None] * stride_value_t + offs_d[None, :]
            value = tl.load(value_tile, mask=inside[:, None] & mask_d[None, :], other=0).to(tl.float32)
            normed = value * scale[:, None]
            if state_value_ptr is not None and tap < NUM_TAPS - 1:
                slot = seq.to(tl.int64) * SPAN + SPAN + source - start
                before = mask_t & (source < start) & ~padding
                if slots_ptr is not None:
                    position = cursor + source - start
                    before = before & known & (position >= 0)
                    slot = seq_slot * RING + position % RING
                scale = tl.load(state_scale_ptr + slot * NUM_BRANCHES + branch, mask=before, other=0).to(tl.float32)
                state_tile = state_value_ptr + slot[:, None] * HIDDEN_SIZE + offs_d[None, :]
                value = tl.load(state_tile, mask=before[:, None] & mask_d[None, :], other=0).to(tl.float32)
                normed = tl.fma(value, scale[:, None], normed)
            weight = tl.load(weight_ptr + tap * stride_weight_k, mask=mask_d, other=0).to(tl.float32)
            conv = tl.fma(normed, (conv_norm * weight)[None, :], conv)
        gate = tl.load(gate_ptr + token64 * NUM_BRANCHES + branch, mask=mask_t, other=0)
        # The last tap is the token itself, so value is its own here.
        result = tl.fma(gate[:, None], value, conv / (1.0 + tl.exp(-conv)))
        if RESIDUAL:
            hidden_tile = hidden_ptr + token64[:, None] * stride_hidden_t + branch64 * stride_hidden_h + offs_d[None, :]
            hidden = tl.load(hidden_tile, mask=mask, other=0)
            result = (result + hidden.to(tl.float32)).to(out_ptr.dtype.element_ty)
            result = tl.where(padding[:, None], hidden, result)
        else:
            result = tl.where(padding[:, None], 0.0, result).to(out_ptr.dtype.element_ty)
        out_tile = out_ptr + token64[:, None] * stride_out_t + branch64 * stride_out_h + offs_d[None, :]
        tl.store(out_tile, result, mask=mask)


def prepare_conv_residual(call: ConvCall, out: torch.Tensor, sequences: dict) -> Callable[..., None]:
    """The launch for tensors such as these; hidden and out ``[T, H, D]``, value ``[T, D]``, T at least 1.

    It is one of (call, gate, scale, out). sequences: what :func:`sequence_arguments` says of the tokens.
    """
    hidden, value, conv_weight, ring = call.hidden, call.value, call.conv_weight, call.slots
    num_tokens, branches, hidden_size = hidden.shape
    config = conv_config(num_tokens, hidden_size, branches)
    stride_h, stride_d, stride_k = conv_weight.stride()
    options = dict(
        sequences,
        **row_strides(dict(hidden=hidden, value=value, out=out)),
        stride_weight_h=stride_h,
        stride_weight_d=stride_d,
        stride_weight_k=stride_k,
        num_tokens=num_tokens,
        num_slots=0 if ring is None else len(ring.cursor),
        NUM_BRANCHES=branches,
        HIDDEN_SIZE=hidden_size,
        NUM_TAPS=conv_weight.shape[2],
        DILATION=call.dilation,
        RESIDUAL=call.residual,
        RING=0 if ring is None else ring.value.shape[1],
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        BRANCHES=config.branches,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    grid = (cdiv(num_tokens, config.block_t) * cdiv(hidden_size, config.block_d) * (branches // config.branches),)
    start = Launch(conv_residual_kernel, grid, options)

    def launch(call, gate, scale, out):
        ring = call.slots
        if ring is None:
            state = (*(call.state or (None, None)), None, None)
        else:
            state = (ring.value, ring.scale, ring.slots, ring.cursor)
        inputs = (call.hidden, call.value, gate, scale, call.conv_norm, call.conv_weight, call.mask, call.cu_seqlens)
        start(*inputs, *state, out)

    return launch
