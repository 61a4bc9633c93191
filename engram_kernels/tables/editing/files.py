"""Some rows of a table in a safetensors file, as the table stores them: a file that is there whole or not at all.

    ids       I64 [n]                 distinct rows of the table
    rows      [n, R]                  in the table's dtype; U8 [n, R / 2] of packed elements
    scales    F8_E8M0 [n, R / 32]     of formats with scales of groups; F8_E4M3 [n, R / 16] of "nvfp4"
    __metadata__    "table_rows": JSON of the table that they are for, and of what else the writer says

How a file is written: checkpoints/writing.py.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engram_kernels.checkpoints.files import ROWS_KEY, SUFFIX, Checkpoint
from engram_kernels.checkpoints.names import FILE_SCALES, file_dtype
from engram_kernels.checkpoints.writing import (
    NewTensor,
    check_disk,
    checked_metadata,
    file_path,
    header_of,
    new_file,
    partial_path,
    read_existing,
    remove_abandoned,
    write_all,
)

from ..placed import PlacedRows
from .exchange import StoredRows

_DEFAULT = f"rows{SUFFIX}"
_VERSION = 1


def save_rows(
    table: PlacedRows,
    stored: StoredRows,
    path: str | os.PathLike,
    where: str,
    metadata: Mapping[str, str] | None = None,
    **said: Any,
) -> Path:
    """Write rows of ``table``; returns the file. said: what the header tells besides the table's own facts."""
    path = file_path(path, where, _DEFAULT)
    metadata = checked_metadata(metadata, where)
    if read_existing(path, where, lambda checkpoint: ROWS_KEY in checkpoint.metadata(path)) is False:
        raise ValueError(f"{where}: {path} holds no rows of an overlay, and is not replaced; save to another file")
    tensors = {name: tensor.cpu() for name, tensor in stored._asdict().items() if tensor is not None}
    new = [NewTensor(name, *layout, tensors[name].nbytes) for name, layout in _layout(table, len(stored.ids)).items()]
    header, places = header_of(new, metadata | {ROWS_KEY: json.dumps(_facts(table) | said)})
    remove_abandoned(path)
    check_disk(path.parent, places[-1], where)
    with new_file(path, partial_path(path)) as fd:
        write_all(fd, header, 0)
        for name, place in zip(tensors, places, strict=False):
            if tensors[name].nbytes:
                write_all(fd, tensors[name].numpy(), place)
    return path


def load_rows(table: PlacedRows, path: str | os.PathLike, where: str) -> tuple[StoredRows, dict[str, Any]]:
    """(rows, what the header says) of a file of :func:`save_rows`; CheckpointError where it is for another table.

    The ids are as they are in the file: whether they are rows of the table is for the caller to check.
    """
    path = file_path(path, where, _DEFAULT)
    with Checkpoint(path, where) as checkpoint:
        said = _said(checkpoint, path)
        for name, ours in _facts(table).items():
            theirs = said.get(name)
            if name == "token_map" and None in (ours, theirs):
                continue
            if type(theirs) is not type(ours) or theirs != ours:
                raise checkpoint.error(f"{path} is of rows for a table with {name} {ours!r}, got {theirs!r}"[:400])
        names = ["ids", "rows", *(["scales"] if table.format.group else [])]
        if sorted(checkpoint.names) != sorted(names):
            raise checkpoint.error(f"{path} must hold {', '.join(names)}, got {', '.join(checkpoint.names)}"[:400])
        count = checkpoint.tensor("ids").shape[:1]
        for name, layout in _layout(table, *(count or (0,))).items():
            tensor = checkpoint.tensor(name)
            if (tensor.dtype, tensor.shape) != layout:
                raise checkpoint.error(f"{path} must hold {name} {layout[0]} {list(layout[1])}, got {tensor}")
        dtypes = dict(ids=torch.int64, rows=table.format.dtype, scales=torch.uint8)
        found = {name: checkpoint.read(checkpoint.tensor(name), dtypes[name]) for name in names}
        return StoredRows(found["ids"], found["rows"], found.get("scales")), said


def _facts(table: PlacedRows) -> dict[str, Any]:
    """What a file says of the table that its rows are for."""
    facts = dict(version=_VERSION, rows=table.rows, width=table.width, format=table.format.name)
    return facts | dict(scale=table.own_scale, token_map=table.token_map)


def _layout(table: PlacedRows, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype as the format calls it, shape) of ``count`` rows by name."""
    fmt = table.format
    layout = dict(ids=("I64", (count,)), rows=(file_dtype(fmt), (count, fmt.row_items(table.width))))
    scales = dict(scales=(FILE_SCALES[fmt.group_scale], (count, fmt.scale_bytes(table.width)))) if fmt.group else {}
    return layout | scales


def _said(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    text = checkpoint.metadata(path).get(ROWS_KEY)
    if text is None:
        raise checkpoint.error(f"{path} holds no rows of an overlay: its header has no {ROWS_KEY!r}")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise checkpoint.error(f"{path} has a {ROWS_KEY!r} that is no JSON ({error})") from None
    if not isinstance(said, dict):
        raise checkpoint.error(f"{path} has a {ROWS_KEY!r} that is no object: {text[:200]!r}")
    return said
