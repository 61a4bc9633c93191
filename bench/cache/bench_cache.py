"""hash_lookup through a hot n-gram cache: a host table, over capacities and numbers of tokens.

A case is a stream of calls, each of which looks up the next T tokens, those before them its history. ``text``: calls of
the first half of the text fill the cache, and those of the second are timed, each seen once. ``uniform``: random ids,
whose n-grams do not come again, so that a cache that is full of others can only cost.

Bytes over the link are those that the cache's own statistics count in the timed calls. The simulator
(reference/cache/simulator.py) looks the same stream up: what it reads is the predicted gain, and counts that differ
from its own fail the case.
Baselines are the same calls in direct order, which reads duplicates again, and in address order, which does not.
bench/cache/report.py says what of the predicted gain was measured.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from bench.running.cases import Case, InTurn, Prepared, Workbench, poison, spread_tokens, tensor_bytes, wrong_rows
from engram_kernels import HashPlan, NgramCache, hash_lookup, reference
from engram_kernels.cache.store import COUNTS
from engram_kernels.commands.traffic import layer_traffic
from engram_kernels.reference.cache.simulator import CacheSimulator, ngram_keys

TOKENS, ALL_TOKENS = (2048, 8192), (128, 512, 1024, 2048, 4096, 8192, 16_384)
#: Of each order in each layer: 0.8 and 3.2 GB for V4.1; with --full 0.2 to 12.8.
ENTRIES, ALL_ENTRIES = (1 << 16, 1 << 18), (1 << 14, 1 << 16, 1 << 18, 1 << 20)
UNIFORM_ENTRIES = 1 << 18
PRIORITY = 60
#: Timed calls of a case: all that the second half of the novels has of 8,192 tokens.
MOST_TIMED = 50
_MOST_TEXT = 1 << 20


def cases(full: bool = False) -> Iterator[Case]:
    streams = [("text", entries) for entries in reversed(ALL_ENTRIES if full else ENTRIES)]
    for place, tokens in enumerate(sorted(ALL_TOKENS if full else TOKENS, reverse=True)):
        for kind, entries in (*streams, ("uniform", UNIFORM_ENTRIES)):
            variant = f"host/{kind}/entries{entries}"
            work = partial(prepare, kind, entries, tokens)
            yield Case("cache", "v41", variant, tokens, PRIORITY + place, work, "zero_copy")


class Stream(NamedTuple):
    """Calls of ``tokens`` tokens each: ``filling`` ones, then one to check, the timed ones, and another to check."""

    token_ids: torch.Tensor  #: int32, of all calls
    tokens: int
    filling: int
    timed: int
    depth: int  #: tokens of history

    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids ``[T]`` and history ``[1, N - 1]`` of each call."""
        start = self.token_ids.new_full((self.depth,), -1)
        before = torch.cat([start, self.token_ids])
        calls = range(0, len(self.token_ids), self.tokens)
        return [(self.token_ids[at : at + self.tokens], before[None, at : at + self.depth]) for at in calls]


