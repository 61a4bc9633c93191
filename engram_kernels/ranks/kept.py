"""Rows of other ranks that this one asked for before, in bounded memory where its lookups are.

The policy is that of the n-gram cache (reference/cache/simulator.py): one group, with keys of rows for n-grams. All of
it is operations of torch whose sizes do not depend on contents, so that on a GPU the host waits for none of them.
"""

import torch

from engram_kernels.reference.cache.simulator import LAG, TAG_BYTES, WAYS, scramble_tensor, set_of


class RankCache:
    """What one rank keeps: :class:`KeptRows` for each device of its lookups, and the versions of shards it is of.

    versions: of each rank's shard, as all were told in the last lookup; the same on every rank.
    """

    def __init__(self, rows: int, row_bytes: int, nbytes: int, versions: list[int]):
        self._options, self.versions = (rows, row_bytes, nbytes), versions
        self.kept: dict[torch.device, KeptRows] = {}

    def on(self, device: torch.device) -> "KeptRows":
        """Those for lookups on ``device``."""
        if device not in self.kept:
            self.kept[device] = KeptRows(*self._options, device)
        return self.kept[device]

    def forget(self, versions: list[int]) -> None:
        """Keep nothing of before; ``versions`` are those of the shards now."""
        for kept in self.kept.values():
            kept.clear()
        self.versions = versions


def check_cache(where: str, cache_bytes: int, capacity: int | None, row_bytes: int) -> None:
    """Raise ValueError where there can be no cache."""
    if capacity is not None:
        raise ValueError(
            f"{where}: cache_bytes is for lookups without capacity, whose sizes follow from what was missed, "
            f"got capacity {capacity}"
        )
    if cache_bytes < least_bytes(row_bytes):
        raise ValueError(f"{where}: cache_bytes must be at least {least_bytes(row_bytes):,}, got {cache_bytes:,}")


def least_bytes(row_bytes: int) -> int:
    """Memory of one set, and of the entry that takes what is not kept."""
    return (WAYS + 1) * (row_bytes + TAG_BYTES)


class KeptRows:
    """At most ``nbytes`` of rows and their tags, at least :func:`least_bytes`, on ``device``.

    rows: that there are to keep. An entry behind those of the sets takes what finds no way.
    """

    def __init__(self, rows: int, row_bytes: int, nbytes: int, device: torch.device):
        # With two ways for each row hardly any set is full.
        self.sets = min((nbytes // (row_bytes + TAG_BYTES) - 1) // WAYS, max(1, -(-2 * rows // WAYS)))
        self.entries = self.sets * WAYS
        self.keys, self.stamps = torch.zeros(2, self.entries + 1, dtype=torch.int64, device=device)
        # Words where rows have whole ones, as they mostly have: a CPU copies rows of them in less than half the time.
        word = torch.int64 if row_bytes % 8 == 0 else torch.uint8
        self.rows = torch.empty(self.entries + 1, row_bytes // word.itemsize, dtype=word, device=device)
        self._lag = self._clock = LAG * self.entries

    @property
    def nbytes(self) -> int:
        """Of rows, keys and stamps."""
        return self.keys.nbytes + self.stamps.nbytes + self.rows.nbytes

    def clear(self) -> None:
        """Forget all rows."""
        self.stamps.zero_()

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Places in ``rows`` of distinct ``ids [n]``, int64; ``entries`` for those not kept. The others are hits."""
        self._clock += len(ids)
        keys = scramble_tensor(ids)
        sets = set_of(keys, self.sets)
        same = (self._of(self.keys, sets) == keys[:, None]) & (self._of(self.stamps, sets) > 0)
        places = torch.where(same.any(1), sets * WAYS + same.byte().argmax(1), self.entries)
        self.stamps.index_fill_(0, places, self._clock)
        return places

    def keep(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep ``rows [n, row_bytes]``, uint8, of distinct ``ids [n]``, which the last :meth:`find` did not find."""
        keys, order = scramble_tensor(ids).sort()
        sets = set_of(keys, self.sets)
        rank = torch.arange(len(sets), device=sets.device) - torch.searchsorted(sets, sets)  # among those of its set
        stamps = self._of(self.stamps, sets)
        ways = stamps.argsort(dim=1, stable=True).gather(1, rank.clamp(max=WAYS - 1)[:, None])[:, 0]
        fits = rank < (stamps < self._clock).sum(1)
        places = torch.where(fits, sets * WAYS + ways, self.entries)
        try:
            self.keys.index_copy_(0, places, keys)
            self.rows.index_copy_(0, places, rows.view(self.rows.dtype).index_select(0, order))
            self.stamps.index_fill_(0, places, self._clock - self._lag)
        except BaseException:
            self.clear()  # an interrupt may have come between a key and its row
            raise

    def _of(self, entries: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """Those of each set, ``[n, WAYS]``."""
        return entries[:-1].view(self.sets, WAYS).index_select(0, sets)
