"""Gated residual addition.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))
    out  = hidden + gate * value

per token t and branch h, in float32, rounded once. T tokens, H branches, D hidden size. sgn(0) is +1 ("copysign",
DeepSeek-V4.1) or 0 ("sign", the demo and Qwen). Source: arXiv 2601.07372, section 2.3.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels import reference
from engram_kernels.launching.checks import (
    check_bound,
    check_choice,
    check_out,
    check_tensor,
    is_kernel_device,
    processors,
    records_gradient,
)
from engram_kernels.launching.device import on_device_of, warp_size
from engram_kernels.launching.prepared import Prepared, form_of
from engram_kernels.ops.gate_kernels.backward import gate_formula, save_gate
from engram_kernels.ops.gate_kernels.branch import (
    addresses_aligned,
    branch_gate,
    branch_sums,
    flatten_tokens,
    float32_eps,
    gate_config,
    norm_parts,
    row_part,
    row_parts,
    store_part,
    store_scalars,
    strides_aligned,
    token_rows,
    widen,
)

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_BRANCHES, MAX_HIDDEN_SIZE = 8, 16_384
_PREPARED = Prepared()


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
    query_norm_row = query_norm_ptr + branch * HIDDEN_SIZE
    key_norm_row = key_norm_ptr + branch * HIDDEN_SIZE
    norms = norm_parts(query_norm_row, key_norm_row, HIDDEN_SIZE, BLOCK_D, KEEP)
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
            sums = branch_sums(
                hidden_row,
                key_row,
                query_norm_row,
                key_norm_row,
                hidden_parts,
                norms,
                HIDDEN_SIZE,
                BLOCK_D,
                KEEP,
            )
            gate, d, hidden_scale, key_scale = branch_gate(
                sums, hidden_row, key_row, query_norm_row, key_norm_row, eps, clamp, HIDDEN_SIZE, COPYSIGN, BLOCK_D
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


def prepare_gate_residual(hidden, key, value, out, eps, clamp, zero_gate, residual) -> Callable[..., None]:
    """The launch for tensors such as these, of (hidden, key, value, query_norm, key_norm, mask, scalars, out).

    hidden, key and out ``[..., H, D]``, value ``[..., D]``, whose leading dimensions view as one.
    scalars: float32 ``[..., 3, H]`` for the backward pass, or None.
    """
    hidden, key, out = (
        flatten_tokens("gate_residual", name, tensor, 2)
        for name, tensor in (("hidden", hidden), ("key", key), ("out", out))
    )
    value = flatten_tokens("gate_residual", "value", value, 1)
    num_tokens, branches, hidden_size = hidden.shape
    if num_tokens == 0:
        return lambda *_: None
    config = gate_config(hidden_size, num_tokens, branches, processors(hidden.device), warp_size())
    strides = (*hidden.stride()[:2], *key.stride()[:2], value.stride(0), *out.stride()[:2])
    numbers = (*strides, num_tokens, float32_eps(eps), float(clamp))
    numbers += (branches, hidden_size, zero_gate == "copysign", residual)
    aligned = strides_aligned(hidden, key, value, out)
    options = dict(
        BLOCK_D=config.block_d,
        KEEP=config.keep,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        grid=(config.programs * branches,),
        warmup=False,
    )

    def launch(hidden, key, value, query_norm, key_norm, mask, scalars, out):
        pointers = (hidden, key, value, query_norm, key_norm, mask, scalars, out)
        aligned_now = aligned and addresses_aligned(hidden, key, value, out)
        with on_device_of(hidden):
            gate_residual_kernel.run(*pointers, *numbers, ALIGNED=aligned_now, **options)

    return launch


def launch_gate_residual(
    hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual, out, scalars=None
) -> None:
    """One launch, of :func:`prepare_gate_residual`."""
    launch = prepare_gate_residual(hidden, key, value, out, eps, clamp, zero_gate, residual)
    launch(hidden, key, value, query_norm, key_norm, mask, scalars, out)


_SCHEMA = (
    "(Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, float? eps, float clamp, "
    "Tensor? mask, str zero_gate, bool residual)"
)


@torch.library.custom_op("engram::gate_residual", mutates_args=(), schema=f"{_SCHEMA} -> Tensor")
def gate_residual_op(hidden, *options):
    """:func:`gate_residual` for torch.compile."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    launch_gate_residual(hidden, *options, out)
    return out


@gate_residual_op.register_fake
def _(hidden, *options):
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


@torch.library.custom_op(
    "engram::gate_residual_out", mutates_args=("out",), schema=f"{_SCHEMA[:-1]}, Tensor(a!) out) -> ()"
)
def gate_residual_out_op(*arguments):
    """:func:`gate_residual` for torch.compile, into ``out``."""
    launch_gate_residual(*arguments)


@gate_residual_out_op.register_fake
def _(*_):
    return None


@torch.library.custom_op("engram::gate_residual_scalars", mutates_args=(), schema=f"{_SCHEMA} -> (Tensor, Tensor)")
def gate_residual_scalars_op(hidden, *options):
    """:func:`gate_residual` where autograd records it: the same bits, and the scalars that the backward pass reads."""
    out, scalars = make_recorded(hidden)
    launch_gate_residual(hidden, *options, out, scalars)
    return out, scalars


@gate_residual_scalars_op.register_fake
def _(hidden, *options):
    return make_recorded(hidden)


gate_residual_scalars_op.register_autograd(gate_formula, setup_context=save_gate)


