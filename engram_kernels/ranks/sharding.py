"""Which rank holds which rows of a table, as a pure function of the table's columns and the number of ranks.

    columns    rank r holds the whole columns r, r + W, r + 2 W, ...: columns come by order of n-grams, so that each
               rank holds some of every order where W is at most the number of heads
    rows       rank r holds rows [n r / W, n (r + 1) / W) of every column: where it is asked for, or where W does not
               divide the number of columns

Both spread the n-gram orders over the ranks: contiguous columns would give rank 0 the bigrams, which repeat most, and
leave others with 5.3 times as many distinct rows (measured by vLLM's authors). W ranks, n rows of a column; rows that
pad a table belong to its last column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

SPLITS = ("columns", "rows")


class Piece(NamedTuple):
    """Rows ``[begin, end)`` of a table, which ``rank`` holds from ``position`` of its shard on."""

    begin: int
    end: int
    rank: int
    position: int


@dataclass(frozen=True)
class Sharding:
    """The rows of one table over ``ranks`` ranks. Make one with :func:`shard_rows`."""

    ranks: int
    split: str  #: "columns" or "rows", which may be other than what was asked for
    pieces: tuple[Piece, ...]  #: ascending, none empty; together all rows

    @property
    def rows(self) -> int:
        return self.pieces[-1].end

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``[begin, end)`` of the rows that ``rank`` holds, ascending; none where there are more ranks than rows."""
        return tuple((piece.begin, piece.end) for piece in self.pieces if piece.rank == rank)

    @cached_property
    def part_rows(self) -> tuple[int, ...]:
        """Number of rows in each rank's shard."""
        rows = [0] * self.ranks
        for piece in self.pieces:
            rows[piece.rank] += piece.end - piece.begin
        return tuple(rows)

    @property
    def key_stride(self) -> int:
        """What a rank's keys are apart: the key of a row is ``rank * key_stride + position``."""
        return max(self.part_rows)

    @property
    def id_dtype(self) -> torch.dtype:
        """Dtype that holds every position."""
        return torch.int32 if self.key_stride < 2**31 else torch.int64


def shard_rows(columns: Sequence[int], rows: int, ranks: int, split: str = "columns") -> Sharding:
    """The sharding of a table of ``rows`` rows whose columns have ``columns`` rows each, in order."""
    if split not in SPLITS:
        raise ValueError(f"ShardedTable: split must be 'columns' or 'rows', got {split!r}")
    if ranks < 1 or not columns or sum(columns) > rows or min(columns) < 1:
        raise ValueError(
            f"ShardedTable: expected one rank or more and columns that {rows} rows hold, got {ranks} and {columns}"
        )
    bounds = [*accumulate(columns[:-1], initial=0), rows]
    whole = split == "columns" and len(columns) % ranks == 0
    taken = [0] * ranks
    pieces = []
    for column, (begin, end) in enumerate(pairwise(bounds)):
        owners = [column % ranks] if whole else range(ranks)
        cuts = [begin + (end - begin) * share // len(owners) for share in range(len(owners) + 1)]
        for rank, (low, high) in zip(owners, pairwise(cuts), strict=True):
            if low < high:
                pieces.append(Piece(low, high, rank, taken[rank]))
                taken[rank] += high - low
    return Sharding(ranks, "columns" if whole else "rows", tuple(pieces))


class ShardMap:
    """A sharding as tensors, which tell the key of each row: keys sort by rank, and then by position."""

    def __init__(self, sharding: Sharding, device: torch.device):
        self.ranks, self.stride, self.rows = sharding.ranks, sharding.key_stride, sharding.rows
        pieces = sharding.pieces
        self._begins = torch.tensor([piece.begin for piece in pieces], device=device)
        shifts = [piece.rank * self.stride + piece.position - piece.begin for piece in pieces]
        self._shifts = torch.tensor(shifts, device=device)
        #: int64 ``[W + 1]``: the first key of each rank, and the one behind all.
        self.bounds = torch.arange(sharding.ranks + 1, device=device) * self.stride

    def keys(self, row_ids: torch.Tensor, outside: int) -> torch.Tensor:
        """int64 ``rank * stride + position`` of each row; ``outside`` for ids that are not in the table."""
        ids = row_ids.long()
        inside = (ids >= 0) & (ids < self.rows)
        ids = torch.where(inside, ids, 0)
        piece = torch.searchsorted(self._begins, ids, right=True) - 1
        return torch.where(inside, ids + self._shifts[piece], outside)
