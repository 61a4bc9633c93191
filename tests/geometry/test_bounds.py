"""Numbers that int64 does not hold: rows, offsets and multipliers are refused where they would wrap."""

import pytest
import torch

from engram_kernels import HashPlan

from .test_plan import small_config, small_map, small_plan


@pytest.mark.parametrize(
    "primes, rows",
    [
        ([[2**62, 2**62]], 2**63),  # int64 sums wrap
        ([[5, 7], [2**62, 2**62]], 2**63),
        ([[2**63 - 25, 2**63 - 25]], 2**64 - 50),
    ],
)
def test_rows_that_leave_int64_are_refused(primes, rows):
    """Otherwise offsets wrap, and any table is large enough."""
    multipliers = torch.ones(len(primes), 3).long()
    with pytest.raises(ValueError, match=f"^HashPlan.from_parts: primes must add up to at most 2.63 - 1 .* got {rows}"):
        HashPlan.from_parts(multipliers, torch.tensor(primes), pad=0)
    size = primes[-1][0]
    config = small_config(table_sizes=(size, size), heads=1, layers=range(len(primes)))
    with pytest.raises(ValueError, match="^HashPlan.build: primes from table_sizes on must add up to at most 2.63 - 1"):
        HashPlan.build(config, small_map())


def test_padding_that_leaves_int64_is_refused():
    config = small_config(table_sizes=(2**62 - 2**20, 2**62 - 2**20), heads=1, row_multiple=2**31, layers=(0,))
    assert sum(config.primes[0]) < 2**63 <= config.rows_per_layer[0]
    with pytest.raises(ValueError, match="^HashPlan.build: .* rows in every layer"):
        HashPlan.build(config, small_map())


def test_unsigned_parts_are_what_they_say():
    plan = small_plan(primes=torch.tensor([[11, 13, 17, 19]] * 2).to(torch.uint64))
    assert plan.primes.tolist() == [[11, 13, 17, 19]] * 2
    top = torch.tensor([[2**63 + 3] * 4] * 2, dtype=torch.uint64)
    with pytest.raises(ValueError, match="primes must add up to at most"):
        small_plan(primes=top)
    with pytest.raises(ValueError, match="multipliers must be int64, got 9223372036854775811"):
        small_plan(multipliers=top[:, :3])
