"""Hash and lookup in one launch: the rows of every n-gram that ends at each token, for all layers of a plan.

The kernel is in row_kernels/hashed.py. T tokens, L layers, C columns, R elements a row.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Literal, NamedTuple, overload

import torch
from torch.compiler import is_compiling

from engram_kernels import reference
from engram_kernels.geometry.choices import OutFormat, ReadOrder, RowsAndScales
from engram_kernels.geometry.kinds import Each, Instance, Optional, check_all, declares
from engram_kernels.geometry.plan import PLAN_SCHEMA, HashPlan
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.launching.overlap import memory_of_plan
from engram_kernels.launching.tokens import TOKEN_KINDS, TOKENS_SCHEMA, Tokens, check_token_values, check_tokens
from engram_kernels.reference.ops.hash_rows import lookup_layers
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import check_recordable, record_rows, records_rows
from engram_kernels.tables.memory.direct import rows_at_hand
from engram_kernels.tables.placed import TABLES, counting, rows_asked
from engram_kernels.tables.staging import check_stageable, stage
from engram_kernels.tables.trainable import moves_taken
from engram_kernels.tables.view import view_tables

from .call import Op, form_of, out_parts, recording_number, registered, writes_alone
from .gate_kernels.gradients import refuse_second_derivative
from .hashing import known_plan, ngram_hash
from .row_kernels.arguments import check_tables_of_plan, identities, is_staged
from .row_kernels.by_id import prepare_lookup
from .row_kernels.caching import CACHE, CACHES, RowCache, check_cache
from .row_kernels.hashed import prepare_hash_lookup
from .row_kernels.order import check_order, choose_order
from .row_kernels.output import READ_KINDS, Reading, check_row_out, make_row_out, op_out
from .views import hash_lookup_op, hash_lookup_out_op, ids_shape


class HashLookupCall(NamedTuple):
    """Tokens, the plan to hash them with, a table for each of its layers, and how rows are wanted."""

    tokens: Tokens
    plan: HashPlan
    tables: Sequence[EngramTable]
    out_dtype: torch.dtype | None
    out_format: str
    programs: int | None
    order: str | None
    cache: RowCache | None

    @property
    def storage(self) -> bool:
        return self.out_format == "storage"

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """Shape of the rows' ids, layers first: ``[L, T, C]`` or ``[L, B, S, C]``."""
        return ids_shape(self.tokens.token_ids, self.plan)


