"""Hash and lookup in one launch: the rows of every n-gram that ends at each token, for all layers of a plan.

The kernel is in ops/row_kernels/hashed.py. T tokens, L layers, C columns, R elements a row.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch

from engram_kernels import reference
from engram_kernels.cache.lookup import check_cache, launch_cached_lookup
from engram_kernels.geometry.plan import PLAN_SCHEMA, HashPlan
from engram_kernels.launching.checks import check_programs, check_token_values, check_tokens, is_kernel_device
from engram_kernels.launching.prepared import form_of
from engram_kernels.ops.row_kernels.arguments import check_tables_of_plan, forms_of
from engram_kernels.ops.row_kernels.hashed import launch_hash_lookup, prepare_hash_lookup
from engram_kernels.ops.row_kernels.order import check_order, choose_order
from engram_kernels.ops.row_kernels.output import (
    VIEW_SCHEMA,
    check_row_out,
    make_row_out,
    make_view_out,
    op_out,
    op_result,
    out_parts,
    split_view,
)
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import check_recordable, record_rows, records_rows
from engram_kernels.tables.staging import check_stageable, stage
from engram_kernels.tables.view import TableView, view_tables

from .hashing import ngram_hash
from .rows import launch_lookup

if TYPE_CHECKING:
    from engram_kernels.cache.ngram import NgramCache


def launch_layers(row_ids, tables: Sequence[EngramTable], out, storage: bool, programs: int | None) -> None:
    """A launch per layer, where some tables are staged: row ids ``[..., L, C]`` come to the CPU once for all."""
    host_ids = row_ids.cpu()
    for layer, table in enumerate(tables):
        ids = row_ids[..., layer, :]
        if table.placement == "staged":
            ids, view = stage(table, ids, "hash_lookup", host_ids[..., layer, :])
        else:
            view = view_tables((table,), ids.device)
        target = tuple(part if part is None else part[layer] for part in out) if storage else out[layer]
        launch_lookup(ids, view, target, storage, programs)


@torch.library.custom_op(
    "engram::hash_lookup",
    mutates_args=(),
    schema=f"(Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, {VIEW_SCHEMA}, "
    f"ScalarType? out_dtype, bool storage, int? programs, str? order, {PLAN_SCHEMA}) -> Tensor[]",
)
def hash_lookup_op(token_ids, cu_seqlens, history, dead, *rest):
    """:func:`hash_lookup` for torch.compile: [values], or for storage [rows] or [rows, scales]."""
    view, (out_dtype, storage, programs, order), plan = _parts(rest)
    out = make_view_out(view, ids_shape(token_ids, plan), token_ids.device, out_dtype, storage)
    order = choose_order(order, view, prod(ids_shape(token_ids, plan)))
    launch_hash_lookup(token_ids, plan, view, cu_seqlens, history, dead, out, storage, programs, order)
    return op_result(out)


@hash_lookup_op.register_fake
def _(token_ids, cu_seqlens, history, dead, *rest):
    view, (out_dtype, storage, *_), plan = _parts(rest)
    return op_result(make_view_out(view, ids_shape(token_ids, plan), token_ids.device, out_dtype, storage))


@torch.library.custom_op(
    "engram::hash_lookup_out",
    mutates_args=("out", "out_scales"),
    schema=f"(Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, {VIEW_SCHEMA}, Tensor(a!) out, "
    f"Tensor(b!)? out_scales, bool storage, int? programs, str? order, {PLAN_SCHEMA}) -> ()",
)
def hash_lookup_out_op(token_ids, cu_seqlens, history, dead, *rest):
    """:func:`hash_lookup` for torch.compile, into ``out``, for storage into ``(out, out_scales)``."""
    view, (out, *out_scales, storage, programs, order), plan = _parts(rest, 5)
    out, order = (out, *out_scales) if storage else out, choose_order(order, view, prod(ids_shape(token_ids, plan)))
    launch_hash_lookup(token_ids, plan, view, cu_seqlens, history, dead, out, storage, programs, order)


@hash_lookup_out_op.register_fake
def _(*_):
    return None


def _parts(rest, options: int = 4) -> tuple[TableView, tuple, HashPlan]:
    """The registered op's arguments after the tokens: view, ``options`` of them such as order, plan."""
    view, rest = split_view(rest)
    return view, rest[:options], HashPlan(*rest[options:])


def ids_shape(token_ids, plan: HashPlan) -> tuple[int, ...]:
    """Shape of the rows' ids, layers first: ``[L, T, C]`` or ``[L, B, S, C]``."""
    return (plan.primes.shape[0], *token_ids.shape, plan.primes.shape[1])


def _layer_gradients(plan: HashPlan, names, grad, token_ids, *tokens):
    """Row ids and their gradient for each layer, from the gradient of :func:`hash_lookup`'s rows."""
    row_ids = ngram_hash(token_ids, plan, **dict(zip(names, tokens, strict=True)))
    return [(row_ids[..., layer, :], part) for layer, part in enumerate(grad)]


