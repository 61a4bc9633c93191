"""Lookup in a table over ranks: distinct ids go to the ranks that hold them, rows come back as they are stored.

    ids [M] -> keys (rank, position), sorted and distinct -> positions to their ranks    all-to-all, 4 B a row
    each rank reads its shard in storage format -> rows and scales, packed              all-to-all, 264 B a row (V4.1)
    the rows received are a small table of their own, in which lookup reads every id's row

The last step is the lookup that one rank alone would have done, on the same stored bytes: the same bits come out.

With ``cache_bytes`` rows of other ranks that this one asked for before are in its own memory (kept.py), and only what
was missed is exchanged. With the number of rows each rank then tells the version of its shard's rows: where one is not
what it was in the last lookup every rank forgets what it kept, and the numbers are told once more. So a rank may change
its rows by itself between two lookups, and the second one reads them.

Exact sizes need the number of rows that each rank asks of each other; these numbers go first, and the host waits for
them. With a fixed ``capacity`` of K rows from one rank to another all sizes are fixed, and a call can be captured in a
CUDA graph. Each request then carries, behind its K positions, the most rows that its sender asked of any rank, so that
every rank knows whether K was enough. A row beyond it reads as NaN.
"""

import torch

from engram_kernels.ops.rows import lookup
from engram_kernels.tables.engram import EngramTable

from .rows import ShardedRows

_WHERE = "ShardedTable.lookup"
_IDS, _ROWS = "the exchange of row ids", "the exchange of rows"
ROWS_ASKED = "rows asked for"


def received_rows(table: ShardedRows, row_ids: torch.Tensor) -> tuple[EngramTable, torch.Tensor]:
    """(a table of the distinct rows that ``row_ids`` ask for, int64 ids of their rows in it), of exact size."""
    ranks, rows_of = table.ranks, table.map(row_ids.device)
    keys, found = torch.unique(rows_of.keys(row_ids, -1), return_inverse=True)
    if len(keys) and int(keys[0]) < 0:  # ids outside the table sort first, and are -1 then
        keys, found = keys[1:], found - 1
    counts = torch.searchsorted(keys, rows_of.bounds).diff()
    if table.cache is not None:
        return _received(table, _through_cache(table, keys, counts)), found
    wanted, asked = ranks.exchange_counts(counts, _WHERE, ROWS_ASKED)
    _count(table, len(keys), wanted, asked)
    return _received(table, _exchanged(table, keys, wanted, asked)), found