class HashLookup(Op):
    """:func:`hash_lookup`."""

    name = "hash_lookup"
    input_names = Tokens._fields

    def signature(self, call, out):
        if call.cache is not None:
            return None
        return form_of(*call.tokens, *out_parts(out)), identities(call.tables), call[3:]

    def __call__(self, call, out=None, signature=None):
        if isinstance(call.tables, (tuple, list)) and not (is_compiling() and self.records(call)):
            for table in call.tables:
                if getattr(table, "put_off", None) is not None:
                    return self._moved(call, out)
        return super().__call__(call, out, signature)

    @torch._disable_dynamo  # torch.compiler.disable, which would import Dynamo here, in 1.6 s
    def _moved(self, call, out):
        """The result, of rows that first take the moves that optimizers have put off."""
        self.check(call, out)
        row_ids = ngram_hash(call.tokens.token_ids, call.plan, **call.tokens.options)
        with moves_taken(call.tables, row_ids.unbind(-2)):
            return super().__call__(call, out)

    def span(self, call):
        return self.name if call.cache is None else "cached_lookup"

    def owner(self, call):
        return call.plan

    def check(self, call, out):
        where, (tokens, plan, tables, out_dtype, out_format, programs, order, cache) = self.name, call
        check_tokens(where, tokens, plan)
        check_tables_of_plan(where, plan, tables)
        num_tokens, num_columns, num_rows = tokens.token_ids.numel(), plan.primes.shape[1], prod(call.ids_shape)
        if num_tokens * num_columns >= 2**31:
            raise ValueError(f"{where}: T * C must be below 2^31, got {num_tokens} * {num_columns}")
        check_all(where, READ_KINDS, dict(programs=programs, order=order))
        check_order(where, order, num_rows)
        shape = (*call.ids_shape, tables[0].width)
        check_row_out(where, tables[0], shape, tokens.token_ids.device, out, out_dtype, out_format)
        check_cache(where, cache, plan, tables, num_rows)
        check_token_values(where, tokens, plan)

    def inputs(self, call):
        return call.tokens

    def fixed(self, call):
        tables = [part for layer, table in enumerate(call.tables) for part in table.memory(f"tables[{layer}]")]
        return memory_of_plan(call.plan) + tables

    def repeats(self, call):
        call.plan.check_memory(self.name)
        for table in call.tables:
            table.check_usable(self.name)
        check_token_values(self.name, call.tokens, call.plan)
        return not self.records(call)

    def settled(self, call):
        if call.cache is not None and not is_compiling() and not call.cache.takes(call.tokens.token_ids.numel()):
            return call._replace(cache=None)
        return call

    def records(self, call):
        return records_rows(call.tables, call.out_format)

    def record(self, call, out):
        check_recordable(self.name, out)
        # The backward pass hashes again, when slots may have moved on.
        call = call._replace(tokens=call.tokens.gathered())
        if is_compiling():  # a cache, of which training has no use, is left as it is
            anchors = [table.anchor for table in call.tables if table.requires_row_grad]
            numbers = ",".join([table.number for table in call.tables])
            options = (call.out_dtype, call.programs, call.order)
            return hash_lookup_recorded_op(*call.tokens[:4], anchors, numbers, *options, *call.plan.parts())
        with torch.no_grad():
            rows = self(call)
        return record_rows(rows, call.tables, partial(_layer_gradients, call.plan), *call.tokens)

    def on_kernels(self, call):
        if call.cache is not None and is_compiling():
            return True  # as the registered op finds when it runs
        return is_kernel_device(call.tokens.token_ids) and call.tables[0].format.dtype != torch.float64

    def reference(self, call, out):
        if call.cache is None and not is_compiling():
            for table in call.tables:
                table.cpu_rows += prod(call.ids_shape[1:])
        options = dict(out=out, out_dtype=call.out_dtype, out_format=call.out_format)
        if any(table.direct is not None or (table.mapped and not is_compiling()) for table in call.tables):
            return self._from_files(call, **options)
        options |= dict(cache=None if call.cache is None else call.cache.simulator, **call.tokens.options)
        return reference.hash_lookup(call.tokens.token_ids, call.plan, call.tables, **options)

    def _from_files(self, call, **options):
        """:meth:`reference`, where rows of some tables are read from files."""
        row_ids = ngram_hash(call.tokens.token_ids, call.plan, **call.tokens.options).unbind(-2)
        if call.cache is not None:
            tokens = call.tokens.gathered()
            sequences = dict(cu_seqlens=tokens.cu_seqlens, history=tokens.history, dead=tokens.dead)
            call.cache.simulator.look_up_tokens(tokens.token_ids, call.plan, **sequences)
        pairs = zip(call.tables, row_ids, strict=True)
        some = [rows_at_hand(table, ids, self.name) for table, ids in pairs]
        return lookup_layers(*zip(*some, strict=True), **options)

    def compiled(self, call, out):
        device = call.tokens.token_ids.device
        if call.cache is not None:
            out = self.allocate(call) if out is None else out
            options = (call.cache.turns, call.cache.name, call.out_dtype, call.storage, call.programs, call.order)
            hash_lookup_cached_op(*call.tokens, *out_parts(out), *options)
            return _with_table_scales(call, out)
        if any(is_staged(table, device) for table in call.tables):
            check_stageable(self.name)
        options = (call.storage, call.programs, call.order, *call.plan.parts())
        view = view_tables(call.tables, device)
        if out is None:
            out = op_out(hash_lookup_op(*call.tokens, *view, call.out_dtype, *options), call.storage)
        else:
            hash_lookup_out_op(*call.tokens, *view, *out_parts(out), *options)
        return _with_table_scales(call, out)

    def allocate(self, call):
        shape = (*call.ids_shape, call.tables[0].width)
        return make_row_out(call.tables[0].format, shape, call.tokens.token_ids.device, call.out_dtype, call.storage)

    def launcher(self, call, out):
        device = call.tokens.token_ids.device
        if any(is_staged(table, device) for table in call.tables):
            return self._launch_layers
        view = view_tables(call.tables, device)
        reading = Reading(call.storage, call.programs, choose_order(call.order, view, prod(call.ids_shape)))
        if call.cache is not None:
            return lambda call, out: call.cache.look_up(call.tokens, view, reading, out)
        launch = prepare_hash_lookup(call.tokens, call.plan, view, reading)
        return counting(call.tables, prod(call.ids_shape[1:]), launch)

    def prepare(self, call, out):
        run = super().prepare(call, out)
        return (lambda call, out: _with_table_scales(call, run(call, out))) if call.storage else run

    def _launch_layers(self, call, out):
        check_stageable(self.name)
        row_ids = ngram_hash(call.tokens.token_ids, call.plan, **call.tokens.options)
        launch_layers(row_ids, call.tables, out, Reading(call.storage, call.programs))


