"""The way of every call: check the arguments, choose where they run, prepare the launch once per signature, launch.

A call is a named tuple of tensors, objects and options. Its signature is all that checks and launches depend on but for
addresses and contents: the shapes, strides, types and devices of its tensors, its objects, its options. A bare launch
costs the host 10 us, and checking arguments as much again, so both are done for the first call of a signature alone.

    signature seen before, and repeats()    the launch that was kept, once out is found apart() from inputs()
    else check(), apart(), settled(), and then
        records()                           record(): the result, for autograd to follow
        not on_kernels()                    reference()
        under torch.compile                 compiled(): the registered op
        else                                prepare(), which is kept: launcher(), and allocate() where there is no out

tests/project/template has an op to copy.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.compiler import is_compiling

from engram_kernels.launching.launch import Kept
from engram_kernels.launching.overlap import Apart
from engram_kernels.launching.ranges import ranged

MOST_KEPT = Kept.MOST  #: launches for one owner
_PACKAGE = __name__.partition(".")[0]
#: Of registered ops. A copy of the package by another name, as Hugging Face's ``kernels`` loads one, has that name.
NAMESPACE = "engram" if _PACKAGE == "engram_kernels" else _PACKAGE
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
#: A launch of (call, out), and where there is an out the check of its address.
_Kept = tuple[Callable, Apart | None]


class Op(ABC):
    """One op; an instance is called with a call and its output, None for a new one. The file's head has the way."""

    name: str
    input_names: tuple[str, ...]
    in_place: str | None = None  #: the input that out may be

    def __init__(self):
        # Kept with what they are for, as long as that lives: a launch holds tensors of a plan, and addresses of tables.
        self._kept: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()
        Kept.watch(self)

    def __call__(self, call, out=None, signature: Hashable = None):
        """The result; ``signature`` is that of the call, where it was asked for before."""
        compiling = is_compiling()
        if not compiling:
            signature = signature or self.signature(call, out)
            kept = self._kept_launch(call, signature)
            if kept is not None and self.repeats(call):
                launch, apart = kept
                if apart is not None:
                    apart(out_parts(out), self.inputs(call))
                return launch(call, out)
        self.check(call, out)
        apart = None
        if out is not None and not compiling:
            apart = self.apart(call, out)
            apart(out_parts(out), self.inputs(call))  # here too, for what is recorded or computed by the reference
        call = self.settled(call)
        if self.records(call):
            return self.record(call, out)
        if not self.on_kernels(call):
            return ranged(self.span(call), self.reference)(call, out)
        if compiling:
            return self.compiled(call, out)
        return self._prepare(call, out, signature, apart)[0](call, out)

    def launch(self, call, out=None):
        """The result by kernels, without checks: for registered ops, whose arguments were checked when traced."""
        signature = self.signature(call, out)
        kept = self._kept_launch(call, signature)
        if kept is None:
            kept = self._prepare(call, out, signature, None if out is None else self.apart(call, out))
        launch, apart = kept
        if apart is not None:
            apart(out_parts(out), self.inputs(call))
        return launch(call, out)

    @abstractmethod
    def signature(self, call, out) -> Hashable:
        """What calls that may share a launch have in common; None where none may."""

    def span(self, call) -> str:
        """What a range around its launches is called (launching/ranges.py)."""
        return self.name

    def owner(self, call) -> object:
        """What a kept launch lives as long as: a plan, a table, or the op itself."""
        return self

    @abstractmethod
    def check(self, call, out) -> None:
        """Raise unless the arguments fit each other."""

    @abstractmethod
    def inputs(self, call) -> tuple[torch.Tensor | None, ...]:
        """The tensors that a launch reads, in the order of ``input_names``."""

    def fixed(self, call) -> list[tuple[str, int, int]]:
        """(name, address, bytes) of what it reads besides, the same for all calls of a signature."""
        return []

    def apart(self, call, out) -> Apart:
        """The check that ``out`` lies apart from what the call reads."""
        inputs = zip(self.input_names, self.inputs(call), strict=True)
        return Apart(self.name, out_parts(out), list(inputs), self.fixed(call), self.in_place)

    def repeats(self, call) -> bool:
        """Whether the kept launch may run for this call; raises where an id is invalid or a table is closed."""
        return not self.records(call)

    def settled(self, call):
        """The call with what it leaves open decided, such as whether a cache is asked; once it was checked."""
        return call

    def records(self, call) -> bool:
        """Whether autograd is to follow the result."""
        return False

    def record(self, call, out):
        """The result, for autograd to follow."""
        raise NotImplementedError

    @abstractmethod
    def on_kernels(self, call) -> bool:
        """Whether kernels compute it; else the reference does."""

    @abstractmethod
    def reference(self, call, out):
        """The result by the reference."""

    @abstractmethod
    def compiled(self, call, out):
        """The result by the registered op, for torch.compile."""

    @abstractmethod
    def allocate(self, call):
        """A new output."""

    @abstractmethod
    def launcher(self, call, out) -> Callable[..., None]:
        """The launches, a function of (call, out), for every call of this signature."""

    def prepare(self, call, out) -> Callable:
        """What computes the result of (call, out), for every call of this signature."""
        launch, allocate = self.launcher(call, out), self.allocate

        def run(call, out):
            if out is None:
                out = allocate(call)
            launch(call, out)
            return out

        return run

    def forget(self) -> None:
        """Drop the launches that were kept."""
        self._kept.clear()

    def _kept_launch(self, call, signature) -> _Kept | None:
        try:
            return self._kept[self.owner(call)].get(signature)
        except (KeyError, TypeError):  # the first call, or an argument that checks will refuse
            return None

    def _prepare(self, call, out, signature, apart: Apart | None) -> _Kept:
        prepared = ranged(self.span(call), self.prepare(call, out)), apart
        if signature is not None:
            kept = self._kept.setdefault(self.owner(call), {})
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[signature] = prepared
        return prepared


