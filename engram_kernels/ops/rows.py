"""Rows of a table by id, dequantised in float32 and rounded once.

    dense         row
    e4m3_ue8m0    row * 2^(scale byte - 127), one byte per 32 elements; byte 255 is NaN
    e4m3          row * scale, one float32 for the table

C columns, R elements a row. An id outside the table, -1 among them, reads as a row of zeros and touches no memory.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels import reference
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.launching.checks import check_programs, check_tensor, is_kernel_device, processors
from engram_kernels.launching.device import cdiv, on_device_of
from engram_kernels.launching.prepared import form_of
from engram_kernels.ops.row_kernels.arguments import check_tables, two_dimensional
from engram_kernels.ops.row_kernels.copy import copy_rows, row_constants, rows_config
from engram_kernels.ops.row_kernels.order import check_order, choose_order, launch_copy_duplicates, scale_words
from engram_kernels.ops.row_kernels.output import (
    VIEW_SCHEMA,
    check_row_out,
    kernel_out,
    make_row_out,
    make_view_out,
    op_out,
    op_result,
    out_parts,
    split_view,
)
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import check_recordable, record_rows, records_rows
from engram_kernels.tables.staging import stage
from engram_kernels.tables.view import TableView, view_tables

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
# No tile goes through shared memory: ids and scales do, which takes 512 bytes, where a tile would take 8 KiB.
CEILINGS = {
    "lookup_kernel": dict(sm_80=(88, 512), sm_90=(80, 512), sm_100=(80, 512), gfx942=(72, 512)),
}


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_entry", "first_key"])
def lookup_kernel(
    row_ids_ptr,
    places_ptr,
    table_ptr,
    out_ptr,
    out_scale_ptr,
    num_rows,
    num_columns,
    first_entry,
    first_key,
    stride_ids_t,
    stride_ids_c,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_MAJOR: tl.constexpr,
):
    """Rows of ids ``[T, C]`` (C None for one column) of any strides, BLOCK_ROWS at a time; with HEAD_MAJOR by column.

    With ``places_ptr`` the ids are sorted keys, of which entries from ``first_entry`` on are read: the row ``key -
    first_key`` of the first of each run, for the output's row ``place``.
    Persistent grid: program p takes steps p, p + programs, and so on. Relies on T * C < 2^31.
    """
    weight_address, scale_address = tl.load(table_ptr), tl.load(table_ptr + 1)
    num_table_rows, scale_bits = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    num_steps = (num_rows - 1) // BLOCK_ROWS + 1  # not tl.cdiv, whose sum wraps for the last T * C below 2^31
    if HEAD_MAJOR:
        num_tokens = num_rows // num_columns
        column_steps = (num_tokens - 1) // BLOCK_ROWS + 1
        num_steps = num_columns * column_steps
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        local = tl.arange(0, BLOCK_ROWS)
        left = num_rows - step * BLOCK_ROWS
        mask_row = local < left
        # Offsets from a step's first row, so that the tile's addresses are one sum and constants.
        first_row, out_row = (num_rows - left).to(tl.int64), local
        if places_ptr is not None:
            entry = first_entry + step * BLOCK_ROWS + local
            key = tl.load(row_ids_ptr + entry, mask=mask_row, other=0)
            before = tl.load(row_ids_ptr + entry - 1, mask=mask_row & (entry > 0), other=0)
            # Of every entry: with 32 rows a step Triton 3.6 does not compile a load whose mask comes from another load.
            out_row = tl.load(places_ptr + entry, mask=mask_row, other=0)
            mask_row = mask_row & ((entry == 0) | (key != before))
            first_row -= first_row
            row = key.to(tl.int64) - first_key
        else:
            if num_columns is None:
                ids = row_ids_ptr + first_row * stride_ids_t + local * stride_ids_t
            else:
                if HEAD_MAJOR:
                    column = step // column_steps
                    first_token = (step - column * column_steps) * BLOCK_ROWS
                    token = first_token + local
                    mask_row = local < num_tokens - first_token
                    first_row = first_token.to(tl.int64) * num_columns + column
                    out_row = local.to(tl.int64) * num_columns
                else:
                    index = step * BLOCK_ROWS + local
                    token, column = index // num_columns, index % num_columns
                offs_t, offs_c = token.to(tl.int64), column.to(tl.int64)
                ids = row_ids_ptr + offs_t * stride_ids_t + offs_c * stride_ids_c
            row = tl.load(ids, mask=mask_row, other=-1)
        copy_rows(
            row,
            out_row,
            mask_row,
            weight_address,
            scale_address,
            num_table_rows,
            scale_bits,
            out_ptr + first_row * WIDTH,
            out_scale_ptr + first_row * (WIDTH // GROUP) if out_scale_ptr is not None else None,
            WIDTH,
            ELEMENT,
            SCALING,
            STORAGE,
            GROUP,
            CHUNK,
        )


def prepare_lookup(
    row_ids, view: TableView, storage: bool, programs: int | None, order: str = "direct"
) -> Callable[..., None]:
    """The launch for ids such as these, of (row_ids, out); ``[..., C]`` whose leading dimensions view as one.

    One launch, or those of :func:`launch_sorted`.
    """
    num_rows = row_ids.numel()
    if num_rows == 0:
        return lambda *_: None
    if order == "address":
        return lambda row_ids, out: launch_sorted(
            two_dimensional(row_ids, False).reshape(1, -1), 0, view, out, storage, programs
        )
    ids = two_dimensional(row_ids, order == "head")
    num_columns = ids.shape[1] if ids.shape[1] > 1 else None
    options = dict(num_rows=num_rows, num_columns=num_columns, first_entry=0, first_key=0)
    options |= dict(stride_ids_t=ids.stride(0), stride_ids_c=ids.stride(1))
    options |= dict(HEAD_MAJOR=order == "head" and num_columns is not None)
    options |= _row_options(view, storage, programs, num_rows)

    def launch(row_ids, out):
        with on_device_of(row_ids):
            lookup_kernel.run(row_ids, None, view.descriptors, *kernel_out(out, view, storage), **options)

    return launch


def launch_lookup(row_ids, view: TableView, out, storage: bool, programs: int | None, order: str = "direct") -> None:
    """What :func:`prepare_lookup` launches."""
    prepare_lookup(row_ids, view, storage, programs, order)(row_ids, out)


def launch_sorted(keys, key_stride: int, view: TableView, out, storage: bool, programs: int | None) -> None:
    """Rows by keys ``[L, rows]`` in the order of the output's: a sort, a launch a layer, and one for duplicates."""
    num_layers, num_rows = keys.shape
    keys, places = torch.sort(keys.view(-1))
    out_ptr, out_scale_ptr = kernel_out(out, view, storage)
    options = dict(num_rows=num_rows, num_columns=None, stride_ids_t=0, stride_ids_c=0, HEAD_MAJOR=False)
    options |= _row_options(view, storage, programs, num_rows)
    with on_device_of(keys):
        for layer in range(num_layers):
            options |= dict(first_entry=layer * num_rows, first_key=layer * key_stride)
            lookup_kernel.run(keys, places, view.descriptors[layer], out_ptr, out_scale_ptr, **options)
    for part in (out_ptr, None if out_scale_ptr is None else scale_words(out_scale_ptr)):
        if part is not None:
            launch_copy_duplicates(keys, places, part, programs or 8 * processors(keys.device))


