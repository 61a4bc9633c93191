"""Correctness cases for implementations of the ops, ours and others': golden data, adversarial parameters, oracles.

    for case in cases("lookup"):
        case.check(my_gather, device="cuda")

``pytest --pyargs engram_kernels.testing --implementation my_module`` runs all of them, see docs/testing_your_kernel.md.
"""

import importlib

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())


class Untested(Exception):
    """A case says nothing of a function, which does not take an option, or raised NotImplementedError."""


def cases(op: str | None = None) -> list:
    """The cases of one op, or of all, each with ``name``, ``op`` and ``check(function, device, placement)``.

    A check raises AssertionError where the function's result is wrong, and :class:`Untested` where the function
    lacks an option that the case sets or raises NotImplementedError. ValueError for what is no op.
    """
    # Here, since a start of pytest imports this file.
    from .implementations import OPS

    files = dict(zip(OPS, ("hashing", "rows", "hash_rows", "gate", "gate_conv"), strict=True))
    if op is not None and op not in files:
        raise ValueError(f"cases: op must be one of {', '.join(OPS)}, got {op!r}")
    chosen = files.values() if op is None else (files[op],)
    return [case for file in chosen for case in importlib.import_module(f".ops.{file}", __name__).cases()]
