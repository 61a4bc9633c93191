"""What a gate with a convolution reads, checked. T tokens, B sequences, H branches, D hidden size, K conv taps."""

from math import prod
from typing import NamedTuple

import torch

from engram_kernels.geometry.kinds import Instance, Number, Optional, Tensor, Whole, check_all
from engram_kernels.launching.checks import check_tensor
from engram_kernels.launching.tokens import check_batch
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES, GATE_KINDS, GateCall

from .slots import ConvSlots

#: What the convolution is told besides tensors, and all that it takes with its gate.
CONV_OPTIONS = dict(dilation=Whole(1, 2**31 - 1), conv_eps=Optional(Number(0)))
CONV_KINDS = GATE_KINDS | CONV_OPTIONS | dict.fromkeys(("conv_norm", "conv_weight"), Tensor(*FLOAT_DTYPES))
CONV_KINDS |= dict(cu_seqlens=Optional(Tensor(torch.int32)), conv_state=Optional(Instance(tuple)))


class ConvCall(NamedTuple):
    """Inputs and options of :func:`gate_conv_residual`, in the order of its registered op, and its state."""

    hidden: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    conv_norm: torch.Tensor
    conv_weight: torch.Tensor
    dilation: int
    eps: float | None
    conv_eps: float | None
    clamp: float
    mask: torch.Tensor | None
    zero_gate: str
    residual: bool
    cu_seqlens: torch.Tensor | None
    state: tuple[torch.Tensor, torch.Tensor] | ConvSlots | None = None

    @property
    def arguments(self) -> tuple:
        """What the registered ops take ahead of a state."""
        return *self[:10], float(self.clamp), *self[11:15]

    @property
    def of_gate(self) -> GateCall:
        """What the gate reads."""
        return GateCall(*self[:5], self.eps, self.clamp, self.mask, self.zero_gate, self.residual)

    @property
    def span(self) -> int:
        """Tokens that the convolution looks back."""
        return (self.conv_weight.shape[2] - 1) * self.dilation

    @property
    def slots(self) -> ConvSlots | None:
        """The state, where it lies in slots."""
        return self.state if isinstance(self.state, ConvSlots) else None


def check_conv(where: str, call: ConvCall) -> None:
    """Types, shapes and devices of what the convolution reads beyond the gate."""
    hidden, conv_norm, conv_weight, dilation = call.hidden, call.conv_norm, call.conv_weight, call.dilation
    *tokens, branches, hidden_size = hidden.shape
    device = hidden.device
    if prod(tokens) >= 2**31:
        raise ValueError(f"{where}: hidden must have below 2^31 tokens, got {list(hidden.shape)}")
    batch = check_batch(where, tokens, call.cu_seqlens, device)
    check_tensor(where, "conv_norm", conv_norm, dtypes=FLOAT_DTYPES, shape=(branches, hidden_size), device=device)
    check_tensor(where, "conv_weight", conv_weight, dtypes=FLOAT_DTYPES, device=device, contiguous=False)
    if conv_weight.dim() != 3 or conv_weight.shape[:2] != (branches, hidden_size) or conv_weight.shape[2] < 1:
        raise ValueError(
            f"{where}: conv_weight must have shape [H, D, K] = [{branches}, {hidden_size}, K >= 1], "
            f"got {list(conv_weight.shape)}"
        )
    check_all(where, CONV_OPTIONS, dict(dilation=dilation, conv_eps=call.conv_eps))
    if call.state is not None:
        check_state = check_conv_slots if call.slots is not None else check_conv_state
        check_state(where, call.state, batch, call.span, hidden)


def check_conv_state(where, conv_state, batch, span, hidden) -> None:
    """Raise unless ``conv_state`` is the state of ``batch`` sequences for an op on ``hidden [..., H, D]``."""
    if not isinstance(conv_state, tuple) or len(conv_state) != 2:
        raise TypeError(f"{where}: conv_state must be a pair (value, scale), got {type(conv_state).__name__}")
    branches, hidden_size = hidden.shape[-2:]
    scale_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for part, dtype, last in ((0, hidden.dtype, hidden_size), (1, scale_dtype, branches)):
        name, expected = f"conv_state[{part}]", (batch, span, last)
        check_tensor(where, name, conv_state[part], dtypes=(dtype,), shape=expected, device=hidden.device)


def check_conv_slots(where, ring: ConvSlots, batch, span, hidden) -> None:
    """Raise unless ``ring`` holds slots of ``batch`` sequences for an op on ``hidden [..., H, D]``."""
    branches, hidden_size = hidden.shape[-2:]
    scale_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    slots, capacity = (len(ring.cursor), ring.value.shape[1]) if ring.value.dim() == 3 else (0, 0)
    if capacity < 2 * span:
        raise ValueError(f"{where}: conv_state must hold at least {2 * span} tokens a slot, got {capacity}")
    for name, tensor, dtype, shape in (
        ("value", ring.value, hidden.dtype, (slots, capacity, hidden_size)),
        ("scale", ring.scale, scale_dtype, (slots, capacity, branches)),
        ("cursor", ring.cursor, torch.int32, (slots,)),
        ("slots", ring.slots, torch.int32, (batch,)),
    ):
        check_tensor(where, f"conv_state.{name}", tensor, dtypes=(dtype,), shape=shape, device=hidden.device)
