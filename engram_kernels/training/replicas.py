"""Tables of which every rank has a copy: kept equal, as DistributedDataParallel keeps dense parameters equal.

A table is no parameter, and nobody tells DistributedDataParallel of it. Where ranks hold copies, a backward pass
gathers the row ids and gradients of all ranks, in the order of ranks, and adds them in the fixed order of
tables/gradient.py: ``row_grad`` has the same bits on every rank, those that one process has over the ranks' batches one
after the other. It is whole before it is clipped, unscaled or asked for its norm, and the step that follows is the same
everywhere.

Every meeting of ranks begins with a few numbers that say what each is doing. A rank that has looked a table up less
often than others, or has other options, is so an error on all ranks, and no mixture of gradients.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import reduce as fold
from typing import Any, Protocol
from weakref import ref

import torch
import torch.distributed as dist

from engram_kernels.launching.exchange import RankError, Ranks
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import GRAD_DTYPES, RowGradient, row_gradient

#: What there is to say of ranks: that there is one, or how the gradients of their copies meet.
ALONE, MEAN, SUM = REDUCES = ("alone", "mean", "sum")
_BACKWARD = "EngramTable.backward"
_STEP = -1  # in the place of a table's number


def check_alone(tables: Sequence[EngramTable], where: str) -> None:
    """Raise ValueError where the ranks of a job would train copies of a table that know nothing of each other."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for table in tables:
        if table.shard is None:
            raise ValueError(
                f"{where}: reduce must say what {table!r} is to the other ranks, for there are "
                f"{dist.get_world_size()} and DistributedDataParallel does not know tables, got {ALONE!r}. "
                "reduce='mean' (or 'sum') keeps copies on all ranks equal, None trains tables that differ on "
                "purpose; a ShardedTable holds one table over all ranks"
            )


class Optimizer(Protocol):
    """What replicas ask of a RowOptimizer."""

    tables: Sequence[EngramTable]
    steps: int
    param_groups: list[dict[str, Any]]
    state: Any
    _seed: int | None


