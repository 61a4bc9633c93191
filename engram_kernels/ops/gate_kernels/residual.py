"""The kernel of gate_residual. Formula and symbols: ops/gate.py."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import on_device_of, processors, warp_size

from .arguments import GateCall, RowLaunch, flatten_tokens, float32_eps
from .branch import (
    branch_gate,
    gate_config,
    norm_parts,
    row_part,
    row_parts,
    store_part,
    store_scalars,
    token_rows,
    widen,
)

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "gate_residual_kernel": dict(sm_80=(168, 64), sm_90=(168, 64), sm_100=(168, 64), gfx942=(168, 64)),
}


@triton.jit
def store_gated(
    out_row,
    value_row,
    hidden,
    gate,
    begin,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """A part of the output from ``begin``, of which ``hidden`` is the part of hidden."""
    value = widen(row_part(value_row, begin, HIDDEN_SIZE, BLOCK_D))
    if RESIDUAL:
        result = tl.fma(gate, value, widen(hidden))
    else:
        result = gate * value
    store_part(out_row, begin, result, HIDDEN_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_residual_kernel(
    hidden_ptr,
    key_ptr,
    value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    mask_ptr,
    scalars_ptr,
    out_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_out_t,
    stride_out_h,
    num_tokens,
    eps,
    clamp,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Tokens p, p + P, and so on, in one branch, of P programs a branch: the gate, then ``hidden + gate * value``.

    Grid (P * H,), branches innermost, which find value in the cache. Relies on a dense last dimension.
    In place is safe: a row is read by the program that writes it alone, and summed before the first store.
    """
    eps, clamp = tl.cast(eps, tl.float32), tl.cast(clamp, tl.float32)
    branch = (tl.program_id(0) % NUM_BRANCHES).to(tl.int64)
    norm_rows = (query_norm_ptr + branch * HIDDEN_SIZE, key_norm_ptr + branch * HIDDEN_SIZE)
    follow_predecessor()
    norms = norm_parts(norm_rows, HIDDEN_SIZE, BLOCK_D, KEEP)
    for index in range(tl.program_id(0) // NUM_BRANCHES, num_tokens, tl.num_programs(0) // NUM_BRANCHES):
        token = tl.cast(index, tl.int64)
        hidden_row = token_rows(hidden_ptr, token, branch, stride_hidden_t, stride_hidden_h, ALIGNED)
        out_row = token_rows(out_ptr, token, branch, stride_out_t, stride_out_h, ALIGNED)
        if mask_ptr is None:
            live: tl.constexpr = True
        else:
            live = tl.load(mask_ptr + token) != 0
        if live:
            hidden_parts = row_parts(hidden_row, HIDDEN_SIZE, BLOCK_D, KEEP)
            key_row = token_rows(key_ptr, token, branch, stride_key_t, stride_key_h, ALIGNED)
            value_row = token_rows(value_ptr, token, 0, stride_value_t, 0, ALIGNED)
            gate, d, hidden_scale, key_scale = branch_gate(
                (hidden_row, key_row),
                norm_rows,
                hidden_parts,
                norms,
                eps,
                clamp,
                HIDDEN_SIZE,
                COPYSIGN,
                BLOCK_D,
                KEEP,
            )
            if scalars_ptr is not None:
                store_scalars(scalars_ptr, token, branch, d, hidden_scale, key_scale, NUM_BRANCHES)
            if KEEP:
                for part in tl.static_range((HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D):
                    store_gated(
                        out_row, value_row, hidden_parts[part], gate, part * BLOCK_D, HIDDEN_SIZE, BLOCK_D, RESIDUAL
                    )
            else:
                for begin in range(0, HIDDEN_SIZE, BLOCK_D):
                    hidden = row_part(hidden_row, begin, HIDDEN_SIZE, BLOCK_D)
                    store_gated(out_row, value_row, hidden, gate, begin, HIDDEN_SIZE, BLOCK_D, RESIDUAL)
        else:
            if scalars_ptr is not None:
                store_scalars(scalars_ptr, token, branch, 0.0, 0.0, 0.0, NUM_BRANCHES)
            for begin in range(0, HIDDEN_SIZE, BLOCK_D):
                # A masked token keeps its bits: -0.0 + 0.0 would not.
                if RESIDUAL:
                    unchanged = row_part(hidden_row, begin, HIDDEN_SIZE, BLOCK_D)
                else:
                    unchanged = tl.zeros([BLOCK_D], tl.float32)
                store_part(out_row, begin, unchanged, HIDDEN_SIZE, BLOCK_D)


def prepare_gate_residual(call: GateCall, out: torch.Tensor) -> Callable[..., None]:
    """The launch for tensors such as these, of (call, out, scalars).

    Leading dimensions of hidden, key, value and out view as one. scalars: float32 ``[..., 3, H]`` for the backward
    pass, or None.
    """
    where = "gate_residual"
    hidden, key, value, *_ = call.flattened(where)
    out = flatten_tokens(where, "out", out, 2)
    num_tokens, branches, hidden_size = hidden.shape
    if num_tokens == 0:
        return lambda *_: None
    config = gate_config(hidden_size, num_tokens, branches, processors(hidden.device), warp_size())
    options = dict(
        num_tokens=num_tokens,
        eps=float32_eps(call.eps),
        clamp=float(call.clamp),
        NUM_BRANCHES=branches,
        HIDDEN_SIZE=hidden_size,
        COPYSIGN=call.zero_gate == "copysign",
        RESIDUAL=call.residual,
        BLOCK_D=config.block_d,
        KEEP=config.keep,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    rows = dict(hidden=hidden, key=key, value=value, out=out)
    start = RowLaunch(gate_residual_kernel, (config.programs * branches,), options, rows)

    def launch(call, out, scalars=None):
        hidden, key, value, query_norm, key_norm, _, _, mask, _, _ = call
        with on_device_of(hidden):
            start(hidden, key, value, query_norm, key_norm, mask, scalars, out)

    return launch
