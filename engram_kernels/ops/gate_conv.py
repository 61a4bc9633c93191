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
from typing import overload

import torch

from engram_kernels import reference
from engram_kernels.geometry.choices import ConvState, ZeroGate
from engram_kernels.geometry.kinds import declares
from engram_kernels.launching.checks import records_gradient
from engram_kernels.launching.device import is_kernel_device, on_device_of
from engram_kernels.launching.ranges import ranged
from engram_kernels.launching.tokens import check_ends

from .call import Op, empty_of, form_of, registered, writes_alone
from .conv_kernels.arguments import CONV_KINDS, ConvCall, check_conv
from .conv_kernels.backward import gate_conv_formula, save_gate_conv
from .conv_kernels.residual import prepare_conv_residual
from .conv_kernels.scale import prepare_gate_scale
from .conv_kernels.slots import ConvSlots, launch_store_conv
from .conv_kernels.state import launch_advance_state
from .gate_kernels.arguments import check_gate, flatten_tokens
from .gate_kernels.gradients import make_recorded
from .hash_kernels.sequences import sequence_arguments


def prepare_gate_conv_residual(call: ConvCall, out: torch.Tensor) -> Callable[..., None]:
    """The launches for tensors such as these: two, and a third where there is a state.

    They are of (call, out, new_state, recorded). Leading dimensions of hidden, key, value and out view as one.
    new_state: (value, scale), to be written from a dense state; slots are written by the third launch.
    recorded: gate, scale ``[..., H]`` and scalars ``[..., 3, H]``, all float32, for the backward pass.
    """
    where, shape, span = "gate_conv_residual", call.hidden.shape[:-2], call.span
    gate_call = call.of_gate.flattened(where)
    flat = call._replace(hidden=gate_call.hidden, key=gate_call.key, value=gate_call.value)
    num_tokens, branches, _ = flat.hidden.shape
    sequences = sequence_arguments(shape, call.cu_seqlens)
    if num_tokens:
        launch_scale = prepare_gate_scale(flat, sequences["num_seqs"])
        launch_residual = prepare_conv_residual(flat, flatten_tokens(where, "out", out, 2), sequences)

    def launch(call, out, new_state=None, recorded=None):
        if recorded is None:
            # Two tensors: halves of one would be aligned for some T and not for others, each a variant of the kernels.
            gate = torch.empty((num_tokens, branches), dtype=torch.float32, device=out.device)
            recorded = gate, torch.empty_like(gate), None
        gate, scale, scalars = recorded
        with on_device_of(out):
            if num_tokens:
                launch_scale(call, gate, scale, scalars)
                launch_residual(call, gate, scale, out)
            if call.state is not None:
                value, tokens = flatten_tokens(where, "value", call.value, 1), (call.mask, call.cu_seqlens)
                if call.slots is not None:
                    launch_store_conv(call.state, value, scale, *tokens, span)
                else:
                    launch_advance_state(value, scale, *tokens, shape, span, call.state, new_state)

    return launch


