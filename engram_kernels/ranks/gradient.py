"""Gradients of rows to the ranks that hold them: one entry per token and column, in the order of the global batch.

A row's gradients are added where the row lives, in the order in which one process would have met them: those of rank
0's tokens first, then rank 1's. The sum has the bits that one whole table gives for the ranks' batches one after
the other, whatever the number of ranks. Sums per sender would depend on that number, and save nothing: an entry of 256
bfloat16 values takes 516 B with its position, a float32 sum 1,028 B, and in 8,192 tokens of English text 0.72 of the
rows of V4.1 are distinct.

Replicas send each other what they received, in the same order, and add alike.
"""

import dataclasses
from dataclasses import dataclass

import torch

from engram_kernels.launching.exchange import Ranks
from engram_kernels.tables.gradient import RowGradient

from .rows import ShardedRows

_WHERE, _STEP = "ShardedTable.backward", "RowSinkhorn.step"


def gather_row_gradients(
    table: ShardedRows, row_ids: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions in this shard, gradients ``[n, R]`` of the rows there) from all ranks, each of which gives its own."""
    rows_of = table.map(row_ids.device)
    keys = rows_of.keys(row_ids.reshape(-1), rows_of.ranks * rows_of.stride)
    owner, order = torch.div(keys, rows_of.stride, rounding_mode="floor").sort(stable=True)
    counts = torch.searchsorted(owner, torch.arange(rows_of.ranks + 1, device=owner.device)).diff()
    wanted, held = table.ranks.exchange_counts(counts, _WHERE, "row gradients")
    order = order[: sum(wanted)]  # ids outside the table come last, and go nowhere
    positions = (keys[order] % rows_of.stride).to(table.sharding.id_dtype)
    entries = grad.reshape(-1, table.width)[order]
    positions = table.ranks.exchange(positions, wanted, held, _WHERE, "the exchange of gradients' row ids")
    entries = _exchange_values(table.ranks, entries, wanted, held)
    if table.replicas is None:
        return positions, entries
    return _among_replicas(table, positions, entries, torch.tensor(held, device=positions.device))


def _among_replicas(table: ShardedRows, positions, entries, held) -> tuple[torch.Tensor, torch.Tensor]:
    """What all replicas of this shard received, in the order of the ranks of the world that it came from."""
    replicas, sources = table.replicas, table.ranks.size
    equal = [sources] * replicas.size
    counts = replicas.exchange(held.repeat(replicas.size), equal, equal, _WHERE, "replicas' counts").tolist()
    theirs = [sum(counts[at : at + sources]) for at in range(0, len(counts), sources)]
    mine = [len(positions)] * replicas.size
    positions = replicas.exchange(positions.repeat(replicas.size), mine, theirs, _WHERE, "replicas' row ids")
    entries = _exchange_values(replicas, entries.repeat(replicas.size, 1), mine, theirs)
    order = sorted(range(len(counts)), key=table.source_ranks.__getitem__)
    return tuple(torch.cat([each.split(counts)[source] for source in order]) for each in (positions, entries))


def _exchange_values(ranks: Ranks, entries, wanted, held) -> torch.Tensor:
    """Gradients as bytes, which every backend moves; each rank's in its own dtype, alike on all."""
    packed = entries.contiguous().view(torch.uint8)
    return ranks.exchange(packed, wanted, held, _WHERE, "the exchange of row gradients").view(entries.dtype)


@dataclass(frozen=True)
class ShardGradient(RowGradient):
    """A shard's row gradient with the norm of all shards', so that clipping scales all of them alike."""

    total: torch.Tensor  #: float64 ``[1]``, sum of squares over the ranks
    ranks: Ranks  #: those of the shards

    def norm(self, order: float = 2.0) -> torch.Tensor:
        """The norm over all rows of all shards, a scalar on the device; collective for another order than 2."""
        if order == 2:
            return self.total[0].sqrt().to(self.squares.dtype)
        norms = self.ranks.values(super().norm(order)[None], _WHERE, "the norms of the gradient's shards")
        return torch.linalg.vector_norm(norms, order)

    def clamp_(self, low: float | None, high: float | None, factor: torch.Tensor) -> None:
        """As of any row gradient; collective, as the norm is that of all shards."""
        super().clamp_(low, high, factor)
        self.total.copy_(_sum_of_squares(self, self.ranks))

    def times(self, factor: torch.Tensor) -> "ShardGradient":
        """The gradient times a scalar tensor, the same on all ranks."""
        return dataclasses.replace(super().times(factor), total=self.total * (factor * factor))

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """``sums [n]`` over this shard's rows, added over the shards; collective."""
        return self.ranks.sum(sums, _STEP, "a sum over the table's rows")

    @classmethod
    def of(cls, gradient: RowGradient, ranks: Ranks) -> "ShardGradient":
        """A shard's gradient with the norm of all; added in float64, in the order of ranks."""
        fields = {field.name: getattr(gradient, field.name) for field in dataclasses.fields(RowGradient)}
        return cls(**fields, total=_sum_of_squares(gradient, ranks), ranks=ranks)


def _sum_of_squares(gradient: RowGradient, ranks: Ranks) -> torch.Tensor:
    total = gradient.squares.sum(0, keepdim=True, dtype=torch.float64)
    return ranks.sum(total, _WHERE, "the sum of the gradient's squares")
