"""Ownership of rows as a pure function: every row once, orders spread, loads even."""

from itertools import pairwise

import pytest
import torch

from engram_kernels import EngramConfig
from engram_kernels.ranks.sharding import ShardMap, shard_rows

V41 = EngramConfig.deepseek_v41_flash()
CASES = [
    ([5, 7, 11, 13, 17, 19], 72, 2),
    ([5, 7, 11, 13, 17, 19], 80, 3),  # padded
    ([5, 7, 11, 13, 17, 19], 72, 4),  # which do not divide the columns
    ([2, 3], 5, 8),  # more ranks than rows
    ([7], 7, 1),
]


@pytest.mark.parametrize("split", ["columns", "rows"])
@pytest.mark.parametrize("columns, rows, ranks", CASES)
def test_every_row_has_one_owner_and_one_position(columns, rows, ranks, split):
    sharding = shard_rows(columns, rows, ranks, split)
    assert sharding.rows == rows and sum(sharding.part_rows) == rows and len(sharding.part_rows) == ranks
    keys = {}
    for rank in range(ranks):
        held = [row for begin, end in sharding.ranges(rank) for row in range(begin, end)]
        assert held == sorted(held) and len(held) == sharding.part_rows[rank]
        keys |= {row: rank * sharding.key_stride + position for position, row in enumerate(held)}
    assert sorted(keys) == list(range(rows)) and len(set(keys.values())) == rows
    ids = torch.arange(-2, rows + 2, dtype=torch.int32)
    found = ShardMap(sharding, torch.device("cpu")).keys(ids, -7)
    assert found.tolist() == [keys.get(row, -7) for row in ids.tolist()]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 12, 24])
def test_whole_columns_are_strided(ranks):
    """Up to as many ranks as heads each holds columns of every order."""
    columns = V41.primes[0]
    sharding = shard_rows(columns, V41.rows_per_layer[0], ranks)
    starts = [sum(columns[:column]) for column in range(24)]
    assert sharding.split == "columns" and len(sharding.pieces) == 24
    for rank in range(ranks):
        mine = [starts.index(begin) for begin, _ in sharding.ranges(rank)]
        assert mine == list(range(rank, 24, ranks))
        assert {column // 8 for column in mine} == {0, 1, 2} or ranks > 8


@pytest.mark.parametrize("ranks, split", [(5, "columns"), (16, "columns"), (48, "columns"), (8, "rows")])
def test_otherwise_every_rank_has_a_range_of_every_column(ranks, split):
    sharding = shard_rows(V41.primes[0], V41.rows_per_layer[0], ranks, split)
    assert sharding.split == "rows"
    assert max(sharding.part_rows) - min(sharding.part_rows) <= 24
    assert all(len(sharding.ranges(rank)) == 24 for rank in range(ranks))
    assert all(a.end == b.begin for a, b in pairwise(sharding.pieces))


def test_ids_are_as_narrow_as_a_shard_allows():
    assert shard_rows([2**31], 2**31, 1).id_dtype == torch.int64
    sharding = shard_rows([2**32], 2**32 + 1, 4)
    assert sharding.id_dtype == torch.int32 and sharding.pieces[-1].end == 2**32 + 1
    keys = ShardMap(sharding, torch.device("cpu")).keys(torch.tensor([2**32]), -1)
    assert keys.item() == 4 * sharding.key_stride - 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([5, 7], 12, 2, "tokens"), "split must be 'columns' or 'rows', got 'tokens'"),
        (([5, 7], 11, 2), r"expected one rank or more and columns that 11 rows hold, got 2 and \[5, 7\]"),
        (([5, 7], 12, 0), "expected one rank or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^ShardedTable: {message}"):
        shard_rows(*arguments)
