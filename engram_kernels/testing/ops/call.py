"""What a case is: inputs in their place, one call of an implementation, and what its result must be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton

from engram_kernels import EngramTable

from .. import Untested
from ..implementations import Implementation
from ..tables import place, same_bits

CPU = torch.device("cpu")


class Place(NamedTuple):
    """Where tensors are, and the placement of tables: by default ``cpu``, or ``device`` on a GPU."""

    device: torch.device = CPU
    placement: str | None = None

    def put(self, tensor):
        """A tensor, a plan, a tuple of them or None, on the device."""
        if isinstance(tensor, tuple):
            return tuple(self.put(part) for part in tensor)
        return None if tensor is None else tensor.to(self.device)

    def table(self, weight, scale, own_scale: float | None = None) -> EngramTable:
        """A table there. own_scale: of nvfp4 where it is not TABLE_SCALE."""
        return place(weight, scale, self.device, self.placement, own_scale)


@dataclass
class Call:
    """Arguments by position, options by name, and ``check(result)``, which raises AssertionError.

    invalid: whether a token id is invalid, which raises ValueError on the CPU and gives row ids -1 in a kernel.
    """

    arguments: tuple
    check: Callable[[object], object]
    options: dict = field(default_factory=dict)
    invalid: bool = False


@dataclass(frozen=True)
class Case:
    """One call of an op. ``name`` is made of letters, digits, ``_`` and ``/`` alone: pytest's -k takes it."""

    op: str
    name: str
    make: Callable[[Place], Call]

    def check(self, function: Callable, device: str | torch.device = "cpu", placement: str | None = None) -> None:
        """Call ``function`` in the place of the op. AssertionError where its result, or what it leaves, is wrong.

        device: where tensors are. placement: of tables, as EngramTable has them; by default what the device reads.
        :class:`Untested` where the function lacks an option that the case sets, or raises NotImplementedError.
        """
        implementation = function
        if not isinstance(function, Implementation):
            implementation = Implementation(self.op, getattr(function, "__name__", "function"), function)
        call = self.make(Place(torch.device(device), placement))
        if lacking := implementation.lacks(call.options):
            raise Untested(f"takes no {', '.join(lacking)}")
        before = [(given, given.clone()) for given in _inputs(call)]
        try:
            result = implementation(*call.arguments, **call.options)
        except NotImplementedError as error:
            raise Untested(f"raised NotImplementedError: {error}") from error
        except ValueError:
            if call.invalid and torch.device(device).type == "cpu":
                return
            raise
        # First, since on the CPU the expected result is computed from these.
        require(all(_same_bytes(given, copy) for given, copy in before), "wrote to an input")
        call.check(result)


def _inputs(call: Call) -> Iterator[torch.Tensor]:
    """Tensors that may not change: all but what is written to."""
    out = call.options.get("out")
    waiting = [*call.arguments, *(value for name, value in call.options.items() if name != "out")]
    while waiting:
        given = waiting.pop()
        if isinstance(given, (tuple, list)):
            waiting += given
        elif isinstance(given, EngramTable):
            waiting += [given.weight.view(torch.uint8), given.scale]
        elif isinstance(given, torch.Tensor) and given is not out:
            yield given


def _same_bytes(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    parts = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, copy))
    return torch.equal(*parts)


def require(holds: bool, words: str) -> None:
    """AssertionError with these words where something does not hold."""
    if not holds:
        raise AssertionError(words)


def require_like(result, shape, dtype: torch.dtype, device: torch.device) -> None:
    """AssertionError unless the result is a tensor of this shape and dtype, on this kind of device."""
    require(isinstance(result, torch.Tensor), f"the result must be a tensor, got {type(result).__name__}")
    got = f"{result.dtype} {list(result.shape)} on {result.device.type}"
    wanted = f"{dtype} {list(shape)} on {device.type}"
    require(got == wanted, f"the result must be {wanted}, got {got}".replace("torch.", ""))


def require_bits(result, expected: torch.Tensor, device: torch.device) -> None:
    """AssertionError unless the result has these bits; any NaN is a NaN, and zeros have signs."""
    require_like(result, expected.shape, expected.dtype, device)
    if expected.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        require(same_bits(result, expected, truncated=True), "more than an ulp from the reference, as interpreted")
        return
    result, expected = result.detach().cpu().contiguous(), expected.contiguous()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    wrong = result.view(words) != expected.view(words)
    if expected.dtype.is_floating_point:
        wrong &= ~(result.float().isnan() & expected.float().isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        one, other = (part.float() if part.dtype.is_floating_point else part for part in (result[at], expected[at]))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {list(at)}: "
            f"got {one.item()}, expected {other.item()}"
        )
