"""Rows of a table that ranks hold parts of: distinct ids go to their owners, rows come back as they are stored.

    ids [M] -> keys (rank, row of its part), sorted and distinct -> ids to owners        all-to-all, 4 B a row
    owners read their part in storage format -> rows and scales, packed                 all-to-all, 264 B a row (V4.1)
    the rows received are a small table of their own; lookup in it places and dequantises them

The last step is the lookup that one rank alone would have done, on the same stored bytes: the same bits come out.

Exact sizes need the number of rows each rank asks of each other, which goes first and which the host waits for. With a
fixed ``capacity`` of K rows from one rank to another sizes depend on nothing, and a call can be captured in a CUDA
graph. Each request then carries, behind its K ids, the most rows that its sender asked of any rank: all ranks know
alike whether K was enough. A row beyond it reads as NaN.
"""

from typing import TYPE_CHECKING

import torch

from engram_kernels.geometry.row_format import SCALE_GROUP, RowFormat
from engram_kernels.ops.rows import lookup
from engram_kernels.tables.engram import EngramTable

if TYPE_CHECKING:
    from .sharded import ShardedTable

_WHERE = "ShardedTable.lookup"


def received_rows(table: "ShardedTable", row_ids: torch.Tensor) -> tuple[EngramTable, torch.Tensor]:
    """(the distinct rows that ``row_ids`` ask for, as a table; the place of each id's row in it), sizes exchanged."""
    ranks, rows_of = table.ranks, table.map(row_ids.device)
    keys, places = torch.unique(rows_of.keys(row_ids, -1), return_inverse=True)
    if len(keys) and int(keys[0]) < 0:  # ids outside the table sort first, and have place -1 then
        keys, places = keys[1:], places - 1
    counts = torch.searchsorted(keys, rows_of.bounds).diff()
    wanted, asked = ranks.exchange_counts(counts, _WHERE, "rows asked for")
    ids = (keys % rows_of.stride).to(table.sharding.id_dtype)
    ids = ranks.exchange(ids, wanted, asked, _WHERE, "the exchange of row ids")
    packed = ranks.exchange(_stored(table.part, ids), asked, wanted, _WHERE, "the exchange of rows")
    received = _empty(table, max(1, len(packed)), packed.device)
    _unpack(packed, received)
    return received, places


class FixedExchange:
    """Lookups of at most ``capacity`` distinct rows from one rank to another, in buffers that stay."""

    def __init__(self, table: "ShardedTable", device: torch.device):
        self._count = table.ranks.size * table.capacity
        self.received = _empty(table, self._count + 1, device)
        parts = (
            [self.received.weight, self.received.scale] if table.format.scaling == "group" else [self.received.weight]
        )
        for part in parts:  # the last row, which is what rows beyond the capacity read: NaN in every format
            part.view(torch.uint8).fill_(0xFF)
        self._packed = torch.empty(self._count, _row_bytes(table.format, table.width), dtype=torch.uint8, device=device)
        #: The most rows that any rank has asked of another in one call so far.
        self.most = torch.zeros(1, dtype=torch.int64, device=device)

    def rows(self, table: "ShardedTable", row_ids: torch.Tensor) -> tuple[EngramTable, torch.Tensor]:
        """As :func:`received_rows`; the rows are overwritten by the next call."""
        ranks, capacity, rows_of = table.ranks, table.capacity, table.map(row_ids.device)
        behind = rows_of.ranks * rows_of.stride
        keys, order = rows_of.keys(row_ids, behind).reshape(-1).sort(stable=True)
        inside = keys < behind
        first = inside.clone()
        first[1:] &= keys[1:] != keys[:-1]
        # distinct[i]: how many distinct rows there are among the first i entries.
        distinct = torch.cat([first.new_zeros(1, dtype=torch.int64), first.cumsum(0)])
        before = distinct[torch.searchsorted(keys, rows_of.bounds)]
        owner = torch.div(keys, rows_of.stride, rounding_mode="floor").clamp_(max=rows_of.ranks - 1)
        slot = distinct[1:] - 1 - before[owner]
        fits = inside & (slot < capacity)
        request = torch.full((ranks.size * (capacity + 1) + 1,), -1, dtype=table.sharding.id_dtype, device=keys.device)
        at = torch.where(fits, owner * (capacity + 1) + slot, len(request) - 1)
        request.scatter_(0, at, (keys % rows_of.stride).to(request.dtype))
        request = request[:-1].view(ranks.size, capacity + 1)
        request[:, -1] = before.diff().amax().to(request.dtype)
        asked = ranks.exchange_into(torch.empty_like(request), request, _WHERE, "the exchange of row ids")
        torch.maximum(self.most, asked[:, -1].amax(0, keepdim=True), out=self.most)
        stored = _stored(table.part, asked[:, :-1].reshape(-1))
        _unpack(ranks.exchange_into(self._packed, stored, _WHERE, "the exchange of rows"), self.received)
        place = torch.where(fits, owner * capacity + slot, torch.where(inside, self._count, -1))
        places = torch.empty_like(place).scatter_(0, order, place)
        return self.received, places.view(row_ids.shape)


def _row_bytes(fmt: RowFormat, width: int) -> int:
    return fmt.row_bytes(width) + fmt.scale_bytes(width)


def _stored(part: EngramTable, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids [n]`` of a part as bytes ``[n, row bytes + scale bytes]``; in address order, they come sorted."""
    rows, scales = lookup(part, ids, out_format="storage")
    if not len(ids):
        return torch.empty(0, _row_bytes(part.format, part.width), dtype=torch.uint8, device=ids.device)
    rows = rows.view(torch.uint8)
    return torch.cat([rows, scales], 1) if part.format.scaling == "group" else rows


def _empty(table: "ShardedTable", rows: int, device: torch.device) -> EngramTable:
    """A table for rows that come from others, where they come."""
    weight = torch.empty(rows, table.width, dtype=table.format.dtype, device=device)
    scale = table.part.scale
    if table.format.scaling == "group":
        scale = torch.empty(rows, table.width // SCALE_GROUP, dtype=torch.uint8, device=device)
    return EngramTable(weight, scale, table.format, "cpu" if device.type == "cpu" else "device")


def _unpack(packed: torch.Tensor, received: EngramTable) -> None:
    """Bytes of rows and scales into the first rows of a table."""
    size = received.format.row_bytes(received.width)
    received.weight[: len(packed)].view(torch.uint8).copy_(packed[:, :size])
    if received.format.scaling == "group":
        received.scale[: len(packed)].copy_(packed[:, size:])