def _through_cache(table: ShardedRows, keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows as bytes of distinct, ascending ``keys``, of which ``counts [W]`` are each rank's."""
    ranks, kept = table.ranks, table.cache.on(keys.device)
    bounds, version = _before(counts), counts.new_full((), table.part.version)
    while True:
        places = kept.find(keys)
        hits = places < kept.entries
        missed = _before(~hits)[bounds].diff()
        told = torch.stack([missed, version.expand_as(missed)], 1).view(-1)
        mine, theirs = ranks.exchange_counts(told, _WHERE, ROWS_ASKED)
        if theirs[1::2] == table.cache.versions:
            break
        table.cache.forget(theirs[1::2])  # on all ranks, which have been told the same
    wanted, asked = mine[::2], theirs[::2]
    _count(table, len(keys), wanted, asked)
    misses = hits.byte().argsort(stable=True)[: sum(wanted)]
    keys, packed = keys[misses], _exchanged(table, keys[misses], wanted, asked)
    rows = kept.rows.index_select(0, places).index_copy_(0, misses, packed.view(kept.rows.dtype)).view(torch.uint8)
    begin = sum(wanted[: ranks.rank])
    end = begin + wanted[ranks.rank]  # its own rows are not kept
    kept.keep(torch.cat([keys[:begin], keys[end:]]), torch.cat([packed[:begin], packed[end:]]))
    return rows


def _before(numbers: torch.Tensor) -> torch.Tensor:
    """int64 ``[n + 1]``: how much there is before each of ``numbers [n]``, and in all."""
    return torch.cat([numbers.new_zeros(1, dtype=torch.int64), numbers.cumsum(0)])


def _exchanged(table: ShardedRows, keys: torch.Tensor, wanted: list[int], asked: list[int]) -> torch.Tensor:
    """Rows as bytes of ascending ``keys``, from the ranks that hold them."""
    positions = (keys % table.map(keys.device).stride).to(table.sharding.id_dtype)
    positions = table.ranks.exchange(positions, wanted, asked, _WHERE, _IDS)
    return table.ranks.exchange(_stored(table.part, positions), asked, wanted, _WHERE, _ROWS)


def _count(table: ShardedRows, distinct: int, wanted: list[int], asked: list[int]) -> None:
    rank, counts = table.ranks.rank, table.counts
    counts["lookups"] += 1
    counts["distinct"] += distinct - wanted[rank]
    counts["hits"] += distinct - sum(wanted)
    counts["received"] += sum(wanted) - wanted[rank]
    counts["given"] += sum(asked) - asked[rank]


def _received(table: ShardedRows, packed: torch.Tensor) -> EngramTable:
    received = _empty(table, max(1, len(packed)), packed.device)
    _unpack(packed, received)
    return received


class FixedExchange:
    """Lookups of at most ``capacity`` distinct rows from one rank to another, in buffers that stay."""

    def __init__(self, table: ShardedRows, device: torch.device):
        self._count = table.ranks.size * table.capacity
        self.received = _empty(table, self._count + 1, device)
        # The last row is what rows beyond the capacity read. These bytes are NaN in every format.
        self.received.weight.view(torch.uint8).fill_(0xFF)
        if table.format.group:
            self.received.scale.fill_(0xFF)
        self._packed = torch.empty(
            self._count, table.format.stored_bytes(table.width), dtype=torch.uint8, device=device
        )
        #: The most rows that any rank has asked of another in one call so far.
        self.most = torch.zeros(1, dtype=torch.int64, device=device)

    def rows(self, table: ShardedRows, row_ids: torch.Tensor) -> tuple[EngramTable, torch.Tensor]:
        """As :func:`received_rows`; the rows are overwritten by the next call."""
        ranks, capacity, rows_of = table.ranks, table.capacity, table.map(row_ids.device)
        behind = rows_of.ranks * rows_of.stride
        keys, order = rows_of.keys(row_ids, behind).reshape(-1).sort(stable=True)
        inside = keys < behind
        first = inside.clone()
        first[1:] &= keys[1:] != keys[:-1]
        # distinct[i]: how many distinct rows there are among the first i entries.
        distinct = _before(first)
        before = distinct[torch.searchsorted(keys, rows_of.bounds)]
        owner = torch.div(keys, rows_of.stride, rounding_mode="floor").clamp_(max=rows_of.ranks - 1)
        slot = distinct[1:] - 1 - before[owner]
        fits = inside & (slot < capacity)
        # One entry more than is sent: what does not fit is written there.
        request = torch.full((ranks.size * (capacity + 1) + 1,), -1, dtype=table.sharding.id_dtype, device=keys.device)
        target = torch.where(fits, owner * (capacity + 1) + slot, len(request) - 1)
        request.scatter_(0, target, (keys % rows_of.stride).to(request.dtype))
        request = request[:-1].view(ranks.size, capacity + 1)
        request[:, -1] = before.diff().amax().to(request.dtype)
        asked = ranks.exchange_into(torch.empty_like(request), request, _WHERE, _IDS)
        torch.maximum(self.most, asked[:, -1].amax(0, keepdim=True), out=self.most)
        stored = _stored(table.part, asked[:, :-1].reshape(-1))
        _unpack(ranks.exchange_into(self._packed, stored, _WHERE, _ROWS), self.received)
        found = torch.where(fits, owner * capacity + slot, torch.where(inside, self._count, -1))
        return self.received, torch.empty_like(found).scatter_(0, order, found).view(row_ids.shape)


def _stored(shard: EngramTable, positions: torch.Tensor) -> torch.Tensor:
    """Rows ``positions [n]`` as bytes ``[n, row bytes + scale bytes]``; these come sorted, so reads are in order."""
    rows, scales = lookup(shard, positions, out_format="storage")
    rows = rows.view(torch.uint8)
    return torch.cat([rows, scales], 1) if shard.format.group else rows


def _empty(table: ShardedRows, rows: int, device: torch.device) -> EngramTable:
    """A table on ``device`` for rows of other ranks."""
    fmt = table.format
    weight = torch.empty(rows, fmt.row_items(table.width), dtype=fmt.dtype, device=device)
    scale, own_scale = table.part.scale, None
    if fmt.group:
        scale = torch.empty(rows, fmt.scale_bytes(table.width), dtype=torch.uint8, device=device)
        own_scale = table.part.own_scale
    return EngramTable(weight, scale, fmt, "cpu" if device.type == "cpu" else "device", own_scale=own_scale)


def _unpack(packed: torch.Tensor, received: EngramTable) -> None:
    """Bytes of rows and scales into the first rows of a table."""
    size = received.format.row_bytes(received.width)
    received.weight[: len(packed)].view(torch.uint8).copy_(packed[:, :size])
    if received.format.group:
        received.scale[: len(packed)].copy_(packed[:, size:])
