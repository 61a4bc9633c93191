"""The memory of an n-gram cache: its entries, made once, emptied where tables change, used by one stream at a time.

    entry    the rows, in the tables' format, of all columns of one order that an n-gram has in one layer
    bytes    groups x entries x (heads x (row + scale bytes) + 16)       (16: a key and a stamp)

G groups, one for each layer and order (layer * (N - 1) + order - 2); S sets of W ways each, so that a group has S * W
entries.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from engram_kernels.geometry.choices import Ways
from engram_kernels.geometry.kinds import Each, Instance, OneOf, Optional, Whole, declares, takes
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.buffers import Buffers
from engram_kernels.launching.device import takes_kernels
from engram_kernels.launching.streams import streams_of
from engram_kernels.ops.row_kernels.arguments import check_tables_of_plan, is_staged
from engram_kernels.ops.row_kernels.caching import RowCache
from engram_kernels.reference.cache.simulator import LAG, TAG_BYTES, WAYS, CacheSimulator
from engram_kernels.tables.engram import EngramTable

from .policy import fewest_tokens

_MOST_WAYS = 32
#: What is counted for each group, in this order: n-grams asked for and hits of these, distinct missed ones read from
#: the tables, those of them that were kept, and entries that they took from others.
COUNTS = ("asked", "hits", "read", "inserted", "evicted")


class CacheState(NamedTuple):
    """The tensors of a cache, and its lag."""

    keys: torch.Tensor  #: int64 ``[G, S, W]``
    stamps: torch.Tensor  #: int64 ``[G, S, W]``, when it was last used; 0 is an empty way, whatever its key
    clock: torch.Tensor  #: int64 ``[1]``, tokens so far, behind a start of ``lag``
    counts: torch.Tensor  #: int64 ``[5, G]``, in the order of COUNTS
    rows: torch.Tensor  #: ``[G * S * W * E, R]`` in the table's type, as bytes where scaled
    scales: torch.Tensor | None  #: uint8 ``[G * S * W * E, R / 32 or 16]`` where the format has them
    descriptor: torch.Tensor  #: int64 ``[4]`` of rows and scales, as in a TableView
    lag: int  #: how much older than now a new entry counts


class CacheStore(RowCache):
    """What :class:`NgramCache` keeps, and where."""

    @takes(
        plan=Instance(HashPlan),
        tables=Each(Instance(EngramTable)),
        bytes=Optional(Whole(0)),
        entries=Optional(Whole(0)),
        ways=OneOf(*(1 << bit for bit in range(_MOST_WAYS.bit_length()))),
        min_tokens=Optional(Whole(0)),
    )
    def __init__(
        self,
        plan: HashPlan,
        tables: Sequence[EngramTable],
        *,
        bytes: int | None = None,
        entries: int | None = None,
        ways: Ways = WAYS,
        min_tokens: int | None = None,
    ):
        where = "NgramCache"
        tables = check_tables_of_plan(where, plan, tables)
        row_format, width = tables[0].format, tables[0].width
        if row_format.dtype == torch.float64:
            raise ValueError(f"{where}: rows must be of a format that kernels read, got {tables[0]!r}")
        if any(is_staged(table, plan.device) for table in tables):
            raise ValueError(
                f"{where}: tables must be read by kernels; those of placement 'staged' are gathered by CPU threads, "
                "before a GPU could say which rows it has"
            )
        self.heads = _heads(where, plan)
        self._groups = plan.primes.shape[0] * (plan.max_ngram - 1)
        #: Bytes of one entry in its table's memory: what a hit need not read over PCIe.
        self.entry_bytes = self.heads * row_format.stored_bytes(width)
        if (bytes is None) == (entries is None):
            raise ValueError(f"{where}: one of bytes and entries must be given, got bytes={bytes}, entries={entries}")
        per_set = self._groups * ways * (self.entry_bytes + TAG_BYTES)
        sets = entries // ways if bytes is None else bytes // per_set
        if sets < 1:
            least = f"entries={ways}" if bytes is None else f"bytes={per_set}"
            got = f"entries={entries}" if bytes is None else f"bytes={bytes}"
            raise ValueError(f"{where}: one set of {ways} ways needs at least {least}, got {got}")
        if self._groups * sets * ways >= 2**31:
            raise ValueError(
                f"{where}: groups * entries must be below 2^31, got {self._groups} groups of {sets * ways} entries"
            )
        self.plan, self.tables, self.ways, self.sets = plan, tables, ways, sets
        self.min_tokens = min_tokens
        self._enter(plan.device)
        if min_tokens is None:
            self.min_tokens = fewest_tokens(self._groups * self.entry_bytes)
        #: Calls and tokens that went past the cache so far, as the host counts them.
        self.bypassed_calls = self.bypassed_tokens = 0
        self._versions = [table.version for table in tables]
        self._state = self._allocate(plan.device)
        self._buffers = Buffers("the cache", (part for part in self._state if isinstance(part, torch.Tensor)))
        self._simulator = _Simulated(self._state) if plan.device.type == "cpu" else None
        self._streams = streams = streams_of(plan.device)
        # External, so that in a capture it becomes nodes of the graph and replays wait for it too. Recorded here: the
        # first use, on whatever stream, waits until the state was made.
        self._used = streams.event(external=True)
        self._kept = {streams.current()}
        streams.record(self._used, streams.current())

    @property
    def entries(self) -> int:
        """N-grams of each order in each layer that it has room for."""
        return self.sets * self.ways

    @property
    def nbytes(self) -> int:
        """Bytes of rows, scales, keys and stamps."""
        return self._groups * self.entries * (self.entry_bytes + TAG_BYTES)

    @property
    def state(self) -> CacheState:
        """The tensors, for tests and tools; to write to them breaks it."""
        # Others over the same memory: kernels know that of the cache's own by address.
        return CacheState(*(part.detach() if isinstance(part, torch.Tensor) else part for part in self._state))

    @property
    def simulator(self) -> CacheSimulator:
        """On a CPU: the specification at work on the state of this cache."""
        return self._simulator

    def clear(self) -> None:
        """Forget all entries; counts stay."""
        with self.in_order():
            self._state.stamps.zero_()

    @declares(num_tokens=Whole(0))
    def takes(self, num_tokens: int) -> bool:
        """Whether a call of ``num_tokens`` tokens goes through it; what tables have changed is forgotten then."""
        Whole(0).check("NgramCache.takes", "num_tokens", num_tokens)
        if num_tokens < max(1, self.min_tokens):
            self.bypassed_calls += 1
            self.bypassed_tokens += num_tokens
            return False
        self._buffers.check("NgramCache.takes")
        self.refresh()
        return True

    def refresh(self) -> None:
        """Forget the entries of tables whose rows have changed since (``EngramTable.version``).

        Every eager lookup does so first. Only the replay of a CUDA graph, in which the host has no part, needs it: call
        it between a change of rows and the next replay.
        """
        versions = [table.version for table in self.tables]
        if versions != self._versions:
            with self.in_order():
                per_layer = self._state.stamps.unflatten(0, (len(self.tables), -1))
                for layer, (version, before) in enumerate(zip(versions, self._versions, strict=True)):
                    if version != before:
                        per_layer[layer].zero_()
            self._versions = versions

    @contextmanager
    def in_order(self) -> Iterator[CacheState]:
        """The state, for work on the current stream: after all that used it, before all that will."""
        self._buffers.check("NgramCache")
        streams = self._streams
        current = streams.current()
        captured = streams.capturing(current)
        ordered = streams.external or not captured
        if not captured and current not in self._kept:
            self._kept.add(current)
            streams.keep([tensor for tensor in self._state if isinstance(tensor, torch.Tensor)], current)
        if ordered:
            streams.wait(current, self._used)
        try:
            yield self._state
        finally:
            if ordered:
                streams.record(self._used, current)

    def _allocate(self, device: torch.device) -> CacheState:
        row_format, width = self.tables[0].format, self.tables[0].width
        num_rows = self._groups * self.entries * self.heads
        if not takes_kernels(device):
            num_rows = 0  # the reference reads rows from the tables, which are in the same memory
        dtype = torch.uint8 if row_format.scaled else row_format.dtype
        rows = torch.empty(num_rows, row_format.row_items(width), dtype=dtype, device=device)
        scales = None
        if row_format.group:
            scales = torch.empty(num_rows, row_format.scale_bytes(width), dtype=torch.uint8, device=device)
        addresses = [rows.data_ptr(), 0 if scales is None else scales.data_ptr(), num_rows, 0]
        shape = (self._groups, self.sets, self.ways)
        lag = LAG * self.entries
        return CacheState(
            keys=torch.zeros(shape, dtype=torch.int64, device=device),
            stamps=torch.zeros(shape, dtype=torch.int64, device=device),
            clock=torch.tensor([lag], dtype=torch.int64, device=device),
            counts=torch.zeros(len(COUNTS), self._groups, dtype=torch.int64, device=device),
            rows=rows,
            scales=scales,
            descriptor=torch.tensor(addresses, dtype=torch.int64, device=device),
            lag=lag,
        )


class _Simulated(CacheSimulator):
    """The simulator on the arrays of a cache in CPU memory."""

    def __init__(self, state: CacheState):
        self.keys, self.stamps, self._clock = state.keys.numpy(), state.stamps.numpy(), state.clock.numpy()
        self.asked, self.hits, self.read, self.inserted, self.evicted = state.counts.numpy()
        self.lag = state.lag

    @property
    def clock(self) -> int:
        return int(self._clock[0])

    @clock.setter
    def clock(self, value: int) -> None:
        self._clock[0] = value


def _heads(where: str, plan: HashPlan) -> int:
    """Columns of each order; ValueError unless all have as many, lower orders first."""
    orders = plan.orders.tolist()
    heads = len(orders) // (plan.max_ngram - 1)
    expected = [order for order in range(2, plan.max_ngram + 1) for _ in range(heads)]
    if orders != expected or not heads:
        raise ValueError(
            f"{where}: plan must have equally many columns of each order from 2 to {plan.max_ngram}, in that order, "
            f"got columns of orders {orders}"
        )
    return heads
