"""Rows of a master table in the format of its serving copy, and into it: those that changed, or all.

Rounding and scales are those of ``table convert`` (checkpoints/encoding.py), a row at a time: a copy that has been
given every row that changed is, bit for bit, the conversion of the whole table.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from engram_kernels.checkpoints.convert import check_pair
from engram_kernels.checkpoints.encoding import decode_rows
from engram_kernels.checkpoints.parallel import spans
from engram_kernels.geometry.row_format import RowFormat

from ..placed import PlacedRows
from ..trainable import TrainableRows
from .exchange import exchange_rows
from .stored import encoded_values, on_writer, read_rows

_DECODED = {"cpu": 1 << 20}  # elements that are decoded at once; of a GPU:
_DECODED_ON_GPU = 1 << 24
#: Elements that are written at once. Of more, each block is converted twice: an error comes before anything is written.
BLOCK = 1 << 26


class Copy(NamedTuple):
    """What a serving copy is, wherever it is."""

    rows: int
    width: int
    format: RowFormat
    own_scale: float | None
    token_map: str | None


def check_copy(where: str, master: PlacedRows, copy: "Copy | PlacedRows") -> None:
    """Raise ValueError unless rows of ``master`` convert to rows of ``copy``."""
    master.check_usable(where)
    ours, theirs = (f"{table.rows:,} x {table.width}" for table in (copy, master))
    if ours != theirs:
        raise ValueError(f"{where}: master must have {ours} elements, as its copy, got {theirs}")
    if None not in (master.token_map, copy.token_map) and master.token_map != copy.token_map:
        raise ValueError(
            f"{where}: master must have rows chosen by token map {copy.token_map[:12]}, got {master.token_map[:12]}"
        )
    check_pair(master.format, copy.format, None, where)


def convert_rows(
    master: TrainableRows, copy: "Copy | PlacedRows", ids: torch.Tensor, where: str, clip: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 ``[n, row bytes]``, uint8 scale bytes or None) of rows ``ids [n]``, where ``master`` lies."""
    same = (master.format, master.own_scale) == (copy.format, copy.own_scale)
    some = max(1, _DECODED.get(master.weight.device.type, _DECODED_ON_GPU) // master.width)
    parts = []
    for begin, end in list(spans(len(ids), some)) or [(0, 0)]:
        rows, scales = read_rows(master, ids[begin:end])
        if not same:
            values = decode_rows(rows.view(master.format.dtype), scales, master.format, master.own_scale)
            rows, scales = encoded_values(copy, values, where, clip)
        parts.append((rows, scales))
    rows, scales = zip(*parts, strict=True)
    return torch.cat(rows), None if scales[0] is None else torch.cat(scales)


def update_rows(table: TrainableRows, master: TrainableRows, ids: torch.Tensor | None, where: str, clip: bool) -> None:
    """Write rows ``ids`` of ``master``, None is all, to its copy ``table``: all of them, or none on an error."""
    count = table.rows if ids is None else len(ids)
    of: Callable = (lambda begin, end: torch.arange(begin, end)) if ids is None else (lambda begin, end: ids[begin:end])
    blocks = list(spans(count, max(1, BLOCK // table.width)))
    for begin, end in blocks if len(blocks) > 1 else ():
        convert_rows(master, table, of(begin, end), where, clip)
    for begin, end in blocks:
        some = of(begin, end)
        exchange_rows(table, on_writer(table, some, *convert_rows(master, table, some, where, clip)))
