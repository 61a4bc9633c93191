"""What a drive, memory and arithmetic give to reads and writes of whole files: roofs of tables into and out of them.

Files are read and written in pieces, several at once. Buffers are reused, as dd reuses its own, but for copies out of
the page cache into memory that is new, as a table's is. Direct I/O leaves out what is behind the last whole block.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from engram_kernels.checkpoints.convert import DECODED, encoded
from engram_kernels.checkpoints.encoding import decode_rows
from engram_kernels.checkpoints.files import Checkpoint
from engram_kernels.checkpoints.parallel import CHUNK, Buffers, run_chunks, spans
from engram_kernels.checkpoints.reading import read_chunk, row_chunks
from engram_kernels.checkpoints.validate import select_table
from engram_kernels.checkpoints.verify import scale_bytes, tally
from engram_kernels.geometry.row_format import FORMATS

BLOCK, MIB = 4096, 1 << 20


def give_back(paths: list[Path]) -> None:
    """Let the page cache forget the files."""
    for path in paths:
        sync(path)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file)


def warm_up(paths: list[Path]) -> None:
    """Have the page cache hold the files."""
    for path in paths:
        cache_copies(path, 8, 4 * MIB, new=False)


def by_pieces(
    path: Path, threads: int, piece: int, work: Callable[[int, int, int, memoryview], object], flags: int = 0
) -> None:
    """``work(descriptor, offset, bytes, buffer)`` on all pieces of a file, by threads with a buffer each."""
    buffers, unit = Buffers(), BLOCK if flags else 1

    def call(span: tuple[int, int]) -> None:
        work(fd, span[0], span[1] - span[0], memoryview(buffers.take(piece)))

    fd = os.open(path, os.O_RDONLY | flags)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, spans(os.fstat(fd).st_size // unit * unit, piece)))
    finally:
        os.close(fd)


def read(fd: int, at: int, size: int, buffer: memoryview) -> None:
    """Fill the first ``size`` bytes of a buffer."""
    if (got := os.preadv(fd, [buffer[:size]], at)) != size:
        raise OSError(f"a read of {size:,} bytes at {at:,} returned {got:,}")


def direct_reads(path: Path, threads: int, piece: int, *, new: bool = False) -> np.ndarray | None:
    """All of a file past the page cache, into buffers, or into new memory, which is returned."""
    memory = Buffers().take(path.stat().st_size if new else 0)
    view = memoryview(memory)
    by_pieces(
        path, threads, piece, lambda fd, at, size, buffer: read(fd, at, size, view[at:] if new else buffer), os.O_DIRECT
    )
    return memory if new else None


def cache_copies(path: Path, threads: int, piece: int, *, new: bool) -> np.ndarray | None:
    """All of a file through the page cache, into buffers, or into new memory, which is returned."""
    memory = np.empty(path.stat().st_size if new else 0, dtype=np.uint8)
    view = memoryview(memory)
    by_pieces(path, threads, piece, lambda fd, at, size, buffer: read(fd, at, size, view[at:] if new else buffer))
    return memory if new else None


def filled(nbytes: int) -> np.ndarray:
    """A buffer that is not zero, which some drives do not store."""
    buffer = Buffers().take(nbytes)
    buffer[:] = 1
    return buffer


def writes(folder: Path, nbytes: int, threads: int, piece: int, *, direct: bool) -> Path:
    """A new file of so many bytes that has reached the disk, in a new folder, which is returned."""
    source = memoryview(filled(piece))
    nbytes -= nbytes % BLOCK
    with _new_file(folder, nbytes, direct) as (made, fd), ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda span: os.pwrite(fd, source[: span[1] - span[0]], span[0]), spans(nbytes, piece)))
    return made


def copies(path: Path, folder: Path, threads: int, piece: int, *, written: float, direct: bool) -> Path:
    """A file read, and ``written`` times as many bytes written to a new one, in a new folder, which is returned."""
    source = memoryview(filled(int(piece * written) + BLOCK))

    def copy(fd: int, at: int, size: int, buffer: memoryview) -> None:
        read(fd, at, size, buffer)
        begin, end = (int(place * written) // BLOCK * BLOCK for place in (at, at + size))
        os.pwrite(out, source[: end - begin], begin)

    with _new_file(folder, int(path.stat().st_size * written), direct) as (made, out):
        by_pieces(path, threads, piece, copy, os.O_DIRECT if direct else 0)
    return made


@contextmanager
def _new_file(folder: Path, nbytes: int, direct: bool) -> Iterator[tuple[Path, int]]:
    """(a new folder, a file in it of so many bytes that have their place on the disk); synced after the block."""
    made = folder / "roof"
    made.mkdir()
    fd = os.open(made / "file", os.O_CREAT | os.O_RDWR | (os.O_DIRECT if direct else 0))
    try:
        os.posix_fallocate(fd, 0, nbytes)
        yield made, fd
        os.fsync(fd)
    finally:
        os.close(fd)


def checks(path: Path) -> None:
    """What verify computes, as often as for all rows of the file, of rows that are in the processor's cache."""
    with Checkpoint(path, "bench") as checkpoint:
        table = select_table(checkpoint)
        chunks = row_chunks(table, CHUNK // table.format.row_bytes(table.width) or 1)
        content, threads = read_chunk(checkpoint, chunks[0]), os.cpu_count() or 1
        copies = iter([[each.clone() for each in content] for _ in range(threads)])
        local = threading.local()

        def work(chunk) -> int:
            if not hasattr(local, "content"):
                local.content = next(copies)
            tally(local.content[0], 0, table.format)
            scale_bytes(local.content[1], table.format)
            return 0

        run_chunks(chunks, work, threads=threads, total=0)


def conversions(path: Path, format: str) -> None:
    """What a conversion computes, as often as for all rows of the file, of rows that are in the processor's cache."""
    with Checkpoint(path, "bench") as checkpoint:
        table = select_table(checkpoint)
        chunks = row_chunks(table, DECODED // table.width)
        rows, scales = read_chunk(checkpoint, chunks[0])

        def work(chunk) -> int:
            values = decode_rows(rows.view(table.format.dtype), scales, table.format, table.scale)
            encoded(values, FORMATS[format], "bench", None, False, 0.125)
            return 0

        run_chunks(chunks, work, threads=os.cpu_count() or 1, total=0)


def has_direct(path: Path) -> bool:
    """Whether the file system has direct I/O."""
    with suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        return True
    return False


@contextmanager
def memory_peak() -> Iterator[Callable[[], float]]:
    """A call that tells by how many MiB this process has grown at most since the block began."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    yield lambda: (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10
