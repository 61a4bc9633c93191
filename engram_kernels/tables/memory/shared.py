"""One copy of a table per node, for any number of processes (the file and its locks: tables/memory/shared_protocol.py).

One process creates it, fills it and publishes it; others attach, and wait until then. Pages of /dev/shm come small
unless the administrator says otherwise, so they are collapsed to huge ones when the table is published, after they
were written and before any driver holds them.
"""

import os
import time
import weakref
from pathlib import Path

import torch

from . import shared_protocol
from .host import Mapping, RuntimeDriver, ensure_huge
from .mapped_files import check_length
from .pages import HUGEPAGE, Pages, Progress
from .shared_protocol import DATA_OFFSET, Geometry


class SharedMapping(Mapping):
    """``nbytes`` bytes that several processes map. Made by create or attach."""

    def __init__(self, fd: int, path: Path, nbytes: int, geometry: Geometry, driver: RuntimeDriver | None):
        self.path, self.geometry, self._fd = path, geometry, fd
        # Runs at exit too, so that no file stays behind.
        self._release = weakref.finalize(self, shared_protocol.release, fd, path)
        # Locks live as long as their open file, which a mapping holds on to: it gets one of its own.
        mapped = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            super().__init__(Pages(nbytes, mapped, DATA_OFFSET), driver)
        except BaseException:
            self._release()
            raise
        finally:
            os.close(mapped)
        self.pages.advise(HUGEPAGE)

    @classmethod
    def create(
        cls,
        name: str,
        nbytes: int,
        geometry: Geometry,
        driver: RuntimeDriver | None,
        progress: Progress | None = None,
        backed: bool = True,
    ) -> "SharedMapping":
        """A new table of that name, zero, all of it backed by memory; readers wait for :meth:`publish`.

        backed: False leaves memory to :meth:`back`, which is called for all bytes before they are written.
        """
        shared_protocol.check_name(name, "EngramTable.empty")
        mapping = cls(*shared_protocol.create(name, nbytes, geometry), nbytes, geometry, driver)
        try:
            mapping.prefer_node()
            if backed:
                # Through the mapping pages come huge; the reservation then finds what is missing.
                mapping.pages.fault_in(progress, new=True)
                shared_protocol.reserve(mapping._fd, mapping.path.parent, DATA_OFFSET + nbytes)
        except BaseException:
            mapping.close()
            raise
        return mapping

    def back(self, part: torch.Tensor) -> None:
        """Give memory to a part of :attr:`bytes`; RuntimeError where there is none. Any number of threads may do so."""
        begin = part.data_ptr() - self.pages.address
        self.pages.back(part.data_ptr(), part.nbytes)
        shared_protocol.reserve(self._fd, self.path.parent, part.nbytes, DATA_OFFSET + begin)

    @classmethod
    def attach(
        cls, name: str, nbytes: int, geometry: Geometry, driver: RuntimeDriver | None, timeout: float
    ) -> "SharedMapping":
        """The published table of that name, which must have ``geometry``; waits for it, ``timeout`` seconds at most."""
        where = "EngramTable.attach"
        shared_protocol.check_name(name, where)
        if not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise ValueError(f"{where}: timeout must be a number of seconds, 0 or more, got {timeout!r}")
        start, pause, filling = time.monotonic(), 0.002, None
        while not isinstance(found := shared_protocol.find(name, nbytes, geometry), tuple):
            if found is None and filling is not None:
                raise RuntimeError(f"{where}: {filling} when that file was removed: it died or gave up")
            filling, waited = found, time.monotonic() - start
            if waited >= timeout:
                what = filling or f"there was no shared table {name!r}"
                raise TimeoutError(f"{where}: {what} after {waited:.1f} s (timeout={timeout})")
            time.sleep(min(pause, timeout - waited))
            pause = min(2 * pause, 0.1)
        fd, path, stored = found
        mapping = cls(fd, path, nbytes, stored, driver)
        try:
            if driver is not None:
                mapping.pages.fault_in()  # maps what is there, by threads; the driver would go page by page
            mapping.register()
        except BaseException:
            mapping.close()
            raise
        return mapping

    def publish(self, progress: Progress | None = None) -> None:
        """Say that the content is complete: collapse to huge pages, register, and let readers in. Once."""
        if shared_protocol.is_complete(self._fd):
            raise ValueError("EngramTable.publish: the table is published already")
        ensure_huge(self.pages, self.notes, progress)
        self.register()
        shared_protocol.complete(self._fd)

    def check(self, where: str) -> None:
        """Raise ValueError where another process cut the file short."""
        check_length(self._fd, self.path, DATA_OFFSET + self.nbytes, where)

    def close(self) -> None:
        """Unregister and let go of the file; the last process to do so removes it."""
        super().close()
        self._release()
