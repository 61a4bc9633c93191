"""First pass of gate_conv_residual: what its second pass needs of a token besides the value, two scalars per branch.

    gate   [T, H]   as in ops/gate.py
    scale  [T, H]   gate * rsqrt(mean((gate * value)^2) + conv_eps), so that rms(gate * value) = value * scale

Both float32, zero for masked and padding tokens. T tokens, H branches.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import processors, warp_size
from engram_kernels.launching.sums import ordered_sum
from engram_kernels.ops.gate_kernels.arguments import RowLaunch, float32_eps
from engram_kernels.ops.gate_kernels.branch import (
    branch_gate,
    gate_config,
    norm_parts,
    row_part,
    row_parts,
    store_scalars,
    token_rows,
    widen,
)

from .arguments import ConvCall

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "gate_scale_kernel": dict(sm_80=(168, 64), sm_90=(168, 64), sm_100=(168, 64), gfx942=(168, 64)),
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
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """First pass, tokens p, p + P, and so on, in one branch, of P programs a branch: gates and scales, ``[T, H]``.

    Grid (P * H,), branches innermost. A masked or padding token gets zeros, and its key and value are not read.
    """
    eps, conv_eps, clamp = tl.cast(eps, tl.float32), tl.cast(conv_eps, tl.float32), tl.cast(clamp, tl.float32)
    branch = (tl.program_id(0) % NUM_BRANCHES).to(tl.int64)
    norm_rows = (query_norm_ptr + branch * HIDDEN_SIZE, key_norm_ptr + branch * HIDDEN_SIZE)
    follow_predecessor()
    norms = norm_parts(norm_rows, HIDDEN_SIZE, BLOCK_D, KEEP)
    end = num_tokens
    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + num_seqs)
    for index in range(tl.program_id(0) // NUM_BRANCHES, num_tokens, tl.num_programs(0) // NUM_BRANCHES):
        token = tl.cast(index, tl.int64)
        offs_out = token * NUM_BRANCHES + branch
        live = index < end
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + token) != 0)
        if live:
            hidden_row = token_rows(hidden_ptr, token, branch, stride_hidden_t, stride_hidden_h, ALIGNED)
            key_row = token_rows(key_ptr, token, branch, stride_key_t, stride_key_h, ALIGNED)
            value_row = token_rows(value_ptr, token, 0, stride_value_t, 0, ALIGNED)
            gate, d, hidden_scale, key_scale = branch_gate(
                (hidden_row, key_row),
                norm_rows,
                row_parts(hidden_row, HIDDEN_SIZE, BLOCK_D, KEEP),
                norms,
                eps,
                clamp,
                HIDDEN_SIZE,
                COPYSIGN,
                BLOCK_D,
                KEEP,
            )
            square = tl.zeros([BLOCK_D], tl.float32)
            for begin in range(0, HIDDEN_SIZE, BLOCK_D):
                value = widen(row_part(value_row, begin, HIDDEN_SIZE, BLOCK_D))
                square = tl.fma(value, value, square)
            MEAN: tl.constexpr = 1.0 / HIDDEN_SIZE
            # A gate of 0 has a value of 0, also where the squares of value exceed float32.
            mean = tl.where(gate == 0, 0.0, gate * gate * (ordered_sum(square, 0) * MEAN))
            tl.store(gate_ptr + offs_out, gate)
            tl.store(scale_ptr + offs_out, gate * tl.rsqrt(mean + conv_eps))
            if scalars_ptr is not None:
                store_scalars(scalars_ptr, token, branch, d, hidden_scale, key_scale, NUM_BRANCHES)
        else:
            tl.store(gate_ptr + offs_out, 0.0)
            tl.store(scale_ptr + offs_out, 0.0)
            if scalars_ptr is not None:
                store_scalars(scalars_ptr, token, branch, 0.0, 0.0, 0.0, NUM_BRANCHES)


def prepare_gate_scale(call: ConvCall, num_seqs: int) -> Callable[..., None]:
    """The launch for tensors such as these; hidden and key ``[T, H, D]``, value ``[T, D]``, T at least 1.

    It is one of (call, gate, scale, scalars), and writes gate and scale ``[T, H]``, and ``scalars [T, 3, H]`` for the
    backward pass where they are not None.
    """
    hidden, key, value = call[:3]
    num_tokens, branches, hidden_size = hidden.shape
    config = gate_config(hidden_size, num_tokens, branches, processors(hidden.device), warp_size())
    options = dict(
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        eps=float32_eps(call.eps),
        conv_eps=float32_eps(call.conv_eps),
        clamp=float(call.clamp),
        NUM_BRANCHES=branches,
        HIDDEN_SIZE=hidden_size,
        COPYSIGN=call.zero_gate == "copysign",
        BLOCK_D=config.block_d,
        KEEP=config.keep,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    rows = dict(hidden=hidden, key=key, value=value)
    start = RowLaunch(gate_scale_kernel, (config.programs * branches,), options, rows)

    def launch(call, gate, scale, scalars):
        start(*call[:5], call.mask, call.cu_seqlens, scalars, gate, scale)

    return launch
