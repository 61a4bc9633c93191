"""Functions in the place of our ops, by their names: ``[OP=]MODULE[:NAME]``.

    my_module                 every function of it that is called as one of our ops is
    my_module:lookup          the op of that name; ``gather`` is another name for ``lookup``
    lookup=my_module:fast     any function, as that op

An implementation takes what our op takes by position, whatever it calls it, and our op's options by their names. It may
lack options that have a default: on cases that set them it is not tested.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import engram_kernels

OPS = ("ngram_hash", "lookup", "hash_lookup", "gate_residual", "gate_conv_residual")
#: Other names that a function of an op may have.
OTHER_NAMES = {"gather": "lookup"}
_P = inspect.Parameter


@cache
def parameters_of(op: str) -> tuple[tuple[str, ...], dict]:
    """What our op takes by position, and its options with their defaults; ``Parameter.empty`` where there is none."""
    parameters = inspect.signature(getattr(engram_kernels, op)).parameters.values()
    options = {each.name: each.default for each in parameters if each.kind == _P.KEYWORD_ONLY}
    return tuple(each.name for each in parameters if each.name not in options), options


@dataclass(frozen=True)
class Implementation:
    """A function in the place of the op ``op``. ``name`` says where it is."""

    op: str
    name: str
    function: Callable

    def __call__(self, *arguments, **options):
        """The function's result. An option that it needs and that is not given has our default."""
        options = {name: value for name, (needed, value) in self._taken.items() if needed} | options
        return self.function(*arguments, **options)

    def lacks(self, options: Iterable[str]) -> list[str]:
        """Which of these options the function does not take."""
        parameters = inspect.signature(self.function).parameters.values()
        anything = any(each.kind == _P.VAR_KEYWORD for each in parameters)
        return [] if anything else [name for name in options if name not in self._taken]

    @property
    def _taken(self) -> dict[str, tuple[bool, object]]:
        """Option -> whether the function needs it, and our default."""
        positional, options = parameters_of(self.op)
        found = {each.name: each.default is each.empty for each in _after(self.function, len(positional))}
        return {name: (needed, options.get(name)) for name, needed in found.items()}


def _after(function: Callable, positional: int) -> list[inspect.Parameter]:
    """Parameters that can be given by name once the first ones are given by position."""
    parameters = list(inspect.signature(function).parameters.values())
    places = [each for each in parameters if each.kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)]
    return [*places[positional:], *(each for each in parameters if each.kind == _P.KEYWORD_ONLY)]


def find_implementations(names: Iterable[str]) -> list[Implementation]:
    """What is named, each once, in its order. ValueError where a name, a module, an op or a signature is wrong."""
    return list(dict.fromkeys(each for name in names for each in _find(name)))


def our_ops() -> list[Implementation]:
    """The ops of this package."""
    return [Implementation(op, f"engram_kernels:{op}", getattr(engram_kernels, op)) for op in OPS]


def _find(text: str) -> list[Implementation]:
    op, equals, place = text.rpartition("=")
    module_name, colon, name = place.partition(":")
    if (equals and not op) or not module_name or (colon and not name) or ":" in name:
        raise ValueError(f"--implementation must be [OP=]MODULE[:NAME], got {text!r}")
    if op and op not in OPS:
        raise ValueError(f"--implementation {text}: OP must be one of {', '.join(OPS)}, got {op!r}")
    module = _imported(module_name, text)
    if not name:
        return [checked(each, module, found, text) for each, found in _names_in(module, op, text).items()]
    op = op or OTHER_NAMES.get(name, name)
    if op not in OPS:
        raise ValueError(
            f"--implementation {text}: NAME must be one of {', '.join((*OPS, *OTHER_NAMES))}, got {name!r}; "
            f"which op it is can be said, as in lookup={place}"
        )
    return [checked(op, module, name, text)]


def _names_in(module, op: str, text: str) -> dict[str, str]:
    """Op -> name of the module's function for it."""
    known = [(each, each) for each in OPS] + [(each, name) for name, each in OTHER_NAMES.items()]
    known = [(each, name) for each, name in known if op in ("", each)]
    found: dict[str, str] = {}
    for each, name in known:
        value = getattr(module, name, None)
        # What a module imports from here, to fall back on, is no implementation of its own.
        borrowed = value is getattr(engram_kernels, each) and module is not engram_kernels
        if callable(value) and not borrowed:
            found.setdefault(each, name)
    if not found:
        names = ", ".join(name for _, name in known)
        raise ValueError(
            f"--implementation {text}: {module.__name__} must have a function with one of the names {names}, "
            "and has none; another one is given as OP=MODULE:NAME"
        )
    return {each: found[each] for each in OPS if each in found}


def _imported(name: str, text: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module of the user's raises
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if not missing:
            reason = f"importing {name} raised {type(error).__name__}: {error}"
        elif name.endswith(".py") or "/" in name:
            reason = f"MODULE must be the name of a module, as import takes it, got the path {name}"
        else:
            reason = f"MODULE must be a module in the current folder or on sys.path, got {name!r}, which is in neither"
        raise ValueError(f"--implementation {text}: {reason}") from error


def checked(op: str, module, name: str, text: str) -> Implementation:
    """The implementation that ``module`` has by ``name``; ValueError where it cannot be called as the op is."""
    function, where = getattr(module, name, None), f"{module.__name__}:{name}"
    if not callable(function):
        got = f"got {type(function).__name__}" if hasattr(module, name) else f"and {module.__name__} has no {name}"
        raise ValueError(f"--implementation {text}: {where} must be a function, {got}")
    problem = _problem(op, function)
    if problem is not None:
        positional, options = parameters_of(op)
        required = [each for each, default in options.items() if default is _P.empty]
        wanted = ", ".join((*positional, "*", *required, "..."))
        raise ValueError(f"--implementation {text}: {where} must take arguments as {op}({wanted}) does, got {problem}")
    return Implementation(op, where, function)


def _problem(op: str, function: Callable) -> str | None:
    """Why ``function`` cannot be called as the op is, behind its signature."""
    positional, options = parameters_of(op)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "one whose signature cannot be read"
    try:
        signature.bind_partial(*positional)
    except TypeError:
        return f"{signature}: fewer than {len(positional)} by position"
    required = [name for name, default in options.items() if default is _P.empty]
    if missing := Implementation(op, "", function).lacks(required):
        return f"{signature}: no {' and no '.join(missing)}"
    needed = [each for each in _after(function, len(positional)) if each.default is each.empty]
    other = [each.name for each in needed if each.name not in options or each.kind == _P.POSITIONAL_ONLY]
    return f"{signature}: {' and '.join(other)} besides, without a default" if other else None