def hash_lookup(
    token_ids: torch.Tensor,
    plan: HashPlan,
    tables: Sequence[EngramTable],
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: str = "values",
    programs: int | None = None,
    order: str | None = None,
    cache: "NgramCache | None" = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """Rows ``[L, T, C, R]`` (``[L, B, S, C, R]``) of all layers of the plan, in one launch unless rows are sorted.

    tables: one :class:`EngramTable` per layer of the plan, in its order, of one format and width.
    token_ids, plan, cu_seqlens, history and dead are those of :func:`ngram_hash`; out, out_dtype, out_format, programs
    and order those of :func:`lookup`. A column that would get row id -1 reads as zeros. The scale of format e4m3 comes
    as float32 ``[L]``. Where a table is staged there is a launch per layer, and the call waits for the GPU
    once, to bring row ids to the CPU; it cannot be captured or compiled then.
    cache: an :class:`NgramCache` for this plan and these tables; what it has is not read from them, and what it has not
    once a call, head by head in every order but "direct". No bit differs.
    Where a table is trainable (:meth:`EngramTable.requires_row_grad_`) autograd follows values back to its rows; the
    backward pass hashes once more rather than keep the ids.
    """
    where, form, launch = "hash_lookup", None, None
    if cache is None and not torch.compiler.is_compiling() and isinstance(plan, HashPlan):
        form = (where, form_of(token_ids, cu_seqlens, history, dead, *out_parts(out)), forms_of(tables))
        form += (out_dtype, out_format, programs, order)
        launch = plan.prepared.launch(form)
    if launch is None:
        check_tokens(where, token_ids, plan, cu_seqlens, history, dead)
        tables = check_tables_of_plan(where, plan, tables)
    else:
        for table in tables:
            table.check_usable(where)
    row_format, shape = tables[0].format, (*ids_shape(token_ids, plan), tables[0].width)
    if launch is None:
        _check_options(where, token_ids, plan, tables, shape, out, out_dtype, out_format, programs, order, cache)
    check_token_values(where, token_ids, plan, cu_seqlens, history, dead)
    if cache is not None and not cache.takes(token_ids.numel()):
        cache = None
    if records_rows(tables, out_format):
        check_recordable(where, out)
        tokens = dict(cu_seqlens=cu_seqlens, history=history, dead=dead)
        with torch.no_grad():
            options = dict(out_dtype=out_dtype, programs=programs, order=order, cache=cache)
            rows = hash_lookup(token_ids, plan, tables, **tokens, **options)
        return record_rows(rows, tables, partial(_layer_gradients, plan, list(tokens)), token_ids, *tokens.values())
    sources, storage = (token_ids, cu_seqlens, history, dead), out_format == "storage"
    if launch is None:
        if not is_kernel_device(token_ids) or row_format.dtype == torch.float64:
            options = dict(cu_seqlens=cu_seqlens, history=history, dead=dead, out=out, out_dtype=out_dtype)
            options |= dict(out_format=out_format, cache=None if cache is None else cache.simulator)
            return reference.hash_lookup(token_ids, plan, tables, **options)
        if token_ids.is_cuda and any(table.placement == "staged" for table in tables):
            check_stageable(where)
            row_ids = ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history, dead=dead)
            if out is None:
                out = make_row_out(row_format, shape, token_ids.device, out_dtype, storage)
            launch_layers(row_ids, tables, out, storage, programs)
            return _with_table_scales(out, tables, storage)
        view = view_tables(tables, token_ids.device)
        if torch.compiler.is_compiling():
            options = (storage, programs, order, *plan.parts())
            if out is None:
                out = op_out(hash_lookup_op(*sources, *view, out_dtype, *options), storage)
            else:
                hash_lookup_out_op(*sources, *view, *out_parts(out), *options)
            return _with_table_scales(out, tables, storage)
        order = choose_order(order, view, prod(shape[:-1]))
        if cache is not None:
            launch = partial(launch_cached_lookup, cache, plan, view, storage, programs, order)
        else:
            launch = prepare_hash_lookup(token_ids, plan, view, cu_seqlens, storage, programs, order)
            if form is not None:
                plan.prepared.keep(form, launch)
    if out is None:
        out = make_row_out(row_format, shape, token_ids.device, out_dtype, storage)
    launch(*sources, out)
    return _with_table_scales(out, tables, storage)


def _check_options(where, token_ids, plan, tables, shape, out, out_dtype, out_format, programs, order, cache) -> None:
    """What is asked for fits tokens, plan and tables, which do fit each other."""
    if token_ids.numel() * plan.primes.shape[1] >= 2**31:
        raise ValueError(f"{where}: T * C must be below 2^31, got {token_ids.numel()} * {plan.primes.shape[1]}")
    check_programs(where, programs)
    check_order(where, order, prod(shape[:-1]))
    check_row_out(where, tables[0], shape, token_ids.device, out, out_dtype, out_format)
    check_cache(where, cache, plan, tables, prod(shape[:-1]))


def _with_table_scales(out, tables, storage: bool):
    """Storage output of format e4m3 comes with the tables' scales, which no kernel writes."""
    if storage and tables[0].format.scaling == "table":
        return out[0], torch.stack([table.scale for table in tables])
    return out
