"""Rows read where they lie in a file, through the page cache: nothing is copied, and nothing read before it is used."""

import mmap
from pathlib import Path

import torch

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12


class FileMapping:
    """``nbytes`` bytes of a file from ``offset`` on; ``bytes`` is a uint8 tensor over them that keeps them mapped.

    Private: what is written stays in this process, and the file's pages are shared until then. A file that is renamed
    or replaced stays what was mapped; one that shrinks takes the pages behind its end away, which ends the process
    that reads them. A table over it looks at the file's length first (tables/memory/mapped_file.py).
    """

    def __init__(self, fd: int, path: Path, offset: int, nbytes: int):
        self.path = path
        end = offset + nbytes
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._mmap = mmap.mmap(
            fd,
            end - begin,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=begin,
        )
        # Rows are read in no order: reading ahead would fetch 128 KB for each of 256 B.
        self._mmap.madvise(mmap.MADV_RANDOM)
        self.bytes = torch.frombuffer(self._mmap, dtype=torch.uint8, count=nbytes, offset=offset - begin)