def out_parts(out) -> tuple[torch.Tensor | None, ...]:
    """An output, of one tensor or of rows and scales, as registered ops take it."""
    return out if isinstance(out, tuple) else (out, None)


def form_of(*tensors: torch.Tensor | None) -> tuple | None:
    """What tensors add to a signature; None where something else is among them, which checks will refuse."""
    form = []
    try:
        for x in tensors:
            if x is None:
                form.append(None)
            else:
                form += x.shape, x.stride(), x.dtype, x.device
    except AttributeError:
        return None
    return tuple(form)


def empty_of(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor without memory that is like ``x`` otherwise: what a launch may know of a new output."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def registered(
    name: str, schema: str, fake: Callable, backward: Callable | None = None, setup_context: Callable | None = None
) -> Callable[[Callable], Any]:
    """Make a function the registered op ``engram::name``, for torch.compile; ``fake`` gives its outputs' shapes.

    backward, setup_context: as for torch.library.register_autograd.
    The dispatcher calls the function itself: what torch.library.custom_op puts before it takes as long as a launch.
    """

    def register(function):
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        arguments = enumerate(op._schema.arguments)
        written = [place for place, argument in arguments if argument.alias_info and argument.alias_info.is_write]
        run = _noting_writes(function, written) if written else function
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        return op

    return register


def _noting_writes(function: Callable, written: list[int]) -> Callable:
    """``function``, telling autograd which of its arguments it has written: what was saved before is no more."""

    @functools.wraps(function)
    def run(*arguments):
        result = function(*arguments)
        for place in written:
            if arguments[place] is not None and not arguments[place].is_inference():
                torch.autograd.graph.increment_version(arguments[place])
        return result

    return run


_RECORDINGS = count()


def recording_number() -> int:
    """A number for each backward formula that is traced: torch takes two equal calls of an op for one."""
    return next(_RECORDINGS)


def writes_alone(*_) -> None:
    """The fake of a registered op that returns nothing."""
