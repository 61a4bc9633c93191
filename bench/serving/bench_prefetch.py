"""Prefetcher beside other work: both V4.1 layers' rows from a host table while a chain of matmuls runs.

A call is MATMULS products ``[T, 4096] x [4096, 4096]`` before each layer, and a copy of its rows, which stands for
what reads them. Baselines are the same work with rows that are there already (``ready``), and with each layer looked up
where it is read (``inline``). The lookup is hidden as far as a call takes no longer than ``ready``.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import Case, Prepared, Workbench, poison, row_bytes, spread_tokens, tensor_bytes, wrong_rows
from engram_kernels import Prefetcher, hash_lookup, reference

TOKENS, ALL_TOKENS = (2048, 8192), (1, 8, 64, 128, 512, 2048, 8192)
PRIORITY = 120
#: Before each layer, 0.14 us a token at 700 TFLOP/s: a little more than its rows take over 50 GB/s.
MATMULS, HIDDEN = 3, 4096


def cases(full: bool = False) -> Iterator[Case]:
    for place, tokens in enumerate(sorted(ALL_TOKENS if full else TOKENS, reverse=True)):
        yield Case("prefetch", "v41", "host/text", tokens, PRIORITY + place, partial(prepare, tokens), "zero_copy")


def prepare(tokens: int, bench: Workbench) -> Prepared:
    plan, plan_cpu = bench.plan("v41", "host"), bench.plan("v41", "host", torch.device("cpu"))
    layers, columns = plan.primes.shape
    tables = (bench.table("v41", "host"),) * layers
    plans = [plan.select(layers=[layer]) for layer in range(layers)]
    prefetcher = Prefetcher(plan, tables, tokens)
    read = row_bytes(tables[0], layers * tokens * columns)
    ids = [bench.token_ids("text", "v41", tokens, index) for index in range(bench.sets(read))]
    hidden, weight = bench.randn(tokens, HIDDEN), bench.randn(HIDDEN, HIDDEN, seed=1) * HIDDEN**-0.5
    shape = (layers, tokens, columns, tables[0].width)
    out = torch.empty(shape, dtype=tables[0].default_out_dtype, device=bench.device)
    poison(out)

    def work(rows) -> torch.Tensor:
        """The call, with ``rows(layer)`` at each layer."""
        x = hidden
        for layer in range(layers):
            for _ in range(MATMULS):
                x = x @ weight
            out[layer].copy_(rows(layer))
        return out

    def prefetched(token_ids: torch.Tensor) -> torch.Tensor:
        prefetcher.start(token_ids)
        return work(prefetcher.rows)

    def inline(index: int) -> torch.Tensor:
        return work(lambda layer: hash_lookup(ids[index], plans[layer], tables[layer : layer + 1])[0])

    def ready():
        rows = [hash_lookup(each, plan, tables) for each in ids]
        return lambda index: work(lambda layer: rows[index][layer])

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens)
        row_ids = reference.ngram_hash(ids[index].cpu(), plan_cpu)[at].to(tables[0].weight.device)
        return wrong_rows(result[:, at.to(bench.device)], row_ids, tables[0])

    return Prepared(
        calls=[partial(prefetched, each) for each in ids],
        check=check,
        nbytes=tensor_bytes(ids[0], out) + read,
        link_bytes=read,
        facts={"sets": len(ids), "table_bytes": tables[0].nbytes, "matmuls": layers * MATMULS},
        baselines={"ready": ready, "inline": lambda: inline},
    )
