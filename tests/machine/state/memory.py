"""Global memory: what a launch may touch, and the access of many lanes at once."""

import ctypes
from bisect import bisect_right

import numpy as np

from tests.machine.faults import Fault
from tests.machine.instructions.values import UNSIGNED, s64, u8, u64


def item_type(size):
    """numpy's type for what one access of ``size`` bytes moves."""
    return np.dtype(UNSIGNED[8 * size]) if size <= 8 else np.dtype(f"V{size}")


class Allocation:
    """Bytes from ``address`` on. ``undefined`` has a byte for each of them, not zero where nobody has written yet."""

    def __init__(self, address, size, name, undefined=None, writable=True):
        self.address, self.size, self.name, self.undefined, self.writable = address, size, name, undefined, writable
        buffer = (ctypes.c_uint8 * size).from_address(address) if size else b""
        self.bytes = np.frombuffer(buffer, dtype=u8)
        self._items = {}

    def items(self, size):
        """All aligned items of ``size`` bytes, the offset of the first, and the undefined bytes in the same form."""
        if size not in self._items:
            start = -self.address % size
            stop = start + max(0, self.size - start) // size * size
            parts = [each if each is None else each[start:stop].view(item_type(size)) for each in self._both()]
            self._items[size] = parts[0], start, parts[1]
        return self._items[size]

    def _both(self):
        return self.bytes, self.undefined


class Memory:
    """The allocations of a launch; all else is out of bounds."""

    def __init__(self, allocations):
        self.allocations = sorted((each for each in allocations if each.size), key=lambda each: each.address)
        for one, two in zip(self.allocations, self.allocations[1:], strict=False):
            if one.address + one.size > two.address:
                raise ValueError(f"allocations {one.name} and {two.name} overlap")
        self.starts = [each.address for each in self.allocations]
        self._starts = np.array(self.starts, u64)
        self._sizes = np.array([each.size for each in self.allocations], u64)

    def find(self, addresses, size, what, where):
        """(number of an allocation, which of the addresses lie in it or None for all, their items' numbers), ..."""
        if (addresses & u64(size - 1)).any():
            bad = addresses[(addresses & u64(size - 1)) != 0]
            raise Fault("misaligned", f"{what} of {size} bytes at {int(bad[0]):#x}, {len(bad)} lanes", where.location)
        low, high = int(addresses.min()), int(addresses.max())
        number = bisect_right(self.starts, low) - 1
        if number >= 0 and high + size <= self.starts[number] + self.allocations[number].size:
            return [(number, None, self._items_at(number, addresses, size))]
        numbers = np.searchsorted(self._starts, addresses, side="right").astype(s64) - 1
        held = np.maximum(numbers, 0)
        if not len(self._sizes):
            raise Fault("out of bounds", f"{what} at {low:#x}: the launch has no memory", where.location)
        behind = self._sizes[held]
        inside = (numbers >= 0) & (behind >= u64(size)) & (addresses - self._starts[held] <= behind - u64(size))
        if not inside.all():
            lane = int(np.flatnonzero(~inside)[0])
            near = self.allocations[int(held[lane])]
            offset = int(addresses[lane]) - near.address
            text = f"{what} of {size} bytes at byte {offset} of {near.name}, which has {near.size}"
            raise Fault("out of bounds", f"{text}; {(~inside).sum()} lanes", where.location)
        found = []
        for number in np.unique(numbers):
            chosen = numbers == number
            found.append((int(number), chosen, self._items_at(int(number), addresses[chosen], size)))
        return found

    def _items_at(self, number, addresses, size):
        first = self.starts[number] + -self.starts[number] % size
        return ((addresses - u64(first)) // u64(size)).astype(s64)

    def load(self, addresses, size, lanes, index, where):
        """Items at the addresses, and which of their bytes are undefined, [lanes, size], or None if none is."""
        lanes.require_wait(index, "load", where)
        out, lost = np.empty(len(addresses), item_type(size)), None
        for number, chosen, at in self.find(addresses, size, "load", where):
            items, first, undefined = self.allocations[number].items(size)
            here = slice(None) if chosen is None else chosen
            out[here] = items.take(at)
            if undefined is not None:
                bad = undefined.take(at).view(u8)
                if bad.any():
                    lost = np.zeros((len(addresses), size), bool) if lost is None else lost
                    lost[here] = bad.reshape(-1, size) != 0
            if lanes.log is not None:
                lanes.log.add(number, "read", at * size + first, size, lanes, _part(index, chosen), None, where)
        return out, lost

    def store(self, addresses, data, lanes, index, where):
        """``data`` is bytes, [lanes, size]."""
        lanes.require_wait(index, "store", where)
        size = data.shape[1]
        for number, chosen, at in self.find(addresses, size, "store", where):
            allocation = self.allocations[number]
            if not allocation.writable:
                lanes.report("read only", f"store to {allocation.name}", where)
                continue
            items, first, undefined = allocation.items(size)
            rows = data if chosen is None else data[chosen]
            items[at] = rows.view(items.dtype)[:, 0]
            if undefined is not None:
                undefined[at] = np.zeros(1, items.dtype)
            if lanes.log is not None:
                lanes.log.add(number, "write", at * size + first, size, lanes, _part(index, chosen), rows, where)

    def atomic(self, addresses, size, lanes, index, where):
        """(items of an allocation, which lanes touch it or None for all, their items' numbers), ..."""
        lanes.require_wait(index, "atomic", where)
        found = []
        for number, chosen, at in self.find(addresses, size, "atomic", where):
            allocation = self.allocations[number]
            if not allocation.writable:
                lanes.report("read only", f"atomic on {allocation.name}", where)
                continue
            items, first, undefined = allocation.items(size)
            if undefined is not None and undefined[at].any():
                lanes.report("undefined", f"atomic on {allocation.name} where nobody has written", where)
            if lanes.log is not None:
                lanes.log.add(number, "atomic", at * size + first, size, lanes, _part(index, chosen), None, where)
            found.append((items, chosen, at))
        return found


def _part(index, chosen):
    """Lanes of an access (None for all) that are among those chosen (None for all)."""
    if chosen is None:
        return index
    return np.flatnonzero(chosen) if index is None else index[chosen]
