"""Gated residual addition with a short convolution, the paper's form.

    v   = gate * value                                              (gate as in ops/gate.py)
    out = hidden + v + silu(conv(rms(v) * conv_norm))

conv is depthwise over tokens, causal, of K taps ``dilation`` tokens apart; tap K-1 is the current token. It never
crosses a sequence. T tokens, B sequences, H branches, D hidden size. Source: arXiv 2601.07372, section 2.3.

Since v = gate * value, ``rms(v)`` is ``value * scale`` with one scalar ``scale = gate * rsqrt(mean(v^2) + conv_eps)``
per token and branch. So two passes do: one finds gate and scale ``[T, H]``, the other reads value and these scalars.
Nothing ``[T, H, D]`` but the output is written, 18 D elements a token move at H = 4 (9 D in each pass), and the state
of a sequence is ``value`` and ``scale`` of its last (K-1) * dilation tokens.
"""

from collections.abc import Callable

import torch

from engram_kernels import reference
from engram_kernels.launching.checks import check_ends, is_kernel_device, records_gradient
from engram_kernels.launching.device import on_device_of
from engram_kernels.launching.prepared import Prepared, form_of
from engram_kernels.ops.conv_kernels.backward import gate_conv_formula, save_gate_conv
from engram_kernels.ops.conv_kernels.residual import prepare_conv_residual
from engram_kernels.ops.conv_kernels.scale import prepare_gate_scale
from engram_kernels.ops.conv_kernels.slots import ConvSlots, launch_store_conv
from engram_kernels.ops.conv_kernels.state import check_conv, launch_advance_state
from engram_kernels.ops.gate_kernels.branch import flatten_tokens
from engram_kernels.ops.hash_kernels.sequences import sequence_arguments

from .gate import check_gate, check_gate_out, make_recorded

_PREPARED = Prepared()


def prepare_gate_conv_residual(
    tensors, dilation, eps, conv_eps, clamp, zero_gate, residual, cu_seqlens, state, out
) -> Callable[..., None]:
    """The launches for tensors such as these, hidden to conv_weight: two, and a third where there is a state.

    They are of (tensors, mask, cu_seqlens, state, out), new_state and recorded. Tokens ``[T]`` or ``[B, S]`` whose
    dimensions view as one.
    state: None, (value, scale), from which new_state comes, or slots, which the third launch writes to.
    recorded: gate, scale ``[..., H]`` and scalars ``[..., 3, H]``, all float32, for the backward pass.
    """
    where, (hidden, key, value, _, _, _, conv_weight) = "gate_conv_residual", tensors
    shape, span = hidden.shape[:-2], (conv_weight.shape[2] - 1) * dilation
    hidden, key, out = (
        flatten_tokens(where, name, tensor, 2) for name, tensor in (("hidden", hidden), ("key", key), ("out", out))
    )
    value = flatten_tokens(where, "value", value, 1)
    num_tokens, branches, _ = hidden.shape
    sequences, in_slots = sequence_arguments(shape, cu_seqlens), isinstance(state, ConvSlots)
    if num_tokens:
        options = (eps, conv_eps, clamp, zero_gate, sequences["num_seqs"])
        launch_scale = prepare_gate_scale(hidden, key, value, *options)
        options = (dilation, residual, sequences, state if in_slots else None)
        launch_residual = prepare_conv_residual(hidden, value, conv_weight, out, *options)

    def launch(tensors, mask, cu_seqlens, state, out, new_state=None, recorded=None):
        hidden, key, value, query_norm, key_norm, conv_norm, conv_weight = tensors
        if recorded is None:
            # Two tensors: halves of one would be aligned for some T and not for others, each a variant of the kernels.
            gate = torch.empty((num_tokens, branches), dtype=torch.float32, device=hidden.device)
            recorded = gate, torch.empty_like(gate), None
        gate, scale, scalars = recorded
        if in_slots:
            parts = (state.value, state.scale, state.slots, state.cursor)
        else:
            parts = (*(state or (None, None)), None, None)
        with on_device_of(hidden):
            if num_tokens:
                launch_scale(hidden, key, value, query_norm, key_norm, mask, cu_seqlens, scalars, gate, scale)
                launch_residual(hidden, value, gate, scale, conv_norm, conv_weight, mask, cu_seqlens, *parts, out)
            if in_slots:
                launch_store_conv(state, flatten_tokens(where, "value", value, 1), scale, mask, cu_seqlens, span)
            elif state is not None:
                rows = flatten_tokens(where, "value", value, 1)
                launch_advance_state(rows, scale, mask, cu_seqlens, shape, span, state, new_state)

    return launch


