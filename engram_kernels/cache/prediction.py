"""What a hot n-gram cache of some size saves on a text: hit rates, and what PCIe still carries, by simulation.

    PCIe bytes a token = layers * heads * (row + scale bytes) * SUM over orders of read
    memory             = layers * orders * entries * (heads * (row + scale bytes) + 16)

``read`` is the share of n-grams whose rows come from the host: each missed one of a call, once. 16 are the bytes of a
key and a stamp. The simulator is reference/cache/simulator.py, which the kernels equal; an n-gram is the same in every
layer, so that one layer stands for all. Counted on the second half of the text, after the first half has filled the
cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import row_format
from engram_kernels.reference.cache.simulator import TAG_BYTES, WAYS, CacheSimulator, ngram_keys

_CHUNK = 1 << 20  # tokens that are hashed at once


@dataclass(frozen=True)
class CacheRates:
    """Per order, 2 first, shares of all n-grams in the second half of a text."""

    entries: int  #: of each order in each layer; 0 stands for no cache, with each n-gram of a call read once
    hits: tuple[float, ...]  #: found in the cache
    read: tuple[float, ...]  #: read from the host

    @property
    def hit(self) -> float:
        """Mean over orders, each of which has as many rows."""
        return sum(self.hits) / len(self.hits)

    @property
    def gain(self) -> float:
        """How many times fewer rows are read than without a cache, duplicates read again."""
        return len(self.read) / sum(self.read) if sum(self.read) else float("inf")


def entry_bytes(config: EngramConfig) -> int:
    """Bytes of one n-gram's rows and scales, of all heads."""
    fmt = row_format(config.format, "entry_bytes")
    return config.heads * (fmt.stored_bytes(config.row_width))


def cache_bytes(config: EngramConfig, entries: int) -> int:
    """Device memory of a cache of ``entries`` n-grams of each order in each layer."""
    groups = len(config.layers) * (config.max_ngram - 1)
    return groups * entries * (entry_bytes(config) + TAG_BYTES)


def entries_within(config: EngramConfig, nbytes: int) -> int:
    """Entries of each order in each layer that fit into ``nbytes``."""
    return nbytes // cache_bytes(config, 1)


def link_bytes(config: EngramConfig, rates: CacheRates) -> float:
    """Bytes of rows and scales that a token needs from the host, in all layers."""
    return len(config.layers) * entry_bytes(config) * sum(rates.read)


def text_keys(token_ids: np.ndarray, plan: HashPlan) -> np.ndarray:
    """Keys int64 ``[N - 1, T]`` of a text, one sequence, in the plan's first layer."""
    plan = plan.select(layers=[0])
    ids = torch.from_numpy(np.ascontiguousarray(token_ids, dtype=np.int64))
    before = torch.full((plan.max_ngram - 1,), -1, device="cpu")
    parts = []
    for chunk in ids.split(_CHUNK):
        parts.append(ngram_keys(chunk, plan, history=before[None]))
        before = torch.cat([before, chunk])[1 - plan.max_ngram :]
    return np.concatenate(parts, axis=1)


def measure_rates(
    keys: np.ndarray,
    entries: int,
    tokens: int,
    ways: int = WAYS,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> CacheRates:
    """Rates of calls with ``tokens`` tokens each, one after the other; ``tell(calls done, calls)`` after each.

    keys: int64 ``[G, T]``, T at least two calls. What is left of T after whole calls is not looked up. Of a set of
    ``ways`` entries as many are used as ``entries`` has whole ones.
    """
    calls = keys.shape[1] // tokens
    if calls < 2:
        raise ValueError(f"measure_rates: expected at least two calls of {tokens} tokens, got {keys.shape[1]} tokens")
    if not entries:
        return _without_cache(keys, tokens)
    simulator = CacheSimulator(len(keys), max(1, entries // ways), min(ways, entries))
    before = None
    for call in range(calls):
        if call == calls // 2:
            before = simulator.asked.copy(), simulator.hits.copy(), simulator.read.copy()
        simulator.look_up(keys[:, call * tokens : (call + 1) * tokens])
        tell(call + 1, calls)
    counted = [now - then for now, then in zip((simulator.asked, simulator.hits, simulator.read), before, strict=True)]
    asked, hits, read = (count.tolist() for count in counted)
    sets, ways = simulator.keys.shape[1:]
    return CacheRates(sets * ways, _shares(hits, asked), _shares(read, asked))


def _without_cache(keys: np.ndarray, tokens: int) -> CacheRates:
    calls = keys.shape[1] // tokens
    counted = keys[:, calls // 2 * tokens : calls * tokens].reshape(len(keys), -1, tokens)
    asked, read = np.count_nonzero(counted, axis=(1, 2)), []
    for of_order in np.sort(counted, axis=2):
        first = np.ones(of_order.shape, dtype=bool)
        first[:, 1:] = of_order[:, 1:] != of_order[:, :-1]
        read.append(np.count_nonzero(first & (of_order != 0)))
    return CacheRates(0, (0.0,) * len(keys), _shares(read, asked))


def _shares(counts, of) -> tuple[float, ...]:
    return tuple(float(count / total) if total else 0.0 for count, total in zip(counts, of, strict=True))
