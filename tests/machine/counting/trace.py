"""What each warp of a launch did, by line of the PTX: the counters' sums, kept apart for every warp."""

from collections import defaultdict

import numpy as np

from .counters import Counters
from .executed import Trace


class WarpCounters(Counters):
    """Give it to one launch, with all warps in step."""

    def __init__(self):
        super().__init__()
        self._parts = []  # of the CTAs that were executed together: block or (what, line) -> times, by warp

    def begin(self, lanes):
        super().begin(lanes)
        warps = lanes.count // 32
        self._parts.append((warps, defaultdict(lambda: np.zeros(warps, np.int64))))

    def execute(self, lanes, block, steps, mask):
        self._block = block
        self._parts[-1][1][block] += _by_warp(mask, lanes)
        super().execute(lanes, block, steps, mask)

    def guarded(self, lanes, instruction, mask, on):
        super().guarded(lanes, instruction, mask, on)
        self._note(lanes, instruction.line, mask, on)

    def branch(self, lanes, register, mask):
        super().branch(lanes, register, mask)
        end = lanes.kernel.program.blocks[self._block].end
        taken = np.broadcast_to(lanes.values[register], lanes.count)
        self._note(lanes, end.line, mask, ~taken if end.negated else taken)

    def _note(self, lanes, line, mask, on):
        found = self._parts[-1][1]
        every = np.broadcast_to(True if mask is None else mask, lanes.count).reshape(-1, 32)
        some = np.broadcast_to(True if on is None else on, lanes.count).reshape(-1, 32) & every
        found["enabled", line] += some.any(1)
        found["partial", line] += some.any(1) & (every & ~some).any(1)

    def trace(self, kernel) -> Trace:
        """Of the launch of ``kernel`` that it was given to."""
        keys = set().union(*(part for _, part in self._parts))
        arrays = {
            key: np.concatenate([part.get(key, np.zeros(warps, np.int64)) for warps, part in self._parts])
            for key in keys
        }
        warps = sum(warps for warps, _ in self._parts)
        tables = {"executed": {}, "enabled": {}, "partial": {}}
        for block in kernel.program.blocks:
            times = arrays.get(block.index, np.zeros(warps, np.int64))
            for each in [*block.instructions, block.end]:
                if each is not None:
                    tables["executed"][each.line] = times
        for key, times in arrays.items():
            if isinstance(key, tuple):
                tables[key[0]][key[1]] = times
        return Trace(warps, **tables)


def _by_warp(mask, lanes):
    return np.ones(lanes.count // 32, bool) if mask is None else mask.reshape(-1, 32).any(1)
