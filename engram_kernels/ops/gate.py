"""Gated residual addition.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))
    out  = hidden + gate * value

per token t and branch h, in float32, rounded once. T tokens, H branches, D hidden size. sgn(0) is +1 ("copysign",
DeepSeek-V4.1) or 0 ("sign", the demo and Qwen). Source: arXiv 2601.07372, section 2.3.
"""

import torch

from engram_kernels import reference
from engram_kernels.geometry.choices import ZeroGate
from engram_kernels.geometry.kinds import declares
from engram_kernels.launching.checks import records_gradient
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.launching.ranges import ranged

from .call import Op, empty_of, form_of, registered, writes_alone
from .gate_kernels.arguments import GATE_KINDS, GateCall, check_gate
from .gate_kernels.backward import gate_formula, save_gate
from .gate_kernels.gradients import make_recorded
from .gate_kernels.residual import prepare_gate_residual


class Gate(Op):
    """:func:`gate_residual`."""

    name = "gate_residual"
    input_names = ("hidden", "key", "value", "query_norm", "key_norm", "mask")
    in_place = "hidden"

    def signature(self, call, out):
        hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual = call
        form = form_of(hidden, key, value, query_norm, key_norm, mask, out)
        return form, out is hidden, eps, clamp, zero_gate, residual

    def check(self, call, out):
        check_gate(self.name, call, out)

    def inputs(self, call):
        return *call[:5], call.mask

    def on_kernels(self, call):
        return is_kernel_device(call.hidden) and call.hidden.dtype != torch.float64

    def records(self, call):
        return records_gradient(*call[:5]) and self.on_kernels(call)

    def record(self, call, out):
        result, _ = gate_residual_scalars_op(*call.arguments)
        return result if out is None else out.copy_(result)

    def reference(self, call, out):
        return reference.gate_residual(*call[:5], **_options(call), out=out)

    def compiled(self, call, out):
        if out is None:
            return gate_residual_op(*call.arguments)
        gate_residual_out_op(*call.arguments, out)
        return out

    def allocate(self, call):
        # empty_like costs 1 us less, and keeps the strides of what is not contiguous.
        hidden = call.hidden
        return torch.empty_like(hidden) if hidden.is_contiguous() else hidden.new_empty(hidden.shape)

    def launcher(self, call, out):
        return prepare_gate_residual(call, empty_of(call.hidden) if out is None else out)


GATE = Gate()
_SCHEMA = (
    "(Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, float? eps, float clamp, "
    "Tensor? mask, str zero_gate, bool residual)"
)


def _options(call: GateCall) -> dict:
    eps = None if call.eps is None else float(call.eps)  # a number of any size and kind
    return dict(eps=eps, clamp=float(call.clamp), mask=call.mask, zero_gate=call.zero_gate, residual=call.residual)


@registered("gate_residual", f"{_SCHEMA} -> Tensor", lambda *arguments: GATE.allocate(GateCall(*arguments)))
def gate_residual_op(*arguments):
    """:func:`gate_residual` for torch.compile."""
    return GATE.launch(GateCall(*arguments))


@registered("gate_residual_out", f"{_SCHEMA[:-1]}, Tensor(a!) out) -> ()", writes_alone)
def gate_residual_out_op(*arguments):
    """:func:`gate_residual` for torch.compile, into ``out``."""
    *arguments, out = arguments
    GATE.launch(GateCall(*arguments), out)


@registered(
    "gate_residual_scalars",
    f"{_SCHEMA} -> (Tensor, Tensor)",
    lambda hidden, *_: make_recorded(hidden),
    gate_formula,
    save_gate,
)
def gate_residual_scalars_op(*arguments):
    """:func:`gate_residual` where autograd records it: the same bits, and the scalars that the backward pass reads."""
    call = GateCall(*arguments)
    out, scalars = make_recorded(call.hidden)
    ranged(GATE.name, prepare_gate_residual(call, out))(call, out, scalars)
    return out, scalars


@declares(**GATE_KINDS)
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
    zero_gate: ZeroGate = "copysign",
    residual: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``hidden + gate * value`` ``[T, H, D]`` (or ``[B, S, H, D]``), in the dtype of hidden.

    hidden, key: ``[T, H, D]``, value ``[T, D]``, of one dtype: bfloat16, float16 or float32 (float64 on the CPU), last
    dimension dense. key and value may be views of one ``kv [T, (H + 1) * D]``.
    query_norm, key_norm: ``[H, D]``, any float dtype, contiguous.
    eps: of both norms; None is the machine epsilon.
    clamp: below it ``|d|`` counts as clamp, which bounds the slope of the square root.
    mask: bool ``[T]``; where False, key and value are not read and hidden comes back bit for bit.
    zero_gate: "copysign" (a gate at d = 0 counts as positive) or "sign" (it is 0.5).
    residual: False returns ``gate * value`` alone.
    out: a contiguous tensor, or hidden itself.

    A token's bits depend on its own data, H, D and the dtypes alone: not on the tokens beside it, nor on mask,
    recording, strides, alignment or ``out``, on one kind of device under one version of Triton.
    Gradients come from kernels too (ops/gate_kernels/backward.py), of the first order; a recorded result is copied to
    ``out``. Split kv by :func:`split_kv`: slices' own backward writes all of kv for each.

    ValueError where shapes, dtypes or devices do not fit, or ``out`` overlaps an input but hidden itself.
    """
    return GATE(GateCall(hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual), out)
