"""The file behind a tensor's memory, where there is one.

A checkpoint read by safetensors, numpy.memmap or torch is mapped, not copied. Where such a file is cut short, reading
on ends the process (SIGBUS); a table looks at the file's length first.
"""

import os
import re
import stat
import weakref

import torch

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+) +(/.*)")


class MappedFile:
    """A regular file, held open, and the length that a mapped tensor needs of it."""

    def __init__(self, fd: int, path: str, need: int):
        self._fd, self.path, self._need = fd, path, need
        self._release = weakref.finalize(self, os.close, fd)

    @classmethod
    def behind(cls, tensor: torch.Tensor) -> "MappedFile | None":
        """The file that the last byte of a CPU tensor is mapped from; None where it is ordinary memory."""
        last = tensor.data_ptr() + tensor.nbytes - 1
        with open("/proc/self/maps") as lines:
            for line in lines:
                match = _RANGE.match(line)
                if match is None or not int(match[1], 16) <= last < int(match[2], 16):
                    continue
                return cls._open(match[5], int(match[4]), int(match[3], 16) + last + 1 - int(match[1], 16))
        return None

    @classmethod
    def _open(cls, path: str, inode: int, need: int) -> "MappedFile | None":
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # removed since, or not ours to open: nothing can be watched
            return None
        status = os.fstat(fd)
        if status.st_ino != inode or not stat.S_ISREG(status.st_mode):  # another file has the name by now
            os.close(fd)
            return None
        return cls(fd, path, need)

    def check(self, where: str) -> None:
        """Raise ValueError where the file is shorter than the tensor needs."""
        have = os.fstat(self._fd).st_size
        if have < self._need:
            raise ValueError(f"{where}: {self.path} shrank to {have:,} bytes while mapped, {self._need:,} are needed")

    def close(self) -> None:
        self._release()
