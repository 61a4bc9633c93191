"""Rows of a file, read as they are asked for, with a bound on the memory that they take.

A mapped file is read through the page cache, which takes all memory that is free and gives it back when it likes. Here
a gather sorts what it was asked for, finds what it has in a cache of rows, and reads the pages of the rest past the
page cache, many at once and in the order of the file. The cache's policy is that of the n-gram cache
(reference/cache/simulator.py), with row ids for n-grams.
"""

import mmap
import os
import threading
from typing import Any, NamedTuple

import numpy as np
import torch

from engram_kernels.geometry.row_format import RowFormat
from engram_kernels.reference.cache.simulator import TAG_BYTES, WAYS, CacheSimulator, scramble

from .mapped_files import MappedFile
from .reads import reader

PAGE = 4096  # bytes of one read; drives answer no smaller ones faster
_BUFFER_PAGES = 2048
_WORK = 24 << 20  # bytes that a gather takes for the ids which it sorts and reads at once, 256 an id, and their rows
#: Bytes of memory that every table needs: the buffer, what a gather works on, and a cache of some rows.
LEAST = 64 << 20
#: What DirectRows counts: rows asked for, distinct ones of each gather, of these found in the cache, and pages read.
COUNTS = ("rows", "distinct", "hits", "pages")


