"""The registered ops of lookup and hash_lookup that know tables by their view alone: numbers and addresses.

These are what a compiled graph calls where no autograd, cache or staging has a part. Ops that find tables by name stand
with :func:`lookup` and :func:`hash_lookup`. L layers, T tokens, C columns.
"""

from math import prod

from engram_kernels.geometry.plan import PLAN_SCHEMA, HashPlan
from engram_kernels.launching.launch import Kept, capturing
from engram_kernels.launching.ranges import ranged
from engram_kernels.launching.tokens import TOKENS_SCHEMA, Tokens
from engram_kernels.tables.view import TableView

from .call import form_of, out_parts, registered, writes_alone
from .hashing import known_plan
from .row_kernels.by_id import prepare_lookup
from .row_kernels.hashed import prepare_hash_lookup
from .row_kernels.order import choose_order
from .row_kernels.output import VIEW_SCHEMA, Reading, make_view_out, op_result, split_view

_LOOKUPS, _HASH_LOOKUPS = Kept(), Kept()  # launches of each


def ids_shape(token_ids, plan: HashPlan) -> tuple[int, ...]:
    """Shape of the rows' ids, layers first: ``[L, T, C]`` or ``[L, B, S, C]``."""
    return (plan.primes.shape[0], *token_ids.shape, plan.primes.shape[1])


def prepare_rows(row_ids, view: TableView, storage: bool, programs: int | None, order: str | None):
    """The launch of :func:`lookup`, in the order that is asked for or chosen."""
    return prepare_lookup(row_ids, view, Reading(storage, programs, choose_order(order, view, row_ids.numel())))


def _launch_lookup(row_ids, view: TableView, out, *options) -> None:
    if capturing(row_ids):
        ranged("lookup", prepare_rows(row_ids, view, *options))(row_ids, out)
        return
    # It holds the descriptors, whose address stays theirs.
    form = form_of(row_ids, *out_parts(out)), view.form, options
    _LOOKUPS.get(form, lambda: ranged("lookup", prepare_rows(row_ids, view, *options)))(row_ids, out)


def _new_rows(row_ids, *rest):
    view, (out_dtype, storage, *_) = split_view(rest)
    return op_result(make_view_out(view, row_ids.shape, row_ids.device, out_dtype, storage))


@registered(
    "lookup",
    f"(Tensor row_ids, {VIEW_SCHEMA}, ScalarType? out_dtype, bool storage, int? programs, str? order) -> Tensor[]",
    _new_rows,
)
def lookup_op(row_ids, *rest):
    """:func:`lookup` for torch.compile: [values], or for storage [rows] or [rows, scales]."""
    view, (out_dtype, storage, programs, order) = split_view(rest)
    out = make_view_out(view, row_ids.shape, row_ids.device, out_dtype, storage)
    _launch_lookup(row_ids, view, out, storage, programs, order)
    return op_result(out)


@registered(
    "lookup_out",
    f"(Tensor row_ids, {VIEW_SCHEMA}, Tensor(a!) out, Tensor(b!)? out_scales, bool storage, int? programs, "
    "str? order) -> ()",
    writes_alone,
)
def lookup_out_op(row_ids, *rest):
    """:func:`lookup` for torch.compile, into ``out``, for storage into ``(out, out_scales)``."""
    view, (out, out_scales, storage, programs, order) = split_view(rest)
    _launch_lookup(row_ids, view, (out, out_scales) if storage else out, storage, programs, order)


def _split(rest, options: int) -> tuple[TableView, tuple, HashPlan]:
    """A registered op's arguments after the tokens: view, so many options, plan."""
    view, rest = split_view(rest)
    return view, rest[:options], known_plan(rest[options:])


def _launch_hash_lookup(tokens: Tokens, plan: HashPlan, view: TableView, out, storage, programs, order) -> None:
    def prepare():
        chosen = choose_order(order, view, prod(ids_shape(tokens.token_ids, plan)))
        return ranged("hash_lookup", prepare_hash_lookup(tokens, plan, view, Reading(storage, programs, chosen)))

    if capturing(tokens.token_ids):
        launch = prepare()
    else:  # it holds the plan's tensors and the descriptors, whose addresses stay theirs
        form = form_of(*tokens, *out_parts(out)), plan, view.form, storage, programs, order
        launch = _HASH_LOOKUPS.get(form, prepare)
    launch(tokens, out)


def _new_layers(token_ids, cu_seqlens, history, dead, slots, *rest):
    view, (out_dtype, storage, *_), plan = _split(rest, 4)
    return op_result(make_view_out(view, ids_shape(token_ids, plan), token_ids.device, out_dtype, storage))


_OPTIONS = f"bool storage, int? programs, str? order, {PLAN_SCHEMA}"


@registered(
    "hash_lookup", f"({TOKENS_SCHEMA}, {VIEW_SCHEMA}, ScalarType? out_dtype, {_OPTIONS}) -> Tensor[]", _new_layers
)
def hash_lookup_op(token_ids, cu_seqlens, history, dead, slots, *rest):
    """:func:`hash_lookup` for torch.compile: [values], or for storage [rows] or [rows, scales]."""
    view, (out_dtype, storage, programs, order), plan = _split(rest, 4)
    out = make_view_out(view, ids_shape(token_ids, plan), token_ids.device, out_dtype, storage)
    _launch_hash_lookup(Tokens(token_ids, cu_seqlens, history, dead, slots), plan, view, out, storage, programs, order)
    return op_result(out)


@registered(
    "hash_lookup_out",
    f"({TOKENS_SCHEMA}, {VIEW_SCHEMA}, Tensor(a!) out, Tensor(b!)? out_scales, {_OPTIONS}) -> ()",
    writes_alone,
)
def hash_lookup_out_op(token_ids, cu_seqlens, history, dead, slots, *rest):
    """:func:`hash_lookup` for torch.compile, into ``out``, for storage into ``(out, out_scales)``."""
    view, (out, out_scales, storage, programs, order), plan = _split(rest, 5)
    out = (out, out_scales) if storage else out
    _launch_hash_lookup(Tokens(token_ids, cu_seqlens, history, dead, slots), plan, view, out, storage, programs, order)
