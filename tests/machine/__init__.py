"""Execute the PTX that Triton emits on CPU memory, thread by thread.

    kernel = machine.Kernel(compiled.asm["ptx"])
    run = machine.execute(kernel, arguments, grid, shared_bytes, allocations)
    assert not run.reports

The instructions follow the PTX manual (docs.nvidia.com/cuda/parallel-thread-execution). What the executor does not
know is a Fault that names it; nothing is guessed.
"""

from .counting.counters import Counters
from .executor import SCHEDULES, Run, execute
from .faults import KINDS, Fault, Report
from .instructions.values import approximation
from .kernel import Kernel
from .state.memory import Allocation

__all__ = [
    "KINDS",
    "SCHEDULES",
    "Allocation",
    "Counters",
    "Fault",
    "Kernel",
    "Report",
    "Run",
    "approximation",
    "execute",
]
