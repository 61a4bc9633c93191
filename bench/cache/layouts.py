"""What a file would save in which the rows of frequent n-grams lie together, page by page: a simulation on real text.

    python -m bench layouts

Heads hash each n-gram to rows that lie anywhere in a table, and each row is a part of many n-grams: no order of rows
puts those of every n-gram into one page. A file can have copies of them: a page for the heads of each n-gram that was
frequent in earlier text, and the table beside it for all others. Finding such a page takes an index in memory, which
the cache of rows then lacks.

Five novels, V4.1's hash; pages read a token in the last fifth of the text, after a cache that has seen all before it:

    rows        as tables are: a page for each head of an n-gram that the cache has not
    together    one page for such an n-gram where it was there twice or more in the first four fifths
    best        one page for every such n-gram: what no file can have
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from engram_kernels import EngramConfig, HashPlan
from engram_kernels.reference.cache.simulator import TAG_BYTES, WAYS, CacheSimulator, ngram_keys
from engram_kernels.testing.golden import v41_token_map

from ..running.text import load_token_ids

CACHES = (64 << 20, 256 << 20, 1 << 30)  # bytes of memory for rows, tags and index
INDEX_BYTES = 12  # of an n-gram with a page: 8 of its key, 4 of the page's number
TOKENS = 64  # of a call
PAGE = 4096
COLUMNS = "{:>9} {:>8} {:>8} {:>9} {:>8} {:>14} {:>12}"


class Saving(NamedTuple):
    """Pages read a token for one size of memory, and bytes of the file of copies and of its index."""

    nbytes: int
    rows: float
    together: float
    best: float
    file_bytes: int
    index_bytes: int


def missed(keys: np.ndarray, nbytes: int, entry_bytes: int) -> np.ndarray:
    """bool ``[G, T]``: n-grams that a cache of so many bytes reads, each distinct one of a call once."""
    groups, tokens = keys.shape
    cache = CacheSimulator(groups, max(1, nbytes // (groups * WAYS * entry_bytes)), WAYS)
    found = np.zeros(keys.shape, dtype=bool)
    for begin in range(0, tokens, TOKENS):
        part = keys[:, begin : begin + TOKENS]
        hits = cache.look_up(part)
        for group, of_group in enumerate(part):
            first = np.zeros(part.shape[1], dtype=bool)
            first[np.unique(of_group, return_index=True)[1]] = True
            found[group, begin : begin + TOKENS] = ~hits[group] & first & (of_group != 0)
    return found


def simulate(ids: np.ndarray, config: EngramConfig, caches: tuple[int, ...] = CACHES) -> list[Saving]:
    """For each size of memory, of one layer."""
    plan = HashPlan.build(config, v41_token_map())
    keys = ngram_keys(torch.from_numpy(ids), plan)[: config.max_ngram - 1]
    heads, row = config.heads, config.row_width + config.row_width // 32
    begin = 4 * keys.shape[1] // 5
    known = np.zeros(keys.shape, dtype=bool)
    pages = 0
    for group, of_group in enumerate(keys):
        distinct, counts = np.unique(of_group[:begin], return_counts=True)
        known[group] = np.isin(of_group, distinct[counts > 1])
        pages += int(np.count_nonzero(counts > 1))
    index, entry = pages * INDEX_BYTES, heads * row + TAG_BYTES
    found = []
    for nbytes in caches:
        plain = missed(keys, nbytes, entry)[:, begin:]
        beside = missed(keys, max(0, nbytes - index), entry)[:, begin:]
        tokens = plain.shape[1]
        once, apart = (int(np.count_nonzero(beside & which)) for which in (known[:, begin:], ~known[:, begin:]))
        together, every = once + heads * apart, int(np.count_nonzero(plain))
        found.append(Saving(nbytes, heads * every / tokens, together / tokens, every / tokens, pages * PAGE, index))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=0, help="of the text; default: all")
    chosen = parser.parse_args(arguments)
    ids = load_token_ids()[: chosen.tokens or None]
    config = EngramConfig.deepseek_v41_flash()
    print(f"{len(ids):,} tokens; pages read a token, one layer")
    print(COLUMNS.format("memory", "rows", "together", "saved", "best", "copies, MiB", "index, MiB"))
    for each in simulate(ids, config):
        saved = f"{1 - each.together / each.rows:.1%}" if each.rows else ""
        rates = (f"{rate:.2f}" for rate in each[1:3])
        sizes = (f"{nbytes / 2**20:,.1f}" for nbytes in (each.file_bytes, each.index_bytes))
        print(COLUMNS.format(f"{each.nbytes >> 20:,} MiB", *rates, saved, f"{each.best:.2f}", *sizes))
    return 0
