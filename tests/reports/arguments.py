"""Write docs/arguments.md, what every parameter of the public surface takes, from the kinds that check it.

python -m tests.reports.arguments
"""

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import engram_kernels as ek
from engram_kernels.geometry.kinds import Kind
from engram_kernels.serving.started import Started
from engram_kernels.serving.state import EngramStep

PAGE = Path(__file__).parents[2] / "docs" / "arguments.md"
#: Methods that this package calls, across its rooms, and users have no use for.
INTERNAL = {
    "EngramTable.check_readable_on", "EngramTable.check_usable", "EngramTable.memory", "HashPlan.check_memory",
    "HashPlan.check_parts", "HashPlan.of_parts", "NgramCache.look_up", "ShardedTable.look_up", "ShardedTable.map",
    "ShardedTable.refusing",
}  # fmt: skip
HEAD = """# What every argument takes

What a parameter takes by itself: any other value is a `ValueError` or `TypeError` that names the function, the
parameter, what was expected and what came. How arguments have to fit each other, and what they mean, is in the
docstrings; so are shapes and devices of tensors. `**options` are those of the function that the docstring names.
Methods that several classes share stand with the first of them.

`python -m tests.reports.arguments` writes this page from the kinds that check the arguments.
"""


def public_functions() -> Iterator[tuple[str, Callable]]:
    """(name, function) of the public surface: functions, classes for their constructors, and methods."""
    for name in ek.__all__:
        value = getattr(ek, name)
        yield name, value
        for member in sorted(dir(value)) if inspect.isclass(value) else ():
            static = inspect.getattr_static(value, member)
            own = any(member in vars(base) for base in value.__mro__ if base.__module__.startswith("engram_kernels"))
            callable_ = isinstance(static, (types.FunctionType, classmethod, staticmethod))
            if not member.startswith("_") and own and callable_ and f"{name}.{member}" not in INTERNAL:
                yield f"{name}.{member}", getattr(value, member)
    yield from ((f"EngramStep.{name}", getattr(EngramStep, name)) for name in ("commit", "conv_state"))
    yield from ((f"Started.{name}", getattr(Started, name)) for name in ("kv", "rows"))


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """What users give, ``self`` and ``**options`` aside."""
    found = inspect.signature(function).parameters.values()
    return {each.name: each for each in found if each.kind != each.VAR_KEYWORD and each.name not in ("self", "_")}


def kinds_of(function: Callable) -> dict[str, Kind]:
    """The kind of each parameter."""
    if isinstance(function, ek.Engram):
        return function.forward.kinds
    return getattr(function.__init__ if inspect.isclass(function) else function, "kinds", {})


def page() -> str:
    """The document; what several classes inherit stands with the first of them."""
    parts, seen = [HEAD], set()
    for name, function in public_functions():
        own = inspect.unwrap(getattr(function, "__func__", function))  # torch wraps an optimizer's step when it is made
        if own in seen:
            continue
        seen.add(own)
        kinds, rows = kinds_of(function), []
        for parameter, given in parameters(function).items():
            default = "" if given.default is given.empty else f"`{given.default!r}`"
            rows.append(f"| `{parameter}` | {kinds[parameter].expected} | {default} |")
        if rows:
            parts.append("\n".join([f"## {name}\n", "| parameter | takes | default |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
