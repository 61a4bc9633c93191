"""Chunks of files, read or written by several threads, with progress, until all are done or one fails."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

Progress = Callable[[int, int], object]
Chunk = TypeVar("Chunk")

#: Bytes of a file that a thread reads or writes at once: eight threads with a buffer each stay below 256 MB, reading
#: and writing both counted.
CHUNK = 16 << 20
#: Reads under way at once, what a drive of several GB/s needs; each waits in the kernel and not for Python.
THREADS = 8


def run_chunks(
    chunks: Iterable[Chunk],
    work: Callable[[Chunk], int],
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
    total: int,
) -> None:
    """``work`` on every chunk; it returns the bytes done. progress(done, total) runs on the caller's thread.

    The first exception, one raised by progress included, ends it: of what is left no more than two chunks a thread are
    worked on, and waited for, so that nobody touches the memory afterwards.
    """
    done, left = 0, iter(chunks)
    if progress is not None:
        progress(0, total)
    with ThreadPoolExecutor(threads, "engram_chunks") as pool:
        # Two for each thread: one at work, one that keeps it busy while this thread reports.
        waiting = {pool.submit(work, chunk) for chunk in itertools.islice(left, 2 * threads)}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(work, chunk) for chunk in itertools.islice(left, len(finished))}
            done += sum(future.result() for future in finished)
            if progress is not None:
                progress(done, total)


def check_threads(threads: int, where: str) -> None:
    """Raise ValueError unless ``threads`` is a number of threads."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"{where}: threads must be at least 1, got {threads!r}")


def interleave(queues: Iterable[Iterable[Chunk]]) -> Iterator[Chunk]:
    """One of each in turn, so that several files are read at once."""
    missing = object()
    for turn in itertools.zip_longest(*queues, fillvalue=missing):
        yield from (chunk for chunk in turn if chunk is not missing)


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """``[begin, end)`` pairs of at most ``step`` that cover ``[0, total)``."""
    return ((begin, min(total, begin + step)) for begin in range(0, total, step))
