"""Tensors over the pages of a file: mapped here, or found to be mapped by somebody else, and their file's length.

Rows are read where they lie in the file, through the page cache: nothing is copied, and nothing read before it is used.
A file that is renamed or replaced stays what was mapped. One that shrinks takes the pages behind its end away, which
ends the process that reads them (SIGBUS): a table looks at the length of its files before every use.
"""

import io
import mmap
import os
import re
import stat
import weakref

import numpy as np
import torch

from .pages import WILLNEED, advise_ranges

_SAMPLE = 16  # pages that are looked at before any are asked for
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ (\d+) *(.*)")


def map_file(fd: int, offset: int, nbytes: int) -> torch.Tensor:
    """``nbytes`` bytes of a file from ``offset`` on, as a uint8 tensor that keeps them mapped.

    Private: what is written stays in this process, and the file's pages are shared until then.
    """
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    mapping = mmap.mmap(fd, offset + nbytes - begin, flags=flags, prot=protection, offset=begin)
    # Rows are read in no order: reading ahead would fetch 128 KB for each of 256 B.
    mapping.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset - begin)


def check_length(fd: int, path: object, need: int, where: str) -> None:
    """Raise ValueError where a mapped file was cut short: reading on would be a SIGBUS."""
    have = os.fstat(fd).st_size
    if have < need:
        raise ValueError(f"{where}: {path} shrank to {have:,} bytes while mapped, {need:,} are needed")


def _range_of(address: int) -> re.Match | None:
    """The line of the process's map that has ``address``."""
    with open("/proc/self/maps") as lines:
        matches = map(_RANGE.match, lines)
        return next((match for match in matches if match and int(match[1], 16) <= address < int(match[2], 16)), None)


def refuses_writes(tensor: torch.Tensor) -> str | None:
    """Why a CPU tensor is not to be written to, in words; None where nothing but this process's memory would change.

    A file that is mapped privately, as :func:`map_file` does, is copied page by page where it is written to.
    """
    match = _range_of(tensor.data_ptr() + tensor.nbytes - 1)
    if match is None:
        return None
    name, permissions = match[6] or "memory", match[3]
    if not permissions.startswith("rw"):
        return f"{name} is mapped for reading alone"
    # A name that has gone is shared with nobody who could still open it.
    shared = permissions.endswith("s") and name.startswith("/") and not name.endswith(" (deleted)")
    return f"a write would change {name}, of which they are a shared mapping" if shared else None


def _past_the_cache(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT)


class MappedFile:
    """A regular file, held open, of which a table reads ``need`` bytes at least.

    begin: address of the first row of a tensor that is mapped from it; nbytes: of one row; end: address behind all.
    """

    def __init__(self, fd: int, path: str, need: int, begin: int = 0, nbytes: int = 0, end: int = 0):
        self._fd, self.path, self._need = fd, path, need
        self._begin, self._nbytes, self._shift = begin, nbytes, need - end
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # a page that is looked at is read, and no others with it
        self._release = weakref.finalize(self, os.close, fd)

    @classmethod
    def behind(cls, tensor: torch.Tensor) -> "MappedFile | None":
        """The file that the last byte of a CPU tensor is mapped from; None where it is ordinary memory.

        A checkpoint read by safetensors, numpy.memmap or torch is mapped, not copied.
        """
        last = tensor.data_ptr() + tensor.nbytes - 1
        match = _range_of(last)
        if match is None or not match[6].startswith("/"):
            return None
        fd = cls._open(match[6], int(match[5]))
        if fd is None:
            return None
        need = int(match[4], 16) + last + 1 - int(match[1], 16)
        return cls(fd, match[6], need, tensor.data_ptr(), tensor.nbytes // len(tensor), last + 1)

    @staticmethod
    def _open(path: str, inode: int) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # removed since, or not ours to open: nothing can be watched
            return None
        status = os.fstat(fd)
        if status.st_ino != inode or not stat.S_ISREG(status.st_mode):  # another file has the name by now
            os.close(fd)
            return None
        return fd

    def reopened(self) -> tuple[io.FileIO, bool]:
        """The same file once more, for reads past the page cache, and whether the file system has these.

        Where it has not, it is for ordinary reads.
        """
        name = f"/proc/self/fd/{self._fd}"
        try:
            return open(name, "rb", buffering=0, opener=_past_the_cache), True
        except OSError:
            return open(name, "rb", buffering=0), False

    def read_ahead(self, ids: np.ndarray) -> None:
        """Let the kernel begin to read rows ``ids``, int64 ``[n]``, where a sample of them is not in memory.

        A read of the mapping waits for its page, some 80 us, where a drive answers hundreds in little more. It costs
        0.3 us a page: most of a lookup from memory, which is why a sample is looked at.
        """
        sample = self._begin + ids[:: max(1, len(ids) // _SAMPLE)] * self._nbytes
        if all(map(self._in_memory, (sample // mmap.PAGESIZE).tolist())):
            return
        first = self._begin + np.unique(ids) * self._nbytes
        first, end = first // mmap.PAGESIZE, (first + self._nbytes - 1) // mmap.PAGESIZE + 1
        fresh = np.ones(len(first), dtype=bool)  # rows that lie in the same pages ask for them once
        fresh[1:] = (first[1:] != first[:-1]) | (end[1:] != end[:-1])
        first, end = first[fresh], end[fresh]
        advise_ranges(np.stack([first, end - first], axis=1).astype(np.uint64) * mmap.PAGESIZE, WILLNEED)

    def _in_memory(self, page: int) -> bool:
        """Whether the page cache has a page of the mapping, number of its address.

        A read that may not wait tells; mincore does not where the file belongs to another user.
        """
        offset = max(0, page * mmap.PAGESIZE + self._shift)
        try:
            return bool(os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT))
        except OSError:  # it would wait, or the file system cannot tell
            return False

    def check(self, where: str) -> None:
        """Raise ValueError where the file is shorter than the tensor needs."""
        check_length(self._fd, self.path, self._need, where)

    def close(self) -> None:
        self._release()