def launch_gate_conv_residual(
    hidden,
    key,
    value,
    query_norm,
    key_norm,
    conv_norm,
    conv_weight,
    dilation,
    eps,
    conv_eps,
    clamp,
    mask,
    zero_gate,
    residual,
    cu_seqlens,
    state_value,
    state_scale,
    out,
    new_value,
    new_scale,
    recorded=None,
    ring: ConvSlots | None = None,
) -> None:
    """What :func:`prepare_gate_conv_residual` launches. ring: the state by slot, in place of the others."""
    tensors = (hidden, key, value, query_norm, key_norm, conv_norm, conv_weight)
    state = ring if state_value is None else (state_value, state_scale)
    options = (dilation, eps, conv_eps, clamp, zero_gate, residual, cu_seqlens, state, out)
    launch = prepare_gate_conv_residual(tensors, *options)
    launch(tensors, mask, cu_seqlens, state, out, (new_value, new_scale), recorded)


_SCHEMA = (
    "(Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, Tensor conv_norm, "
    "Tensor conv_weight, int dilation, float? eps, float? conv_eps, float clamp, Tensor? mask, str zero_gate, "
    "bool residual, Tensor? cu_seqlens"
)
_STATE = "Tensor? state_value, Tensor? state_scale"


@torch.library.custom_op("engram::gate_conv_residual", mutates_args=(), schema=f"{_SCHEMA}, {_STATE}) -> Tensor[]")
def gate_conv_residual_op(hidden, *options):
    """:func:`gate_conv_residual` for torch.compile: [out], or [out, new value, new scale] where there is a state."""
    results = make_conv_out(hidden, *options[-2:])
    launch_gate_conv_residual(hidden, *options, *results)
    return [result for result in results if result is not None]


@gate_conv_residual_op.register_fake
def _(hidden, *options):
    return [result for result in make_conv_out(hidden, *options[-2:]) if result is not None]


@torch.library.custom_op(
    "engram::gate_conv_residual_slots",
    mutates_args=("ring_value", "ring_scale"),
    schema=f"{_SCHEMA}, Tensor(a!) ring_value, Tensor(b!) ring_scale, Tensor cursor, Tensor slots) -> Tensor",
)
def gate_conv_residual_slots_op(hidden, *options):
    """:func:`gate_conv_residual` for torch.compile where the state lies in slots."""
    out, *_ = make_conv_out(hidden, None, None)
    ring = ConvSlots(*options[-4:])
    launch_gate_conv_residual(hidden, *options[:-4], None, None, out, None, None, ring=ring)
    return out


@gate_conv_residual_slots_op.register_fake
def _(hidden, *options):
    return make_conv_out(hidden, None, None)[0]


@torch.library.custom_op(
    "engram::gate_conv_residual_out",
    mutates_args=("out", "new_value", "new_scale", "ring_value", "ring_scale"),
    schema=f"{_SCHEMA}, {_STATE}, Tensor(a!) out, Tensor(b!)? new_value, Tensor(c!)? new_scale, "
    "Tensor(d!)? ring_value, Tensor(e!)? ring_scale, Tensor? cursor, Tensor? slots) -> ()",
)
def gate_conv_residual_out_op(*arguments):
    """:func:`gate_conv_residual` for torch.compile, into ``out``, with a dense state, slots or neither."""
    *arguments, ring_value, ring_scale, cursor, slots = arguments
    ring = None if ring_value is None else ConvSlots(ring_value, ring_scale, cursor, slots)
    launch_gate_conv_residual(*arguments, ring=ring)


@gate_conv_residual_out_op.register_fake
def _(*_):
    return None


@torch.library.custom_op(
    "engram::gate_conv_residual_scalars",
    mutates_args=(),
    schema=f"{_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def gate_conv_residual_scalars_op(hidden, *options):
    """:func:`gate_conv_residual` where autograd records it: the same bits, and what the backward pass reads."""
    out, *recorded = make_conv_recorded(hidden)
    launch_gate_conv_residual(hidden, *options, None, None, out, None, None, recorded)
    return out, *recorded


@gate_conv_residual_scalars_op.register_fake
def _(hidden, *options):
    return make_conv_recorded(hidden)


gate_conv_residual_scalars_op.register_autograd(gate_conv_formula, setup_context=save_gate_conv)


def make_conv_recorded(hidden):
    """The output, gate and scale ``[..., H]``, and the scalars ``[..., 3, H]`` of both norms."""
    out, scalars = make_recorded(hidden)
    return out, *(hidden.new_empty(hidden.shape[:-1], dtype=torch.float32) for _ in range(2)), scalars


def make_conv_out(hidden, state_value, state_scale, out=None):
    """The output (``out`` where it is given) and the new state (None, None where there is none)."""
    if out is None:
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if state_value is None:
        return out, None, None
    return out, *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (state_value, state_scale))


