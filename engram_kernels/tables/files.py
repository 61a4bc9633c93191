"""Rows of a table into and out of safetensors files, and the tensors of a table that stays in its file."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from engram_kernels.checkpoints.files import Checkpoint, StoredTensor
from engram_kernels.checkpoints.parallel import CHUNK, THREADS, Progress, run_chunks
from engram_kernels.checkpoints.reading import fill_tensors, flat_bytes
from engram_kernels.checkpoints.table_writer import Piece, TableWriter
from engram_kernels.checkpoints.validate import StoredTable
from engram_kernels.geometry.row_format import SCALE_DTYPES

from .memory.direct import LEAST, DirectRows, Part
from .memory.mapped_files import MappedFile, map_file
from .memory.pages import prefer_huge
from .memory.report import available_host_memory
from .memory.shared import SharedMapping
from .placed import PlacedRows


def fill_table(table: PlacedRows, checkpoint: Checkpoint, stored: StoredTable, *, new: bool = False, **options) -> None:
    """Write what is stored into a table of its rows, width and format.

    new: nothing was written to the table's memory yet, which comes while it is filled.
    options: of :func:`fill_tensors`; ranges ``[begin, end)`` of the stored rows that the table is to hold, in order.
    """
    targets = [(flat_bytes(table.weight), stored.weights)]
    if stored.scales:
        targets.append((flat_bytes(table.scale), stored.scales))
    for target in (target for target, _ in targets if new and target.is_cpu):
        prefer_huge(target)
    back = table._mapping.back if new and isinstance(table._mapping, SharedMapping) else None
    fill_tensors(targets, checkpoint, before=back, **options)


def check_room(name: str, nbytes: int, placement: str, where: str, way_out: str) -> None:
    """Raise MemoryError where loading would have the kernel end this process or another."""
    available = available_host_memory()
    if placement != "device" and nbytes > available:
        raise MemoryError(f"{where}: {name} takes {nbytes:,} bytes and {available:,} are available; {way_out}")


def direct_table(
    checkpoint: Checkpoint, stored: StoredTable, memory_bytes: int, **reading
) -> tuple[DirectRows, torch.Tensor | None]:
    """Rows that are read from the files as they are asked for, and their scales, which are loaded, of all a table.

    memory_bytes: for both. reading: threads and progress, as of :func:`fill_tensors`.
    """
    scale_bytes = sum(tensor.nbytes for tensor in stored.scales)
    if memory_bytes < scale_bytes + LEAST:
        raise ValueError(
            f"{checkpoint.where}: memory_bytes must be at least {scale_bytes + LEAST:,}, {scale_bytes:,} of them for "
            f"scales, got {memory_bytes:,}"
        )
    need: dict[Path, int] = {}
    for tensor in stored.weights:
        need[tensor.path] = max(need.get(tensor.path, 0), tensor.offset + tensor.nbytes)
    files = {path: MappedFile(os.dup(checkpoint.open_fd(path)), str(path), nbytes) for path, nbytes in need.items()}
    parts = [Part(files[tensor.path], tensor.offset, tensor.shape[0]) for tensor in stored.weights if tensor.shape[0]]
    direct, scale = DirectRows(parts, stored.format.row_bytes(stored.width), memory_bytes - scale_bytes), None
    # What may come to be written, and is not yet.
    check_room(f"memory_bytes={memory_bytes:,}", scale_bytes + direct.nbytes, "cpu", checkpoint.where, "give less")
    if stored.scales:
        scale = torch.empty(stored.rows, stored.format.scale_bytes(stored.width), dtype=torch.uint8, device="cpu")
        fill_tensors([(flat_bytes(scale), stored.scales)], checkpoint, **reading)
    elif stored.scale is not None:
        scale = torch.tensor(stored.scale, dtype=torch.float32, device="cpu")
    return direct, scale


def map_table(checkpoint: Checkpoint, stored: StoredTable) -> dict[str, torch.Tensor | float | None]:
    """What :meth:`EngramTable.from_tensors` takes, over the pages of the checkpoint's file."""
    weight = _mapped(checkpoint, stored.weights, stored.format.dtype)
    if not stored.scales:
        return dict(weight=weight, scale=stored.scale)
    dtype = SCALE_DTYPES[stored.format.group_scale]
    return dict(weight=weight, scale=_mapped(checkpoint, stored.scales, dtype), own_scale=stored.scale)


def _mapped(checkpoint: Checkpoint, tensors: Sequence[StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    """One tensor ``[rows, width]`` over tensors that follow each other in one file."""
    where, first = checkpoint.where, tensors[0]
    ends = list(itertools.accumulate((tensor.nbytes for tensor in tensors), initial=first.offset))
    if any((tensor.path, tensor.offset) != (first.path, at) for tensor, at in zip(tensors, ends, strict=False)):
        raise ValueError(
            f"{where}: mapped=True needs rows that follow each other in one file, and {first.name} is one of "
            f"{len(tensors)} parts; give memory_bytes, which reads parts, join them (python -m engram_kernels table "
            "convert ... --out FILE), or load them"
        )
    if first.offset % dtype.itemsize:
        raise ValueError(
            f"{where}: mapped=True needs {first.name} at a multiple of {dtype.itemsize} bytes in {first.path}, got "
            f"{first.offset}; convert the file, or load it"
        )
    content = map_file(checkpoint.open_fd(first.path), first.offset, ends[-1] - first.offset)
    return content.view(dtype).view(-1, first.shape[1])


def save_table(table: PlacedRows, path: str | os.PathLike, where: str, progress: Progress | None, **writing) -> Path:
    """Write all rows; arguments and result are those of :meth:`EngramTable.save_safetensors`."""
    weight, scale, fmt = table.weight, table.scale, table.format
    shape = dict(format=fmt, rows=table.rows, width=table.width)
    with TableWriter(path, where, **shape, scale=table.own_scale, token_map=table.token_map, **writing) as writer:
        sources = {"weight": flat_bytes(weight)} | ({"scale": flat_bytes(scale)} if fmt.group else {})

        def write(piece: Piece) -> int:
            return writer.write_piece(piece, sources[piece.key][piece.begin : piece.end])

        total = table.rows * writer.row_bytes
        run_chunks(writer.pieces(CHUNK), write, threads=THREADS, progress=progress, total=total)
        return writer.commit()
