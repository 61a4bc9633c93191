"""Launches that are executed on the stand-in for a GPU and counted."""

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from tests.machine import execute
from tests.machine.gpu import Machine
from tests.machine.parsing import sass

from .executed import Executed
from .occupancy import programs_in_flight
from .round_trips import RoundTrips, round_trips, way
from .trace import WarpCounters


@dataclass
class LaunchCounts:
    """What one launch executed. Global memory by kind (load, store, atomic), shared memory in all."""

    kernel: str
    programs: int
    warps: int  # of a program
    registers: int
    shared_bytes: int
    in_flight: int  # programs on a multiprocessor at once
    executed: dict[str, int]  # kind -> warp instructions of the machine code
    requests: dict[str, int]
    sectors: dict[str, int]
    distinct_sectors: dict[str, int]
    asked: dict[str, int]  # bytes
    distinct: dict[str, int]  # bytes, each once a request
    shared: dict[str, int]  # requests, wavefronts, conflicts
    chain: int  # global loads in a row that each need the one before, ahead of a thread's first store
    waits: int  # round trips of a warp ahead of its first store
    all_waits: int
    doubts: list[str]

    @property
    def instructions(self) -> int:
        return sum(self.executed.values())

    def as_dict(self) -> dict:
        return asdict(self)


class CountingMachine(Machine):
    """``counts`` has an entry for each launch since :meth:`clear`."""

    def __init__(self, target: str):
        super().__init__(target)
        self.name = target
        self.counts: list[LaunchCounts] = []
        self._programs: dict[bytes, sass.Program] = {}

    def clear(self) -> None:
        self.counts.clear()

    def execute(self, kernel, values, grid, shared_bytes, given, binary):
        """Execute a launch once, with all warps in step, and count it."""
        counters, allocations = WarpCounters(), self.memory.of_launch(given)
        execute(kernel, values, grid, shared_bytes, allocations, races=False, counters=counters)
        if binary not in self._programs:
            self._programs[binary] = sass.disassemble(binary)
        self.counts.append(_counts(self.name, kernel, grid, shared_bytes, self._programs[binary], counters))


def _counts(target, kernel, grid, shared_bytes, program, counters) -> LaunchCounts:
    executed = Executed(program, kernel.program, counters.trace(kernel))
    trips = [round_trips(way(each.flows[0])) for each in executed.classes] or [RoundTrips(0, 0, 0)]
    kinds = ("load", "store", "atomic")
    totals = {
        name: {kind: counters.total(getattr(counters, name), kind) for kind in kinds}
        for name in ("requests", "sectors", "asked", "distinct")
    }
    shared = {
        name: sum(getattr(counters, attribute).values())
        for name, attribute in (("requests", "shared"), ("wavefronts", "wavefronts"), ("conflicts", "conflicts"))
    }
    warps = kernel.threads // 32
    return LaunchCounts(
        kernel=kernel.name,
        programs=int(np.prod(grid)),
        warps=warps,
        registers=program.registers,
        shared_bytes=shared_bytes,
        in_flight=programs_in_flight(target, program.registers, warps, shared_bytes),
        executed=executed.by_kind(),
        **totals,
        distinct_sectors={kind: counters.distinct_sectors(kind) for kind in kinds},
        shared=shared,
        chain=counters.chain,
        waits=max(each.before_store for each in trips),
        all_waits=max(each.total for each in trips),
        doubts=executed.doubts,
    )


def total(counts: list[LaunchCounts], name: str) -> Counter:
    """The sum over launches of one of their dictionaries."""
    found: Counter = Counter()
    for each in counts:
        found.update(getattr(each, name))
    return found
