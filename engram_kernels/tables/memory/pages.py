"""A range of this process's memory: mapped, advised, faulted in, collapsed to huge pages, and read back.

By system calls through ctypes, which lets other Python threads run: :mod:`mmap` does not during madvise, and its
objects unmap their range in a forked child too, where it may hold something else by then.
"""

import ctypes
import errno
import mmap
import os
import platform
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engram_kernels.checkpoints.parallel import Progress, spans

HUGE_PAGE = 2 << 20
NOHUGEPAGE, HUGEPAGE, DONTFORK, DONTNEED, WILLNEED = 15, 14, 10, 4, 3
COLLAPSE, POPULATE_WRITE = 25, 23  # Linux 6.1 and 5.14; mmap does not name them
_PIECE = 256 << 20  # bytes that a thread faults in or collapses at once, and the step of a progress bar
_MAX_THREADS = 16  # zeroing pages saturates a socket's memory well before that
_NORESERVE, _FIXED = 0x4000, 0x10
_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}
_PROCESS_MADVISE = 440  # on all architectures, from Linux 5.10 on
_AT_ONCE = 512  # ranges that it is given, of at most 1,024
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_NODES = Path("/sys/devices/system/node/online")
#: Fields of smaps that count bytes in huge pages: anonymous, shared memory, files, hugetlb.
_HUGE_FIELDS = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


@dataclass(frozen=True)
class Usage:
    """What the kernel says of a range: bytes with pages, and of these in huge ones."""

    resident: int
    huge: int


class Pages:
    """``nbytes`` bytes from a 2 MiB boundary on, between inaccessible ones; ``bytes`` is a uint8 tensor over them.

    Anonymous and private, or ``nbytes`` of the file ``fd`` from ``offset`` on, shared. The range is unmapped with the
    last tensor that views it, in the process that mapped it.
    """

    def __init__(self, nbytes: int, fd: int | None = None, offset: int = 0):
        self.nbytes, self._shared = nbytes, fd is not None
        # Guards on both sides: the kernel would otherwise join neighbours of equal flags, and smaps count them as one.
        reserved = _rounded(nbytes, HUGE_PAGE) + HUGE_PAGE + 2 * mmap.PAGESIZE
        start = _map(None, reserved, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        self.address = _rounded(start + mmap.PAGESIZE, HUGE_PAGE)
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE if fd is None else mmap.MAP_SHARED
        try:
            _map(self.address, nbytes, 3, kind | _FIXED, -1 if fd is None else fd, offset)
        except OSError:
            _unmap(start, reserved, os.getpid())
            raise
        self.buffer = (ctypes.c_uint8 * nbytes).from_address(self.address)
        weakref.finalize(self.buffer, _unmap, start, reserved, os.getpid()).atexit = False
        self.bytes = torch.frombuffer(self.buffer, dtype=torch.uint8)

    def release(self) -> None:
        """Let go of the range; it is unmapped with the last tensor that views it."""
        self.bytes = self.buffer = None

    def advise(self, advice: int) -> str | None:
        """madvise over the whole range; the name of the error where the kernel refuses, else None."""
        return _advise(self.address, self.nbytes, advice)

    def back(self, address: int, nbytes: int) -> str | None:
        """Give memory to the pages of some of the range's bytes; the error's name, or None.

        Of a new file in huge pages: each is made of one small page, and the rest of it need not be zeroed apart and
        copied, which takes several times as long.
        """
        begin = address - (address - self.address) % HUGE_PAGE
        end = min(_rounded(address + nbytes - self.address, HUGE_PAGE), self.nbytes) + self.address
        if self._shared:
            for at in range(begin, end, HUGE_PAGE):
                if (error := _advise(at, mmap.PAGESIZE, POPULATE_WRITE)) is not None:
                    return error
            whole = (end - begin) // HUGE_PAGE * HUGE_PAGE
            if whole:
                _advise(begin, whole, COLLAPSE)  # what it refuses comes in small pages
        return _advise(begin, end - begin, POPULATE_WRITE)

    def fault_in(self, progress: Progress | None = None, *, touch: bool = False, new: bool = False) -> str | None:
        """Give every page memory, by several threads; the first error's name, or None.

        new: of a file in which nothing is yet. touch: where the kernel cannot be asked (before 5.14), write zeros
        instead; only for fresh private memory.
        """

        errors: list[str] = []

        def fault(address: int, nbytes: int) -> str | None:
            if errors:
                return errors[0]
            error = self.back(address, nbytes) if new else _advise(address, nbytes, POPULATE_WRITE)
            if error == "EINVAL" and touch:
                ctypes.memset(address, 0, nbytes)
            elif error is not None:
                errors.append(error)  # the other pieces would take memory that is given back anyway
            return errors[0] if errors else None

        return self._by_threads(fault, progress)

    def collapse(self, progress: Progress | None = None) -> str | None:
        """Copy small pages together into huge ones, by several threads; the first error's name, or None.

        It works after the pages were written and before a driver holds them: pinned pages cannot move.
        """
        return self._by_threads(lambda address, nbytes: _advise(address, nbytes, COLLAPSE), progress)

    def prefer_node(self, node: int) -> str | None:
        """Take pages from NUMA node ``node`` while it has some; the error's name, or None."""
        number = _MBIND.get(platform.machine())
        if number is None:
            return f"ENOSYS on {platform.machine()}"
        mask = (ctypes.c_ulong * 16)()
        mask[node // 64] = 1 << node % 64
        arguments = (self.address, _rounded(self.nbytes, mmap.PAGESIZE), _PREFERRED, ctypes.addressof(mask), 1024, 0)
        return _error() if _libc().syscall(*(ctypes.c_long(value) for value in (number, *arguments))) else None

    def usage(self) -> Usage:
        """Read back from smaps what the range holds."""
        resident = huge = 0
        inside = False
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if edges := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
                    first = int(edges[1], 16)
                    if first >= self.address + self.nbytes:  # in order; the kernel walks what is read, and no more
                        break
                    inside = first >= self.address
                elif inside:
                    name, _, value = line.partition(":")
                    if name in _HUGE_FIELDS:
                        huge += int(value.split()[0]) << 10
                    if name == "Rss" or name.endswith("_Hugetlb"):  # Rss leaves hugetlb pages out
                        resident += int(value.split()[0]) << 10
        return Usage(resident, huge)

    def nodes(self) -> dict[int, int]:
        """Bytes with pages by NUMA node, from numa_maps; empty where the kernel has none."""
        nodes: dict[int, int] = {}
        try:
            lines = Path("/proc/self/numa_maps").read_text().splitlines()
        except OSError:
            return nodes
        for line in lines:
            if self.address <= int(line.split()[0], 16) < self.address + self.nbytes:
                page = int(match[1]) << 10 if (match := re.search(r"kernelpagesize_kB=(\d+)", line)) else mmap.PAGESIZE
                for node, count in re.findall(r" N(\d+)=(\d+)", line):
                    nodes[int(node)] = nodes.get(int(node), 0) + int(count) * page
        return nodes

    def _by_threads(self, work: Callable[[int, int], str | None], progress: Progress | None) -> str | None:
        """``work(address, nbytes)`` on every piece, ``progress`` in this thread; no piece is left running."""
        pieces = [(begin, end - begin) for begin, end in spans(self.nbytes, _PIECE)]
        first, done = None, 0
        with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(pieces))) as threads:
            waiting = {threads.submit(work, self.address + at, nbytes): nbytes for at, nbytes in pieces}
            try:
                for future in as_completed(waiting):
                    first = first or future.result()
                    done += waiting[future]
                    if progress is not None:
                        progress(done, self.nbytes)
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        return first


