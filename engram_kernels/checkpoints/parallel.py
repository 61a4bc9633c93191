"""Chunks of files, read or written by several threads, with progress, until all are done or one fails."""

import ctypes
import errno
import io
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import numpy as np

Progress = Callable[[int, int], object]
Chunk = TypeVar("Chunk")

#: Bytes of a file that a thread reads or writes at once: as much as a drive takes in one request, or a few.
CHUNK = 4 << 20
#: Addresses, offsets and sizes of direct I/O are multiples of a disk's blocks, which are 512 or 4,096 bytes.
BLOCK = 4096
LEAST_DIRECT = 256 << 10  # bytes of a read or write, below which the page cache is as fast
_SAMPLES = 16  # pages of a read, by which it is told whether the page cache holds it
_HUGE_PAGE = _PIECE = 2 << 20  # bytes that come by way of a buffer at once: still in a cache when they are copied on
#: Chunks under way at once, what a drive of several GB/s needs, and threads that wait for the processor to zero new
#: memory besides; with a buffer each they stay below 128 MB, reading and writing both counted twice.
THREADS = 16


def run_chunks(
    chunks: Iterable[Chunk],
    work: Callable[[Chunk], int],
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
    total: int,
) -> None:
    """``work`` on every chunk; it returns the bytes done. progress(done, total) runs on the caller's thread.

    The first exception, one raised by progress included, ends it: what is being worked on is waited for, so that nobody
    touches the memory afterwards, and nothing else is begun.
    """
    left, taking, stop = iter(chunks), threading.Lock(), threading.Event()
    finished: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()  # None: one of the threads has ended

    def run() -> None:
        try:
            while not stop.is_set():
                with taking:
                    chunk = next(left, None)
                if chunk is None:
                    break
                finished.put(work(chunk))
        except BaseException as error:
            with taking:  # of several the first: others would keep the memory that their frames hold
                first = not stop.is_set()
                stop.set()
            if first:
                finished.put(error)
        finally:
            finished.put(None)

    done, running = 0, [threading.Thread(target=run, name=f"engram_chunks_{number}") for number in range(threads)]
    if progress is not None:
        progress(0, total)
    started: list[threading.Thread] = []
    try:
        for thread in running:
            started.append(thread)
            thread.start()
        waiting = len(running)
        while waiting:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                waiting -= 1
                continue
            done += result
            if progress is not None:
                progress(done, total)
    finally:
        stop.set()
        for thread in started:
            if thread.ident is not None:
                thread.join()
        # An error's frames may hold the function above, and with it the memory that chunks are of.
        left = work = chunks = None


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


class Buffers(threading.local):
    """Memory of each thread's own that begins at a page, kept for the thread's next chunk.

    Large ones are of huge pages: a direct read or write of small ones becomes several times as many requests.
    """

    def __init__(self):
        self._memory: dict[str, np.ndarray] = {}

    def take(self, nbytes: int, name: str = "") -> np.ndarray:
        """uint8 ``[nbytes]``, with whatever is in it; a thread's buffers of several names are apart."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < nbytes:
            memory = self._memory[name] = _buffer(nbytes)
        return memory[:nbytes]


def _buffer(nbytes: int) -> np.ndarray:
    huge = nbytes >= _HUGE_PAGE
    mapping = mmap.mmap(-1, max(1, nbytes) + huge * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    return memory[-memory.ctypes.data % _HUGE_PAGE if huge else 0 :][:nbytes]


class FileReads:
    """Reads of an open file by any number of threads: what the page cache has from there, the rest past it.

    100 GB of a table gain nothing from the page cache, push all else out of it, and cost the processor a copy. What is
    there already comes many times as fast.
    """

    def __init__(self, fd: int):
        self._fd, self._buffers, self._lock = fd, Buffers(), threading.Lock()
        self._direct: io.FileIO | None = None
        self._mapped, self._address = np.empty(0, dtype=np.uint8), 0
        self._refused = False  # by a file system without direct I/O, or one with larger blocks

    def fill(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from byte ``offset`` on; returns the bytes read, fewer only where the file ends."""
        direct = len(view) >= LEAST_DIRECT and self._opened() and not self._cached(offset, len(view))
        target, done = np.frombuffer(view, dtype=np.uint8), 0
        while done < len(target):
            read = self._past_the_cache if direct and not self._refused else self._through_the_cache
            count = read(target[done:], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
            self._direct, self._mapped = None, np.empty(0, dtype=np.uint8)

    def _through_the_cache(self, target: np.ndarray, offset: int) -> int:
        return os.preadv(self._fd, [memoryview(target)], offset)

    def _past_the_cache(self, target: np.ndarray, offset: int) -> int:
        """Whole blocks straight to memory that begins at one, all else by way of a buffer."""
        head, fd = offset % BLOCK, self._direct.fileno()
        together = target.ctypes.data % BLOCK == head
        try:
            if together and head == 0 and len(target) >= BLOCK:
                return os.preadv(fd, [memoryview(target[: len(target) // BLOCK * BLOCK])], offset)
            room = BLOCK if together else min(_PIECE, -(-(head + len(target)) // BLOCK) * BLOCK)
            buffer = self._buffers.take(room)
            count = min(os.preadv(fd, [memoryview(buffer)], offset - head) - head, len(target))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._refused, count = True, 0
        if count <= 0:  # refused, or so few that none is wanted, as behind the end of the file
            return self._through_the_cache(target, offset)
        target[:count] = buffer[head : head + count]
        return count

    def _opened(self) -> bool:
        """Whether the file can be read past the page cache."""
        with self._lock:
            if self._direct is None and not self._refused:
                try:
                    mapping = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)  # of addresses alone; nothing is read by it
                    self._mapped = np.frombuffer(mapping, dtype=np.uint8)
                    self._address = self._mapped.ctypes.data
                    self._direct = open(f"/proc/self/fd/{self._fd}", "rb", buffering=0, opener=direct_opener)
                    # Reads of what is cached would have the kernel read ahead into the cache, again and again.
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
                except (OSError, ValueError):  # a file system without it, no /proc, or an empty file
                    self._refused = True
        return not self._refused

    def _cached(self, offset: int, nbytes: int) -> bool:
        """Whether the page cache holds at least half of some pages among these bytes, or the kernel does not say.

        It says so of files that are this user's own, or that this user may write to, and claims to hold all of others.
        """
        found = ctypes.c_ubyte()
        # Without letting other threads run: taking turns 16 times would cost more than the answers.
        mincore, held, asked = ctypes.PyDLL(None).mincore, 0, 0
        for at in range(offset, min(offset + nbytes, len(self._mapped)), max(mmap.PAGESIZE, nbytes // _SAMPLES)):
            page = ctypes.c_void_p(self._address + at - at % mmap.PAGESIZE)
            failed = mincore(page, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found))
            held, asked = held + bool(failed or found.value & 1), asked + 1
        return 2 * held >= asked


def direct_opener(path: str, flags: int) -> int:
    """Opens a file for direct I/O, for :func:`open`."""
    return os.open(path, flags | os.O_DIRECT)
