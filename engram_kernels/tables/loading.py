"""Tables from safetensors files: streamed into the memory of a placement, or mapped where they lie.

Everything that headers tell is checked before memory is asked for. Rows then go from the file straight to their place
by pread, in chunks, from several files at once; a table on a GPU takes a buffer per thread on the way.
"""

import itertools
import threading
import traceback
from collections.abc import Iterator, Sequence

import torch

from engram_kernels.checkpoints.files import Checkpoint, Paths, StoredTensor
from engram_kernels.checkpoints.parallel import CHUNK, THREADS, Progress, check_threads, interleave, run_chunks, spans
from engram_kernels.checkpoints.validate import StoredTable, select_table
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.tables.memory.file_mapping import FileMapping
from engram_kernels.tables.memory.report import available_host_memory

from .engram import EngramTable

_WHERE = "EngramTable.from_safetensors"
_MAPPED_PLACEMENTS = ("cpu", "staged")


def load_table(
    paths: Paths,
    *,
    placement: str,
    config: EngramConfig | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    mapped: bool = False,
    threads: int = THREADS,
    progress: Progress | None = None,
    **options,
) -> EngramTable:
    """:meth:`EngramTable.from_safetensors`. options: of :meth:`EngramTable.empty` (``from_tensors`` where mapped)."""
    check_threads(threads, _WHERE)
    with Checkpoint(paths, _WHERE) as checkpoint:
        stored = select_table(checkpoint, config, layer, prefix)
        if mapped:
            return _mapped(checkpoint, stored, placement, options)
        way_out = "free memory, or read it where it lies (placement='cpu', mapped=True)"
        check_room(f"{stored.prefix}weight", stored.nbytes, placement, _WHERE, way_out)
        if stored.scale is not None:
            options["scale"] = stored.scale
        table = EngramTable.empty(stored.rows, stored.width, stored.format.name, placement=placement, **options)
        try:
            fill_table(table, checkpoint, stored, threads=threads, progress=progress)
            if placement == "shared":
                table.publish()
        except BaseException as error:
            # Frames that the error keeps alive hold views of the memory, and would keep it as well.
            traceback.clear_frames(error.__traceback__)
            table.close()
            raise
        return table