def make_stream(kind: str, entries: int, tokens: int, depth: int, bench: Workbench) -> Stream:
    """Half of the text to fill the cache, or twice as many random ids as it has entries, so that no way stays empty."""
    if kind == "text":
        calls = len(ids := bench.stream(kind, "v41", _MOST_TEXT)) // tokens
        filling = calls // 2
        timed = min(MOST_TIMED, calls - filling - 2)
        if timed < 1:
            raise ValueError(f"a text of {len(ids):,} tokens has {calls} calls of {tokens:,}; five are needed")
    else:
        filling, timed = -(-2 * entries // tokens), MOST_TIMED
        ids = bench.stream(kind, "v41", (filling + timed + 2) * tokens)
    return Stream(ids[: (filling + timed + 2) * tokens], tokens, filling, timed, depth)


class Prediction(NamedTuple):
    """What the simulator counts in the timed calls of a stream."""

    counts: np.ndarray  #: int64 ``[5, G]``, in the order of COUNTS
    distinct: int  #: n-grams of each call, read once: what is read without a cache that outlives a call


def predict(stream: Stream, plan: HashPlan, sets: int, ways: int) -> Prediction:
    """The stream through a cache of that shape; ``plan`` on the CPU."""
    keys = ngram_keys(stream.token_ids.cpu(), plan)
    calls = np.split(keys, range(stream.tokens, keys.shape[1], stream.tokens), axis=1)
    simulator = CacheSimulator(len(keys), sets, ways)
    for call in calls[: stream.filling + 1]:
        simulator.look_up(call)
    before, timed = _counts(simulator), calls[stream.filling + 1 : -1]
    for call in timed:
        simulator.look_up(call)
    distinct = int(sum(np.count_nonzero(np.unique(of_group)) for call in timed for of_group in call))
    return Prediction(_counts(simulator) - before, distinct)


def prepare(kind: str, entries: int, tokens: int, bench: Workbench) -> Prepared:
    plan, plan_cpu = bench.plan("v41", "host"), bench.plan("v41", "host", torch.device("cpu"))
    layers, columns = plan.primes.shape
    table = bench.table("v41", "host")
    tables = (table,) * layers
    cache = NgramCache(plan, tables, entries=entries, min_tokens=0)
    stream = make_stream(kind, entries, tokens, plan.max_ngram - 1, bench)
    predicted = predict(stream, plan_cpu, cache.sets, cache.ways)
    out = torch.empty(layers, tokens, columns, table.width, dtype=table.default_out_dtype, device=bench.device)

    def look_up(inputs: tuple[torch.Tensor, torch.Tensor], **options) -> torch.Tensor:
        hash_lookup(inputs[0], plan, tables, history=inputs[1], out=out, **options)
        return out

    def uncached(order: str, index: int) -> torch.Tensor:
        return look_up(inputs[index], order=order)

    inputs = stream.inputs()
    for filling in inputs[: stream.filling]:
        look_up(filling, cache=cache)
    inputs = inputs[stream.filling :]
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens)
        token_ids, history = (part.cpu() for part in inputs[index])
        row_ids = reference.ngram_hash(token_ids, plan_cpu, history=history)[at].to(table.weight.device)
        return wrong_rows(result[:, at.to(bench.device)], row_ids, table)

    before = np.zeros_like(predicted.counts)

    def finish() -> dict:
        counted = _counts(cache.stats()) - before
        if not np.array_equal(counted, predicted.counts):
            raise ValueError(f"the cache counted {_words(counted)}, and the simulator {_words(predicted.counts)}")
        asked, hits, read, inserted, _ = counted.sum(axis=1).tolist()
        per_entry = cache.entry_bytes / stream.timed
        # Of the cache: rows of hits are read, those of what is kept written.
        moved = (read + hits + inserted) * per_entry + tensor_bytes(inputs[0][0], out)
        wire = layers * layer_traffic(bench.config("v41"), tokens).wire_bytes * read / asked
        return dict(
            link_bytes=int(read * per_entry), nbytes=int(moved), wire_bytes=wire, facts=facts | {"hits": hits / asked}
        )

    asked, _, read, *_ = predicted.counts.sum(axis=1).tolist()
    facts = {
        "kind": kind,
        "entries": cache.entries,
        "cache_bytes": cache.nbytes,
        "table_bytes": table.nbytes,
        "filling_calls": stream.filling,
        "timed_calls": stream.timed,
        "rows": layers * tokens * columns,
        # Times fewer rows than without a cache; one is read where none has to be, so that a gain is a number.
        "predicted_gain": {"direct": asked / max(1, read), "address": predicted.distinct / max(1, read)},
    }
    return Prepared(
        calls=[partial(look_up, each, cache=cache) for each in inputs],
        check=check,
        nbytes=0,  # like all bytes of a case in turn, counted as it runs
        facts=facts,
        baselines={"direct": lambda: partial(uncached, "direct"), "address": lambda: partial(uncached, "address")},
        in_turn=InTurn(start=lambda: np.copyto(before, _counts(cache.stats())), finish=finish),
    )


def _counts(of) -> np.ndarray:
    """int64 ``[5, G]`` of a simulator or of a cache's statistics."""
    return np.stack([np.ravel(getattr(of, name)) for name in COUNTS])


def _words(counts: np.ndarray) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in zip(COUNTS, counts.sum(axis=1).tolist(), strict=True))
