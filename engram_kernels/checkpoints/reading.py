"""Rows out of a checkpoint's files: into tensors that take all of them, or chunk by chunk.

Bytes go from the file straight to where they are wanted by pread, from several files at once; what lies in GPU memory
takes a buffer per thread on the way.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .files import Checkpoint, StoredTensor
from .parallel import CHUNK, THREADS, Buffers, Progress, interleave, run_chunks, spans
from .validate import StoredTable


def fill_tensors(
    targets: Sequence[tuple[torch.Tensor, Sequence[StoredTensor]]],
    checkpoint: Checkpoint,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    before: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Fill each dense uint8 tensor with the bytes of the stored tensors beside it, one after the other.

    ranges: ``[begin, end)`` of the rows wanted, counted over the stored tensors of a target; None is all of them.
    before: called with each part of a target on the CPU ahead of its bytes, by the thread that reads them.
    """
    buffers = Buffers()

    def copy(chunk) -> int:
        tensor, begin, end, target, at = chunk
        if target.is_cpu:
            part = target[at : at + end - begin]
            if before is not None:
                before(part)
            checkpoint.read_into(tensor, begin, memoryview(part.numpy()))
        else:
            buffer = buffers.take(end - begin)
            checkpoint.read_into(tensor, begin, memoryview(buffer))
            target[at : at + end - begin].copy_(torch.from_numpy(buffer))
        return end - begin

    # Of each file (tensor, begin and end in its bytes, target, byte of the target that they go to).
    by_file: dict = {}
    total = 0
    for target, tensors in targets:
        at = 0
        for tensor, low, high in _byte_ranges(tensors, ranges):
            chunks = by_file.setdefault(tensor.path, [])
            chunks += [(tensor, low + begin, low + end, target, at + begin) for begin, end in spans(high - low, CHUNK)]
            at += high - low
        total += at
    run_chunks(interleave(by_file.values()), copy, threads=threads, progress=progress, total=total)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as uint8 ``[bytes]``."""
    return tensor.view(torch.uint8).view(-1)


class RowChunk(NamedTuple):
    """Rows ``[begin, end)`` of one stored tensor and of its scales; ``first`` is the row of the table they start at."""

    first: int
    weight: StoredTensor
    scales: StoredTensor | None
    begin: int
    end: int


def row_chunks(stored: StoredTable, rows: int) -> list[RowChunk]:
    """All rows of a stored table, at most ``rows`` at a time."""
    chunks, first = [], 0
    for weight, scales in itertools.zip_longest(stored.weights, stored.scales):
        chunks += [RowChunk(first + begin, weight, scales, begin, end) for begin, end in spans(weight.shape[0], rows)]
        first += weight.shape[0]
    return chunks


def read_chunk(
    checkpoint: Checkpoint, chunk: RowChunk, buffers: Buffers | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes of the rows, of their scales), uint8 ``[rows, bytes]``; of no scales ``[rows, 0]``.

    With ``buffers`` they lie in these, until the thread reads the next chunk.
    """

    def read(tensor: StoredTensor | None, name: str) -> torch.Tensor:
        size, rows = 0 if tensor is None else tensor.nbytes // tensor.shape[0], chunk.end - chunk.begin
        content = (buffers or Buffers()).take(rows * size, name)
        if size:
            checkpoint.read_into(tensor, chunk.begin * size, memoryview(content))
        return torch.from_numpy(content).view(rows, size)

    return read(chunk.weight, "rows"), read(chunk.scales, "scales")


def read_bytes(checkpoint: Checkpoint, tensors: Sequence[StoredTensor], begin: int, view: memoryview) -> None:
    """Fill ``view`` from byte ``begin`` of stored tensors on, which follow each other."""
    end, first = begin + len(view), 0
    for tensor in tensors:
        low, high = max(begin, first), min(end, first + tensor.nbytes)
        if low < high:
            checkpoint.read_into(tensor, low - first, view[low - begin : high - begin])
        first += tensor.nbytes


def _byte_ranges(
    tensors: Sequence[StoredTensor], ranges: Sequence[tuple[int, int]] | None
) -> Iterator[tuple[StoredTensor, int, int]]:
    """(stored tensor, begin and end in its bytes) of the rows in ``ranges``, in their order."""
    ends = list(itertools.accumulate(tensor.shape[0] for tensor in tensors))
    for begin, end in [(0, ends[-1])] if ranges is None else ranges:
        for tensor, last in zip(tensors, ends, strict=True):
            first = last - tensor.shape[0]
            low, high = max(begin, first), min(end, last)
            if low < high:
                size = tensor.nbytes // tensor.shape[0]
                yield tensor, (low - first) * size, (high - first) * size
