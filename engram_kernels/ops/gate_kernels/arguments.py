"""What a gate reads, checked; and how its kernels' rows lie in memory. T tokens, H branches, D hidden size."""

from typing import NamedTuple

import torch

from engram_kernels.geometry.kinds import Flag, Number, OneOf, Optional, Tensor, check_all
from engram_kernels.launching.checks import check_out, check_tensor
from engram_kernels.launching.launch import Launch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: What a gate is told besides tensors, and all that it takes.
GATE_OPTIONS = dict(eps=Optional(Number(0)), clamp=Number(0), zero_gate=OneOf("copysign", "sign"), residual=Flag())
GATE_KINDS = dict.fromkeys(("hidden", "key", "value", "query_norm", "key_norm"), Tensor(*FLOAT_DTYPES))
GATE_KINDS |= GATE_OPTIONS | dict(mask=Optional(Tensor(torch.bool)), out=Optional(Tensor(*FLOAT_DTYPES)))
MAX_BRANCHES, MAX_HIDDEN_SIZE = 8, 16_384


class GateCall(NamedTuple):
    """Inputs and options of :func:`gate_residual`, in the order of its registered op."""

    hidden: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    eps: float | None
    clamp: float
    mask: torch.Tensor | None
    zero_gate: str
    residual: bool

    @property
    def arguments(self) -> tuple:
        """What the registered ops take."""
        return *self[:6], float(self.clamp), *self[7:]

    def flattened(self, where: str) -> "GateCall":
        """With all tokens in one dimension: hidden and key ``[T, H, D]``, value ``[T, D]``."""
        if self.hidden.dim() == 3:
            return self
        return self._replace(
            hidden=flatten_tokens(where, "hidden", self.hidden, 2),
            key=flatten_tokens(where, "key", self.key, 2),
            value=flatten_tokens(where, "value", self.value, 1),
        )


def check_gate(where: str, call: GateCall, out: torch.Tensor | None) -> None:
    """Types, shapes and devices of what a gate reads; ``out`` is None, contiguous and fits, or hidden itself."""
    hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual = call
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
    check_all(where, GATE_OPTIONS, dict(eps=eps, clamp=clamp, zero_gate=zero_gate, residual=residual))
    if hidden.is_cuda and hidden.dtype == torch.float64:
        raise TypeError(
            f"{where}: hidden must be bfloat16, float16 or float32 on a GPU, float64 is for the CPU; "
            f"got float64 on {hidden.device}"
        )
    if out is not hidden:
        check_out(where, out, hidden.shape, hidden.dtype, hidden.device)


def rows_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return strides_aligned(*tensors) and addresses_aligned(*tensors)


def strides_aligned(*tensors: torch.Tensor) -> bool:
    """Whether the rows of every tensor are multiples of 16 bytes apart."""
    return all(stride * tensor.element_size() % 16 == 0 for tensor in tensors for stride in tensor.stride()[:-1])


def addresses_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes."""
    misaligned = 0  # a bit below 16 is set where it is set in any address
    for tensor in tensors:
        misaligned |= tensor.data_ptr()
    return misaligned % 16 == 0


def float32_eps(eps: float | None) -> float:
    """What the kernels add inside a norm: None is the machine epsilon, as in torch.nn.RMSNorm."""
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


def flatten_tokens(where: str, name: str, tensor: torch.Tensor, kept: int) -> torch.Tensor:
    """``tensor`` with all but its last ``kept`` dimensions viewed as one; ValueError where that would take a copy."""
    if tensor.dim() == kept + 1:
        return tensor
    shape = tensor.shape[tensor.dim() - kept :]
    try:
        return tensor.view(-1 if tensor.numel() else 0, *shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: leading dimensions of {name} must be viewable as one, "
            f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
        ) from None


def row_strides(rows: dict[str, torch.Tensor]) -> dict[str, int]:
    """What kernels are told of tensors ``[T, H, D]`` and ``[T, D]``: ``stride_<name>_t`` and ``stride_<name>_h``."""
    strides = {}
    for name, tensor in rows.items():
        for dimension, stride in zip("th", tensor.stride()[:-1], strict=False):
            strides[f"stride_{name}_{dimension}"] = stride
    return strides


class RowLaunch(Launch):
    """A launch of a kernel that is told the strides of ``rows``, and whether each row is ALIGNED to 16 bytes.

    rows: tensors such as those to come, by the names of their parameters without ``_ptr``.
    """

    def __init__(self, kernel, grid: tuple[int, ...], fixed: dict, rows: dict[str, torch.Tensor]):
        super().__init__(kernel, grid, fixed | row_strides(rows) | dict(ALIGNED=False))
        self._flag = kernel.arg_names.index("ALIGNED") if strides_aligned(*rows.values()) else None
        self._rows = sum(1 << len(self.tensors) - 1 - self.tensors.index(f"{name}_ptr") for name in rows)

    def settle(self, values: list, misaligned: int) -> None:
        if self._flag is not None:
            values[self._flag] = not misaligned & self._rows