def _row_options(view: TableView, storage: bool, programs: int | None, num_rows: int) -> dict:
    """What lookup_kernel is told of tables and tiles."""
    itemsize = FORMATS[view.format].dtype.itemsize
    config = rows_config(view.width, itemsize, num_rows, processors(view.descriptors.device), view.placement)
    return dict(
        row_constants(view, storage, config),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        grid=(min(programs or config.programs, cdiv(num_rows, config.block_rows)),),
        warmup=False,
    )


@torch.library.custom_op(
    "engram::lookup",
    mutates_args=(),
    schema=f"(Tensor row_ids, {VIEW_SCHEMA}, ScalarType? out_dtype, bool storage, int? programs, str? order) "
    "-> Tensor[]",
)
def lookup_op(row_ids, *rest):
    """:func:`lookup` for torch.compile: [values], or for storage [rows] or [rows, scales]."""
    view, (out_dtype, storage, programs, order) = split_view(rest)
    out = make_view_out(view, row_ids.shape, row_ids.device, out_dtype, storage)
    launch_lookup(row_ids, view, out, storage, programs, choose_order(order, view, row_ids.numel()))
    return op_result(out)


@lookup_op.register_fake
def _(row_ids, *rest):
    view, (out_dtype, storage, *_) = split_view(rest)
    return op_result(make_view_out(view, row_ids.shape, row_ids.device, out_dtype, storage))


