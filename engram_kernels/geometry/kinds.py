"""What public functions take: the kind of each parameter, written once, beside the function, by :func:`takes`.

A kind tells what it expects, whether a value is of it, and the value as it is used. Errors name the function, the
parameter, what was expected and what came. ``function.kinds`` is what tests and documents read.
"""

import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch

Checked = TypeVar("Checked", bound=Callable[..., Any])

INT64 = (-(2**63), 2**63 - 1)


class Kind:
    """Values of one kind; ``expected`` is it in words, ``error`` the class of the error for another value."""

    expected: str
    error: type[Exception] = TypeError

    def fits(self, value) -> bool:
        raise NotImplementedError

    def settled(self, value):
        """The value as it is used."""
        return value

    def check(self, where: str, name: str, value):
        """``value`` as it is used; raises where it is not of this kind."""
        if not self.fits(value):
            if self.error is TypeError or isinstance(value, torch.Tensor):
                raise TypeError(f"{where}: {name} must be {self.expected}, got {describe(value)}")
            raise self.error(f"{where}: {name} must be {self.expected}, got {short(value)}")
        return self.settled(value)


class Whole(Kind):
    """A whole number from ``least`` to ``most``, NumPy's too; no bool."""

    error = ValueError

    def __init__(self, least: int = INT64[0], most: int = INT64[1]):
        self.least, self.most = least, most
        first = "a positive int" if least == 1 else "an int" + (f" of at least {least}" if least > INT64[0] else "")
        self.expected = first + (f"{' and' if least != 1 else ' of'} at most {_bound(most)}" if most < INT64[1] else "")

    def fits(self, value) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and self.least <= value <= self.most

    def settled(self, value) -> int:
        return int(value)


class Number(Kind):
    """A finite number of at least ``least``, below ``end``; no bool, and no tensor, whose value may change unseen."""

    error = ValueError

    def __init__(self, least: float = -math.inf, end: float = math.inf):
        self.least, self.end = least, end
        low = "" if least == -math.inf else f" of at least {least:g}"
        self.expected = f"a finite number{low}" + ("" if end == math.inf else f" and below {end:g}")

    def fits(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return max(self.least, -sys.float_info.max) <= value <= sys.float_info.max and value < self.end

    def settled(self, value) -> float:
        return float(value)


class Flag(Kind):
    """True or False."""

    expected, error = "True or False", ValueError

    def fits(self, value) -> bool:
        return isinstance(value, bool)


class OneOf(Kind):
    """One of some texts or whole numbers."""

    error = ValueError

    def __init__(self, *choices: str | int):
        self.choices = choices
        self.expected = "one of " + ", ".join(map(repr, choices))

    def fits(self, value) -> bool:
        return type(value) in (str, int) and value in self.choices


class Anything(Kind):
    """Whatever it is."""

    expected = "anything"

    def fits(self, value) -> bool:
        return True


class Text(Kind):
    """Any text."""

    expected = "a text"

    def fits(self, value) -> bool:
        return isinstance(value, str)


class Path(Kind):
    """A path of a file or folder."""

    expected = "a file or a folder"

    def fits(self, value) -> bool:
        return isinstance(value, (str, os.PathLike)) and "\0" not in os.fspath(value) and os.fspath(value) != ""


class Function(Kind):
    """Something to call."""

    expected = "a function"

    def fits(self, value) -> bool:
        return callable(value)


class Instance(Kind):
    """An object of one of some classes, or of a class of that name where importing it would be a circle."""

    def __init__(self, *classes: type | str):
        self.classes = classes
        names = [each if isinstance(each, str) else each.__name__ for each in classes]
        self.expected = " or ".join(f"{'an' if name[0] in 'AEIO' else 'a'} {name}" for name in names)

    def fits(self, value) -> bool:
        names = [each.__name__ for each in type(value).__mro__]
        return any(each in names if isinstance(each, str) else isinstance(value, each) for each in self.classes)


class Tensor(Kind):
    """A tensor of one of ``dtypes``; shapes and devices depend on other arguments, and are checked with them."""

    def __init__(self, *dtypes: torch.dtype):
        self.dtypes = dtypes
        self.expected = "a tensor" + (f" of {words(map(_name, dtypes))}" if dtypes else "")

    def fits(self, value) -> bool:
        return isinstance(value, torch.Tensor) and (not self.dtypes or value.dtype in self.dtypes)


class Integers(Kind):
    """A tensor of whole numbers, of so many dimensions."""

    def __init__(self, dimensions: int):
        self.dimensions = dimensions
        self.expected = f"a {dimensions}-dimensional integer tensor"

    def fits(self, value) -> bool:
        if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.dim() != self.dimensions:
            return False
        return not value.is_floating_point() and not value.is_complex()


class Dtype(Kind):
    """One of some dtypes of torch."""

    def __init__(self, *dtypes: torch.dtype):
        self.dtypes = dtypes
        self.expected = words(map(_name, dtypes))

    def fits(self, value) -> bool:
        return isinstance(value, torch.dtype) and value in self.dtypes


class Device(Kind):
    """A device of torch, by itself or by name."""

    expected = "a torch.device or its name"

    def fits(self, value) -> bool:
        try:
            return isinstance(value, torch.device) or (isinstance(value, str) and bool(torch.device(value)))
        except RuntimeError:
            return False


class Optional(Kind):
    """None, or a value of another kind."""

    def __init__(self, kind: Kind):
        self.kind, self.error = kind, kind.error
        self.expected = f"{kind.expected} or None"

    def fits(self, value) -> bool:
        return value is None or self.kind.fits(value)

    def settled(self, value):
        return None if value is None else self.kind.settled(value)


class AnyOf(Kind):
    """A value of any of some kinds."""

    def __init__(self, *kinds: Kind):
        self.kinds, self.error = kinds, kinds[0].error
        self.expected = " or ".join(kind.expected for kind in kinds)

    def fits(self, value) -> bool:
        return any(kind.fits(value) for kind in self.kinds)

    def settled(self, value):
        return next(kind for kind in self.kinds if kind.fits(value)).settled(value)


class Each(Kind):
    """A sequence of values of one kind; ``count`` of them, or ``least`` at least. No text and no tensor."""

    def __init__(self, kind: Kind, *, least: int = 0, count: int | None = None, error: type[Exception] = TypeError):
        self.kind, self.least, self.count, self.error = kind, least, count, error
        number = f", {count}" if count is not None else f", {least} or more" if least else ""
        self.expected = f"a sequence of {re.sub('^an? ', '', kind.expected)}{number}"

    def fits(self, value) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) < self.least:
            return False
        return self.count in (None, len(value)) and all(map(self.kind.fits, value))

    def check(self, where: str, name: str, value):
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            for place, each in enumerate(value):
                self.kind.check(where, f"{name}[{place}]", each)
        return super().check(where, name, value)

    def settled(self, value) -> tuple:
        return tuple(map(self.kind.settled, value))