def make_recorded(hidden):
    """The output, and the scalars ``[..., 3, H]`` that :func:`store_scalars` writes."""
    *tokens, branches, _ = hidden.shape
    return hidden.new_empty(hidden.shape), hidden.new_empty(*tokens, 3, branches, dtype=torch.float32)


def check_gate(where, hidden, key, value, query_norm, key_norm, *, eps, clamp, mask, zero_gate) -> None:
    """Types, shapes and devices of what a gate reads."""
    check_tensor(where, "hidden", hidden, dtypes=FLOAT_DTYPES, contiguous=False)
    if hidden.dim() not in (3, 4):
        raise ValueError(f"{where}: hidden must have shape [T, H, D] or [B, S, H, D], got {list(hidden.shape)}")
    *tokens, branches, hidden_size = hidden.shape
    if not 1 <= branches <= MAX_BRANCHES or not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(
            f"{where}: hidden must have 1 to {MAX_BRANCHES} branches and a D of at most {MAX_HIDDEN_SIZE}, "
            f"got {list(hidden.shape)}"
        )
    for name, tensor, shape in (("key", key, hidden.shape), ("value", value, (*tokens, hidden_size))):
        check_tensor(where, name, tensor, dtypes=(hidden.dtype,), shape=shape, device=hidden.device, contiguous=False)
    for name, tensor in (("hidden", hidden), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1 and hidden_size > 1:
            raise ValueError(
                f"{where}: the last dimension of {name} must be dense, got strides {list(tensor.stride())}"
            )
    for name, tensor in (("query_norm", query_norm), ("key_norm", key_norm)):
        check_tensor(where, name, tensor, dtypes=FLOAT_DTYPES, shape=(branches, hidden_size), device=hidden.device)
    if mask is not None:
        check_tensor(where, "mask", mask, dtypes=(torch.bool,), shape=tokens, device=hidden.device)
    if eps is not None:
        check_bound(where, "eps", eps)
    check_bound(where, "clamp", clamp)
    check_choice(where, "zero_gate", zero_gate, ("copysign", "sign"))
    if hidden.is_cuda and hidden.dtype == torch.float64:
        raise TypeError(
            f"{where}: hidden must be bfloat16, float16 or float32 on a GPU, float64 is for the CPU; "
            f"got float64 on {hidden.device}"
        )


def check_gate_out(where, hidden, out) -> None:
    """Raise unless ``out`` is None, a contiguous tensor that fits, or ``hidden`` itself."""
    if out is not hidden:
        check_out(where, out, hidden.shape, hidden.dtype, hidden.device)


def gate_residual(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    *,
    eps: float | None,
    clamp: float = 1e-6,
    mask: torch.Tensor | None = None,
    zero_gate: str = "copysign",
    residual: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``hidden + gate * value`` ``[T, H, D]`` (or ``[B, S, H, D]``), in the dtype of hidden.

    hidden, key: ``[T, H, D]``, value ``[T, D]``, of one dtype: bfloat16, float16 or float32 (float64 on the CPU), last
    dimension dense. key and value may be views of one ``kv [T, (H + 1) * D]``.
    query_norm, key_norm: ``[H, D]``, any float dtype, contiguous. eps: of both norms; None is the machine epsilon.
    clamp: below it ``|d|`` counts as clamp, which bounds the slope of the square root.
    mask: bool ``[T]``; where False, key and value are not read and hidden comes back bit for bit.
    zero_gate: "copysign" (a gate at d = 0 counts as positive) or "sign" (it is 0.5).
    residual: False returns ``gate * value`` alone. out: a contiguous tensor, or hidden itself.

    A token's bits depend on its own data, H, D and the dtypes alone: not on the tokens beside it, nor on mask,
    recording, strides, alignment or ``out``, on one kind of device under one version of Triton.
    Gradients come from kernels too (ops/gate_kernels/backward.py), of the first order; a recorded result is copied to
    ``out``. Split kv by ``kv.split``: slices' own backward writes all of kv for each.
    """
    where, compiling = "gate_residual", torch.compiler.is_compiling()
    launch = None
    if not compiling:
        tensors = form_of(hidden, key, value, query_norm, key_norm, mask, out)
        form = (tensors, out is hidden, eps, clamp, zero_gate, residual)
        launch = _PREPARED.launch(form)
    if launch is None:
        check_gate(
            where, hidden, key, value, query_norm, key_norm, eps=eps, clamp=clamp, mask=mask, zero_gate=zero_gate
        )
        check_gate_out(where, hidden, out)
        if not is_kernel_device(hidden) or hidden.dtype == torch.float64:
            options = dict(eps=eps, clamp=clamp, mask=mask, zero_gate=zero_gate, residual=residual, out=out)
            return reference.gate_residual(hidden, key, value, query_norm, key_norm, **options)
    recorded = records_gradient(hidden, key, value, query_norm, key_norm)
    if recorded or compiling:
        arguments = (hidden, key, value, query_norm, key_norm, eps, float(clamp), mask, zero_gate, residual)
        if recorded:
            result, _ = gate_residual_scalars_op(*arguments)
            return result if out is None else out.copy_(result)
        if out is None:
            return gate_residual_op(*arguments)
        gate_residual_out_op(*arguments, out)
        return out
    if out is None:
        # empty_like costs 1 us less, and keeps the strides of what is not contiguous.
        out = torch.empty_like(hidden) if hidden.is_contiguous() else hidden.new_empty(hidden.shape)
    if launch is None:
        launch = _PREPARED.keep(form, prepare_gate_residual(hidden, key, value, out, eps, clamp, zero_gate, residual))
    launch(hidden, key, value, query_norm, key_norm, mask, None, out)
    return out
