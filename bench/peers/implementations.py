"""Implementations that ``--implementation`` names, as baselines of the cases of their op.

They get the inputs that ours gets, options by name where they take them, and an ``out`` of their own. Their results
must be ours before they are timed: equal where the op is exact, else within the bounds that ours is checked by.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import engram_kernels
from bench.running.cases import Case, Prepared, Workbench, poison
from engram_kernels.testing.implementations import Implementation, parameters_of

EXACT = ("ngram_hash", "lookup", "hash_lookup")


class Skipped(Exception):
    """An implementation does not do what a case asks for."""


def cases_of(implementations: Iterable[Implementation], cases: Iterable[Case]) -> list[Case]:
    """The cases of their ops."""
    ops = {each.op for each in implementations}
    return [case for case in cases if case.op in ops]


def baselines(bench: Workbench, case: Case, prepared: Prepared) -> dict[str, Callable]:
    """Name -> maker of ``call(index)``, of the workbench's implementations of the case's op."""
    mine = [each for each in bench.implementations if each.op == case.op]
    return {each.name: partial(_baseline, each, prepared) for each in mine}


def _baseline(implementation: Implementation, prepared: Prepared) -> Callable[[int], object]:
    """:class:`Skipped` for options that it lacks, ValueError where its result is not ours."""
    calls = [_in_place_of(call, implementation) for call in prepared.calls]
    for index in sorted({0, len(calls) - 1}):
        found: Any
        ours: Any = prepared.calls[index]()
        try:
            found = calls[index]()
        except NotImplementedError as error:
            raise Skipped(f"raised NotImplementedError: {error}") from None
        if (got := _described(found)) != (wanted := _described(ours)):
            raise ValueError(f"its result is {got}, and ours {wanted}")
        if implementation.op in EXACT and isinstance(ours, torch.Tensor) and (wrong := _differing(found, ours)):
            raise ValueError(f"{wrong} of {ours.numel()} elements differ from ours")
        if (problem := prepared.check(found, index)) is not None:
            raise ValueError(problem)
    return lambda index: calls[index]()


def _in_place_of(call: partial, implementation: Implementation) -> Callable[[], object]:
    """One of our calls, made by ``implementation``; what it lacks is left out where it is our default, or ``out``."""
    if call.func is not getattr(engram_kernels, implementation.op):
        raise ValueError(f"the case calls {call.func}, not {implementation.op}")
    _, defaults = parameters_of(implementation.op)
    options = {name: value for name, value in call.keywords.items() if value is not defaults[name]}
    lacking = implementation.lacks(options)
    if "out" in options and "out" not in lacking:
        options["out"] = torch.empty_like(options["out"])
        poison(options["out"])
    needed = [name for name in lacking if name != "out" and options[name] != defaults[name]]
    if needed:
        raise Skipped(f"takes no {', '.join(needed)}")
    return partial(implementation, *call.args, **{name: options[name] for name in options if name not in lacking})


def _differing(found: torch.Tensor, ours: torch.Tensor) -> int:
    """Elements of which a bit differs."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.itemsize]
    return int((found.contiguous().view(bits) != ours.contiguous().view(bits)).sum())


def _described(result) -> str:
    if not isinstance(result, torch.Tensor):
        return type(result).__name__
    return f"{result.dtype} {list(result.shape)} on {result.device.type}".removeprefix("torch.")


def faults(records: Iterable[dict], implementations: Iterable[Implementation], no_time: str) -> list[str]:
    """What went wrong with implementations in these records, a line each; one that was never timed among it."""
    found = []
    for name in dict.fromkeys(each.name for each in implementations):
        entries = [(record["name"], record["baselines"].get(name)) for record in records if record["status"] == "ok"]
        entries = [(case, entry) for case, entry in entries if entry is not None]
        found += [
            f"{name}, {case}: {why}" for case, entry in entries if (why := entry.get("failed")) not in (None, no_time)
        ]
        if not any("median" in entry for _, entry in entries):
            found.append(f"{name} was never timed")
    return found
