"""Which rank holds which rows of a table, as a pure function of the table's columns and the number of ranks.

    columns    column c belongs to rank c mod W, whole: columns run order-major, so that each rank holds some of every
               order where W is at most the number of heads
    rows       of every column rank r holds rows [n r / W, n (r + 1) / W): where W does not divide the columns, or
               where it is asked for

Both spread the orders: contiguous columns would give rank 0 the bigrams, which repeat most, and leave others with 5.3
times as many distinct rows (measured by vLLM's authors). A rank's part holds its rows in the order of the table. W
ranks, n rows of a column; rows that pad a table belong to its last column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

SPLITS = ("columns", "rows")


class Piece(NamedTuple):
    """Rows ``[begin, end)`` of a table, which one rank holds from row ``at`` of its part on."""

    begin: int
    end: int
    rank: int
    at: int


@dataclass(frozen=True)
class Sharding:
    """The rows of one table over ``ranks`` ranks. Make one with :func:`shard_rows`."""

    ranks: int
    split: str  #: what became of the wish: "columns" or "rows"
    pieces: tuple[Piece, ...]  #: ascending, none empty; together all rows

    @property
    def rows(self) -> int:
        return self.pieces[-1].end

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``[begin, end)`` of the rows that ``rank`` holds, ascending; none where there are more ranks than rows."""
        return tuple((piece.begin, piece.end) for piece in self.pieces if piece.rank == rank)

    @cached_property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each rank's part."""
        rows = [0] * self.ranks
        for piece in self.pieces:
            rows[piece.rank] += piece.end - piece.begin
        return tuple(rows)

    @property
    def key_stride(self) -> int:
        """What a rank counts in a key ``rank * key_stride + row of its part``."""
        return max(self.part_rows)

    @property
    def id_dtype(self) -> torch.dtype:
        """Type in which a part's rows are asked for."""
        return torch.int32 if self.key_stride < 2**31 else torch.int64


def shard_rows(columns: Sequence[int], rows: int, ranks: int, split: str = "columns") -> Sharding:
    """Ownership of a table of ``rows`` rows whose columns have ``columns`` rows each, in order."""
    if split not in SPLITS:
        raise ValueError(f"ShardedTable: split must be 'columns' or 'rows', got {split!r}")
    if ranks < 1 or not columns or sum(columns) > rows or min(columns) < 1:
        raise ValueError(
            f"ShardedTable: expected one rank or more and columns that {rows} rows hold, got {ranks} and {columns}"
        )
    bounds = [*accumulate(columns, initial=0)][:-1] + [rows]
    whole = split == "columns" and len(columns) % ranks == 0
    owned = []
    for column, (begin, end) in enumerate(pairwise(bounds)):
        if whole:
            owned.append((begin, end, column % ranks))
        else:
            cuts = [begin + (end - begin) * rank // ranks for rank in range(ranks + 1)]
            owned += [(low, high, rank) for rank, (low, high) in enumerate(pairwise(cuts)) if low < high]
    taken = [0] * ranks
    pieces = []
    for begin, end, rank in owned:
        pieces.append(Piece(begin, end, rank, taken[rank]))
        taken[rank] += end - begin
    return Sharding(ranks, "columns" if whole else "rows", tuple(pieces))


class ShardMap:
    """A sharding as tensors: the key of each row, which sorts by rank and then by place in its part."""

    def __init__(self, sharding: Sharding, device: torch.device):
        self.ranks, self.stride, self.rows = sharding.ranks, sharding.key_stride, sharding.rows
        pieces = sharding.pieces
        self._begins = torch.tensor([piece.begin for piece in pieces], device=device)
        first_keys = [piece.rank * self.stride + piece.at - piece.begin for piece in pieces]
        self._shifts = torch.tensor(first_keys, device=device)
        #: Key at which each rank's begin, and the one behind all.
        self.bounds = torch.arange(sharding.ranks + 1, device=device) * self.stride

    def keys(self, row_ids: torch.Tensor, outside: int) -> torch.Tensor:
        """int64 ``rank * stride + row of the part`` for each id; ``outside`` for ids that are not in the table."""
        ids = row_ids.long()
        inside = (ids >= 0) & (ids < self.rows)
        ids = torch.where(inside, ids, 0)
        piece = torch.searchsorted(self._begins, ids, right=True) - 1
        return torch.where(inside, ids + self._shifts[piece], outside)
