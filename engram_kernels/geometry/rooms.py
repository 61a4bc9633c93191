"""The modules of a room as attributes of it, whatever was used before: imported when they are first asked for."""

import importlib
import types
from importlib.util import find_spec
from typing import Any


def find_modules(room: dict[str, Any]) -> None:
    """Let the room with these globals find its modules, such as ``engram_kernels.nn.warmup`` of ``engram_kernels.nn``.

    Python by itself finds those that something has imported. To type checkers a name that is not there stays an error.
    """
    name = room["__name__"]

    def find(module: str) -> types.ModuleType:
        if module.startswith("_") or not module.isidentifier() or find_spec(f"{name}.{module}") is None:
            raise AttributeError(f"module {name!r} has no attribute {module!r}")
        return importlib.import_module(f"{name}.{module}")

    room["__getattr__"] = find