def fill_table(
    table: EngramTable,
    checkpoint: Checkpoint,
    stored: StoredTable,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Write what is stored into a table of its rows, width and format.

    ranges: ``[begin, end)`` of the rows that the table is to hold, one after the other; None is all of them.
    """
    targets = [(flat_bytes(table.weight), stored.weights)]
    if stored.scales:
        targets.append((flat_bytes(table.scale), stored.scales))
    fill_tensors(targets, checkpoint, threads=threads, progress=progress, ranges=ranges)


def fill_tensors(
    targets: Sequence[tuple[torch.Tensor, Sequence[StoredTensor]]],
    checkpoint: Checkpoint,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Write stored tensors, one after the other, into the dense uint8 tensor that each sequence of them fills.

    ranges: as of :func:`fill_table`, in rows of each sequence.
    """
    buffers = threading.local()

    def copy(chunk) -> int:
        tensor, begin, end, target, at = chunk
        if target.is_cpu:
            checkpoint.read_into(tensor, begin, memoryview(target[at : at + end - begin].numpy()))
        else:
            if not hasattr(buffers, "bytes"):
                buffers.bytes = torch.empty(CHUNK, dtype=torch.uint8)
            part = buffers.bytes[: end - begin]
            checkpoint.read_into(tensor, begin, memoryview(part.numpy()))
            target[at : at + end - begin].copy_(part)
        return end - begin

    chunks = _chunks(targets, ranges)
    total = sum(end - begin for _, begin, end, *_ in chunks)
    run_chunks(chunks, copy, threads=threads, progress=progress, total=total)


def _chunks(targets, ranges) -> list[tuple[StoredTensor, int, int, torch.Tensor, int]]:
    """(stored tensor, begin and end in it, target, place there), files in turn."""
    queues: dict = {}
    for target, tensors in targets:
        place = 0
        for tensor, low, high in _parts(tensors, ranges):
            queue = queues.setdefault(tensor.path, [])
            for begin, end in spans(high - low, CHUNK):
                queue.append((tensor, low + begin, low + end, target, place + begin))
            place += high - low
    return list(interleave(queues.values()))


def _parts(tensors: Sequence[StoredTensor], ranges) -> Iterator[tuple[StoredTensor, int, int]]:
    """(stored tensor, begin and end in its bytes) of rows in ``ranges``, in their order; None is all of them."""
    if ranges is None:
        yield from ((tensor, 0, tensor.nbytes) for tensor in tensors)
        return
    ends = list(itertools.accumulate(tensor.shape[0] for tensor in tensors))
    for begin, end in ranges:
        for tensor, last in zip(tensors, ends, strict=True):
            first = last - tensor.shape[0]
            low, high = max(begin, first), min(end, last)
            if low < high:
                size = tensor.nbytes // tensor.shape[0]
                yield tensor, (low - first) * size, (high - first) * size


def _mapped(checkpoint: Checkpoint, stored: StoredTable, placement: str, options: dict) -> EngramTable:
    """A table over the file's own pages."""
    if placement not in _MAPPED_PLACEMENTS:
        expected = " or ".join(map(repr, _MAPPED_PLACEMENTS))
        raise ValueError(f"{_WHERE}: mapped=True needs placement {expected}, whose rows a CPU reads, got {placement!r}")
    weight = _run(checkpoint, stored.weights, stored.format.dtype)
    scale: torch.Tensor | float | None = stored.scale
    if stored.scales:
        scale = _run(checkpoint, stored.scales, torch.uint8)
    return EngramTable.from_tensors(weight, scale, placement=placement, **options)


def _run(checkpoint: Checkpoint, tensors: Sequence[StoredTensor], dtype) -> torch.Tensor:
    """One tensor over tensors that follow each other in one file."""
    first = tensors[0]
    ends = list(itertools.accumulate((tensor.nbytes for tensor in tensors), initial=first.offset))
    if any((tensor.path, tensor.offset) != (first.path, at) for tensor, at in zip(tensors, ends, strict=False)):
        raise ValueError(
            f"{_WHERE}: mapped=True needs rows that follow each other in one file, and {first.name} is one of "
            f"{len(tensors)} parts; join them (python -m engram_kernels table convert ... --out FILE), or load them"
        )
    if first.offset % dtype.itemsize:
        raise ValueError(
            f"{_WHERE}: mapped=True needs {first.name} at a multiple of {dtype.itemsize} bytes in {first.path}, got "
            f"{first.offset}; convert the file, or load it"
        )
    mapping = FileMapping(checkpoint.open_fd(first.path), first.path, first.offset, ends[-1] - first.offset)
    return mapping.bytes.view(dtype).view(-1, first.shape[1])


def check_room(name: str, nbytes: int, placement: str, where: str, way_out: str) -> None:
    """Raise MemoryError where loading would have the kernel end this process or another."""
    available = available_host_memory()
    if placement != "device" and nbytes > available:
        raise MemoryError(f"{where}: {name} takes {nbytes:,} bytes and {available:,} are available; {way_out}")


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).view(-1)


def iter_rows(
    checkpoint: Checkpoint, stored: StoredTable, rows: int
) -> Iterator[tuple[int, StoredTensor, int, int, StoredTensor | None]]:
    """(first row in the table, weight, begin and end row in it, its scales) for at most ``rows`` rows at a time."""
    place = 0
    for weight, scale in itertools.zip_longest(stored.weights, stored.scales):
        for begin, end in spans(weight.shape[0], rows):
            yield place + begin, weight, begin, end, scale
        place += weight.shape[0]
