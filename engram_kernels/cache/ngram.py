"""The hot n-gram cache: rows of n-grams that are asked for often, in device memory, to be read from there.

What is kept and what makes room for it is specified by reference/cache/simulator.py, in whole numbers, so that hits can
be predicted exactly. store.py has the memory, lookup.py the launches, contents.py statistics and files, policy.py when
it pays; docs/cache.md says why no reader sees half an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from engram_kernels.geometry.kinds import Function, Optional, Tensor, takes
from engram_kernels.geometry.kinds import Path as PathKind

from .contents import CacheStats, load_keys, read_stats, save_keys, warm_up
from .lookup import launch_cached_lookup
from .store import COUNTS, CacheStore


@dataclass(frozen=True)
class CacheUse(CacheStats):
    """Also what went past the cache, as calls of fewer than ``min_tokens`` tokens do; without replays of graphs."""

    min_tokens: int
    bypassed_calls: int
    bypassed_tokens: int

    def __str__(self) -> str:
        past = f"{self.bypassed_calls:,} calls of {self.bypassed_tokens:,} tokens"
        return f"{super().__str__()}\npast the cache, with fewer than min_tokens = {self.min_tokens:,}: {past}"


class NgramCache(CacheStore):
    """Rows of hot n-grams in the memory of the plan's device, for ``hash_lookup(..., plan, tables, cache=cache)``.

    plan, tables: the :class:`HashPlan`, and one table per layer of it; a cache is for these objects alone.
    entries: n-grams that are kept of each order in each layer; or bytes: device memory for all of it. Whole sets are
    used, so that it may be a little less: see ``entries`` and ``nbytes``.
    ways: entries of a set, a power of two up to 32.
    min_tokens: calls with fewer tokens go past the cache and leave it as it is; None is :func:`fewest_tokens`.

    Results have the same bits with and without a cache. Calls from several streams take turns by an event; not for
    two threads at once. Keep it, like any buffer, for as long as a CUDA graph that uses it is replayed.
    ValueError unless all orders 2 to N have equally many columns, for float64 rows, and for staged tables on a GPU.
    """

    def stats(self) -> CacheUse:
        """Counts by layer and order, and of what went past it; printable. Waits for the GPU, where lookups count."""
        stats = read_stats(self)
        counts = {field.name: getattr(stats, field.name) for field in fields(stats)}
        past = dict(bypassed_calls=self.bypassed_calls, bypassed_tokens=self.bypassed_tokens)
        return CacheUse(**counts, min_tokens=self.min_tokens, **past)

    def metrics(self) -> dict[str, int]:
        """:meth:`stats` in sums over layers and orders, for a scraper.

        asked, hits, read, inserted, evicted: n-grams, as :class:`CacheStats` has them, replays of graphs included.
        read_bytes, saved_bytes: read from the tables, and not read. bypassed_calls, bypassed_tokens: past the cache,
        without replays. used, entries: n-grams that it holds and has room for, of all orders and layers. nbytes: of it.

        The device's counters are read now, for which the host waits for the GPU's current stream; lookups under way on
        other streams may be in part of them. Another thread may ask, but none while a CUDA graph is captured.
        """
        self._buffers.check("NgramCache.metrics")
        # Without in_order(), whose event is the thread's that looks up: whoever only reads orders nothing.
        state = self._state
        counted = torch.cat([state.counts.sum(1), (state.stamps > 0).sum()[None]]).tolist()
        counts = dict(zip((*COUNTS, "used"), counted, strict=True))
        asked, read = counts["asked"], counts["read"]
        moved = dict(read_bytes=read * self.entry_bytes, saved_bytes=(asked - read) * self.entry_bytes)
        past = dict(bypassed_calls=self.bypassed_calls, bypassed_tokens=self.bypassed_tokens)
        return counts | moved | past | dict(entries=self._groups * self.entries, nbytes=self.nbytes)

    @takes(token_ids=Tensor(torch.int32, torch.int64), progress=Optional(Function()))
    def warm(self, token_ids: torch.Tensor, *, progress: Callable[[int, int], object] | None = None) -> None:
        """Fill it with the n-grams of ``token_ids``, ``[T]`` one sequence or ``[B, S]`` each row one; counts stay.

        progress: called with (tokens done, all). ValueError for ids that are not on the cache's device.
        """
        warm_up(self, token_ids, progress)

    @takes(path=PathKind())
    def save(self, path: str | Path) -> Path:
        """Write the keys that it holds, not their rows, to ``path``, for :meth:`load`; whole or not at all.

        OSError where it cannot be written, ValueError where another kind of file is there.
        """
        return save_keys(self, path)

    @takes(path=PathKind())
    def load(self, path: str | Path) -> None:
        """Hold the keys of file ``path`` instead of what it holds now; rows are read from the tables.

        The file may come from a cache of another size: of a set's keys the most recently used ones stay. ValueError
        where it was written for a plan that hashes differently.
        """
        load_keys(self, path)

    def look_up(self, tokens, view, reading, out) -> None:
        """Launch what reads the rows of ``tokens`` into ``out``; :func:`hash_lookup` calls it."""
        launch_cached_lookup(self, tokens, view, reading, out)

    def __repr__(self) -> str:
        return (
            f"NgramCache({self._groups} groups of {self.entries:,} entries in {self.ways} ways, "
            f"{self.nbytes / 1e9:.3g} GB on {self.plan.device})"
        )
