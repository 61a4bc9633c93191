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
from .shared_protocol import DATA_OFFSET, Geometry, WriterDied


class SharedMapping(Mapping):
    """``nbytes`` bytes that several processes map. Made by create or attach."""

    def __init__(self, fd: int, path: Path, nbytes: int, geometry: Geometry, driver: RuntimeDriver | None):
        self.path, self.geometry, self._fd = path, geometry, fd
        self.vouched = False  #: Whether this process published rows of that digest, and wrote no others since.
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
        cls, name: str, nbytes: int, geometry: Geometry, driver: RuntimeDriver | None, timeout: float | None, where: str
    ) -> "SharedMapping":
        """The published table of that name, which must have ``geometry``; waits for it, ``timeout`` seconds at most.

        timeout: None waits for what is being filled alone, as long as that takes; FileNotFoundError where nothing is.
        """
        shared_protocol.check_name(name, where)
        if timeout is not None and (not isinstance(timeout, (int, float)) or not timeout >= 0):
            raise ValueError(f"{where}: timeout must be a number of seconds, 0 or more, got {timeout!r}")
        start, pause, filling = time.monotonic(), 0.002, None
        while not isinstance(found := shared_protocol.find(name, nbytes, geometry, where), tuple):
            if found is None and filling is not None:
                raise WriterDied(f"{where}: {filling} when that file was removed: it died or gave up")
            if found is None and timeout is None:
                raise FileNotFoundError(f"{where}: there is no shared table {name!r}")
            filling, waited = found, time.monotonic() - start
            if timeout is not None and waited >= timeout:
                what = filling or f"there was no shared table {name!r}"
                raise TimeoutError(f"{where}: {what} after {waited:.1f} s (timeout={timeout})")
            time.sleep(pause if timeout is None else min(pause, timeout - waited))
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

    @property
    def digest(self) -> str | None:
        """SHA-256, in hex, of what the rows were made from, unless they were written since; None where unknown."""
        return shared_protocol.digest_of(self._fd) or None

    def rows_written(self) -> None:
        """Take the digest away, for good, where the process that published it is about to write rows."""
        if self.vouched:
            self.vouched = False
            shared_protocol.void(self._fd)

    def check(self, where: str) -> None:
        """Raise ValueError where another process cut the file short."""
        check_length(self._fd, self.path, DATA_OFFSET + self.nbytes, where)

    def close(self) -> None:
        """Unregister and let go of the file; the last process to do so removes it, unless it is kept."""
        super().close()
        self._release()
