"""hash_lookup over a host table in each read order, with scales on the host and on the device, over sizes of the grid.

Bytes over the link are those of the rows that an order reads: address order reads each distinct row of a call once.
Scales on the device are a copy there of the same table's, so that no second table is needed.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import Case, Prepared, Workbench, poison, spread_tokens, tensor_bytes, wrong_rows
from engram_kernels import hash_lookup, reference
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops.row_kernels.hashed import prepare_hash_lookup
from engram_kernels.ops.row_kernels.order import ORDERS
from engram_kernels.ops.row_kernels.output import Reading
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import view_tables

TOKENS, ALL_TOKENS = (2048, 8192), (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
PROGRAMS = (8, 16, 32, 64, 132)
#: Behind every op of the package: these cases say which choice is right, not how fast an op is.
PRIORITY = 100


def cases(full: bool = False) -> Iterator[Case]:
    for place, tokens in enumerate(sorted(ALL_TOKENS if full else TOKENS, reverse=True)):
        for kind in ("uniform", "text"):
            for order in ORDERS:
                yield _case(kind, order, "host", None, tokens, place)
            yield _case(kind, "address", "device", None, tokens, place)
            if full:
                yield _case(kind, "direct", "device", None, tokens, place)
    for programs in PROGRAMS:
        for order in ("direct", "address") if full else ("address",):
            yield _case("uniform", order, "host", programs, max(TOKENS), len(ALL_TOKENS))


def _case(kind: str, order: str, scales: str, programs: int | None, tokens: int, place: int) -> Case:
    variant = f"host/{kind}/{order}/scales-{scales}" + (f"/programs{programs}" if programs else "")
    work = partial(prepare, kind, order, scales, programs, tokens)
    return Case("read_order", "v41", variant, tokens, PRIORITY + place, work, "zero_copy")


def prepare(kind: str, order: str, scales: str, programs: int | None, tokens: int, bench: Workbench) -> Prepared:
    plan, plan_cpu = bench.plan("v41", "host"), bench.plan("v41", "host", torch.device("cpu"))
    layers, columns = plan.primes.shape
    table = bench.table("v41", "host")
    tables = (table,) * layers
    out = torch.empty(layers, tokens, columns, table.width, dtype=table.default_out_dtype, device=bench.device)
    ids = [bench.token_ids(kind, "v41", tokens, index) for index in range(bench.sets(tensor_bytes(out)))]
    distinct = [_distinct_rows(each, plan_cpu) for each in ids]
    asked = layers * tokens * columns
    read = sum(distinct) / len(distinct) if order == "address" else asked
    link = read * (table.format.row_bytes(table.width) + (scales == "host") * table.format.scale_bytes(table.width))
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens)
        row_ids = reference.ngram_hash(ids[index].cpu(), plan_cpu)[at].to(table.weight.device)
        return wrong_rows(result[:, at.to(bench.device)], row_ids, table)

    lookup = partial(hash_lookup, plan=plan, tables=tables, out=out, order=order, programs=programs)
    if scales == "device" and bench.device.type == "cuda":
        lookup = _with_scales_on_device(tables, plan, out, order, programs)
    return Prepared(
        calls=[partial(lookup, each) for each in ids],
        check=check,
        nbytes=int(link) + tensor_bytes(ids[0], out),
        link_bytes=int(link),
        facts={
            "sets": len(ids),
            "table_bytes": table.nbytes,
            "rows_asked_for": asked,
            "rows_read": int(read),
            "distinct_rows": round(sum(distinct) / len(distinct) / asked, 4),
        },
    )


def _distinct_rows(token_ids: torch.Tensor, plan_cpu) -> int:
    """Rows that a call reads at least: distinct ones of each layer."""
    row_ids = reference.ngram_hash(token_ids.cpu(), plan_cpu)
    return sum(len(row_ids[:, layer].unique()) for layer in range(row_ids.shape[1]))


def _with_scales_on_device(tables: tuple[EngramTable, ...], plan, out: torch.Tensor, order: str, programs: int | None):
    """``call(token_ids)`` of a launch that finds the tables' scales in device memory."""
    view = view_tables(tables, out.device)
    scales = tables[0].scale.to(out.device)
    descriptors = view.descriptors.clone()
    descriptors[:, 1] = scales.data_ptr()
    view = view._replace(descriptors=descriptors)

    def call(token_ids: torch.Tensor, kept: torch.Tensor = scales) -> torch.Tensor:
        tokens = Tokens(token_ids)
        prepare_hash_lookup(tokens, plan, view, Reading(False, programs, order))(tokens, out)
        return out

    return call
