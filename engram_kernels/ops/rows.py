"""Rows of a table by id, dequantised in float32 and rounded once.

    dense         row
    e4m3_ue8m0    row * 2^(scale byte - 127), one byte per 32 elements; byte 255 is NaN
    e4m3          row * scale, one float32 for the table
    mxfp4         e2m1 row * 2^(scale byte - 127), one byte per 32 elements
    nvfp4         (e2m1 row * e4m3 scale) * scale: one byte per 16 elements, one float32 for the table

C columns, R elements a row. An id outside the table, -1 among them, reads as a row of zeros and touches no memory.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch.compiler import is_compiling

from engram_kernels import reference
from engram_kernels.geometry.choices import OutFormat, ReadOrder, RowsAndScales
from engram_kernels.geometry.kinds import Instance, Tensor, check_all, declares
from engram_kernels.launching.checks import check_tensor
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import check_recordable, record_rows, records_rows
from engram_kernels.tables.memory.direct import rows_at_hand
from engram_kernels.tables.placed import TABLES, counting, rows_asked
from engram_kernels.tables.trainable import moves_taken

from .call import Op, form_of, out_parts, recording_number, registered
from .gate_kernels.gradients import refuse_second_derivative
from .row_kernels.arguments import check_tables, is_staged, view_rows
from .row_kernels.order import check_order
from .row_kernels.output import READ_KINDS, check_row_out, make_row_out, op_out
from .views import lookup_op, lookup_out_op, prepare_rows


class LookupCall(NamedTuple):
    """Ids, the table that they are of, and how its rows are wanted."""

    row_ids: torch.Tensor
    table: EngramTable
    out_dtype: torch.dtype | None
    out_format: str
    programs: int | None
    order: str | None

    @property
    def storage(self) -> bool:
        return self.out_format == "storage"


class Lookup(Op):
    """:func:`lookup`."""

    name = "lookup"
    input_names = ("row_ids",)

    def signature(self, call, out):
        return form_of(call.row_ids, *out_parts(out)), getattr(call.table, "identity", None), call[2:]

    def __call__(self, call, out=None, signature=None):
        if getattr(call.table, "put_off", None) is None or (is_compiling() and self.records(call)):
            return super().__call__(call, out, signature)
        return self._moved(call, out)

    @torch._disable_dynamo  # torch.compiler.disable, which would import Dynamo here, in 1.6 s
    def _moved(self, call, out):
        """The result, of rows that first take the moves that an optimizer has put off."""
        self.check(call, out)
        with moves_taken((call.table,), (call.row_ids,)):
            return super().__call__(call, out)

    def owner(self, call):
        return call.table

    def check(self, call, out):
        row_ids, table, out_dtype, out_format, programs, order = call
        check_tensor(self.name, "row_ids", row_ids, dtypes=(torch.int32, torch.int64), contiguous=False)
        Instance(EngramTable).check(self.name, "table", table)
        check_tables(self.name, (table,), row_ids.device)
        check_all(self.name, READ_KINDS, dict(programs=programs, order=order))
        check_order(self.name, order, row_ids.numel())
        if row_ids.dim() == 0 or row_ids.numel() >= 2**31:
            shape = list(row_ids.shape)
            raise ValueError(f"{self.name}: row_ids must have shape [..., C], below 2^31 ids, got {shape}")
        check_row_out(self.name, table, (*row_ids.shape, table.width), row_ids.device, out, out_dtype, out_format)

    def inputs(self, call):
        return (call.row_ids,)

    def fixed(self, call):
        return call.table.memory("table")

    def repeats(self, call):
        call.table.check_usable(self.name)
        return not self.records(call)

    def records(self, call):
        return records_rows((call.table,), call.out_format)

    def record(self, call, out):
        check_recordable(self.name, out)
        if is_compiling():
            return lookup_recorded_op(call.row_ids, call.table.anchor, call.table.number, call.out_dtype, *call[4:])
        with torch.no_grad():
            rows = self(call)
        return record_rows(rows, (call.table,), lambda grad, ids: ((ids, grad),), call.row_ids)

    def on_kernels(self, call):
        return is_kernel_device(call.row_ids) and call.table.format.dtype != torch.float64

    def reference(self, call, out):
        if not is_compiling():
            call.table.cpu_rows += call.row_ids.numel()
        table, row_ids = rows_at_hand(call.table, call.row_ids, self.name)
        return reference.lookup(table, row_ids, out=out, out_dtype=call.out_dtype, out_format=call.out_format)

    def compiled(self, call, out):
        row_ids, view = view_rows(call.table, call.row_ids, self.name)
        if out is None:
            found = lookup_op(row_ids, *view, call.out_dtype, call.storage, call.programs, call.order)
            out = op_out(found, call.storage)
        else:
            lookup_out_op(row_ids, *view, *out_parts(out), call.storage, call.programs, call.order)
        return _with_table_scale(call, out)

    def allocate(self, call):
        shape = (*call.row_ids.shape, call.table.width)
        return make_row_out(call.table.format, shape, call.row_ids.device, call.out_dtype, call.storage)

    def launcher(self, call, out):
        if is_staged(call.table, call.row_ids.device):
            return self._launch_staged
        _, view = view_rows(call.table, call.row_ids, self.name)
        launch = prepare_rows(call.row_ids, view, call.storage, call.programs, call.order)
        return counting((call.table,), call.row_ids.numel(), launch)

    def _launch_staged(self, call, out):
        rows_asked((call.table,)).rows += call.row_ids.numel()
        row_ids, view = view_rows(call.table, call.row_ids, self.name)
        prepare_rows(row_ids, view, call.storage, call.programs, call.order)(row_ids, out)

    def prepare(self, call, out):
        run = super().prepare(call, out)
        return (lambda call, out: _with_table_scale(call, run(call, out))) if call.storage else run


LOOKUP = Lookup()


def _with_table_scale(call: LookupCall, out):
    """Storage output of format e4m3 comes with the table's scale, which no kernel writes."""
    return (out[0], call.table.scale) if call.storage and call.table.format.name == "e4m3" else out


