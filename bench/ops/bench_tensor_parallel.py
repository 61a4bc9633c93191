"""hash_lookup of one rank's columns, and of rows as they are stored: tensor parallelism and fp8 projections."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import Case, Prepared, Workbench, poison, priority, row_bytes, spread_tokens, tensor_bytes
from engram_kernels import hash_lookup, lookup, ngram_hash, reference

RANKS = 8
TOKENS = (1, 128, 4096)


def cases(full: bool = False) -> Iterator[Case]:
    for placement, roof in (("host", "zero_copy"), ("device", "device_copy")):
        for name, ranks in (("storage", 1), (f"1of{RANKS}", RANKS), (f"1of{RANKS}/storage", RANKS)):
            for tokens in TOKENS if full else TOKENS[::2]:
                storage = name.endswith("storage")
                variant, rank = f"{placement}/{name}", priority("v41", tokens, 6)
                work = partial(prepare, placement, ranks, storage, tokens)
                yield Case("tensor_parallel", "v41", variant, tokens, rank, work, roof)


def prepare(placement: str, ranks: int, storage: bool, tokens: int, bench: Workbench) -> Prepared:
    whole = bench.plan("v41", placement, torch.device("cpu"))
    plan_cpu = whole.select(columns=range(0, whole.primes.shape[1], ranks))
    plan = plan_cpu.to(bench.device)
    layers, columns = plan.primes.shape
    tables = (bench.table("v41", placement),) * layers
    table, shape = tables[0], (layers, tokens, columns)
    fmt, width = table.format, table.width
    items, dtype = (fmt.row_items(width), fmt.dtype) if storage else (width, table.default_out_dtype)
    out = torch.empty(*shape, items, dtype=dtype, device=bench.device)
    poison(out)
    scales = None
    if storage and fmt.group:
        scales = torch.empty(*shape, fmt.scale_bytes(width), dtype=torch.uint8, device=bench.device)
        poison(scales)
    read = row_bytes(table, layers * tokens * columns)
    sets = bench.sets(read + tensor_bytes(out, scales))
    ids = [bench.token_ids("uniform", "v41", tokens, index) for index in range(sets)]
    target, options = (out, scales) if storage else out, dict(out_format="storage" if storage else "values")

    def check(result, index: int) -> str | None:
        at = spread_tokens(tokens)
        row_ids = reference.ngram_hash(ids[index].cpu(), plan_cpu)[at].to(table.weight.device)
        wrong = 0
        for layer in range(layers):
            expected = reference.lookup(table, row_ids[:, layer], **options)
            parts = result if storage else (result,)
            found = [part[layer, at.to(bench.device)] for part in parts if part is not None]
            for one, other in zip(found, expected if storage else (expected,), strict=False):
                wrong += int((one.view(torch.uint8).to(other.device) != other.view(torch.uint8)).sum())
        return f"{wrong} bytes differ from the reference" if wrong else None

    def two_launches(index: int):
        row_ids = ngram_hash(ids[index], plan)
        found = [lookup(table, row_ids[:, layer], **options) for layer in range(layers)]
        return tuple(map(torch.stack, zip(*found, strict=True))) if storage else torch.stack(found)

    return Prepared(
        calls=[partial(hash_lookup, each, plan, tables, out=target, **options) for each in ids],
        check=check,
        nbytes=tensor_bytes(ids[0], out, scales) + read,
        link_bytes=read if placement == "host" else 0,
        baselines={"two_launches": lambda: two_launches},
        facts={"sets": sets, "table_bytes": table.nbytes, "layers": layers, "columns": columns},
    )