@torch.library.custom_op(
    "engram::lookup_out",
    mutates_args=("out", "out_scales"),
    schema=f"(Tensor row_ids, {VIEW_SCHEMA}, Tensor(a!) out, Tensor(b!)? out_scales, bool storage, int? programs, "
    "str? order) -> ()",
)
def lookup_out_op(row_ids, *rest):
    """:func:`lookup` for torch.compile, into ``out``, for storage into ``(out, out_scales)``."""
    view, (out, out_scales, storage, programs, order) = split_view(rest)
    out, order = (out, out_scales) if storage else out, choose_order(order, view, row_ids.numel())
    launch_lookup(row_ids, view, out, storage, programs, order)


@lookup_out_op.register_fake
def _(*_):
    return None


def lookup(
    table: EngramTable,
    row_ids: torch.Tensor,
    *,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None = None,
    out_dtype: torch.dtype | None = None,
    out_format: str = "values",
    programs: int | None = None,
    order: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """Rows ``[..., C, R]`` of a table.

    row_ids: ``[..., C]``, int32 or int64, any strides whose leading dimensions view as one. An id outside the table,
    such as -1, reads as zeros.
    out_dtype: bfloat16, float16 or float32; None is the table's own dtype, bfloat16 for fp8.
    out_format: "values", or "storage" for the raw rows in the table's dtype and their scales: uint8 ``[..., C, R /
    32]`` for e4m3_ue8m0, the table's float32 scalar for e4m3, None for dense formats.
    out: a contiguous tensor to write to; a pair (rows, scales) for "storage".
    programs: size of the persistent grid, None for all multiprocessors; fewer leave them to other work.
    order: in which rows are read, "direct", "head" (column by column) or "address" (sorted, duplicates read once); None
    leaves the choice to ops/row_kernels/order.py. It changes no bit, and nothing on the CPU.
    With a staged table the call waits for the GPU to bring row_ids to the CPU, and cannot be captured or compiled.
    Where the table is trainable (:meth:`EngramTable.requires_row_grad_`) autograd follows values back to its rows.
    """
    where, launch = "lookup", None
    if not torch.compiler.is_compiling() and isinstance(table, EngramTable):
        form = (form_of(row_ids, *out_parts(out)), out_dtype, out_format, programs, order)
        launch = table.prepared.launch(form)
    if launch is None:
        check_tensor(where, "row_ids", row_ids, dtypes=(torch.int32, torch.int64), contiguous=False)
        check_tables(where, (table,), row_ids.device)
        check_programs(where, programs)
        check_order(where, order, row_ids.numel())
        if row_ids.dim() == 0 or row_ids.numel() >= 2**31:
            raise ValueError(f"{where}: row_ids must have shape [..., C], below 2^31 ids, got {list(row_ids.shape)}")
        check_row_out(where, table, (*row_ids.shape, table.width), row_ids.device, out, out_dtype, out_format)
    else:
        table.check_usable(where)
    if records_rows((table,), out_format):
        check_recordable(where, out)
        with torch.no_grad():
            rows = lookup(table, row_ids, out_dtype=out_dtype, programs=programs, order=order)
        return record_rows(rows, (table,), lambda grad, ids: ((ids, grad),), row_ids)
    storage = out_format == "storage"
    if launch is None:
        if not is_kernel_device(row_ids) or table.format.dtype == torch.float64:
            return reference.lookup(table, row_ids, out=out, out_dtype=out_dtype, out_format=out_format)
        staged = table.placement == "staged" and row_ids.is_cuda
        row_ids, view = stage(table, row_ids, where) if staged else (row_ids, view_tables((table,), row_ids.device))
        if torch.compiler.is_compiling():
            if out is None:
                out = op_out(lookup_op(row_ids, *view, out_dtype, storage, programs, order), storage)
            else:
                lookup_out_op(row_ids, *view, *out_parts(out), storage, programs, order)
            return _with_table_scale(out, table, storage)
        launch = prepare_lookup(row_ids, view, storage, programs, choose_order(order, view, row_ids.numel()))
        if not staged:
            table.prepared.keep(form, launch)
    if out is None:
        out = make_row_out(table.format, (*row_ids.shape, table.width), row_ids.device, out_dtype, storage)
    launch(row_ids, out)
    return _with_table_scale(out, table, storage)


def _with_table_scale(out, table: EngramTable, storage: bool):
    """Storage output of format e4m3 comes with the table's scale, which no kernel writes."""
    return (out[0], table.scale) if storage and table.format.scaling == "table" else out
