"""Conversion of a checkpoint's table to another format or other files, with no more than a few chunks in memory.

Between equal formats bytes are copied, and nothing is rounded. Otherwise rows are decoded to float32 and encoded as
checkpoints/encoding.py says. The result appears as a whole or not at all.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engram_kernels.geometry.row_format import RowFormat, checked_scale, row_format

from .encoding import decode_rows, encode_rows, greatest, overflows, table_scale
from .files import Checkpoint, Paths
from .parallel import CHUNK, THREADS, Buffers, Progress, run_chunks
from .reading import RowChunk, read_bytes, read_chunk, row_chunks
from .table_writer import Piece, TableWriter
from .validate import StoredTable, select_table

#: Elements of a chunk that is decoded: float32 of it stay in a core's cache, which makes it several times faster than
#: 16 M elements (90 against 40 M elements a second on two cores).
DECODED = 1 << 20


@dataclass(frozen=True)
class Loss:
    """What rounding cost, where anything was rounded."""

    signal_to_noise: float  #: dB, of all elements: squares of what was read over squares of what got lost
    largest_error: float
    beyond: float  #: share of rows whose error is more than ``bound`` times their norm
    bound: float


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path  #: what to load it from
    format: RowFormat
    rows: int
    width: int
    scale: float | None
    overflows: int  #: values that became infinite (float16), or the greatest that a given scale reaches (e4m3, nvfp4)
    loss: Loss | None  #: None where bytes were copied

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.stored_bytes(self.width)


def convert_table(
    paths: Paths,
    out: str | os.PathLike,
    where: str,
    *,
    format: str | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    out_prefix: str | None = None,
    scale: float | None = None,
    nearest: bool = False,
    bound: float = 0.125,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the table that layer and prefix mean as ``out``.

    format: None keeps it. scale: of formats "e4m3" and "nvfp4"; None takes the greatest value to the format's greatest,
    which reads the table twice. nearest: of four bits, without a search for better scales of groups. bound: of
    :class:`Loss`. out_prefix: of the names written; None keeps it. shard_bytes: as for
    :meth:`EngramTable.save_safetensors`.
    """
    with Checkpoint(paths, where) as checkpoint:
        stored = select_table(checkpoint, layer=layer, prefix=prefix)
        target = row_format(format or stored.format.name, where)
        target.check_width(stored.width, where)
        check_pair(stored.format, target, scale, where)
        same = target == stored.format and scale in (None, stored.scale)
        chunks, buffers = row_chunks(stored, max(1, DECODED // stored.width)), Buffers()
        measures = target.table_scale and not same and scale is None
        total, done = (1 + measures) * stored.nbytes, 0
        report = None if progress is None else lambda count, _: progress(done + count, total)
        # Of arithmetic a few more than processors, which have work then while chunks are on their way.
        threads = THREADS if same else min(THREADS, (os.cpu_count() or 1) + 2)
        options = dict(threads=threads, progress=report, total=stored.nbytes)
        if measures:
            scale, done = _measured_scale(checkpoint, stored, chunks, target, options), stored.nbytes
        elif same:
            scale = stored.scale
        lost, errors = [], []
        names = dict(prefix=stored.prefix if out_prefix is None else out_prefix, shard_bytes=shard_bytes)
        names |= dict(scale=scale, token_map=stored.token_map)
        with TableWriter(out, where, format=target, rows=stored.rows, width=stored.width, **names) as writer:

            def copy(piece: Piece) -> int:
                content = buffers.take(piece.end - piece.begin)
                tensors = stored.weights if piece.key == "weight" else stored.scales
                read_bytes(checkpoint, tensors, piece.begin, memoryview(content))
                return writer.write_piece(piece, torch.from_numpy(content))

            def convert(chunk: RowChunk) -> int:
                values, nbytes = _decoded(checkpoint, stored, chunk)
                rows, scales, beyond, error = encoded(values, target, where, scale, nearest, bound)
                lost.append(beyond)
                errors.append(error)
                writer.write(chunk.first, rows, scales)
                return nbytes

            if same:
                run_chunks(writer.pieces(CHUNK), copy, **options)
            else:
                run_chunks(chunks, convert, **options)
            path = writer.commit()
        loss = None if same else _loss(errors, stored.rows, bound)
        return Conversion(path, target, stored.rows, stored.width, scale, sum(lost), loss)


def check_pair(source: RowFormat, target: RowFormat, scale: float | None, where: str) -> None:
    """Raise ValueError unless rows convert from one format to the other, with a table's scale or without."""
    if source != target and "float64" in (source.name, target.name) and target.name != "float32":
        raise ValueError(f"{where}: float64 rows convert to float32 alone, got {source.name} to {target.name}")
    if scale is not None and (not target.table_scale or not 0 < scale < float("inf")):
        raise ValueError(
            f"{where}: a scale is a positive number and for formats 'e4m3' and 'nvfp4', got {scale} for {target.name}"
        )
    if scale is not None:
        checked_scale(scale, where)


def encoded(
    values: torch.Tensor, target: RowFormat, where: str, scale: float | None, nearest: bool, bound: float
) -> tuple[torch.Tensor, torch.Tensor | None, int, tuple[float, float, float, int]]:
    """(rows, scales, overflows, errors as of a chunk) of values float32 ``[rows, R]``."""
    rows, scales = encode_rows(values, target, where, scale=scale, nearest=nearest)
    errors = _errors(values, decode_rows(rows, scales, target, scale), bound)
    return rows, scales, overflows(values, rows, target, scale), errors


def _decoded(checkpoint: Checkpoint, stored: StoredTable, chunk: RowChunk) -> tuple[torch.Tensor, int]:
    """Values float32 ``[rows, R]`` of a chunk, and the bytes that were read for them."""
    rows, scales = read_chunk(checkpoint, chunk)
    values = decode_rows(rows.view(stored.format.dtype), scales, stored.format, stored.scale)
    return values, rows.nbytes + scales.nbytes


def _measured_scale(
    checkpoint: Checkpoint, stored: StoredTable, chunks: list[RowChunk], target: RowFormat, options: dict
) -> float:
    """The scale that takes the table's greatest value to that of ``target``. options: of run_chunks."""
    maxima = []

    def measure(chunk: RowChunk) -> int:
        values, nbytes = _decoded(checkpoint, stored, chunk)
        maxima.append(float(greatest(values.flatten())))
        return nbytes

    run_chunks(chunks, measure, **options)
    if max(maxima) == float("inf"):
        raise ValueError(f"{checkpoint.where}: {stored.name} holds an infinity, which {target.name} cannot hold")
    return table_scale(max(maxima), target)


def _errors(values: torch.Tensor, decoded: torch.Tensor, bound: float) -> tuple[float, float, float, int]:
    """(squares of values, of errors, the largest error, rows beyond the bound) of a chunk, without NaN and infinity."""
    error = (decoded - values).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    signal, noise = (
        each.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).double().square().sum(1) for each in (values, error)
    )
    return float(signal.sum()), float(noise.sum()), float(error.abs().max()), int((noise > bound**2 * signal).sum())


def _loss(errors: list[tuple[float, float, float, int]], rows: int, bound: float) -> Loss:
    signal, noise, largest, beyond = zip(*errors, strict=True)
    # Chunks end in any order, and their sum is the same.
    signal, noise = math.fsum(signal), math.fsum(noise)
    decibels = 10 * math.log10(signal / noise) if signal and noise else math.inf
    return Loss(decibels, max(largest), sum(beyond) / rows, bound)