class GateConv(Op):
    """:func:`gate_conv_residual`."""

    name = "gate_conv_residual"
    input_names = (*ConvCall._fields[:7], "mask", "cu_seqlens", *("conv_state",) * len(ConvSlots._fields))
    in_place = "hidden"

    def signature(self, call, out):
        if call.state is not call.slots:  # a dense state is another one in every call
            return None
        form = form_of(*call[:7], call.mask, call.cu_seqlens, out, *(call.state or ()))
        return form, out is call.hidden, *call[7:11], call.zero_gate, call.residual

    def check(self, call, out):
        check_gate(self.name, call.of_gate, out)
        check_conv(self.name, call)

    def inputs(self, call):
        state = tuple(call.state or ())
        return *call[:7], call.mask, call.cu_seqlens, *state, *(None,) * (len(ConvSlots._fields) - len(state))

    def repeats(self, call):
        if call.cu_seqlens is not None:
            check_ends(self.name, call.cu_seqlens, call.hidden.shape[0])
        return not self.records(call)

    def on_kernels(self, call):
        return is_kernel_device(call.hidden) and call.hidden.dtype != torch.float64

    def records(self, call):
        return records_gradient(*call[:7]) and self.on_kernels(call)

    def record(self, call, out):
        if call.state is not None:
            return self.reference(call, out)
        result, *_ = gate_conv_residual_scalars_op(*call.arguments)
        return result if out is None else out.copy_(result)

    def reference(self, call, out):
        eps, conv_eps = (None if each is None else float(each) for each in (call.eps, call.conv_eps))
        options = dict(dilation=call.dilation, eps=eps, conv_eps=conv_eps, clamp=float(call.clamp), mask=call.mask)
        options |= dict(zero_gate=call.zero_gate, residual=call.residual, cu_seqlens=call.cu_seqlens)
        return reference.gate_conv_residual(*call[:7], **options, conv_state=call.state, out=out)

    def compiled(self, call, out):
        ring, state = call.slots, (None, None) if call.state is call.slots else call.state
        new_state = ()
        if out is not None:
            _, *new_state = results = _results(call, out)
            gate_conv_residual_out_op(*call.arguments, *state, *results, *(ring or (None,) * 4))
        elif ring is not None:
            out = gate_conv_residual_slots_op(*call.arguments, *ring)
        else:
            out, *new_state = gate_conv_residual_op(*call.arguments, *state)
        return _with_state(call, out, new_state)

    def allocate(self, call):
        return torch.empty_like(call.hidden, memory_format=torch.contiguous_format)

    def launcher(self, call, out):
        return prepare_gate_conv_residual(call, empty_of(call.hidden) if out is None else out)

    def prepare(self, call, out):
        launch = self.launcher(call, out)

        def run(call, out):
            out, *new_state = _results(call, out)
            launch(call, out, new_state)
            return _with_state(call, out, new_state)

        return run


GATE_CONV = GateConv()


def _results(call: ConvCall, out):
    """The output (``out`` where it is given) and a new dense state (None, None where there is none)."""
    if out is None:
        out = GATE_CONV.allocate(call)
    if call.state is call.slots:
        return out, None, None
    return out, *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in call.state)


def _with_state(call: ConvCall, out, new_state):
    """What the caller sees: the output, and the state after these tokens where there was one before them."""
    if call.state is None:
        return out
    return out, tuple(new_state) if call.slots is None else call.state


_SCHEMA = (
    "(Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, Tensor conv_norm, "
    "Tensor conv_weight, int dilation, float? eps, float? conv_eps, float clamp, Tensor? mask, str zero_gate, "
    "bool residual, Tensor? cu_seqlens"
)
_STATE = "Tensor? state_value, Tensor? state_scale"


def _dense_call(arguments) -> ConvCall:
    """The call of a registered op that ends with a dense state, or with None for both of its parts."""
    *arguments, value, scale = arguments
    return ConvCall(*arguments, None if value is None else (value, scale))


def _new_results(*arguments):
    return [result for result in _results(_dense_call(arguments), None) if result is not None]


@registered("gate_conv_residual", f"{_SCHEMA}, {_STATE}) -> Tensor[]", _new_results)
def gate_conv_residual_op(*arguments):
    """:func:`gate_conv_residual` for torch.compile: [out], or [out, new value, new scale] where there is a state."""
    call = _dense_call(arguments)
    out, *new_state = results = _results(call, None)
    ranged(GATE_CONV.name, prepare_gate_conv_residual(call, out))(call, out, new_state)
    return [result for result in results if result is not None]


@registered(
    "gate_conv_residual_slots",
    f"{_SCHEMA}, Tensor(a!) ring_value, Tensor(b!) ring_scale, Tensor cursor, Tensor slots) -> Tensor",
    lambda *arguments: GATE_CONV.allocate(ConvCall(*arguments[:-4])),
)
def gate_conv_residual_slots_op(*arguments):
    """:func:`gate_conv_residual` for torch.compile where the state lies in slots."""
    return GATE_CONV.launch(ConvCall(*arguments[:-4], ConvSlots(*arguments[-4:])))[0]