def _save_lookup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.name = inputs[2]


def _lookup_formula(ctx, grad):
    row_ids, anchor = ctx.saved_tensors
    found = lookup_gradient_op(grad, row_ids, anchor.detach(), ctx.name, recording_number())
    return None, found, None, None, None, None


def _recorded_call(row_ids, _, name: str, out_dtype, *options) -> LookupCall:
    return LookupCall(row_ids, TABLES.find(name), out_dtype, "values", *options)


@registered(
    "lookup_recorded",
    "(Tensor row_ids, Tensor anchor, str table, ScalarType? out_dtype, int? programs, str? order) -> Tensor",
    lambda *arguments: LOOKUP.allocate(_recorded_call(*arguments)),
    _lookup_formula,
    _save_lookup,
)
def lookup_recorded_op(*arguments):
    """:func:`lookup` for torch.compile where autograd follows it: an eager call, which takes moves that are put off."""
    with torch.no_grad():
        return LOOKUP(_recorded_call(*arguments))


@registered(
    "lookup_gradient",
    "(Tensor grad, Tensor row_ids, Tensor anchor, str table, int recording) -> Tensor",
    lambda grad, row_ids, anchor, *_: torch.zeros_like(anchor),
    refuse_second_derivative("lookup"),
)
def lookup_gradient_op(grad, row_ids, anchor, name, recording):
    """Leaves the rows' gradient in the table, as an eager backward pass does. For the anchor itself 0 is to be added.

    recording: another one for each lookup, so that no two of a graph are taken for the same.
    """
    table = TABLES.find(name)
    if table.requires_row_grad:
        table.accumulate_row_grad(row_ids, grad)
    return torch.zeros_like(anchor)


@overload
def lookup(
    table: EngramTable,
    row_ids: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: Literal["values"] = "values",
    programs: int | None = None,
    order: ReadOrder | None = None,
) -> torch.Tensor: ...


@overload
def lookup(
    table: EngramTable,
    row_ids: torch.Tensor,
    *,
    out: RowsAndScales | None = None,
    out_dtype: None = None,
    out_format: Literal["storage"],
    programs: int | None = None,
    order: ReadOrder | None = None,
) -> RowsAndScales: ...


@declares(table=Instance(EngramTable), row_ids=Tensor(torch.int32, torch.int64), **READ_KINDS)
def lookup(
    table: EngramTable,
    row_ids: torch.Tensor,
    *,
    out: torch.Tensor | RowsAndScales | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: OutFormat = "values",
    programs: int | None = None,
    order: ReadOrder | None = None,
) -> torch.Tensor | RowsAndScales:
    """Rows ``[..., C, R]`` of a table.

    table: the :class:`EngramTable`, which the device of row_ids can read.
    row_ids: ``[..., C]``, int32 or int64, any strides whose leading dimensions view as one. An id outside the table,
    such as -1, reads as zeros.
    out_dtype: bfloat16, float16 or float32; None is the table's own dtype, bfloat16 where rows have scales.
    out_format: "values", or "storage" for the raw rows in the table's dtype (uint8 ``[..., C, R / 2]`` of nvfp4 and
    mxfp4) and their scales: uint8 ``[..., C, R / 32]`` for e4m3_ue8m0 and mxfp4, ``[..., C, R / 16]`` for nvfp4 (its
    other scale is ``table.own_scale``), the table's float32 scalar for e4m3, None for dense formats.
    out: a contiguous tensor to write to; a pair (rows, scales) for "storage".
    programs: size of the persistent grid, None for all multiprocessors; fewer leave them to other work.
    order: in which rows are read, "direct", "head" (column by column) or "address" (sorted, duplicates read once); None
    leaves the choice to ops/row_kernels/order.py. It changes no bit, and nothing on the CPU.

    With a staged table the call waits for the GPU to bring row_ids to the CPU, and cannot be captured or compiled.
    Where the table is trainable (:meth:`EngramTable.requires_row_grad_`) autograd follows values back to its rows.

    ValueError for 2^31 ids or more, a table that is closed or that this device cannot read, and an ``out`` that does
    not fit or overlaps an input.
    """
    return LOOKUP(LookupCall(row_ids, table, out_dtype, out_format, programs, order), out)
