"""Execute the CTAs of a launch on a CPU: many at once, each thread a lane, and report what no GPU would say.

An executed launch says nothing of time, caches, streams or what ptxas makes of the PTX.
"""

from dataclasses import dataclass, field

import numpy as np

from .faults import Fault, Report
from .instructions.values import UNSIGNED, f32, f64, u32, u64
from .state.lanes import Lanes
from .state.memory import Memory
from .state.races import Log
from .state.shared import Shared

LANES = 1 << 15  # threads that are executed at once
SCHEDULES = (None, "up", "down")


@dataclass
class Run:
    """``executed`` counts instructions, each for all the lanes that it was executed for at once."""

    reports: list[Report] = field(default_factory=list)
    executed: int = 0


class Launch:
    """What all CTAs of a launch have in common."""

    def __init__(self, kernel, arguments, grid, memory, log, counters):
        self.kernel, self.grid, self.memory, self.log, self.counters = kernel, grid, memory, log, counters
        self.reports = []
        if len(arguments) != len(kernel.parameters):
            names = [name for _, name in kernel.parameters]
            raise ValueError(f"{kernel.name} has {len(names)} parameters, {names}, and got {len(arguments)} arguments")
        self.arguments = {
            name: _argument(kind, value) for (kind, name), value in zip(kernel.parameters, arguments, strict=True)
        }


def _argument(kind, value):
    """An array of one item with the bits of a parameter."""
    bits = int(kind[1:])
    if kind[0] == "f":
        return np.array([value], f64 if bits == 64 else f32).view(u64 if bits == 64 else u32)
    if isinstance(value, float):
        raise TypeError(f"parameter of type {kind} got {value!r}")
    return np.array([int(value) & (1 << bits) - 1], UNSIGNED[bits])


def execute(kernel, arguments, grid, shared_bytes, allocations, *, schedule=None, races=True, counters=None):
    """Run every CTA of ``grid`` and return a Run.

    ``arguments`` are integers and floats, one for each parameter. ``allocations`` are all the memory that the launch
    may touch; kernels change it in place. ``schedule`` None takes all warps in step; "up" and "down" let each warp run
    alone to its next barrier, the lowest or the highest first. ``counters`` is an object as :class:`counters.Counters`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule has to be one of {SCHEDULES}, not {schedule!r}")
    grid = (*grid, 1, 1, 1)[:3]
    memory, log = Memory(allocations), Log() if races else None
    launch = Launch(kernel, arguments, grid, memory, log, counters)
    total, step = grid[0] * grid[1] * grid[2], max(1, LANES // kernel.threads)
    run = Run(launch.reports)
    try:
        for first in range(0, total, step):
            run.executed += _run_ctas(launch, range(first, min(total, first + step)), shared_bytes, schedule)
            if log:
                launch.reports += log.reports("shared memory", "shared memory")
    except Fault as fault:
        fault.reports = [*launch.reports, fault.report]
        raise
    if log:
        for number, allocation in enumerate(memory.allocations):
            launch.reports += log.reports(number, allocation.name)
    return run


def _run_ctas(launch, ctas, shared_bytes, schedule):
    """Execute some CTAs to their ends, from barrier to barrier; returns how many instructions that took."""
    warps = -(-launch.kernel.threads // 32)
    shared = Shared(len(ctas), shared_bytes, launch.log)
    together = [range(warps)] if schedule is None else [range(warp, warp + 1) for warp in range(warps)]
    every = [Lanes(launch, ctas, each, shared) for each in (together[::-1] if schedule == "down" else together)]
    if launch.counters is not None:
        for lanes in every:
            launch.counters.begin(lanes)
    while True:
        for lanes in every:
            lanes.run()
        if not _release(launch, every):
            break
    if launch.counters is not None:
        for lanes in every:
            launch.counters.end(lanes)
    return sum(lanes.executed for lanes in every)


def _release(launch, every):
    """Let the threads go on that wait at a barrier; whether there were any."""
    waiting = [lanes.waiting for lanes in every]
    if not any((each >= 0).any() for each in waiting):
        return False
    at = np.concatenate([each.reshape(lanes.ctas, -1) for each, lanes in zip(waiting, every, strict=True)], 1)
    blocks = launch.kernel.program.blocks
    if (at != at[:, :1]).any():
        for cta in np.flatnonzero((at != at[:, :1]).any(1)):
            places = [int(each) for each in np.unique(at[cta]) if each >= 0]
            ends = [blocks[each].end for each in places]
            if len({end.operands[0] for end in ends}) > 1:
                raise Fault("deadlock", "threads of a CTA wait at barriers of several numbers", ends[0].location)
            where = f"CTA {every[0].first_cta + cta}"
            left = (at[cta] < 0).sum()
            if left:
                every[0].report("barrier", f"{where}: {left} threads have left instead of waiting", ends[0])
            if len(ends) > 1:
                other = ends[1].location
                every[0].report("barrier", f"{where}: some threads wait here, others at {other}", ends[0])
    for lanes in every:
        waits = lanes.waiting >= 0
        # All threads of a CTA with a barrier are one epoch on, those that have left too: it is the CTA's.
        passed = np.repeat((at >= 0).any(1), lanes.threads).astype(np.int32)
        lanes.epoch, lanes.warp_epoch = lanes.epoch + passed, lanes.warp_epoch + passed
        lanes.waiting = np.where(waits, -1, lanes.waiting)
        if lanes.counters is not None:
            lanes.counters.barrier(lanes)
    return True