@registered(
    "gate_conv_residual_out",
    f"{_SCHEMA}, {_STATE}, Tensor(a!) out, Tensor(b!)? new_value, Tensor(c!)? new_scale, "
    "Tensor(d!)? ring_value, Tensor(e!)? ring_scale, Tensor? cursor, Tensor? slots) -> ()",
    writes_alone,
)
def gate_conv_residual_out_op(*arguments):
    """:func:`gate_conv_residual` for torch.compile, into ``out``, with a dense state, slots or neither."""
    *arguments, out, new_value, new_scale, ring_value, ring_scale, cursor, slots = arguments
    call = _dense_call(arguments)
    if ring_value is not None:
        call = call._replace(state=ConvSlots(ring_value, ring_scale, cursor, slots))
    ranged(GATE_CONV.name, prepare_gate_conv_residual(call, out))(call, out, (new_value, new_scale))


@registered(
    "gate_conv_residual_scalars",
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, *_: make_conv_recorded(hidden),
    gate_conv_formula,
    save_gate_conv,
)
def gate_conv_residual_scalars_op(*arguments):
    """:func:`gate_conv_residual` where autograd records it: the same bits, and what the backward pass reads."""
    call = ConvCall(*arguments)
    out, *recorded = make_conv_recorded(call.hidden)
    ranged(GATE_CONV.name, prepare_gate_conv_residual(call, out))(call, out, None, recorded)
    return out, *recorded


def make_conv_recorded(hidden):
    """The output, gate and scale ``[..., H]``, and the scalars ``[..., 3, H]`` of both norms."""
    out, scalars = make_recorded(hidden)
    return out, *(hidden.new_empty(hidden.shape[:-1], dtype=torch.float32) for _ in range(2)), scalars


@overload
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
    zero_gate: ZeroGate = "copysign",
    residual: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
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
    zero_gate: ZeroGate = "copysign",
    residual: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: ConvState,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ConvState]: ...


@overload
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
    zero_gate: ZeroGate = "copysign",
    residual: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: ConvSlots,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ConvSlots]: ...


@declares(**CONV_KINDS)
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
    zero_gate: ZeroGate = "copysign",
    residual: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: ConvState | ConvSlots | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ConvState | ConvSlots]:
    """``hidden + v + silu(conv(rms(v) * conv_norm))`` ``[T, H, D]`` (or ``[B, S, H, D]``) with ``v = gate * value``.

    hidden, key: ``[T, H, D]``, value ``[T, D]``, of one dtype: bfloat16, float16 or float32 (float64 on the CPU).
    query_norm, key_norm, conv_norm: ``[H, D]``, any float dtype, contiguous.
    conv_weight: ``[H, D, K]``, any strides; tap K-1 is the current token.
    dilation: tokens between two taps.
    eps, conv_eps: of the norms of query and key, and of the one before the convolution; None is the machine epsilon.
    clamp: below it ``|d|`` counts as clamp. zero_gate: "copysign" (a gate at d = 0 counts as positive) or "sign" (0.5).
    mask: bool ``[T]``; where False v is 0, and the convolution of the tokens around it still applies.
    residual: False leaves hidden out of the sum. out: a contiguous tensor, or hidden itself.
    cu_seqlens: int32 ``[B + 1]``, starts of packed sequences and the end; padding tokens come back as hidden.
    conv_state: (value ``[B, (K-1) * dilation, D]`` in hidden's dtype, scale ``[B, (K-1) * dilation, H]`` float32),
    oldest first, zeros before a sequence's start. It is not written; with it the result is (out, new state). Or the
    slots of an :class:`EngramState`, which come back as they are: these tokens are written to them, and count once they
    are committed.

    Gradients come from kernels too (ops/conv_kernels/backward.py), but with conv_state from the reference, as does the
    output. ValueError where shapes, dtypes or devices do not fit, or ``out`` overlaps an input but hidden itself.
    """
    tensors = (hidden, key, value, query_norm, key_norm, conv_norm, conv_weight)
    options = (dilation, eps, conv_eps, clamp, mask, zero_gate, residual, cu_seqlens, conv_state)
    return GATE_CONV(ConvCall(*tensors, *options), out)
