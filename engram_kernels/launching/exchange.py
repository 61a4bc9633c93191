"""Collectives of torch.distributed over the ranks of a group, with errors that name the step and the rank.

In every method ``where`` is the public function that is running and ``what`` its step, both for errors. Annotations are
texts, since torch can be built without torch.distributed, and the package is imported with such builds too.

A rank that dies, hangs, or makes another call shows up in its peers' next collective: at once with Gloo where a
connection breaks, within the group's time-out otherwise.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engram_kernels.geometry.kinds import describe

from .ranges import ranged

Result = TypeVar("Result")
_REFUSED = -1  # in place of a number of entries


class RankError(RuntimeError):
    """A step that all ranks of a group take together failed on some rank."""


class Ranks:
    """A process group seen from one of its ranks; None is the world."""

    def __init__(self, group: "dist.ProcessGroup | None", where: str, name: str = "group"):
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(f"{where}: torch.distributed must be initialised first (init_process_group)")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{where}: {name} must be a ProcessGroup (of a DeviceMesh, mesh.get_group(name)) or None, "
                f"got {describe(group)}"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"{where}: rank {dist.get_rank()} of the world is not a member of the group")

    @property
    def members(self) -> list[int]:
        """Ranks of the world, in the group's order."""
        return dist.get_process_group_ranks(self.group)

    def exchange(
        self, send: torch.Tensor, send_counts: list[int], receive_counts: list[int], where: str, what: str
    ) -> torch.Tensor:
        """What the ranks send this one, in their order; ``send [n, ...]`` has ``send_counts[r]`` entries for rank r."""
        received = send.new_empty(sum(receive_counts), *send.shape[1:])
        return self.exchange_into(received, send, where, what, receive_counts, send_counts)

    def exchange_into(
        self,
        received: torch.Tensor,
        send: torch.Tensor,
        where: str,
        what: str,
        receive_counts: list[int] | None = None,
        send_counts: list[int] | None = None,
    ) -> torch.Tensor:
        """The same into the tensor ``received``; without counts every rank gets an equal share."""
        with self._together(where, what):
            exchange = ranged("exchange", dist.all_to_all_single)
            exchange(received, send, receive_counts, send_counts, group=self.group)
        return received

    def exchange_counts(self, counts: torch.Tensor, where: str, what: str) -> tuple[list[int], list[int]]:
        """Both as lists: int64 ``counts [W]`` of entries for each rank, and what they have for this one. Waits.

        Of counts ``[W * n]`` each rank gets n. RankError where a rank has none to give, since it refuses its arguments
        (:meth:`refuse`).
        """
        theirs = self.exchange_into(torch.empty_like(counts), counts, where, f"the number of {what}").tolist()
        if _REFUSED in theirs:
            rank = theirs.index(_REFUSED) * self.size // len(theirs)
            raise RankError(f"{where}: rank {rank} of {self.size} refused its arguments; its own error says why")
        return counts.tolist(), theirs

    def refuse(self, device: torch.device, where: str, what: str, each: int = 1) -> None:
        """Take part in :meth:`exchange_counts` for a rank whose arguments are wrong, so that its peers need not wait.

        device: one that the group moves tensors of. each: numbers that a rank gets. Where peers are gone there is
        nobody to tell.
        """
        with contextlib.suppress(RankError):
            counts = torch.full((self.size * each,), _REFUSED, device=device)
            self.exchange_into(torch.empty_like(counts), counts, where, f"the number of {what}")

    def sum(self, value: torch.Tensor, where: str, what: str) -> torch.Tensor:
        """The sum of ``value [n]`` over the ranks, added in their order: the same bits on every rank."""
        return self.values(value, where, what).sum(0)

    def values(self, value: torch.Tensor, where: str, what: str) -> torch.Tensor:
        """Every rank's ``value [...]``, of the same shape and dtype on all, in the order of ranks ``[W, ...]``."""
        values = value.new_empty(self.size, *value.shape)
        with self._together(where, what):
            dist.all_gather(list(values), value, group=self.group)
        return values

    def gather(self, value: Any, where: str, what: str) -> list[Any]:
        """Every rank's ``value``, in the order of ranks."""
        values: list[Any] = [None] * self.size
        with self._together(where, what):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, where: str, what: str, work: Callable[[], Result]) -> Result:
        """``work()`` on every rank; where it fails on one, it fails on all: there with its error, else RankError."""
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            error = failure
        text = None if error is None else f"{type(error).__name__}: {error}"
        texts = self.gather(text, where, f"report on {what}")
        if error is not None:
            raise error
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if failed:
            rank, text = failed[0]
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RankError(f"{where}: {what} failed on rank {rank} of {self.size}{others}: {text}")
        return result

    def check_equal(self, facts: Mapping[str, Any], where: str) -> None:
        """Raise ValueError on every rank unless all of them have the same facts."""
        everywhere = self.gather(dict(facts), where, "comparison of arguments")
        for name, expected in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other.get(name) != expected:
                    raise ValueError(
                        f"{where}: {name} must be the same on all {self.size} ranks, got {expected!r} on rank 0 and "
                        f"{other.get(name)!r} on rank {rank}"
                    )

    @contextlib.contextmanager
    def _together(self, where: str, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what c10d and its backends raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RankError(
                f"{where}: {what} failed on rank {self.rank} of {self.size}: a rank has died, has not come within the "
                f"group's time-out, or made another call ({reason[:300]})"
            ) from error


class Groups:
    """The groups that one rank of a table is in.

    ranks: those that hold the shards of one table. node: those that share this rank's shard in memory, or None.
    replicas: those whose shards have the same rows; the node unless given.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | None",
        node: "dist.ProcessGroup | None",
        replicas: "dist.ProcessGroup | None",
        where: str,
    ):
        self.ranks = Ranks(group, where)
        self.node = None if node is None else Ranks(node, where, "node")
        self.replicas = self.node if replicas is None else Ranks(replicas, where, "replicas")

    def attempt(self, where: str, what: str, work: Callable[[], Result]) -> Result:
        """:meth:`Ranks.attempt` over the ranks and all replicas of theirs."""
        if self.replicas is None:
            return self.ranks.attempt(where, what, work)
        return self.replicas.attempt(where, what, lambda: self.ranks.attempt(where, what, work))
