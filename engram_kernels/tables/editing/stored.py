"""Rows that a caller gives, as a table stores them: bits as they come, or values, encoded; and rows read back."""

import numpy as np
import torch

from engram_kernels.checkpoints.encoding import MOST, encode_rows, overflows
from engram_kernels.geometry.kinds import Optional, Tensor
from engram_kernels.geometry.row_format import SCALE_DTYPES, check_content

from ..memory.mapped_files import refuses_writes
from ..placed import PlacedRows
from .exchange import StoredRows

#: Dtypes of rows that are values.
VALUES = (torch.float32, torch.bfloat16, torch.float16)
ROW_KINDS = dict(
    ids=Tensor(torch.int32, torch.int64),
    rows=Tensor(*VALUES, torch.float8_e4m3fn, torch.uint8, torch.float64),
    scales=Optional(Tensor(torch.uint8, *SCALE_DTYPES.values())),
)


def check_writable(table: PlacedRows, where: str) -> None:
    """Raise ValueError where rows of this table cannot be written in place, or not for all that read them."""
    table.check_usable(where)
    if table.attached:
        raise ValueError(f"{where}: {table!r} was attached, and only the process that published it may write rows")
    if table.placement == "shared" and table.scales_on_device:
        raise ValueError(
            f"{where}: {table!r} is shared and its scales are on the device, where every process has a copy of its own "
            "that a write here would not reach; share it with its scales in the file (scales=None)"
        )
    if table.direct is not None:
        raise ValueError(
            f"{where}: {table!r} is read from its file as rows are asked for (memory_bytes=), and not to be written; "
            "load it, or map it without memory_bytes"
        )
    parts = [table.weight, table.scale if table.format.group else None]
    for part in parts if table.placement in ("cpu", "staged") else ():
        if part is not None and part.numel() and (reason := refuses_writes(part)):
            raise ValueError(
                f"{where}: the table's rows must be in memory of this process, got others: {reason}. Load them, or map "
                "them by from_safetensors(mapped=True), where writes stay in this process"
            )
    if table.writing_device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{where}: a CUDA graph is being captured, whose replays would write again unseen")


def checked_ids(table: PlacedRows, ids: torch.Tensor, where: str) -> torch.Tensor:
    """``ids [n]`` as int64 on the CPU; ValueError unless they are distinct rows of the table."""
    check_content(ids, "ids", where)
    if ids.dim() != 1 or ids.layout != torch.strided:
        raise ValueError(f"{where}: ids must have shape [n], dense, got {list(ids.shape)} ({ids.layout})")
    found = ids.detach().to("cpu", torch.int64, copy=True)
    if not len(found):
        return found
    low, high = (int(bound) for bound in found.aminmax())
    if low < 0 or high >= table.rows:
        raise ValueError(
            f"{where}: ids must be rows of the table, 0 <= id < {table.rows}, got {low if low < 0 else high}"
        )
    ordered = found.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"{where}: ids must be distinct, got {int(twice[0])} more than once")
    return found


def encoded(
    table: PlacedRows, rows: torch.Tensor, scales: torch.Tensor | None, count: int, where: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 ``[n, row bytes]``, uint8 scale bytes or None) of ``rows [n, R]``, where the caller has them.

    Rows in the table's own dtype are its bits; float32, bfloat16 and float16 are values, rounded as
    checkpoints/encoding.py says. ValueError where a value does not fit the format, or the table's own scale.
    """
    fmt = table.format
    shape = [count, fmt.row_items(table.width) if rows.dtype == fmt.dtype else table.width]
    check_content(rows, "rows", where)
    if list(rows.shape) != shape or rows.layout != torch.strided:
        raise ValueError(f"{where}: rows must have shape {shape}, dense, got {list(rows.shape)} ({rows.layout})")
    grouped = bool(fmt.group) and rows.dtype == fmt.dtype
    if (scales is not None) != grouped:
        stored = str(fmt.dtype).removeprefix("torch.")
        need = f"scales must come with {stored} rows" if grouped else "scales must be None"
        raise ValueError(
            f"{where}: {need}, for rows of {rows.dtype} and a table of {fmt.name}, got "
            f"{'none' if scales is None else f'{scales.dtype} {list(scales.shape)}'}"
        )
    rows = rows.detach().contiguous()
    if rows.dtype == fmt.dtype:
        if scales is None:
            return rows.view(torch.uint8), None
        expected = [count, fmt.scale_bytes(table.width)]
        check_content(scales, "scales", where)
        if scales.dtype not in (torch.uint8, own := SCALE_DTYPES[fmt.group_scale]):
            raise ValueError(f"{where}: scales of {fmt.name} must be uint8 or {own}, got {scales.dtype}")
        if list(scales.shape) != expected or scales.layout != torch.strided:
            raise ValueError(f"{where}: scales must have shape {expected}, dense, got {list(scales.shape)}")
        return rows.view(torch.uint8), scales.detach().contiguous().view(torch.uint8)
    if rows.dtype not in VALUES:
        raise TypeError(
            f"{where}: rows must be float32, bfloat16 or float16 values, or {fmt.dtype} as stored, got {rows.dtype}"
        )
    return encoded_values(table, rows, where)


def encoded_values(
    table: PlacedRows, rows: torch.Tensor, where: str, clip: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`encoded` of values ``[n, R]``. clip: values beyond the format become its greatest, as of a conversion."""
    values, fmt = rows.to(torch.float32), table.format
    scale = table.own_scale
    made, scales = encode_rows(values, fmt, where, scale=scale)
    if not clip and (lost := overflows(values, made, fmt, scale)):
        most = float(values.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        limit = f"{MOST[fmt.name]:g} times the table's scale, {MOST[fmt.name] * scale:g}" if scale else "65504"
        raise ValueError(
            f"{where}: rows must fit {fmt.name}, at most {limit}, got {lost:,} values beyond, the greatest {most:g}"
        )
    return made.contiguous().view(torch.uint8), scales


def on_writer(table: PlacedRows, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None) -> StoredRows:
    """These on the device that writes the table, in memory of their own, whatever the caller does with his."""
    device = table.writing_device
    parts = (None if part is None else part.to(device, copy=True) for part in (ids, rows, scales))
    return StoredRows(*parts)


def read_rows(table: PlacedRows, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(bytes of rows, of scales or None) as they are now, where the table lies; waits for a GPU that writes them."""
    table.wait_for_steps()
    sources = [table.weight.view(torch.uint8), table.scale if table.format.group else None]
    return tuple(None if source is None else _gathered(source, ids) for source in sources)


def _gathered(source: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if source.is_cpu and len(ids):  # a quarter of the time of torch's indexing
        return torch.from_numpy(np.take(source.numpy(), ids.cpu().numpy(), axis=0))
    return source.index_select(0, ids.to(source.device))