class Many(Kind):
    """Anything to go through that is no text and no single number; what it holds is checked when it is gone through."""

    expected = "a sequence"

    def fits(self, value) -> bool:
        if isinstance(value, torch.Tensor):
            return value.dim() > 0
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


class Having(Kind):
    """An object that has some methods."""

    def __init__(self, expected: str, *methods: str):
        self.expected, self.methods = expected, methods

    def fits(self, value) -> bool:
        return all(hasattr(value, method) for method in self.methods)


class Keyed(Kind):
    """A mapping from keys of one kind to values of another."""

    def __init__(self, keys: Kind, values: Kind):
        self.keys, self.values = keys, values
        self.expected = f"a mapping from {keys.expected} to {values.expected}"

    def fits(self, value) -> bool:
        return (
            isinstance(value, Mapping)
            and all(map(self.keys.fits, value))
            and all(map(self.values.fits, value.values()))
        )


def describe(value) -> str:
    """A value in an error message: what matters of a tensor, the type and the value of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    try:
        return repr(value) if isinstance(value, torch.dtype) else f"{type(value).__name__} {value!r}"[:80]
    except Exception:  # a number that Python does not print, or whatever an object's own repr raises
        return type(value).__name__


def short(value) -> str:
    """A value in an error message: by itself where that is plain, as :func:`describe` has it otherwise."""
    printed = value.bit_length() < 999 if isinstance(value, int) else isinstance(value, (float, str, torch.dtype))
    if value is None or printed:
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return describe(value)


def _bound(number: int) -> str:
    """A bound as errors have it: powers of two, and what is one below, as such where they are long."""
    for value, text in ((number, ""), (number + 1, " - 1")):
        if value >= 2**20 and value & (value - 1) == 0:
            return f"2^{value.bit_length() - 1}{text}"
    return str(number)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def words(names: Iterable[str]) -> str:
    """Names as a sentence lists them: "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def takes(**kinds: Kind) -> Callable[[Checked], Checked]:
    """Check a function's arguments, each by its kind, before it runs; under ``@classmethod`` where it is one."""

    def decorate(function):
        signature = inspect.signature(function)
        method = next(iter(signature.parameters), None) in ("self", "cls")

        @functools.wraps(function)
        def checked(*args, **kwargs):
            where = function.__name__
            if method and args:
                owner = (args[0] if isinstance(args[0], type) else type(args[0])).__name__
                where = owner if where == "__init__" else f"{owner}.{where}"
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{where}: {error}") from None
            for name, kind in kinds.items():
                if name in given.arguments:
                    given.arguments[name] = kind.check(where, name, given.arguments[name])
            return function(*given.args, **given.kwargs)

        checked.kinds = kinds
        return checked

    return decorate


def declares(**kinds: Kind) -> Callable[[Checked], Checked]:
    """Say what a function takes that checks it itself: where a call may cost no more than a launch."""

    def decorate(function):
        function.kinds = kinds
        return function

    return decorate


def check_all(where: str, kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> None:
    """Raise unless every value is of its kind."""
    for name, kind in kinds.items():
        if name in values:
            kind.check(where, name, values[name])
