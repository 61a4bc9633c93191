"""Programmatic dependent launch: a kernel's programs start while the kernel before it still runs, and wait inside.

Each kernel calls :func:`follow_predecessor` before its first access to memory, in every program and ahead of every
branch: what comes before it is arithmetic on arguments and program ids. The wait ends when all programs of the kernel
before have ended and what they wrote can be seen. Parameters too are read after it, since an optimizer or a loader may
have written them just before, and writes come after it, since the kernel before may still read what they replace. As
every program waits, a kernel ends after all those before it, so that to wait for the last of them is enough.

The trigger stands behind the wait. CUDA starts the next kernel once every program of this one has called it or
ended, so none of this one's is left without its place. Ahead of the wait it would let a third kernel start while the
first still runs; kernels of other libraries read weights before they wait, and may rely on what is two launches back to
be done.

The launch option ``launch_pdl`` decides alone: without it the calls compile to nothing.
"""

from functools import lru_cache

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it beside every kernel
from triton.language.extra import cuda
from triton.runtime import driver

from engram_kernels.geometry.kinds import Flag, takes

from .device import INTERPRETING

#: Whether launches from now on are dependent where the GPU can; see :func:`set_dependent_launch`.
chosen = True


@takes(enabled=Flag())
def set_dependent_launch(enabled: bool) -> bool:
    """Whether kernels are launched from now on as dependent on the one before, where the GPU can; returns what was.

    enabled: on at first; ValueError unless it is a bool. It needs CUDA and compute capability 9.0 or higher (sm_90);
    elsewhere nothing changes with it, and results have the same bits either way. It holds for the whole process, for
    launches that were prepared before too. A CUDA graph keeps what was in force at its capture, where dependent
    launches become programmatic edges (CUDA 12.3).
    """
    global chosen
    before, chosen = chosen, enabled
    return before


def dependent_options() -> dict[str, bool]:
    """The option of a launch on the current device: ``launch_pdl``, or nothing where it is off or not known."""
    if INTERPRETING or not chosen:
        return {}
    active = driver.active
    return {"launch_pdl": True} if _can_depend(active, active.get_current_device()) else {}


@lru_cache(maxsize=64)
def _can_depend(active, device: int) -> bool:
    """Whether a driver's current device, of this number, is one of CUDA's from compute capability 9.0 on."""
    target = active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def _follows(_semantic) -> bool:
    # Triton passes its own semantic; the interpreter, which has no launches to wait for, calls without one.
    return _semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False)


def grid_wait(_semantic=None):
    """Wait until the kernel before has ended and its writes can be seen; nothing in a launch without ``launch_pdl``."""
    if _follows(_semantic):
        cuda.gdc_wait(_semantic=_semantic)


def grid_trigger(_semantic=None):
    """Let the next kernel start once all programs are here; nothing in a launch without ``launch_pdl``."""
    if _follows(_semantic):
        cuda.gdc_launch_dependents(_semantic=_semantic)


# Builtins of Triton's language, whose own decorator refuses a call without a semantic.
grid_wait.__triton_builtin__ = grid_trigger.__triton_builtin__ = True


@triton.jit
def follow_predecessor():
    """The wait, then the trigger: before the first access of a kernel to memory, in every program."""
    grid_wait()
    grid_trigger()
