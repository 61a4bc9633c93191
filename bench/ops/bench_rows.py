"""lookup: rows of one layer by ids that are there; host and device tables, ids uniform and of text."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import (
    TOKENS,
    Case,
    Prepared,
    Workbench,
    poison,
    row_bytes,
    row_variants,
    spread_tokens,
    tensor_bytes,
    wrong_rows,
)
from engram_kernels import lookup, reference
from engram_kernels.commands.traffic import layer_traffic

from . import baselines


def cases(full: bool = False) -> Iterator[Case]:
    for model, variant, tokens, priority, roof in row_variants(full):
        yield Case("lookup", model, variant, tokens, priority, partial(prepare, model, variant, tokens, full), roof)


def prepare(model: str, variant: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    placement, kind = variant.split("/")
    table, plan_cpu = bench.table(model, placement), bench.plan(model, placement, torch.device("cpu"))
    columns = plan_cpu.primes.shape[1]
    out = torch.empty(tokens, columns, table.width, dtype=table.default_out_dtype, device=bench.device)
    read = row_bytes(table, tokens * columns)
    row_ids = []
    for index in range(bench.sets(read + tensor_bytes(out))):
        token_ids = bench.token_ids(kind, model, tokens, index).cpu()
        row_ids.append(reference.ngram_hash(token_ids, plan_cpu)[:, 0].contiguous().to(bench.device))
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens).to(bench.device)
        return wrong_rows(result[None, at], row_ids[index][at, None].to(table.weight.device), table)

    prepared = Prepared(
        calls=[partial(lookup, table, ids, out=out) for ids in row_ids],
        check=check,
        nbytes=tensor_bytes(row_ids[0], out) + read,
        link_bytes=read if placement == "host" else 0,
        wire_bytes=layer_traffic(bench.config(model), tokens).wire_bytes if placement == "host" else 0.0,
        facts={
            "sets": len(row_ids),
            "table_bytes": table.nbytes,
            "distinct_rows": round(len(row_ids[0].unique()) / row_ids[0].numel(), 4),
        },
    )
    if bench.peers and model == "v41":
        prepared.baselines |= bench.peers.lookup(table, row_ids)
    prepared.baselines["embedding"] = lambda: baselines.embedding(table, row_ids)
    if placement == "host":
        prepared.baselines["staged"] = lambda: baselines.staged(table, row_ids)
        prepared.baselines["cpu_gather"] = lambda: baselines.cpu_gather(table, row_ids)
    else:
        prepared.baselines["eager"] = lambda: lambda index: reference.lookup(table, row_ids[index])
        if full or (variant == "device/uniform" and model == "v41" and tokens == max(TOKENS)):
            inputs = [(ids,) for ids in row_ids]
            plain = baselines.plain_lookup(table)
            prepared.baselines["compiled"] = lambda: baselines.compiled(plain, inputs)
    return prepared
