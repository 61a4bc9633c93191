"""What hash_lookup may look in before it reads tables."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from engram_kernels.geometry.kinds import Instance
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.registry import Registry
from engram_kernels.launching.tokens import Tokens
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import TableView

from .output import Reading

CACHES = Registry("cache")


class RowCache(ABC):
    """Rows of some n-grams, nearer than their tables: :class:`NgramCache`. For one plan and its tables alone."""

    plan: HashPlan
    tables: Sequence[EngramTable]
    name: str  #: by which registered ops find it, in CACHES
    #: int64 ``[1]`` on the plan's device, which stands for its state in compiled graphs: a lookup is declared to write
    #: to it, so that none is dropped and all come in their order. The state itself is not their argument: kernels
    #: know rows by address, and torch may hand on a copy of what an op writes to.
    turns: torch.Tensor

    def _enter(self, device: torch.device) -> None:
        """Let registered ops find this cache, as long as it lives."""
        self.name, self.turns = CACHES.enter(self), torch.zeros(1, dtype=torch.int64, device=device)

    @abstractmethod
    def takes(self, num_tokens: int) -> bool:
        """Whether a call of so many tokens goes through it."""

    @abstractmethod
    def look_up(self, tokens: Tokens, view: TableView, reading: Reading, out) -> None:
        """Launch what reads the rows of ``tokens``, from here or from the tables of ``view``, into ``out``."""

    @property
    @abstractmethod
    def simulator(self):
        """On a CPU: what the reference tells of the n-grams that it looks up."""


CACHE = Instance(RowCache)
CACHE.expected = "an NgramCache"  # the one there is, in a room above


def check_cache(where: str, cache, plan: HashPlan, tables, num_rows: int) -> None:
    """Raise unless ``cache`` is None or one for this plan and these tables, in a call for ``num_rows`` rows."""
    if cache is None:
        return
    CACHE.check(where, "cache", cache)
    same = len(tables) == len(cache.tables) and all(map(lambda a, b: a is b, tables, cache.tables))
    if plan is not cache.plan or not same:
        raise ValueError(f"{where}: cache must be made for this very plan and these tables, got {cache!r} of others")
    if num_rows >= 2**31:
        raise ValueError(f"{where}: with a cache L * T * C must be below 2^31, got {num_rows}")
