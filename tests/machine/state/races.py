"""Races: accesses of two threads to a byte, at least one of them a store, with nothing that orders them.

Barriers of a CTA order its threads, barriers of a warp the warp's; nothing orders two CTAs of a launch. A shuffle, vote
or reduction waits for the threads of a warp, but promises nothing of memory: of two threads of the warp only a read
before it and a store behind it are in order, since a warp's loads and stores leave it in turn. Stores of the same value
race with each other without harm and are let through, atomics race with stores alone.
"""

from typing import NamedTuple

import numpy as np

from tests.machine.faults import Report
from tests.machine.instructions.values import s64, u8, u64

READ, WRITE, ATOMIC = range(3)
KINDS = {"read": READ, "write": WRITE, "atomic": ATOMIC}
NAMES = ("read", "store", "atomic")
LOOKED_AT = 2000  # bytes of a memory that are looked at one by one, once it is clear that something may be wrong
DENSE = 1 << 24  # granules of a memory that are counted in place
TOLD = 4  # reports of one memory


class Access(NamedTuple):
    kind: int
    offsets: np.ndarray
    size: int
    lanes: object
    index: np.ndarray | None  # None: all lanes
    epoch: np.ndarray
    warp_epoch: np.ndarray
    meetings: np.ndarray
    data: np.ndarray | None  # bytes that were stored, [lanes, size]
    where: object


class Log:
    """All accesses to each memory: an allocation's number, or "shared memory"."""

    def __init__(self):
        self.accesses = {}

    def add(self, memory, kind, offsets, size, lanes, index, data, where):
        passed = lanes.epoch, lanes.warp_epoch, lanes.meetings
        access = Access(KINDS[kind], offsets, size, lanes, index, *passed, data, where)
        self.accesses.setdefault(memory, []).append(access)

    def reports(self, memory, name):
        """Races in one of the memories, which is then forgotten."""
        accesses = self.accesses.pop(memory, [])
        if not any(each.kind == WRITE for each in accesses):
            return []
        table = _Table(accesses)
        found = table.within_ctas()
        if memory != "shared memory":
            found += table.between_ctas()
        return [Report("race", f"{name}: {text}", place) for text, place in found[:TOLD]]