class Replicas:
    """The ranks that hold copies of an optimizer's tables; parts of a ShardedTable meet by themselves."""

    def __init__(self, optimizer: Optimizer, reduce: str, group: "dist.ProcessGroup | None", where: str):
        ranks = Ranks(group, where)
        if group is None:  # one of its own, where no collective of DistributedDataParallel comes between
            ranks = Ranks(dist.new_group(ranks.members, use_local_synchronization=True), where)
        self.ranks, self.reduce, self._optimizer = ranks, reduce, ref(optimizer)
        self._tables: list[EngramTable] = []
        self._passes: list[int] = []  # of each table since the last step

    @property
    def alive(self) -> bool:
        return self._optimizer() is not None

    def check_new(self, group: Mapping[str, Any], where: str) -> None:
        """Raise ValueError unless all ranks are about to take the same tables and options; collective, reads all."""
        for table in group["params"]:
            if table.shard is None and table.placement == "shared":
                raise ValueError(
                    f"{where}: reduce={self.reduce!r} takes no table of placement 'shared', whose readers have no "
                    f"optimizer that would meet the writer's, got {table!r}; ShardedTable(..., node=, replicas=) "
                    "trains a copy per node"
                )
        self._compare(group["params"], _options(self._optimizer(), [group]), where)

    def join(self, tables: Sequence[EngramTable]) -> None:
        """Gather the gradients of these tables from now on."""
        for table in tables:
            if table.shard is None:
                table.gradient_of = _Gathered(self, len(self._tables))
                self._tables.append(table)
                self._passes.append(0)

    def check(self, where: str) -> None:
        """Raise ValueError on all ranks where options, rows or states differ between them; collective, reads all."""
        optimizer = self._optimizer()
        self._compare(optimizer.tables, _options(optimizer, optimizer.param_groups), where)

    def _compare(self, tables: Sequence[EngramTable], options: dict, where: str) -> None:
        optimizer = self._optimizer()
        facts = {"optimizer": type(optimizer).__name__, "reduce": self.reduce} | options
        for number, table in enumerate(tables):
            if table.shard is None:
                table.wait_for_steps()
                facts[f"table {number}"] = f"{table.rows} x {table.width} {table.format.name}"
                facts[f"digest of table {number}'s rows"] = digest(table.weight)
                for name, value in optimizer.state.get(table.anchor, {}).items():
                    facts[f"digest of table {number}'s {name}"] = digest(value)
        self.ranks.check_equal(facts, where)

    def before_step(self, where: str) -> None:
        """Raise on all ranks unless they take the same step, of the same options, after the same backward passes."""
        optimizer = self._optimizer()
        options = _options(optimizer, optimizer.param_groups)
        digest_of_options = zlib.crc32(repr(options).encode())
        device = self._tables[0].anchor_device if self._tables else torch.device("cpu")
        met = self._meet(where, [_STEP, optimizer.steps, digest_of_options, 0], device)
        self._passes = [0] * len(self._tables)
        if len({numbers[2] for numbers in met}) > 1:
            self.ranks.check_equal(options, where)

    def close(self) -> None:
        """Leave the tables as they were: their gradients are those of this rank."""
        for table in self._tables:
            if isinstance(table.gradient_of, _Gathered) and table.gradient_of.replicas is self:
                del table.gradient_of

    def gradient(self, number: int, row_ids: torch.Tensor, grad: torch.Tensor, rows: int) -> RowGradient:
        """What all ranks' gradients of table ``number`` make together; collective."""
        ranks, width = self.ranks, grad.shape[-1]
        self._passes[number] += 1
        mine = [number, self._passes[number], row_ids.numel(), GRAD_DTYPES.index(grad.dtype)]
        met = self._meet(_BACKWARD, mine, grad.device)
        counts = [count for _, _, count, _ in met]
        # Ranks without tokens may have made their empty gradient in another dtype.
        dtype = fold(torch.promote_types, [GRAD_DTYPES[code] for *_, code in met])
        ids = torch.where((row_ids >= 0) & (row_ids < rows), row_ids, -1).view(-1)
        ids = self._gathered(ids.to(torch.int32 if rows < 2**31 else torch.int64), counts, "gathering row ids")
        values = grad.reshape(-1, width).to(dtype).view(torch.uint8)
        values = self._gathered(values, counts, "gathering row gradients").view(dtype)
        found = row_gradient(ids, values, rows)
        return found if self.reduce == SUM else found.times(found.squares.new_tensor(1 / ranks.size))

    def _gathered(self, mine: torch.Tensor, counts: list[int], what: str) -> torch.Tensor:
        """``[sum of counts, ...]``: all ranks' entries, in the order of ranks; sent as many as the longest has."""
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        every = self.ranks.values(padded, _BACKWARD, what)
        return torch.cat([entries[:count] for entries, count in zip(every, counts, strict=True)])

    def _meet(self, where: str, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, of which the first two must be alike: what a rank is doing, and for which time."""
        met = self.ranks.values(torch.tensor(numbers, device=device), where, "the meeting of ranks").tolist()
        for rank, other in enumerate(met):
            if other[:2] != met[0][:2]:
                raise RankError(
                    f"{where}: rank {rank} of {self.ranks.size} is at {_told(*other[:2])}, rank 0 at "
                    f"{_told(*met[0][:2])}: every rank has to look the same tables up in each backward pass, with no "
                    "ids where it has no tokens, and to take every step"
                )
        return met


class _Gathered:
    """What a table asks for the gradient of a backward pass, in the place of row_gradient."""

    def __init__(self, replicas: Replicas, number: int):
        self.replicas, self._number = replicas, number

    def __call__(self, row_ids: torch.Tensor, grad: torch.Tensor, rows: int) -> RowGradient:
        return self.replicas.gradient(self._number, row_ids, grad, rows)


def check_free(table: EngramTable, where: str, replicas: Replicas | None = None) -> None:
    """Forget replicas whose optimizer is gone; ValueError where there is one, and it is not of the same kind."""
    if not isinstance(table.gradient_of, _Gathered):
        return
    other = table.gradient_of.replicas
    if other.alive and (
        replicas is None or (other.reduce, other.ranks.members) != (replicas.reduce, replicas.ranks.members)
    ):
        raise ValueError(
            f"{where}: {table!r} has an optimizer with reduce={other.reduce!r} over ranks {other.ranks.members}; "
            "close that first"
        )
    del table.gradient_of


def _options(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> dict:
    """What a step depends on besides rows, states and gradients, in plain numbers."""
    found: dict = {"seed": optimizer._seed, "steps": optimizer.steps}
    for number, group in enumerate(groups):
        for name, value in group.items():
            if name != "params":
                found[f"{name} of group {number}"] = value.item() if isinstance(value, torch.Tensor) else value
    return found


def _told(number: int, count: int) -> str:
    return f"step {count + 1}" if number == _STEP else f"backward pass {count} of table {number}"


def digest(tensor: torch.Tensor) -> int:
    """A number of 64 bits of a dense tensor's bytes and their places: equal where all bytes are."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    words, total, step = flat.view(torch.int64), 0, 2**22
    for begin in range(0, len(words), step):
        part = words[begin : begin + step]
        # SplitMix64's constants; a sum of words that depend on their place does not depend on the order of adding.
        mixed = part + torch.arange(begin + 1, begin + 1 + len(part), device=part.device) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
        mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
        total += int((mixed ^ (mixed >> 31)).sum())
    return total % 2**64
