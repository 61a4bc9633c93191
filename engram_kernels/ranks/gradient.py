"""Row gradients to the ranks that hold the rows: one entry per token and column, in the order of the global batch.

A row's gradients are added where the row lives, in the order in which one process would have met them: those of the
tokens of rank 0 first, then rank 1's. The owner's sum has the bits that a table in one piece gives for the ranks'
batches one after the other, whatever the number of ranks. Sums per sender would depend on it, and save nothing: an
entry of 256 bfloat16 values takes 516 B with its id, a float32 sum 1,028 B, and of the rows of V4.1 0.72 are distinct
in 8,192 tokens of English text.

Ranks that hold the same part (``replicas``) send each other what they received, in the same order, and add alike.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engram_kernels.tables.gradient import RowGradient

if TYPE_CHECKING:
    from .exchange import Ranks
    from .sharded import ShardedTable

_WHERE = "ShardedTable.backward"


def gather_row_gradients(
    table: "ShardedTable", row_ids: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of this rank's part, their gradients ``[n, R]``) of all ranks, from this rank's ids and gradients."""
    rows_of = table.map(row_ids.device)
    keys = rows_of.keys(row_ids.reshape(-1), rows_of.ranks * rows_of.stride)
    owner, order = torch.div(keys, rows_of.stride, rounding_mode="floor").sort(stable=True)
    counts = torch.searchsorted(owner, torch.arange(rows_of.ranks + 1, device=owner.device)).diff()
    wanted, held = table.ranks.exchange_counts(counts, _WHERE, "row gradients")
    order = order[: sum(wanted)]  # ids outside the table come last, and go nowhere
    ids = (keys[order] % rows_of.stride).to(table.sharding.id_dtype)
    entries = grad.reshape(-1, table.width)[order]
    ids = table.ranks.exchange(ids, wanted, held, _WHERE, "the exchange of gradients' row ids")
    entries = _exchange_values(table.ranks, entries, wanted, held)
    if table.replicas is None:
        return ids, entries
    return _among_replicas(table, ids, entries, torch.tensor(held, device=ids.device))


def _among_replicas(table, ids, entries, held) -> tuple[torch.Tensor, torch.Tensor]:
    """What all replicas of this part received, in the order of the ranks of the world that it came from."""
    replicas, sources = table.replicas, table.ranks.size
    equal = [sources] * replicas.size
    counts = replicas.exchange(held.repeat(replicas.size), equal, equal, _WHERE, "replicas' counts").tolist()
    theirs = [sum(counts[at : at + sources]) for at in range(0, len(counts), sources)]
    mine = [len(ids)] * replicas.size
    ids = replicas.exchange(ids.repeat(replicas.size), mine, theirs, _WHERE, "replicas' row ids")
    entries = _exchange_values(replicas, entries.repeat(replicas.size, 1), mine, theirs)
    order = sorted(range(len(counts)), key=table.source_ranks.__getitem__)
    return tuple(torch.cat([part.split(counts)[place] for place in order]) for part in (ids, entries))


@dataclass(frozen=True)
class PartGradient(RowGradient):
    """A part's row gradient, whose norm is that of all parts: what is clipped by it is clipped alike on all ranks."""

    total: torch.Tensor  #: float64 ``[1]``, sum of squares over the ranks

    def norm(self) -> torch.Tensor:
        """Euclidean norm over all rows of all parts, a scalar on the device."""
        return self.total[0].sqrt().to(self.squares.dtype)

    def times(self, factor: torch.Tensor) -> "PartGradient":
        """The gradient times a scalar tensor, the same on all ranks."""
        return dataclasses.replace(super().times(factor), total=self.total * (factor * factor))

    @classmethod
    def of(cls, gradient: RowGradient, ranks: "Ranks") -> "PartGradient":
        """A part's gradient with the norm of all; added in float64, in the order of ranks."""
        fields = {field.name: getattr(gradient, field.name) for field in dataclasses.fields(RowGradient)}
        total = gradient.squares.sum(0, keepdim=True, dtype=torch.float64)
        return cls(**fields, total=ranks.sum(total, _WHERE, "the sum of the gradient's squares"))


def _exchange_values(ranks, entries, wanted, held) -> torch.Tensor:
    """Gradients as bytes, which every backend moves; each rank's in its own dtype, alike on all."""
    packed = entries.contiguous().view(torch.uint8)
    return ranks.exchange(packed, wanted, held, _WHERE, "the exchange of row gradients").view(entries.dtype)
