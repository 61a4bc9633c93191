"""Threads that are executed together, each a lane of numpy arrays: their registers, and where they stand."""

import numpy as np

from tests.machine.faults import Fault, Report
from tests.machine.instructions.values import UNSIGNED, s32, s64, u8, u32
from tests.machine.parsing.flow import EXIT

NEVER_WRITTEN = {1: np.array([True]), 8: np.array([0xBD], u8)} | {
    bits: np.array([0x7FBADBAD7FBADBAD & (1 << bits) - 1], UNSIGNED[bits]) for bits in (16, 32, 64)
}
LOST = np.array([True])
BLOCKS = 1_000_000  # executed by one set of lanes before the launch is called endless


class Lanes:
    """Warps ``warps`` (a range) of each of ``ctas`` (a range of the grid's).

    A register holds one item where all lanes have the same, else one for each lane; its undefined lanes are marked in
    ``undefined``, None where none is. Arrays are never changed in place.
    """

    def __init__(self, launch, ctas, warps, shared):
        self.launch, self.kernel, self.memory, self.shared = launch, launch.kernel, launch.memory, shared
        self.log, self.counters = launch.log, launch.counters
        self.threads = 32 * len(warps)  # of a CTA that are in here
        self.ctas, self.count = len(ctas), len(ctas) * self.threads
        self.thread = np.tile(np.arange(32 * warps.start, 32 * warps.stop, dtype=u32), self.ctas)
        self.cta = np.repeat(np.arange(self.ctas, dtype=s64), self.threads)
        self.first_cta = ctas.start
        self.lane = self.thread & u32(31)
        self.values, self.undefined = [], []
        self.epoch = np.zeros(self.count, s32)  # barriers passed
        self.warp_epoch = np.zeros(self.count, s32)  # those and the warp's own
        self.meetings = np.zeros(self.count, s32)  # shuffles, votes and reductions, which wait for the warp's threads
        self.groups = np.zeros(self.count, s32)  # of cp.async that were committed
        self.place = np.zeros(self.count, s64)  # block of each lane, unless all are in the block ``together``
        self.together = 0
        self.waiting = np.full(self.count, -1, s64)  # the block whose barrier a lane waits at
        self.blocks = self.executed = 0
        self.early = (
            np.ones(self.count, bool) if self.kernel.dependent else None
        )  # lanes yet to wait for the kernel before

    # ---- registers
    def grow(self):
        """Registers and constants that blocks translated since brought in."""
        for each in self.kernel.initial[len(self.values) :]:
            unwritten = isinstance(each, int)
            self.undefined.append(LOST if unwritten else None)
            self.values.append(
                NEVER_WRITTEN[each] if unwritten else self.special(each) if isinstance(each, str) else each
            )

    def special(self, name):
        """A special register: %tid.x, %ctaid.y and so on."""
        grid = self.launch.grid
        number = self.first_cta + self.cta
        parts = number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])
        zero, one = np.zeros(1, u32), np.ones(1, u32)
        found = {"%laneid": self.lane, "%warpid": self.thread // u32(32)}
        threads = np.array([self.kernel.threads], u32)
        for axis, letter in enumerate("xyz"):
            found[f"%tid.{letter}"] = zero if axis else self.thread
            found[f"%ntid.{letter}"] = one if axis else threads
            found[f"%ctaid.{letter}"] = parts[axis].astype(u32)
            found[f"%nctaid.{letter}"] = np.array([grid[axis]], u32)
        return found[name]

    def put(self, target, value, lost, mask):
        """Write a register, in the lanes of the mask (None: in all)."""
        if mask is None:
            self.values[target], self.undefined[target] = value, lost
            return
        self.values[target] = np.where(mask, value, self.values[target])
        old = self.undefined[target]
        if lost is not None or old is not None:
            lost = np.where(mask, False if lost is None else lost, False if old is None else old)
            self.undefined[target] = lost if lost.any() else None

    def fill(self, target, value, lost, index):
        """Write a register in lanes given by number (None: in all), one item each."""
        if index is None or len(index) == self.count:
            self.values[target], self.undefined[target] = value, lost
            return
        new = np.array(np.broadcast_to(self.values[target], self.count))
        new[index] = value
        self.values[target] = new
        old = self.undefined[target]
        if lost is not None or old is not None:
            marks = np.zeros(self.count, bool) if old is None else np.array(np.broadcast_to(old, self.count))
            marks[index] = False if lost is None else lost
            self.undefined[target] = marks if marks.any() else None

    def pick(self, array, index):
        """An item of each lane, by number; None: of all lanes."""
        if len(array) == 1:
            return array.repeat(self.count if index is None else len(index))
        return array if index is None else array[index]

    def numbers(self, mask):
        """Numbers of the mask's lanes, None for all."""
        return None if mask is None else np.flatnonzero(mask)

    # ---- reports
    def report(self, kind, text, where):
        self.launch.reports.append(Report(kind, text, where.location))

    def require(self, register, mask, what, where):
        """The register has to be defined in these lanes."""
        lost = self.undefined[register]
        if lost is None:
            return
        bad = np.broadcast_to(lost if mask is None else lost & mask, self.count)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            cta, thread = self.first_cta + self.cta[lane], self.thread[lane]
            self.report("undefined", f"{what}, {bad.sum()} lanes, first thread {thread} of CTA {cta}", where)

    def wait_for_predecessor(self, mask):
        """griddepcontrol.wait, in the lanes of the mask."""
        if self.early is not None:
            self.early = None if mask is None else self.early & ~mask
            if self.early is not None and not self.early.any():
                self.early = None

    def require_wait(self, index, what, where):
        """Lanes given by number (None: all) have waited for the kernel before, in a launch that depends on it."""
        if self.early is None:
            return
        bad = self.early if index is None else self.early[index]
        if bad.any():
            self.report("dependence", f"{what} before the wait for the kernel before, {bad.sum()} lanes", where)

    def whole_warps(self, mask, where, needed=False):
        """Instructions of a warp are for all of its threads; ``needed``: nothing can be said of a part."""
        self.meetings = self.meetings + (1 if mask is None else mask.astype(s32))
        if mask is not None:
            warps = mask.reshape(-1, 32)
            if (warps.any(1) != warps.all(1)).any():
                text = f"{where.opcode} with a part of a warp"
                if needed:
                    raise Fault("divergent", text, where.location)
                self.report("divergent", text, where)

    # ---- control
    def run(self):
        """Execute until every lane waits at a barrier or has left."""
        with np.errstate(all="ignore"):
            self._run()

    def _run(self):
        rank, kernel = self.kernel.ranks, self.kernel
        while True:
            block, mask = self.together, None
            if block is None:
                ready = (self.waiting < 0) & (self.place != EXIT)
                if not ready.any():
                    return
                here = self.place[ready]
                block = int(here[rank[here].argmin()])
                mask = ready & (self.place == block)
                if mask.all():
                    self.together, mask = block, None
            elif block == EXIT:
                return
            steps = kernel.steps(block)
            if len(self.values) < len(kernel.initial):
                self.grow()
            self.blocks += 1
            self.executed += len(steps) + 1
            if self.blocks > BLOCKS:
                raise Fault("deadlock", f"{kernel.name} has not ended after {BLOCKS} blocks")
            if self.counters is None:
                for step in steps:
                    step(self, mask)
            else:
                self.counters.execute(self, block, steps, mask)
            self._leave(block, kernel.program.blocks[block].end, mask)

    def _leave(self, block, end, mask):
        """Go to the block that follows."""
        after = block + 1
        name = "" if end is None else end.opcode.split(".")[0]
        if name == "trap":
            raise Fault("trap", "the kernel stops itself", end.location)
        if name in ("bar", "barrier"):
            if end.guard or len(end.operands) != 1 or not end.operands[0].isdigit():
                raise Fault("unknown", f"barrier {end}", end.location)
            self.whole_warps(mask, end)
            self._go(after, mask)
            self._scatter()
            self.waiting = np.where(True if mask is None else mask, block, self.waiting)
            return
        target = {"": after, "ret": EXIT, "exit": EXIT}.get(name)
        if target == EXIT:
            self.require_wait(self.numbers(mask), "end", end)
        if name == "bra":
            target = self.kernel.program.labels[end.operands[0]]
        if end is None or end.guard is None:
            self._go(target, mask)
            return
        register = self.kernel.register(end.guard, end.scope)
        self.require(register, mask, "predicate of a branch", end)
        if self.counters is not None:
            self.counters.branch(self, register, mask)
        taken = self.values[register]
        taken = ~taken if end.negated else taken
        if mask is None and taken.all():
            self._go(target, None)
        elif mask is None and not taken.any():
            self._go(after, None)
        else:
            self._scatter()
            places = np.where(taken, target, after)
            self.place = np.where(mask, places, self.place) if mask is not None else places

    def _go(self, target, mask):
        if mask is None:
            self.together = target
        else:
            self.place = np.where(mask, target, self.place)

    def _scatter(self):
        """Lanes go ways of their own."""
        if self.together is not None:
            self.place, self.together = np.full(self.count, self.together, s64), None
