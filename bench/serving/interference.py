"""How much a lookup beside it slows a matmul down, by the number of the lookup's programs.

A persistent lookup holds ``programs`` multiprocessors and a share of the memory's bandwidth. The matmul is that of an
8B decoder's FFN: over many tokens, bound by arithmetic (``prefill``), or over few, bound by reading its weights
(``decode``). It runs as often in a row as fits into 0.6 of the lookup, from the same moment on, so that the lookup is
there to its end; ``covered`` says whether it was.
"""

import statistics
from functools import partial

import torch

from bench.running.cases import Workbench, poison, row_bytes, spread_tokens, wrong_rows
from bench.running.timing import SideStream
from engram_kernels import hash_lookup, reference

KINDS = {"prefill": 2048, "decode": 16}  # rows of the matmul
PROGRAMS = (4, 8, 16, 32, 64, 132)
WIDTHS = (4096, 24_576)
LOOKUP_TOKENS = 8192
SAMPLES = 15
#: Seconds that one measurement is expected to take before one has been made.
FIRST_PAIR = 3.0


def interference_names() -> list[str]:
    """Every measurement; the programs between which a choice is likely come first."""
    order = sorted(PROGRAMS, key=lambda programs: abs(programs - 24))
    return [f"interference/{kind}/programs{programs}" for programs in order for kind in KINDS]


class Interference:
    """A lookup from the host table, and matmuls to run beside it."""

    def __init__(self, bench: Workbench, timer, widths: tuple[int, int] = WIDTHS, tokens: int = LOOKUP_TOKENS):
        self._bench, self._timer, self._side = bench, timer, SideStream(bench.device)
        self._plan, self._table = bench.plan("v41", "host"), bench.table("v41", "host")
        layers, columns = self._plan.primes.shape
        self._ids = bench.token_ids("uniform", "v41", tokens, 0)
        options = dict(dtype=torch.bfloat16, device=bench.device)
        self._rows = torch.empty(layers, tokens, columns, self._table.width, **options)
        self._weight = bench.randn(*widths, seed=1) * widths[0] ** -0.5

    def measure(self, name: str) -> dict:
        """The record of ``interference/<kind>/programs<n>``: each alone and beside the other, in turn, in seconds."""
        _, kind, setting = name.split("/")
        programs, timer = int(setting.removeprefix("programs")), self._timer
        tables = (self._table,) * len(self._rows)
        lookup = partial(hash_lookup, self._ids, self._plan, tables, out=self._rows, programs=programs)
        problem = self._check(lookup)
        if problem is not None:
            return dict(status="failed", reason=problem)
        left = self._bench.randn(KINDS[kind], self._weight.shape[0], seed=2)
        out = torch.empty(len(left), self._weight.shape[1], dtype=left.dtype, device=left.device)
        once = partial(torch.mm, left, self._weight, out=out)
        lookup_alone = timer.measure([lookup]).median
        count = max(1, int(0.6 * lookup_alone / timer.measure([once]).median))

        def many() -> None:
            for _ in range(count):
                once()

        replay = timer.record(many)
        alone, ours, others = [], [], []
        for _ in range(SAMPLES):
            alone += timer.rounds([replay], 1, lambda number: None)[0]
            taken = timer.beside(replay, lookup, self._side)
            ours.append(taken[0])
            others.append(taken[1])
        return dict(
            kind=kind,
            programs=programs,
            matmuls=count,
            alone=statistics.median(alone),
            beside=statistics.median(ours),
            slowdown=statistics.median(own / free - 1 for own, free in zip(ours, alone, strict=True)),
            lookup_alone=lookup_alone,
            lookup_beside=statistics.median(others),
            lookup_bytes=row_bytes(self._table, self._rows[..., 0].numel()),
            covered=all(other >= own for own, other in zip(ours, others, strict=True)),
        )

    def _check(self, lookup) -> str | None:
        poison(self._rows)
        lookup()
        at = spread_tokens(len(self._ids), 64)
        plan = self._bench.plan("v41", "host", torch.device("cpu"))
        row_ids = reference.ngram_hash(self._ids.cpu(), plan)[at]
        return wrong_rows(self._rows[:, at.to(self._rows.device)], row_ids, self._table)
