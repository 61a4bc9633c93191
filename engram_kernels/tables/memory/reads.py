"""Many reads of a file at once, to places of one buffer: by io_uring where the kernel has it, else by threads.

A drive answers one read in some 80 us and hundreds in little more, so its rate is a matter of how many are under way.
io_uring takes a batch of them in one system call, and arrays fill its queue, so that Python's time for a read is below
a microsecond; containers often forbid it, and each of a number of threads waits for one read then.

Source of the layout: io_uring_setup(2), io_uring_enter(2), linux/io_uring.h.
"""

import ctypes
import errno
import io
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

DEPTH = 128  # reads under way: the rate of the drives that tables are read from no longer rises much beyond
_THREADS = 32
_SETUP, _ENTER = 425, 426  # numbers of the system calls, the same on all architectures
_GET_EVENTS, _READ = 1, 22  # IORING_ENTER_GETEVENTS, IORING_OP_READ
_SUBMISSIONS = 0x1000_0000  # IORING_OFF_SQES

_SUBMISSION = np.dtype(
    dict(
        names=["opcode", "fd", "offset", "address", "size", "number"],
        formats=["u1", "i4", "u8", "u8", "u4", "u8"],
        offsets=[0, 4, 8, 16, 24, 32],
        itemsize=64,
    )
)
_COMPLETION = np.dtype([("number", "u8"), ("result", "i4"), ("flags", "u4")])