def prefer_huge(tensor: torch.Tensor) -> None:
    """Ask for huge pages under a dense CPU tensor that is about to be written as a whole, in half the time."""
    begin = _rounded(tensor.data_ptr(), mmap.PAGESIZE)
    nbytes = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if nbytes >= HUGE_PAGE:
        _advise(begin, nbytes, HUGEPAGE)


def advise_ranges(ranges: np.ndarray, advice: int) -> None:
    """madvise of each of ``ranges [n, 2]``, uint64 address and bytes: in few calls where the kernel and what confines
    this process allow it, else one by one. What is refused is left.
    """
    libc, done, process = _libc(), 0, os.pidfd_open(os.getpid())
    try:
        while done < len(ranges):
            some = np.ascontiguousarray(ranges[done : done + _AT_ONCE])
            arguments = (process, some.ctypes.data, len(some), advice, 0)
            if libc.syscall(*(ctypes.c_long(value) for value in (_PROCESS_MADVISE, *arguments))) < 0:
                break
            done += len(some)
    finally:
        os.close(process)
    for address, nbytes in ranges[done:].tolist():
        _advise(address, nbytes, advice)


def huge_page_setting() -> str:
    """What the kernel does about huge pages for memory that asks: "always", "madvise", "never", or "absent"."""
    try:
        return (_THP / "enabled").read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "absent"


def whole_huge_pages(address: int, nbytes: int) -> int:
    """Bytes of the huge pages that lie wholly inside a range: as many as can come."""
    try:
        size = int((_THP / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        size = HUGE_PAGE
    return max(0, (address + nbytes) // size * size - _rounded(address, size))


def online_nodes() -> int:
    """NUMA nodes of this machine; 1 where the kernel does not say."""
    try:
        spans = [span.split("-") for span in _NODES.read_text().strip().split(",")]
        return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
    except (OSError, ValueError):
        return 1


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error() -> str:
    return errno.errorcode.get(ctypes.get_errno(), f"errno {ctypes.get_errno()}")


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    call = _libc().mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    result = call(address, nbytes, protection, flags, fd, offset)
    if result == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping {nbytes:,} bytes: {os.strerror(code)}")
    return result


def _unmap(address: int, nbytes: int, owner: int) -> None:
    # A forked child inherits this call, but the range is not in it, or something else of its own is there.
    if os.getpid() == owner:
        _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def _advise(address: int, nbytes: int, advice: int) -> str | None:
    call = _libc().madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return _error() if call(address, nbytes, advice) else None
