"""Count what a launch executes: warps a block, memory requests, bank conflicts, chains of dependent loads.

Units: a *request* is one instruction of one warp with a lane enabled. A *sector* is an aligned piece of 32 bytes,
counted in each request that touches it. A *wavefront* is one pass over the 32 banks of shared memory, 4 bytes each; a
request of 8 or 16 bytes a lane takes two or four at least, and those above the least are conflicts.
"""

from collections import Counter

import numpy as np

from tests.machine.instructions.translation import enabled
from tests.machine.instructions.values import s16, s64, u64

SECTOR, BANKS = 32, 32


class Counters:
    """Sums over all launches that it is given to. Give it with all warps in step: ``schedule=None``.

    ``warps``: Counter, block number -> warps that executed it, by kernel: ``warps[kernel, block]``.
    ``off``: Counter, (kernel, PTX line) -> warps that issued the instruction with no lane's predicate set.
    ``requests``, ``sectors``, ``asked`` (bytes of enabled lanes), ``distinct`` (bytes, each once a request): Counters
    by (kind, PTX line), kind one of load, store, atomic. ``widths``: requests by (kind, bytes a lane).
    ``shared``, ``wavefronts``, ``conflicts``: Counters by (kind, PTX line), of requests to shared memory.
    ``chain``: the most global loads in a row that each need the one before, ahead of any thread's first store.
    ``deepest``: the same ahead of any store.
    """

    def __init__(self):
        self.warps, self.off, self.widths = Counter(), Counter(), Counter()
        self.requests, self.sectors, self.asked, self.distinct = Counter(), Counter(), Counter(), Counter()
        self.shared, self.wavefronts, self.conflicts = Counter(), Counter(), Counter()
        self.chain = self.deepest = self.ctas = 0
        self._sectors = {"load": [], "store": [], "atomic": []}
        self._depths = {}
        self._line = 0

    def total(self, counter, kind):
        """Sum over the lines of a counter by (kind, line)."""
        return sum(count for (each, _), count in counter.items() if each == kind)

    def distinct_sectors(self, kind):
        """Sectors that requests of a kind touched, each once."""
        found = self._sectors[kind]
        if len(found) > 1:
            found[:] = [np.unique(np.concatenate(found))]
        return len(found[0]) if found else 0

    def instructions(self, kernel):
        """PTX line -> warps that issued its instructions, with lanes enabled or not."""
        found = Counter()
        for block in kernel.program.blocks:
            for each in [*block.instructions, block.end]:
                if each is not None:
                    found[each.line] = max(found[each.line], self.warps[kernel, block.index])
        return found

    # ---- called by the executor
    def begin(self, lanes):
        self._depths[lanes] = _Depths(lanes)
        self.ctas += lanes.ctas

    def end(self, lanes):
        depths = self._depths.pop(lanes)
        self.chain = max(self.chain, int(depths.first.max()))

    def execute(self, lanes, block, steps, mask):
        """Execute a block's instructions for the lanes of the mask, and count them."""
        depths, kernel = self._depths[lanes], lanes.kernel
        warps = _warps(mask, lanes)
        self.warps[kernel, block] += warps
        for instruction, step in zip(kernel.program.blocks[block].instructions, steps, strict=True):
            on = mask
            if instruction.guard is not None:
                register = kernel.register(instruction.guard, instruction.scope)
                on = enabled(lanes, instruction, register, mask)
                self.guarded(lanes, instruction, mask, on)
            self._line = instruction.line
            depths.before(instruction)
            step(lanes, mask)
            if on is None or on.any():
                depths.after(instruction, on)
                if instruction.opcode.startswith(("st.global", "red.global", "atom.global")):
                    self.deepest = max(self.deepest, depths.store(instruction, on))

    def guarded(self, lanes, instruction, mask, on):
        """An instruction with a predicate: ``on`` are the lanes of ``mask`` that have it enabled."""
        self.off[lanes.kernel, instruction.line] += _warps(mask, lanes) - _warps(on, lanes)

    def branch(self, lanes, register, mask):
        self._depths[lanes].branch(register, mask)

    def barrier(self, lanes):
        self._depths[lanes].barrier()

    def access(self, lanes, space, kind, addresses, size, index):
        """Addresses of an access of ``size`` bytes a lane, in the lanes given by number, None for all."""
        index = np.arange(lanes.count) if index is None else index
        if space == "shared":
            offsets = addresses.astype(s64)
            self._depths[lanes].shared(kind, offsets, size, index)
            if kind != "copy":
                waves, least = wavefronts(offsets, size, index)
                key = kind, self._line
                self.shared[key] += len(np.unique(index // 32))
                self.wavefronts[key] += waves
                self.conflicts[key] += waves - least
            return
        warp, key = (index // 32).astype(u64) << u64(50), (kind, self._line)
        requests = len(np.unique(warp))
        self.requests[key] += requests
        self.widths[kind, size] += requests
        self.sectors[key] += len(np.unique(warp | (addresses >> u64(5))))
        self.asked[key] += len(index) * size
        self.distinct[key] += len(np.unique(warp | (addresses & u64((1 << 50) - 1)))) * size
        self._sectors[kind].append(np.unique(addresses >> u64(5)))
        if len(self._sectors[kind]) > 64:
            self.distinct_sectors(kind)


def _warps(mask, lanes):
    return lanes.count // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())


def wavefronts(offsets, size, lanes):
    """(wavefronts, least wavefronts) of a request to shared memory.

    Lanes are taken 32 at a time for up to 4 bytes, 16 for 8, 8 for 16. Of the words that fall into one bank each
    different one takes a wavefront of its own.
    """
    words = max(1, size // 4)
    together = lanes // (32 // words)
    word = (offsets // 4)[:, None] + np.arange(words)
    key = np.unique(together[:, None] << 32 | word)
    bank, count = np.unique(key >> 32 << 5 | key % BANKS, return_counts=True)
    starts = np.flatnonzero(np.r_[True, bank[1:] >> 5 != bank[:-1] >> 5])
    return int(np.maximum.reduceat(count, starts).sum()), len(starts)


class _Depths:
    """Of each register and lane: how many global loads had to come back, one after the other, to know it."""

    def __init__(self, lanes):
        self.lanes, self.count = lanes, lanes.count
        self.of = {}
        self.control = np.zeros(1, s16)  # of the branches that a lane's warp has passed
        self.words = np.zeros(len(lanes.shared.bytes) // 4 + 4, s16)  # of shared memory, each 4 bytes
        self.first = np.zeros(self.count, s16)  # of the first store of each lane
        self.stored = np.zeros(self.count, bool)
        self.now, self.read = None, None

    def _deepest(self, registers):
        depth = np.zeros(1, s16)
        for each in registers:
            if each in self.of:
                depth = np.maximum(depth, self.of[each])
        return depth

    def _warp(self, depth):
        depth = np.broadcast_to(depth, self.count).reshape(-1, 32).max(1)
        return np.repeat(depth, 32)

    def before(self, instruction):
        """What the instruction stores to shared memory is as deep as this; cp.async loads it first."""
        self.now = self._deepest(instruction.sources)
        if instruction.opcode.startswith("cp.async.c"):
            self.now = np.maximum(self.now, self.control) + s16(1)
        self.read = np.zeros(self.count, s16)

    def after(self, instruction, mask):
        if not instruction.targets:
            return
        depth, name = self.now, instruction.opcode.split(".")[0]
        if instruction.opcode.startswith(("ld.global", "atom.global")):
            depth = np.maximum(depth, self.control) + s16(1)
        elif name in ("ld", "ldmatrix", "atom") and not instruction.opcode.startswith("ld.param"):
            depth = np.maximum(depth, self._warp(self.read) if name == "ldmatrix" else self.read)
        elif name in ("shfl", "vote", "redux"):
            depth = self._warp(depth)
        for target in instruction.targets:
            old = self.of.get(target, np.zeros(1, s16))
            self.of[target] = depth if mask is None else np.where(mask, depth, old)

    def shared(self, kind, offsets, size, index):
        words = (offsets + self.lanes.pick(self.lanes.cta, index) * self.lanes.shared.stride) // 4
        words = words[:, None] + np.arange(max(1, size // 4))
        if kind != "load":
            self.words[words] = np.broadcast_to(self.now, self.count)[index][:, None]
        if kind in ("load", "atomic"):
            np.maximum.at(self.read, index, self.words[words].max(1))

    def store(self, instruction, mask):
        """The depth of a store, which may be a lane's first."""
        depth = np.broadcast_to(np.maximum(self._deepest(instruction.sources), self.control), self.count)
        new = ~self.stored if mask is None else ~self.stored & mask
        self.first = np.where(new, depth, self.first)
        self.stored |= new
        return int(depth.max() if mask is None else depth[mask].max())

    def branch(self, register, mask):
        """A branch on what was loaded makes all that follows in the warp as deep."""
        depth = np.broadcast_to(self.of.get(register, np.zeros(1, s16)), self.count)
        if depth.any():
            self.control = np.maximum(self.control, self._warp(np.where(mask, depth, 0) if mask is not None else depth))

    def barrier(self):
        """Every warp of a CTA waits for the deepest."""
        if self.control.any():
            depth = np.broadcast_to(self.control, self.count).reshape(self.lanes.ctas, -1).max(1)
            self.control = np.repeat(depth, self.lanes.threads)