def gate_conv_residual(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    conv_norm: torch.Tensor,
    conv_weight: torch.Tensor,
    *,
    dilation: int,
    eps: float | None,
    conv_eps: float | None,
    clamp: float = 1e-6,
    mask: torch.Tensor | None = None,
    zero_gate: str = "copysign",
    residual: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: tuple[torch.Tensor, torch.Tensor] | ConvSlots | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """``hidden + v + silu(conv(rms(v) * conv_norm))`` ``[T, H, D]`` (or ``[B, S, H, D]``) with ``v = gate * value``.

    hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual and out are those of
    :func:`gate_residual`; where mask is False v is 0, and the convolution of the tokens around it still applies.
    conv_norm: ``[H, D]``, contiguous. conv_weight: ``[H, D, K]``, any strides; tap K-1 is the current token.
    conv_eps: of the norm before the convolution; None is the machine epsilon.
    cu_seqlens: as for :func:`ngram_hash`; padding tokens come back as hidden.
    conv_state: (value ``[B, (K-1) * dilation, D]`` in hidden's dtype, scale ``[B, (K-1) * dilation, H]`` float32),
    oldest first, zeros before a sequence's start. It is not written; with it the result is (out, new state). Or the
    slots of an :class:`EngramState`, which come back as they are: these tokens are written to them, and count once they
    are committed.

    Gradients come from kernels too (ops/conv_kernels/backward.py), but with conv_state from the reference, as does the
    output.
    """
    where, compiling, launch = "gate_conv_residual", torch.compiler.is_compiling(), None
    tensors = (hidden, key, value, query_norm, key_norm, conv_norm, conv_weight)
    ring = conv_state if isinstance(conv_state, ConvSlots) else None
    if not compiling and conv_state is ring:
        form = (form_of(*tensors, mask, cu_seqlens, out, *(ring or ())), out is hidden)
        form += (dilation, eps, conv_eps, clamp, zero_gate, residual)
        launch = _PREPARED.launch(form)
    if launch is None:
        options = dict(eps=eps, clamp=clamp, mask=mask, zero_gate=zero_gate)
        check_gate(where, hidden, key, value, query_norm, key_norm, **options)
        check_conv(where, hidden, conv_norm, conv_weight, dilation, conv_eps, cu_seqlens, conv_state)
        check_gate_out(where, hidden, out)
    elif cu_seqlens is not None:
        check_ends(where, cu_seqlens, hidden.shape[0])
    recorded = records_gradient(*tensors)
    on_reference = launch is None and (not is_kernel_device(hidden) or hidden.dtype == torch.float64)
    if on_reference or (recorded and conv_state is not None):
        options = dict(dilation=dilation, eps=eps, conv_eps=conv_eps, clamp=clamp, mask=mask, zero_gate=zero_gate)
        options |= dict(residual=residual, cu_seqlens=cu_seqlens, conv_state=conv_state, out=out)
        return reference.gate_conv_residual(*tensors, **options)
    state = (None, None) if conv_state is None or ring is not None else conv_state
    if recorded or compiling:
        options = (dilation, eps, conv_eps, float(clamp), mask, zero_gate, residual, cu_seqlens)
        if recorded:
            result, *_ = gate_conv_residual_scalars_op(*tensors, *options)
            return result if out is None else out.copy_(result)
        if out is not None:
            _, *new_state = results = make_conv_out(hidden, *state, out)
            gate_conv_residual_out_op(*tensors, *options, *state, *results, *(ring or (None,) * 4))
        elif ring is not None:
            out = gate_conv_residual_slots_op(*tensors, *options, *ring)
        else:
            out, *new_state = gate_conv_residual_op(*tensors, *options, *state)
    else:
        out, *new_state = make_conv_out(hidden, *state, out)
        if launch is None:
            options = (dilation, eps, conv_eps, clamp, zero_gate, residual, cu_seqlens, conv_state, out)
            launch = prepare_gate_conv_residual(tensors, *options)
            if conv_state is ring:
                _PREPARED.keep(form, launch)
        launch(tensors, mask, cu_seqlens, conv_state, out, new_state)
    return out if conv_state is None else (out, tuple(new_state) if ring is None else ring)