class _Table:
    """Columns, a row for each access of a lane to a granule: the smallest item that any access moves.

    Rows of granules that are stored once and touched by nothing else are left out: most of them.
    """

    def __init__(self, accesses):
        self.accesses = accesses
        self.size = min(each.size for each in accesses)
        granules = [self._granules(each) for each in accesses]
        numbers = np.concatenate(granules)
        if numbers.max() > DENSE:  # of gigabytes a launch touches a few bytes
            numbers = np.unique(numbers, return_inverse=True)[1]
        stored = np.repeat([each.kind == WRITE for each in accesses], [len(each) for each in granules])
        written = np.zeros(int(numbers.max()) + 1, bool)
        written[numbers[stored]] = True
        keep = written[numbers] & (np.bincount(numbers)[numbers] > 1)
        starts = np.cumsum([0] + [len(each) for each in granules])
        parts = [
            self._rows(number, each, granules[number], keep[starts[number] : starts[number + 1]])
            for number, each in enumerate(accesses)
        ]
        columns = [np.concatenate(each) for each in zip(*parts, strict=True)]
        self.granule, self.kind, self.cta, self.thread, self.epoch, self.warp_epoch, self.meetings = columns[:7]
        self.value, self.number = columns[7:]

    def _granules(self, access):
        return ((access.offsets // self.size)[:, None] + np.arange(access.size // self.size)).reshape(-1).astype(s64)

    def _rows(self, number, access, granules, keep):
        rows = np.flatnonzero(keep)
        lane = rows // (access.size // self.size)
        if access.index is not None:
            lane = access.index[lane]
        columns = [granules[rows], np.full(len(rows), access.kind)]
        passed = access.epoch, access.warp_epoch, access.meetings
        for each in (access.lanes.first_cta + access.lanes.cta, access.lanes.thread, *passed):
            columns.append(each[lane].astype(s64))
        value = np.zeros(len(rows), u64)
        if access.data is not None and len(rows):
            value = _digest(access.data, self.size)[rows]
        return [*columns, value, np.full(len(rows), number)]

    def _groups(self, *keys):
        """(order, starts, ends) of the rows that have the same keys."""
        order = np.lexsort(keys[::-1])
        change = np.ones(len(order), bool)
        change[1:] = False
        for key in keys:
            sorted_key = key[order]
            change[1:] |= sorted_key[1:] != sorted_key[:-1]
        starts = np.flatnonzero(change)
        return order, starts, np.append(starts[1:], len(order))

    def _suspects(self, by, *keys):
        """Rows of each group with a store in which ``by`` differs, unless all of it are stores of one value."""
        if not len(self.granule):
            return
        order, starts, ends = self._groups(*keys)
        write = self.kind[order] == WRITE
        stored = np.logical_or.reduceat(write, starts)
        mixed = np.logical_or.reduceat(~write, starts)
        several = _differs(by[order], starts) & stored
        several &= mixed | _differs(self.value[order], starts)
        for group in np.flatnonzero(several)[:LOOKED_AT]:
            yield order[starts[group] : ends[group]]

    def _text(self, one, two, what):
        kinds = [NAMES[self.kind[each]] for each in (one, two)]
        who = [f"thread {self.thread[each]} of CTA {self.cta[each]}" for each in (one, two)]
        text = f"{kinds[0]} by {who[0]} and {kinds[1]} by {who[1]} of byte {self.granule[one] * self.size}, {what}"
        places = [self.accesses[self.number[each]].where.location for each in (one, two)]
        return text, " and ".join(dict.fromkeys(places))

    def within_ctas(self):
        """Between two barriers of a CTA; races of two warps come first."""
        found = {}
        for rows in self._suspects(self.thread, self.cta, self.granule, self.epoch):
            for write in rows[self.kind[rows] == WRITE][:4]:
                other = rows[self.thread[rows] != self.thread[write]]
                near = self.thread[other] // 32 == self.thread[write] // 32
                in_turn = (self.kind[other] == READ) & (self.meetings[other] < self.meetings[write])
                other = other[~(near & (in_turn | (self.warp_epoch[other] != self.warp_epoch[write])))]
                other = other[~((self.kind[other] == WRITE) & (self.value[other] == self.value[write]))]
                if not len(other):
                    continue
                far = other[self.thread[other] // 32 != self.thread[write] // 32]
                one = far[0] if len(far) else other[0]
                what = "two warps without a barrier between" if len(far) else "one warp without a barrier between"
                text, place = self._text(one, write, what)
                found.setdefault((not len(far), place), text)
        return [(text, place) for (_, place), text in sorted(found.items())]

    def between_ctas(self):
        found = {}
        for rows in self._suspects(self.cta, self.granule):
            for write in rows[self.kind[rows] == WRITE][:4]:
                other = rows[self.cta[rows] != self.cta[write]]
                other = other[~((self.kind[other] == WRITE) & (self.value[other] == self.value[write]))]
                if len(other):
                    text, place = self._text(other[0], write, "two CTAs of one launch")
                    found.setdefault(place, text)
        return [(text, place) for place, text in found.items()]


def _differs(values, starts):
    """Of each group whether not all of its values are the same."""
    return np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts)


def _digest(data, size):
    """A number for each granule of the bytes: the bytes themselves up to 8, a mix of them above."""
    parts = np.ascontiguousarray(data).view(u8).reshape(-1, size)
    if size <= 8:
        return parts.view(f"u{size}")[:, 0].astype(u64)
    words = parts.view(u64)
    mix = np.zeros(len(words), u64)
    for place in range(words.shape[1]):
        mix = mix * u64(0x9E3779B97F4A7C15) + words[:, place]
    return mix
