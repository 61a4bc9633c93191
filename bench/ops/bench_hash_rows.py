"""hash_lookup: rows of all layers from token ids in one launch; host and device tables, ids uniform and of text."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import (
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
from engram_kernels import hash_lookup, reference
from engram_kernels.commands.traffic import layer_traffic

from . import baselines


def cases(full: bool = False) -> Iterator[Case]:
    for model, variant, tokens, priority, roof in row_variants(full):
        yield Case(
            "hash_lookup", model, variant, tokens, priority, partial(prepare, model, variant, tokens, full), roof
        )


def prepare(model: str, variant: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    placement, kind = variant.split("/")
    plan, plan_cpu = bench.plan(model, placement), bench.plan(model, placement, torch.device("cpu"))
    layers, columns = plan.primes.shape
    tables = (bench.table(model, placement),) * layers
    table = tables[0]
    out = torch.empty(layers, tokens, columns, table.width, dtype=table.default_out_dtype, device=bench.device)
    read = row_bytes(table, layers * tokens * columns)
    sets = bench.sets(read + tensor_bytes(out))
    ids = [bench.token_ids(kind, model, tokens, index) for index in range(sets)]
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens)
        row_ids = reference.ngram_hash(ids[index].cpu(), plan_cpu)[at].to(table.weight.device)
        return wrong_rows(result[:, at.to(bench.device)], row_ids, table)

    prepared = Prepared(
        calls=[partial(hash_lookup, each, plan, tables, out=out) for each in ids],
        check=check,
        nbytes=tensor_bytes(ids[0], out) + read,
        link_bytes=read if placement == "host" else 0,
        wire_bytes=layers * layer_traffic(bench.config(model), tokens).wire_bytes if placement == "host" else 0.0,
        facts={"sets": sets, "table_bytes": table.nbytes, "layers": layers},
    )
    if bench.peers and model == "v41":
        prepared.baselines |= bench.peers.hash_lookup(ids, plan, tables)
    prepared.baselines["two_launches"] = lambda: baselines.two_launches(ids, plan, tables)
    prepared.baselines["demo"] = lambda: baselines.demo_rows(ids, plan_cpu, tables)
    if placement == "device":
        prepared.baselines["eager"] = lambda: lambda index: reference.hash_lookup(ids[index], plan, tables)
        if full:
            rows = baselines.plain_lookup(table)

            def plain(token_ids):
                row_ids = reference.ngram_hash(token_ids, plan)
                return torch.stack([rows(row_ids[:, layer]) for layer in range(layers)])

            prepared.baselines["compiled"] = lambda: baselines.compiled(plain, [(each,) for each in ids])
    return prepared
