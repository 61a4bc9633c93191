"""Outputs of the ops that read rows: values, or for "storage" the raw rows and their scales."""

from typing import NamedTuple

import torch

from engram_kernels.geometry.kinds import AnyOf, Dtype, Instance, OneOf, Optional, Tensor, Whole, check_all
from engram_kernels.geometry.row_format import FORMATS, RowFormat
from engram_kernels.launching.checks import check_out, check_tensor
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import TableView

from .order import ORDERS

#: A TableView in the schema of a registered op.
VIEW_SCHEMA = "Tensor descriptors, str row_format, int width, str placement, int link_bytes, int page_bytes, str link"
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: How rows may be wanted.
OUT_KINDS = dict(
    out=Optional(AnyOf(Tensor(), Instance(tuple))),
    out_dtype=Optional(Dtype(*OUT_DTYPES, torch.float64)),
    out_format=OneOf("values", "storage"),
)
READ_KINDS = OUT_KINDS | dict(programs=Optional(Whole(1, 2**31 - 1)), order=Optional(OneOf(*ORDERS)))


class Reading(NamedTuple):
    """What a launch is told of how rows are wanted."""

    storage: bool  #: as they are stored, rather than as values
    programs: int | None = None  #: of the persistent grid; None is what the multiprocessors hold
    order: str = "direct"  #: one of order.ORDERS


def check_row_out(where: str, table: EngramTable, shape, device, out, out_dtype, out_format) -> None:
    """Raise unless ``out`` (a tensor, or (rows, scales) for "storage", or None) and the output's type fit."""
    check_all(where, OUT_KINDS, dict(out_dtype=out_dtype, out_format=out_format))
    if out_format == "values":
        dtype = out_dtype or table.default_out_dtype
        if dtype not in OUT_DTYPES and not dtype == table.format.dtype == torch.float64:
            raise TypeError(f"{where}: out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
        check_out(where, out, shape, dtype, device)
        return
    if out_dtype is not None:
        raise ValueError(f"{where}: out_format 'storage' keeps the table's own dtype, got out_dtype={out_dtype}")
    if out is None:
        return
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{where}: out must be a pair (rows, scales) for 'storage', got {type(out).__name__}")
    fmt, rows = table.format, (*shape[:-1], table.format.row_items(table.width))
    check_tensor(where, "out[0]", out[0], dtypes=(fmt.dtype,), shape=rows, device=device)
    if fmt.group:
        scales = (*shape[:-1], fmt.scale_bytes(table.width))
        check_tensor(where, "out[1]", out[1], dtypes=(torch.uint8,), shape=scales, device=device)
    elif out[1] is not None:
        raise ValueError(f"{where}: a table of format {table.format.name} has no scales per row, got out[1]")


def make_row_out(row_format: RowFormat, shape, device, out_dtype, storage: bool):
    """A new output of ``shape [..., R]``, as :func:`check_row_out` describes it."""
    if not storage:
        default = torch.bfloat16 if row_format.scaled else row_format.dtype
        return torch.empty(shape, dtype=out_dtype or default, device=device)
    (*many, width), scales = shape, None
    if row_format.group:
        scales = torch.empty((*many, row_format.scale_bytes(width)), dtype=torch.uint8, device=device)
    return torch.empty((*many, row_format.row_items(width)), dtype=row_format.dtype, device=device), scales


def make_view_out(view: TableView, ids_shape, device, out_dtype, storage: bool):
    """A new output for ids of ``ids_shape``."""
    return make_row_out(FORMATS[view.format], (*ids_shape, view.width), device, out_dtype, storage)


def kernel_out(out, view: TableView, storage: bool):
    """``(out_ptr, out_scale_ptr)`` of the output that the caller sees; fp8 bytes as uint8."""
    if not storage:
        return out, None
    rows, scales = out
    fmt = FORMATS[view.format]
    return rows.view(torch.uint8) if fmt.scaled else rows, scales if fmt.group else None


def split_view(rest: tuple) -> tuple[TableView, tuple]:
    """The view that a registered op's arguments ``rest`` begin with, and what follows it."""
    return TableView(*rest[:7]), rest[7:]


def op_out(result: list[torch.Tensor], storage: bool):
    """What the caller sees of :func:`op_result`."""
    return (*result, None)[:2] if storage else result[0]


def op_result(out) -> list[torch.Tensor]:
    """An output as registered ops return it."""
    return [tensor for tensor in out if tensor is not None] if isinstance(out, tuple) else [out]