class _Parameters(ctypes.Structure):
    """struct io_uring_params; of both queues' offsets: head, tail, mask, entries, then flags, dropped, array | cqes."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("submissions", "completions", "flags", "cpu", "idle", "features")),
        ("unused", ctypes.c_uint32 * 4),
        ("submission_offsets", ctypes.c_uint32 * 10),
        ("completion_offsets", ctypes.c_uint32 * 10),
    ]


class Ring:
    """io_uring, for one thread at a time. OSError where the kernel refuses it."""

    def __init__(self, depth: int = DEPTH):
        self._libc = ctypes.CDLL(None, use_errno=True)
        parameters = _Parameters()
        self._file = io.FileIO(self._call(_SETUP, depth, ctypes.byref(parameters)))  # closed with this object
        self._map(parameters)

    def _map(self, parameters: _Parameters) -> None:
        submission, completion = parameters.submission_offsets, parameters.completion_offsets
        entries, results = parameters.submissions, parameters.completions
        shared = max(submission[6] + 4 * entries, completion[5] + _COMPLETION.itemsize * results)
        fd = self._file.fileno()
        queues = np.frombuffer(mmap.mmap(fd, shared, flags=mmap.MAP_SHARED), dtype=np.uint8)
        table = mmap.mmap(fd, _SUBMISSION.itemsize * entries, flags=mmap.MAP_SHARED, offset=_SUBMISSIONS)

        def number(offset):
            return queues[offset : offset + 4].view(np.uint32)

        self.depth = entries
        #: Of what was added: how many the kernel has taken, and how many there are, both without end (modulo 2^32).
        self._taken, self._tail, self._mask = number(submission[0]), number(submission[1]), entries - 1
        #: Of results: how many were taken here, and how many there are.
        self._head, self._end, self._results_mask = number(completion[0]), number(completion[1]), results - 1
        self._results = queues[completion[5] :][: _COMPLETION.itemsize * results].view(_COMPLETION)
        queues[submission[6] :][: 4 * entries].view(np.uint32)[:] = np.arange(entries)
        self._submissions = np.frombuffer(table, dtype=_SUBMISSION)
        self._submissions["opcode"] = _READ

    def read(
        self,
        fds: int | np.ndarray,
        offsets: np.ndarray,
        buffer: np.ndarray,
        places: np.ndarray,
        size: int,
        meanwhile=None,
    ) -> np.ndarray:
        """What each read returned, int64 ``[n]``: bytes, or an error's negative number.

        Reads ``size`` bytes of a file, or of the files ``fds [n]``, from each of ``offsets [n]`` to the same number of
        ``places [n]`` in ``buffer``, uint8. meanwhile: called once the first are under way.
        """
        found = np.empty(len(offsets), dtype=np.int64)
        fds, addresses, sent = np.broadcast_to(fds, len(offsets)), buffer.ctypes.data + places, 0
        try:
            while sent < len(offsets) or self._under_way():
                count = min(self.depth - self._under_way(), len(offsets) - sent)
                if count:
                    some = slice(sent, sent + count)
                    self._add(fds[some], offsets[some], addresses[some], size, sent)
                    sent += count
                if meanwhile is not None:
                    self._enter(0)
                    meanwhile()
                    meanwhile = None
                # Of calls few, and the drive has enough to do meanwhile.
                self._enter(self._under_way() if sent == len(offsets) else max(1, self._under_way() // 4))
                self._take(found)
        finally:  # whatever came up, an interrupt too, nothing is written to the buffer after this
            while self._under_way():
                self._enter(self._under_way())
                self._take(found)
        return found

    def _under_way(self) -> int:
        """Reads that were added and whose results were not taken. The queues alone know it, wherever a call ended."""
        return int((self._tail - self._head)[0])

    def _add(self, fds: np.ndarray, offsets: np.ndarray, addresses: np.ndarray, size: int, first: int) -> None:
        at, table = (self._tail + np.arange(len(offsets))) & self._mask, self._submissions
        table["fd"][at], table["size"][at] = fds, size
        table["offset"][at], table["address"][at] = offsets, addresses
        table["number"][at] = first + np.arange(len(offsets))
        self._tail += np.uint32(len(offsets))  # the system call that follows is a barrier

    def _enter(self, least: int) -> None:
        """Let the kernel begin with what was added, and wait for so many results."""
        while True:
            try:
                self._call(_ENTER, self._file.fileno(), int((self._tail - self._taken)[0]), least, _GET_EVENTS, None, 0)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY):  # the kernel is short of memory for now
                    raise
                time.sleep(1e-3)
                continue
            if self._tail[0] == self._taken[0]:
                return

    def _take(self, found: np.ndarray) -> None:
        """Results that are there now, into ``found``."""
        end = self._end.copy()
        at = (self._head + np.arange(int((end - self._head)[0]))) & self._results_mask
        done = self._results[at]
        found[done["number"].astype(np.int64)] = done["result"]
        self._head[:] = end

    def _call(self, number: int, *arguments) -> int:
        result = self._libc.syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"io_uring: {os.strerror(code)}")
        return result

    def close(self) -> None:
        self._file.close()


class Threads:
    """The same by threads, each of which waits for one read."""

    def __init__(self, threads: int = _THREADS):
        self.depth = threads
        self._pool = ThreadPoolExecutor(threads, "engram_reads")

    def read(
        self,
        fds: int | np.ndarray,
        offsets: np.ndarray,
        buffer: np.ndarray,
        places: np.ndarray,
        size: int,
        meanwhile=None,
    ) -> np.ndarray:
        """As :meth:`Ring.read`."""
        fds, found, view = (
            np.broadcast_to(fds, len(offsets)),
            np.empty(len(offsets), dtype=np.int64),
            memoryview(buffer),
        )

        def some(first: int) -> None:
            for number in range(first, len(offsets), self.depth):
                place = int(places[number])
                try:
                    found[number] = os.preadv(fds[number], [view[place : place + size]], int(offsets[number]))
                except OSError as error:
                    found[number] = -(error.errno or errno.EIO)

        reading = [self._pool.submit(some, first) for first in range(min(self.depth, len(offsets)))]
        try:
            if meanwhile is not None:
                meanwhile()
            for each in reading:
                each.result()
        finally:
            wait(reading)
        return found

    def close(self) -> None:
        self._pool.shutdown()


def reader() -> Ring | Threads:
    """What this process may use."""
    try:
        return Ring()
    except OSError:
        return Threads()
