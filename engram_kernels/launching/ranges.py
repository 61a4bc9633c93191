"""Named ranges around groups of launches, for torch's profiler. Off at first, where they cost kept launches nothing.

A kept launch is wrapped when it is made, or not, so that it never asks. The switch therefore forgets what is kept.
"""

from collections.abc import Callable

from torch.compiler import is_compiling
from torch.profiler import record_function

from engram_kernels.geometry.kinds import Flag, takes

from .launch import Kept

#: Whether there are ranges; see :func:`set_ranges`.
chosen = False


@takes(enabled=Flag())
def set_ranges(enabled: bool) -> bool:
    """Whether launches from now on stand in ranges ``engram.<name>`` of torch's profiler; returns what was.

    enabled: off at first; ValueError unless it is a bool. A range is what one call launches, from the first launch to
    the last; its checks come before. The switch holds for the whole process. A change forgets the launches that were
    kept, so that the next call of each form prepares its own again, though nothing is compiled again. Graphs of
    torch.compile have ranges where ops of this package run in them, replays of CUDA graphs have none. docs/metrics.md
    has all names.
    """
    global chosen
    before, chosen = chosen, enabled
    if before != enabled:
        Kept.forget()
    return before


def ranged(name: str, function: Callable) -> Callable:
    """``function``, which is called once or kept; where ranges are on now, in one called ``engram.<name>``."""
    if is_compiling() or not chosen:  # in this order, or a graph would depend on the switch
        return function

    def run(*args, **kwargs):
        with record_function(f"engram.{name}"):
            return function(*args, **kwargs)

    return run
