"""Shared memory of the CTAs that are executed together, and the copies to it that are still on their way."""

import numpy as np

from tests.machine.faults import Fault
from tests.machine.instructions.values import s64, u8

from .memory import item_type

WRITTEN, NEVER, COMING = 0, 1, 2  # of each byte


class Shared:
    """``size`` bytes for each of ``ctas``; addresses begin at 0 in each."""

    def __init__(self, ctas, size, log):
        self.size = size
        self.stride = -(-size // 32) * 32  # of two CTAs' bytes, so that items of all sizes are aligned in all
        self.bytes = np.full(ctas * self.stride, 0xBB, u8)
        self.state = np.full(ctas * self.stride, NEVER, u8)
        self.log = log
        self.pending = []  # under way: (lanes, their numbers, groups, offsets, bytes, undefined bytes, instruction)

    def items(self, offsets, size, lanes, index, what, where):
        """Numbers of the items of ``size`` bytes at the offsets."""
        if (offsets & (size - 1)).any():
            raise Fault("misaligned", f"shared {what} of {size} bytes at {int(offsets[0])}", where.location)
        if (offsets + size > self.size).any():
            text = f"shared {what} of {size} bytes at {int(offsets.max())} of {self.size}"
            raise Fault("out of bounds", text, where.location)
        return (offsets + lanes.pick(lanes.cta, index) * self.stride) // size

    def load(self, offsets, size, lanes, index, where):
        """Items at the offsets, and which of their bytes are undefined, [lanes, size], or None if none is."""
        offsets = offsets.astype(s64)
        at = self.items(offsets, size, lanes, index, "load", where)
        lost = self.state.view(item_type(size)).take(at).view(u8)
        lost = lost.reshape(-1, size) != WRITTEN if lost.any() else None
        if self.log is not None:
            self.log.add("shared memory", "read", offsets, size, lanes, index, None, where)
        return self.bytes.view(item_type(size)).take(at), lost

    def store(self, offsets, data, lost, lanes, index, where):
        """``data`` is bytes, [lanes, size]; ``lost`` says which of them are undefined, or is None."""
        offsets, size = offsets.astype(s64), data.shape[1]
        at = self.items(offsets, size, lanes, index, "store", where)
        self.bytes.view(item_type(size))[at] = data.view(item_type(size))[:, 0]
        if lost is None:
            self.state.view(item_type(size))[at] = np.zeros(1, item_type(size))
        else:
            self.state.view(item_type(size))[at] = np.ascontiguousarray(lost, u8).view(item_type(size))[:, 0]
        if self.log is not None:
            self.log.add("shared memory", "write", offsets, size, lanes, index, data, where)

    def atomic(self, offsets, size, lanes, index, where):
        """[(all items, None for all lanes, numbers of the lanes' items)]"""
        offsets = offsets.astype(s64)
        at = self.items(offsets, size, lanes, index, "atomic", where)
        if self.state.view(item_type(size))[at].any():
            lanes.report("undefined", "atomic on shared memory that nobody has written", where)
        if self.log is not None:
            self.log.add("shared memory", "atomic", offsets, size, lanes, index, None, where)
        return [(self.bytes.view(item_type(size)), None, at)]

    def copy(self, offsets, data, lost, lanes, index, where):
        """Begin a copy by cp.async: the bytes are undefined until their thread has waited for its group."""
        offsets, size = offsets.astype(s64), data.shape[1]
        at = self.items(offsets, size, lanes, index, "cp.async", where)
        self.state.view(item_type(size))[at] = np.full((1, size), COMING, u8).view(item_type(size))[:, 0]
        if self.log is not None:
            self.log.add("shared memory", "write", offsets, size, lanes, index, data, where)
        chosen = np.arange(lanes.count) if index is None else index
        lost = np.zeros(data.shape, bool) if lost is None else lost
        self.pending.append((lanes, chosen, lanes.groups[chosen], offsets, data, lost, where))

    def wait(self, keep, lanes, index):
        """Lanes wait until at most ``keep`` of their last groups are under way; None: for all their copies."""
        waits = np.zeros(lanes.count, bool)
        waits[slice(None) if index is None else index] = True
        left = []
        for owner, chosen, group, offsets, data, lost, where in self.pending:
            done = np.zeros(len(chosen), bool)
            if owner is lanes:
                done = waits[chosen] & (True if keep is None else group < lanes.groups[chosen] - keep)
            if done.any():
                self.store(offsets[done], data[done], lost[done], lanes, chosen[done], where)
            if not done.all():
                rest = (each[~done] for each in (chosen, group, offsets, data, lost))
                left.append((owner, *rest, where))
        self.pending = left