HASH_LOOKUP = HashLookup()


def launch_layers(row_ids: torch.Tensor, tables: Sequence[EngramTable], out, reading: Reading) -> None:
    """A launch per layer, where some tables are staged: row ids ``[..., L, C]`` come to the CPU once for all."""
    host_ids = row_ids.cpu()
    for layer, table in enumerate(tables):
        ids = row_ids[..., layer, :]
        rows_asked((table,)).rows += ids.numel()
        if is_staged(table, ids.device):
            ids, view = stage(table, ids, "hash_lookup", host_ids[..., layer, :])
        else:
            view = view_tables((table,), ids.device)
        target = tuple(part if part is None else part[layer] for part in out) if reading.storage else out[layer]
        prepare_lookup(ids, view, reading)(ids, target)


def _layer_gradients(plan: HashPlan, grad, *tokens):
    """Row ids and their gradient for each layer, from the gradient of :func:`hash_lookup`'s rows."""
    row_ids = ngram_hash(tokens[0], plan, **Tokens(*tokens).options)
    return [(row_ids[..., layer, :], part) for layer, part in enumerate(grad)]


def _with_table_scales(call: HashLookupCall, out):
    """Storage output of format e4m3 comes with the tables' scales, which no kernel writes."""
    if call.storage and call.tables[0].format.name == "e4m3":
        return out[0], torch.stack([table.scale for table in call.tables])
    return out


@registered(
    "hash_lookup_cached",
    f"({TOKENS_SCHEMA}, Tensor(a!) out, Tensor(b!)? out_scales, Tensor(c!) turns, str cache, ScalarType? out_dtype, "
    "bool storage, int? programs, str? order) -> ()",
    writes_alone,
)
def hash_lookup_cached_op(token_ids, cu_seqlens, history, dead, slots, out, out_scales, turns, name, *options):
    """:func:`hash_lookup` with a cache for torch.compile: an eager call, which asks what only a run can tell.

    That is whether so few tokens go past the cache, and whether rows of a table have changed.
    """
    out_dtype, storage, programs, order = options
    cache, tokens = CACHES.find(name), Tokens(token_ids, cu_seqlens, history, dead, slots)
    reading = (out_dtype, "storage" if storage else "values", programs, order, cache)
    with torch.no_grad():
        HASH_LOOKUP(HashLookupCall(tokens, cache.plan, cache.tables, *reading), (out, out_scales) if storage else out)


def _save_hash_lookup(ctx, inputs, output) -> None:
    *tokens, anchors, numbers, _, _, _ = inputs[:9]
    ctx.save_for_backward(*tokens, *inputs[9:15], *anchors)
    ctx.options = numbers, inputs[15:]


def _hash_lookup_formula(ctx, grad):
    saved, (numbers, options) = ctx.saved_tensors, ctx.options
    anchors = [anchor.detach() for anchor in saved[10:]]
    parts = (*saved[4:10], *options)
    found = hash_lookup_gradient_op(grad, *saved[:4], anchors, numbers, recording_number(), *parts)
    return *(None,) * 4, list(found), *(None,) * (4 + len(parts))


def _recorded_call(token_ids, cu_seqlens, history, dead, anchors, numbers, *rest) -> HashLookupCall:
    out_dtype, programs, order, *parts = rest
    tables = [TABLES.find(number) for number in numbers.split(",")]
    tokens = Tokens(token_ids, cu_seqlens, history, dead)
    return HashLookupCall(tokens, known_plan(parts), tables, out_dtype, "values", programs, order, None)


@registered(
    "hash_lookup_recorded",
    "(Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, Tensor[] anchors, str tables, "
    f"ScalarType? out_dtype, int? programs, str? order, {PLAN_SCHEMA}) -> Tensor",
    lambda *arguments: HASH_LOOKUP.allocate(_recorded_call(*arguments)),
    _hash_lookup_formula,
    _save_hash_lookup,
)
def hash_lookup_recorded_op(*arguments):
    """:func:`hash_lookup` for torch.compile where autograd follows it, see lookup_recorded."""
    with torch.no_grad():
        return HASH_LOOKUP(_recorded_call(*arguments))


