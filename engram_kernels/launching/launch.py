"""One kernel with all that is fixed, launched again and again with other tensors."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import dependent
from .dependent import dependent_options


class Launch:
    """A launch of ``kernel`` over ``grid``; ``fixed`` is all that it takes but the tensors that come with each launch.

    These are for its parameters ``*_ptr`` that ``fixed`` leaves out, in their order.

    Before each launch Triton looks at every argument to find the compiled kernel for it, which is most of the 10 us
    that a launch costs the host. Here only one thing that it looks at may change from call to call: whether a tensor's
    address is a multiple of 16 bytes. So compiled kernels are kept, one for each combination of that, and started
    directly. Types and devices of the tensors must stay the same, and so must which of them are None. Whether a launch
    depends on the one before is asked each time (launching/dependent.py): kernels call follow_predecessor.
    """

    def __init__(self, kernel, grid: tuple[int, ...], fixed: dict):
        names = kernel.arg_names
        self.kernel, self.grid = kernel, grid
        self._grid = (*grid, 1, 1)[:3]
        #: Parameters that tensors come for.
        self.tensors = [name for name in names if name.endswith("_ptr") and name not in fixed]
        missing = [name for name in names if name not in fixed and name not in self.tensors]
        if missing:
            raise TypeError(f"Launch: fixed must have all but tensors, and lacks {', '.join(missing)}")
        self._values = [fixed.get(name) for name in names]
        self._places = [names.index(name) for name in self.tensors]
        self.options = {name: value for name, value in fixed.items() if name not in names}
        self._compiled: dict[int, CompiledKernel] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        values, misaligned = self._values.copy(), 0  # a bit for each tensor
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
            misaligned <<= 1
            if tensor is not None and tensor.data_ptr() % 16:
                misaligned |= 1
        self.settle(values, misaligned)
        variant = misaligned << 1 | dependent.chosen  # what was compiled for either is kept
        compiled = self._compiled.get(variant)
        if compiled is not None:
            self.again(compiled, values)
            return
        compiled = self.kernel.run(*values, grid=self.grid, warmup=False, **self.options, **dependent_options())
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[variant] = compiled

    def settle(self, values: list, misaligned: int) -> None:
        """Set constants among ``values`` that go by which tensors are misaligned, a bit each, the last one's lowest."""

    def again(self, compiled: CompiledKernel, values: list) -> None:
        """Launch what was compiled; ``values`` of all parameters, in their order.

        Without hooks (of profilers) nothing is to be told of a launch, and what Triton does then for each costs 3 us.
        """
        hooks = knobs.runtime
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
            compiled[self._grid](*values)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        compiled.run(*self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def capturing(tensor: torch.Tensor) -> bool:
    """Whether work on its device is captured: the tensor may be of the graph's pool, which nothing may keep."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Kept:
    """What calls of one form have in common, such as a launch: made when the form first comes."""

    #: What :meth:`forget` empties: all of this class, and what else keeps launches as ``_kept``.
    _all: ClassVar[WeakSet] = WeakSet()

    #: All are forgotten then: no serving engine repeats as many lengths.
    MOST = 1024

    def __init__(self):
        self._kept: dict[Hashable, Any] = {}
        self._all.add(self)

    def __contains__(self, form: Hashable) -> bool:
        return form in self._kept

    def get(self, form: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept for ``form``."""
        kept = self._kept.get(form)
        if kept is None:
            if len(self._kept) >= self.MOST:
                self._kept.clear()
            kept = self._kept[form] = make()
        return kept

    @classmethod
    def watch(cls, keeper) -> None:
        """Let :meth:`forget` empty ``keeper._kept`` too."""
        cls._all.add(keeper)

    @classmethod
    def forget(cls) -> None:
        """Drop what is kept anywhere, as in a process that has launched nothing."""
        for kept in cls._all:
            kept._kept.clear()
