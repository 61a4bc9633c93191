"""Rows of a file, read as they are asked for, with a bound on the memory that they take.

A mapped file is read through the page cache, which takes all memory that is free and gives it back when it likes. Here
a gather sorts what it was asked for, finds what it has in a cache of rows, and reads the pages of the rest past the
page cache, many at once and in the order of the file. The cache's policy is that of the n-gram cache
(reference/cache/simulator.py), with row ids for n-grams.
"""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
#: What DirectRows counts: rows asked for, distinct ones of each gather, of these found in the cache, pages read, and
#: rows read ahead of their gather.
COUNTS = ("rows", "distinct", "hits", "pages", "prefetched")


class Part(NamedTuple):
    """Rows that follow each other in one file."""

    file: MappedFile
    offset: int  #: of the first, in bytes
    rows: int


class DirectRows:
    """Rows ``[rows, row_bytes]``, parts of them in a file each; any number of threads, one at a time.

    nbytes: of memory, that the buffer, a gather's own arrays and the cache take together, at least LEAST.
    ValueError where a file shrinks, OSError where the disk fails.

    Pages have numbers, by which those of one part follow those of another: ``_pages [P + 1]`` has each part's first,
    and ``_begin [P]`` the byte, counted from page 0, where row 0 would lie if the part began with it.
    """

    def __init__(self, parts: Sequence[Part], row_bytes: int, nbytes: int):
        self._parts, self._row_bytes = parts, row_bytes
        self.files = list(dict.fromkeys(part.file for part in parts))
        rows, offsets = (np.array([getattr(part, name) for part in parts]) for name in ("rows", "offset"))
        spans = (offsets + rows * row_bytes - 1) // PAGE - offsets // PAGE + 1
        self._rows, self._pages = (np.concatenate([[0], each.cumsum()]) for each in (rows, spans))
        self._begin = self._pages[:-1] * PAGE + offsets % PAGE - self._rows[:-1] * row_bytes
        #: Bytes from a page's place among all to its place in the file, and where each part ends there.
        self._shift, self._end = offsets // PAGE * PAGE - self._pages[:-1] * PAGE, offsets + rows * row_bytes
        self.shape = int(self._rows[-1]), row_bytes
        self._most_pages = 1 + -(-(row_bytes - 1) // PAGE)  # of a row, wherever it begins
        self._lock = threading.Lock()
        self._process = 0
        self.rows = self.distinct = self.hits = self.pages = self.prefetched = 0
        self._most_ids = _WORK // (2 * row_bytes + 256)
        room = nbytes - _BUFFER_PAGES * PAGE - _WORK
        # With two ways for each row of the table hardly any set is full.
        sets = min(max(1, room // (WAYS * (row_bytes + TAG_BYTES + 1))), -(-2 * self.shape[0] // WAYS))
        self._cache = CacheSimulator(1, sets, WAYS)
        self._kept = _small_pages(sets * WAYS, row_bytes)
        #: Of these, which were read ahead and not asked for since.
        self._ahead = np.zeros(sets * WAYS, dtype=bool)
        #: The process that reads ahead, and its thread.
        self._reading_ahead: tuple[int, Any] = (0, None)
        self.cached_rows = len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes in the end."""
        return _BUFFER_PAGES * PAGE + _WORK + self.cached_rows * (self._row_bytes + TAG_BYTES + 1)

    def gather(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows ``ids [n]``, each ``0 <= id < rows``, into ``out [n, row_bytes]``, uint8."""
        for begin in range(0, len(ids), self._most_ids):
            some = slice(begin, begin + self._most_ids)
            distinct, occurrences = np.unique(ids[some], return_inverse=True)
            rows = self._locked(distinct)
            self.rows += len(occurrences)
            np.take(rows, occurrences, axis=0, out=out[some], mode="clip")

    def prefetch(self, ids: np.ndarray) -> None:
        """Begin to read rows ``ids [n]``, each ``0 <= id < rows``, into the cache, as far as that holds them.

        An error is left to the gather that reads again.
        """
        process, thread = self._reading_ahead
        if process != os.getpid():  # a thread does not survive a fork
            thread = ThreadPoolExecutor(1, "engram_prefetch")
            self._reading_ahead = os.getpid(), thread
        thread.submit(self._fill, np.unique(ids))

    def _fill(self, ids: np.ndarray) -> None:
        for begin in range(0, len(ids), self._most_ids):
            self._locked(ids[begin : begin + self._most_ids], ahead=True)

    def _locked(self, ids: np.ndarray, ahead: bool = False) -> np.ndarray:
        """Rows of distinct, ascending ids."""
        with self._lock:
            self._check_process()
            try:
                return self._distinct_rows(ids, ahead)
            except BaseException:
                self._cache.stamps[:] = 0  # empty: an interrupt may have come between a key and its row
                raise

    def close(self) -> None:
        """Let the queue, its threads and the cache go."""
        process, thread = self._reading_ahead
        if process == os.getpid():
            thread.shutdown(cancel_futures=True)
        with self._lock:
            if self._process == os.getpid():
                self._reader.close()
                for file in self._opened:
                    file.close()
            self._process, self._kept = 0, np.empty((0, self._row_bytes), dtype=np.uint8)

    def _check_process(self) -> None:
        """Open files and a queue of this process's own: a fork shares its parent's, and may not use them."""
        if self._process == os.getpid():
            return
        opened = {file: file.reopened() for file in self.files}
        self._opened = [file for file, _ in opened.values()]
        self._fds = np.array([opened[part.file][0].fileno() for part in self._parts])
        self._direct = all(direct for _, direct in opened.values())
        self._reader = reader()
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER_PAGES * PAGE), dtype=np.uint8)
        self._every_start = np.lib.stride_tricks.sliding_window_view(self._buffer, self._row_bytes)
        self._process = os.getpid()

    def _distinct_rows(self, ids: np.ndarray, ahead: bool) -> np.ndarray:
        """Rows of distinct, ascending ids. ahead: of what is found in the cache none, and nothing counts as asked."""
        rows = np.empty((len(ids), self._row_bytes), dtype=np.uint8)
        keys = scramble(ids)
        order = np.argsort(keys)
        self._cache.clock += len(ids)
        slots = np.empty(len(ids), dtype=np.int64)
        slots[order] = self._cache.find(0, keys[order])
        found, missed = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        if ahead:
            self.prefetched += len(missed)
        else:
            self.distinct += len(ids)
            self.hits += len(found)
        ascending = order[slots[order] < 0]
        kept = np.empty(0, dtype=np.int64)

        def meanwhile() -> None:
            nonlocal kept
            if len(found) and not ahead:
                rows[found] = self._kept[slots[found]]
                # What was read ahead is asked for once now, as what is read when it is asked for.
                once = slots[found][self._ahead[slots[found]]]
                self._cache.stamps.reshape(-1)[once] = self._cache.clock - self._cache.lag
                self._ahead[once] = False
            kept = self._cache.keep(0, keys[ascending])

        # Rows whose pages fit half of the buffer, whatever they share; those in the other half are copied meanwhile.
        most, work = _BUFFER_PAGES // 2 // self._most_pages, meanwhile
        for number, begin in enumerate(range(0, len(missed), most)):
            places = missed[begin : begin + most]
            work = self._read(ids[places], rows, places, number % 2, work)
        work()
        ascending, kept = ascending[kept >= 0], kept[kept >= 0]
        self._kept[kept], self._ahead[kept] = rows[ascending], ahead
        return rows

    def _read(
        self, ids: np.ndarray, rows: np.ndarray, places: np.ndarray, half: int, meanwhile: Callable[[], None]
    ) -> Callable[[], None]:
        """Read the pages of ascending ids into half of the buffer; what is returned copies them to ``rows[places]``.

        meanwhile: called while the first are under way.
        """
        parts = np.searchsorted(self._rows, ids, side="right") - 1 if len(self._parts) > 1 else 0
        begin = self._begin[parts] + ids * self._row_bytes
        first = begin // PAGE
        last = (begin + self._row_bytes - 1) // PAGE
        pages = np.unique(np.minimum(first[:, None] + np.arange(self._most_pages), last[:, None]))
        parts = np.searchsorted(self._pages, pages, side="right") - 1 if len(self._parts) > 1 else np.zeros_like(pages)
        offsets = pages * PAGE + self._shift[parts]
        base = half * (_BUFFER_PAGES // 2) * PAGE
        at = base + np.arange(len(pages)) * PAGE
        results = self._reader.read(self._fds[parts], offsets, self._buffer, at, PAGE, meanwhile)
        self._check(results, parts, offsets)
        self.pages += len(pages)
        if not self._direct:  # what the page cache had to keep
            for file in self._opened:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def copy() -> None:
            # Pages of one row follow each other in the buffer as in the file.
            rows[places] = self._every_start[base + np.searchsorted(pages, first) * PAGE + begin % PAGE]

        return copy

    def _check(self, results: np.ndarray, parts: np.ndarray, offsets: np.ndarray) -> None:
        """Raise OSError where a read failed, ValueError where the file ended."""
        short = np.flatnonzero(results < np.minimum(PAGE, self._end[parts] - offsets))
        if len(short):
            file, result, offset = self._parts[parts[short[0]]].file, int(results[short[0]]), int(offsets[short[0]])
            if result < 0:
                text = f"EngramTable: byte {offset:,} cannot be read: {os.strerror(-result)}"
                raise OSError(-result, text, file.path)
            file.check("EngramTable")
            raise OSError(f"EngramTable: {file.path} ended at byte {offset:,} for a read")


def _small_pages(rows: int, row_bytes: int) -> np.ndarray:
    """Memory for rows that come in no order. Huge pages would nearly all be zeroed in the first call, 1 s for 1 GiB."""
    memory = mmap.mmap(-1, rows * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8).reshape(rows, row_bytes)


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
            table.prefetch(row_ids)
        return table, row_ids
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{where}: rows are read from a file as they are asked for (memory_bytes=), which torch.compile cannot "
            "hold; call it outside"
        )
    flat = row_ids.reshape(-1).long().numpy()
    inside = np.flatnonzero((flat >= 0) & (flat < table.rows))
    ids, numbers = flat[inside], np.full(len(flat), -1)
    numbers[inside] = np.arange(len(ids))
    if not len(ids):
        ids = np.zeros(1, dtype=np.int64)
    fmt = table.format
    rows = np.empty((len(ids), fmt.row_bytes(table.width)), dtype=np.uint8)
    table.direct.gather(ids, rows)
    scale = table.scale.index_select(0, torch.from_numpy(ids)) if fmt.group else table.scale
    weight = torch.from_numpy(rows).view(fmt.dtype)
    local = LocalRows(len(ids), weight, scale, fmt, table.own_scale, table.default_out_dtype)
    return local, torch.from_numpy(numbers).view(row_ids.shape)