@registered(
    "hash_lookup_gradient",
    "(Tensor grad, Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, Tensor[] anchors, str tables, "
    f"int recording, {PLAN_SCHEMA}) -> Tensor[]",
    lambda *arguments: [torch.zeros_like(anchor) for anchor in arguments[5]],
    refuse_second_derivative("hash_lookup"),
)
def hash_lookup_gradient_op(grad, token_ids, cu_seqlens, history, dead, anchors, numbers, recording, *parts):
    """As lookup_gradient, for the tables of all layers, whose ids are hashed once more."""
    found = _layer_gradients(known_plan(parts), grad, token_ids, cu_seqlens, history, dead)
    for number, (ids, part) in zip(numbers.split(","), found, strict=True):
        if (table := TABLES.find(number)).requires_row_grad:
            table.accumulate_row_grad(ids, part)
    return [torch.zeros_like(anchor) for anchor in anchors]


@overload
def hash_lookup(
    token_ids: torch.Tensor,
    plan: HashPlan,
    tables: Sequence[EngramTable],
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: Literal["values"] = "values",
    programs: int | None = None,
    order: ReadOrder | None = None,
    cache: RowCache | None = None,
) -> torch.Tensor: ...


@overload
def hash_lookup(
    token_ids: torch.Tensor,
    plan: HashPlan,
    tables: Sequence[EngramTable],
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: RowsAndScales | None = None,
    out_dtype: None = None,
    out_format: Literal["storage"],
    programs: int | None = None,
    order: ReadOrder | None = None,
    cache: RowCache | None = None,
) -> RowsAndScales: ...


@declares(**TOKEN_KINDS, tables=Each(Instance(EngramTable), least=1), cache=Optional(CACHE), **READ_KINDS)
def hash_lookup(
    token_ids: torch.Tensor,
    plan: HashPlan,
    tables: Sequence[EngramTable],
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | RowsAndScales | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: OutFormat = "values",
    programs: int | None = None,
    order: ReadOrder | None = None,
    cache: RowCache | None = None,
) -> torch.Tensor | RowsAndScales:
    """Rows ``[L, T, C, R]`` (``[L, B, S, C, R]``) of all layers of the plan, in one launch unless rows are sorted.

    token_ids: raw ids, int32 or int64, ``[T]`` packed or ``[B, S]``. plan: the :class:`HashPlan`, on their device.
    tables: one :class:`EngramTable` per layer of the plan, in its order, of one format and width.
    cu_seqlens: int32 ``[B + 1]``, starts of packed sequences and the end. history: ``[B, N - 1]`` ids before them, -1
    none.
    dead: bool ``[T]`` (``[B, S]``), tokens of no n-gram. slots: int32 ``[B]``, each sequence's row of history.
    out, out_dtype: a contiguous tensor to write to; its dtype, None is the table's, bfloat16 where rows have scales.
    out_format: "values", or "storage" for the raw rows in the tables' dtype (uint8 ``[..., R / 2]`` of nvfp4 and mxfp4)
    and their scales: uint8 ``[..., R / 32]`` for e4m3_ue8m0 and mxfp4, ``[..., R / 16]`` for nvfp4, float32 ``[L]``
    for e4m3, None for dense formats; ``out`` is a pair of these then.
    programs, order: size of the grid, and the read order "direct", "head" or "address"; None chooses. No bit differs.
    cache: an :class:`NgramCache` for this plan and these tables; what it has is not read from them, and what it has not
    once a call, head by head in every order but "direct". No bit differs.

    A column that would get row id -1 reads as zeros. Where a table is staged there is a launch per layer, and the call
    waits for the GPU once, to bring row ids to the CPU; it cannot be captured or compiled then. Where a table is
    trainable (:meth:`EngramTable.requires_row_grad_`) autograd follows values back to its rows; the backward pass
    hashes once more.

    ValueError for an invalid id on the CPU, tables that do not fit the plan, and 2^31 row ids a layer or more.
    """
    tokens = Tokens(token_ids, cu_seqlens, history, dead, slots)
    return HASH_LOOKUP(HashLookupCall(tokens, plan, tables, out_dtype, out_format, programs, order, cache), out)