class DirectRows:
    """Rows ``[rows, row_bytes]`` from byte ``offset`` of a file on; any number of threads, one at a time.

    nbytes: of memory, that the buffer, a gather's own arrays and the cache take together, at least LEAST.
    ValueError where the file shrinks, OSError where the disk fails.
    """

    def __init__(self, file: MappedFile, offset: int, rows: int, row_bytes: int, nbytes: int):
        self._file, self._offset, self._rows, self._row_bytes = file, offset, rows, row_bytes
        self.shape = rows, row_bytes
        self._most_pages = 1 + -(-(row_bytes - 1) // PAGE)  # of a row, wherever it begins
        self._lock = threading.Lock()
        self._process = 0
        self.rows = self.distinct = self.hits = self.pages = 0
        self._most_ids = _WORK // (2 * row_bytes + 256)
        room = nbytes - _BUFFER_PAGES * PAGE - _WORK
        # With two ways for each row of the table hardly any set is full.
        sets = min(max(1, room // (WAYS * (row_bytes + TAG_BYTES))), -(-2 * rows // WAYS))
        self._cache = CacheSimulator(1, sets, WAYS)
        self._kept = np.empty((sets * WAYS, row_bytes), dtype=np.uint8)
        self.cached_rows = len(self._kept)

    def gather(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows ``ids [n]``, each ``0 <= id < rows``, into ``out [n, row_bytes]``, uint8."""
        with self._lock:
            if self._process != os.getpid():  # a fork shares its parent's queue, and may not use it
                self._open()
            try:
                for begin in range(0, len(ids), self._most_ids):
                    some = slice(begin, begin + self._most_ids)
                    distinct, occurrences = np.unique(ids[some], return_inverse=True)
                    self.rows += len(ids[some])
                    np.take(self._distinct_rows(distinct), occurrences, axis=0, out=out[some])
            except BaseException:
                self._cache.stamps[:] = 0  # empty: an interrupt may have come between a key and its row
                raise

    def close(self) -> None:
        """Let the queue, its threads and the cache go."""
        with self._lock:
            if self._process == os.getpid():
                self._reader.close()
                self._opened.close()
            self._process, self._kept = 0, np.empty((0, self._row_bytes), dtype=np.uint8)

    def _open(self) -> None:
        self._opened, self._direct = self._file.reopened()
        self._reader = reader()
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER_PAGES * PAGE), dtype=np.uint8)
        self._process = os.getpid()

    def _distinct_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of distinct, ascending ids."""
        rows = np.empty((len(ids), self._row_bytes), dtype=np.uint8)
        keys = scramble(ids)
        order = np.argsort(keys)
        self._cache.clock += len(ids)
        slots = np.empty(len(ids), dtype=np.int64)
        slots[order] = self._cache.find(0, keys[order])
        found = slots >= 0
        rows[found] = self._kept[slots[found]]
        self.distinct += len(ids)
        self.hits += np.count_nonzero(found)
        if found.all():
            return rows
        missed = np.flatnonzero(~found)
        for part in self._parts(ids[missed]):
            self._read(ids[missed[part]], rows, missed[part])
        ascending = order[~found[order]]
        kept = self._cache.keep(0, keys[ascending])
        self._kept[kept[kept >= 0]] = rows[ascending[kept >= 0]]
        return rows

    def _parts(self, ids: np.ndarray):
        """Slices of ascending ids whose pages fit the buffer, whatever rows share."""
        most = _BUFFER_PAGES // self._most_pages
        return (slice(begin, begin + most) for begin in range(0, len(ids), most))

    def _read(self, ids: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Rows of ascending ids into ``rows[places]``."""
        begin = self._offset + ids * self._row_bytes
        first, last = begin // PAGE, (begin + self._row_bytes - 1) // PAGE
        pages = np.unique(np.minimum(first[:, None] + np.arange(self._most_pages), last[:, None]))
        at = np.arange(len(pages)) * PAGE
        results = self._reader.read(self._opened.fileno(), pages * PAGE, self._buffer, at, PAGE)
        self._check(pages, results)
        self.pages += len(pages)
        # Pages of one row follow each other in the buffer as in the file.
        at = np.searchsorted(pages, first) * PAGE + begin % PAGE
        every_start = np.lib.stride_tricks.sliding_window_view(self._buffer, self._row_bytes)
        rows[places] = every_start[at]
        if not self._direct:  # what the page cache had to keep
            os.posix_fadvise(self._opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _check(self, pages: np.ndarray, results: np.ndarray) -> None:
        """Raise OSError where a read failed, ValueError where the file ended."""
        failed = results < 0
        if failed.any():
            code, page = int(-results[failed][0]), int(pages[failed][0])
            text = f"EngramTable: byte {page * PAGE:,} cannot be read: {os.strerror(code)}"
            raise OSError(code, text, self._file.path)
        end = self._offset + self._rows * self._row_bytes
        short = results < np.minimum(PAGE, end - pages * PAGE)
        if short.any():
            self._file.check("EngramTable")
            raise OSError(f"EngramTable: {self._file.path} ended at byte {int(pages[short][0]) * PAGE:,} for a read")


class LocalRows(NamedTuple):
    """Some rows of a table, as the reference reads a whole one."""

    rows: int
    weight: torch.Tensor
    scale: torch.Tensor | None
    format: RowFormat
    own_scale: float | None
    default_out_dtype: torch.dtype


def rows_at_hand(table, row_ids: torch.Tensor, where: str) -> tuple[Any, torch.Tensor]:
    """What the reference is to read instead of a table whose rows lie in a file, and the ids to read there.

    That is the table itself, once the kernel has begun to read its pages, or where it has a ``direct`` the rows that
    were asked for; an id outside the table is -1 then. ValueError for these under torch.compile, which cannot hold it.
    """
    if table.direct is None:
        if table.mapped and not torch.compiler.is_compiling():
            table.read_ahead(row_ids.reshape(-1).long().numpy())
        return table, row_ids
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{where}: rows are read from a file as they are asked for (memory_bytes=), which torch.compile cannot "
            "hold; call it outside"
        )
    flat = row_ids.reshape(-1).long()
    inside = (flat >= 0) & (flat < table.rows)
    distinct, places = torch.unique(flat[inside], return_inverse=True)
    if not len(distinct):
        distinct = torch.zeros(1, dtype=torch.int64)
    fmt = table.format
    rows = torch.empty(len(distinct), fmt.row_bytes(table.width), dtype=torch.uint8)
    table.direct.gather(distinct.numpy(), rows.numpy())
    scale = table.scale[distinct] if fmt.group else table.scale
    numbers = torch.full_like(flat, -1)
    numbers[inside] = places
    local = LocalRows(len(distinct), rows.view(fmt.dtype), scale, fmt, table.own_scale, table.default_out_dtype)
    return local, numbers.view(row_ids.shape)
