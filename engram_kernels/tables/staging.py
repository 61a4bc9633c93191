"""Rows of a "staged" table for a GPU: gathered by CPU threads, copied there, then read by the same kernels.

For memory that no driver can hold and for mapped checkpoint files. A call needs its row ids on the CPU, which waits
for the GPU once. What it sends lies in one block of device memory, that a kernel reads like a small table:

    descriptor [4] int64 | local ids [n] int32 | rows [n, row bytes] | scales [n, scale bytes]

A local id is the number of the row in the block, or -1 for an id outside the table. The block is filled through a few
pinned buffers, called slots here, so that threads gather into one while others are being copied; a slot is written
again only after the event behind its last copy. (Slots of sequences, in serving/, are something else.)
"""

import itertools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

import numpy as np
import torch

from engram_kernels.launching.ranges import ranged

from .memory.direct import DirectRows
from .memory.host import degrade
from .placed import PlacedRows, TableDescriptor
from .view import TableView

_SLOTS, _SLOT_BYTES = 4, 4 << 20  # 15,000 V4.1 rows a slot: the copy of one takes 80 us at 52 GB/s, its start 10
_ALIGNED = 256  # ids, rows and scales of a block start at multiples of so many bytes
_MAX_THREADS = 16
# Handing rows to a thread takes 30 us here, and one thread copies 1,000 rows of 256 B in that time; a page that has to
# come from a file is worth a thread of its own.
_ROWS_PER_TASK, _FILE_ROWS_PER_TASK = 1024, 4


class StreamRuntime:
    """Memory and copies on a GPU, which run on a side stream. Tests put a runtime of their own here."""

    def __init__(self, device: torch.device):
        self._device = device
        self._side = torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory that copies can leave from while the CPU goes on."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def block(self, nbytes: int) -> torch.Tensor:
        """Device memory of the current stream, for the side stream to write to after what that stream does now."""
        block = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        return block

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def event(self):
        """Something whose ``synchronize()`` waits for the copies so far; ``query()`` is whether they are done."""
        return self._side.record_event()

    def finish(self) -> None:
        """Let the current stream wait for the copies. The block's memory is the current stream's, and so stays safe."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)


class StagingRing:
    """Pinned buffers, used in turn, for the rows of one table that one device reads."""

    def __init__(self, runtime, *, slots: int = _SLOTS, slot_bytes: int = _SLOT_BYTES, threads: int | None = None):
        self._runtime = runtime
        self._threads = threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        try:
            memory = runtime.pinned(slots * slot_bytes)
        except RuntimeError as error:
            degrade([], f"staging without pinned memory, whose copies the CPU waits for ({str(error).splitlines()[0]})")
            memory = torch.empty(slots * slot_bytes, dtype=torch.uint8, device="cpu")
        self._slots = list(memory.view(slots, slot_bytes))
        self._events: list = [None] * slots
        self._next = 0
        #: Fetches so far, their rows, bytes that they copied, and waits for a slot whose last copy was under way.
        self.calls = self.rows = self.bytes = self.waits = 0

    def fetch(
        self,
        sources: Sequence[np.ndarray | DirectRows],
        ids: np.ndarray,
        num_rows: int,
        scale_bits: int,
        rows_per_task: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(descriptor ``[1, 4]``, local ids ``[n]``) on the device for ids ``[n]`` of sources ``[num_rows, bytes]``."""
        n = len(ids)
        inside = (ids >= 0) & (ids < num_rows)
        local = np.where(inside, np.arange(n, dtype=np.int32), np.int32(-1)).view(np.uint8).reshape(n, 4)
        widths = [4, *(source.shape[1] for source in sources)]
        starts, total = _layout(widths, n)
        # Rows that fit in a slot together with their ids and scales, whatever their alignment takes.
        capacity = (self._slots[0].numel() - _ALIGNED * (1 + len(widths))) // sum(widths)
        if capacity < 1:
            raise ValueError(f"StagingRing: a slot must hold a row of {sum(widths)} bytes, got {len(self._slots[0])}")
        with self._lock, ExitStack() as stack:
            self.calls += 1
            self.rows += n
            self.bytes += total
            block = self._runtime.block(total)
            stack.callback(self._runtime.finish)  # where a gather raises too: the block may be given out again
            addresses = [block.data_ptr() + start for start in starts[1:]] + [0]
            descriptor = np.array(TableDescriptor(*addresses[:2], n, scale_bits), dtype=np.int64).view(np.uint8)
            for begin in range(0, n, capacity):
                index, slot = self._free_slot()
                count = min(n - begin, capacity)
                slot_starts, used = _layout(widths, count)
                areas = [slot.numpy()[at:][: count * width] for at, width in zip(slot_starts, widths, strict=True)]
                try:
                    slot.numpy()[: len(descriptor)] = descriptor
                    areas[0][:] = local[begin : begin + count].reshape(-1)
                    self._gather(sources, ids[begin : begin + count], areas[1:], rows_per_task)
                    if count == n:  # slot and block are laid out alike
                        self._runtime.copy(block, slot[:used])
                    else:
                        self._runtime.copy(block[:_ALIGNED], slot[:_ALIGNED])
                        for start, at, width in zip(starts, slot_starts, widths, strict=True):
                            target = block[start + begin * width :][: count * width]
                            self._runtime.copy(target, slot[at:][: count * width])
                finally:
                    self._events[index] = self._runtime.event()
        return block[:32].view(torch.int64).view(1, 4), block[starts[0] :][: 4 * n].view(torch.int32)

    def close(self) -> None:
        """Wait for the copies and let the threads go."""
        with self._lock:
            for event in self._events:
                if event is not None:
                    event.synchronize()
            if self._executor is not None:
                self._executor.shutdown()
            self._executor, self._slots = None, []

    def _free_slot(self) -> tuple[int, torch.Tensor]:
        index = self._next
        self._next = (index + 1) % len(self._slots)
        if self._events[index] is not None:
            self.waits += not self._events[index].query()
            self._events[index].synchronize()
        return index, self._slots[index]

    def _gather(self, sources, ids: np.ndarray, targets, rows_per_task: int) -> None:
        """Rows ``ids`` of each source into its target. An id outside takes any row, which its local id then hides."""
        pairs = []
        for source, target in zip(sources, targets, strict=True):
            rows = target.reshape(-1, source.shape[1])
            if isinstance(source, DirectRows):  # whose reads are under way together without threads
                source.gather(ids.clip(0, source.shape[0] - 1), rows)
            else:
                pairs.append((source, rows))

        def gather(first: int, end: int) -> None:
            for source, target in pairs:
                np.take(source, ids[first:end], axis=0, out=target[first:end], mode="clip")

        tasks = min(self._threads, len(ids) // rows_per_task)
        if tasks < 2:
            gather(0, len(ids))
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="engram-staging")
        edges = [len(ids) * task // tasks for task in range(tasks + 1)]
        futures = [self._executor.submit(gather, *span) for span in itertools.pairwise(edges)]
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)  # whatever came up, no thread writes to the slot after this


def stage(
    table: PlacedRows, row_ids: torch.Tensor, where: str, host_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, TableView]:
    """Local ids of the shape of ``row_ids``, and the view of the block that has their rows; launch with both at once.

    host_ids: the same ids on the CPU, where the caller has them; else this waits for the GPU to bring them.
    """
    if host_ids is None:
        check_stageable(where)
        host_ids = row_ids.cpu()
    ids = host_ids.reshape(-1).numpy()
    if table.direct is None:
        table.prefetch(host_ids)
    sources: list[np.ndarray | DirectRows] = [table.direct or table.weight.view(torch.uint8).numpy()]
    if table.format.group:
        sources.append(table.scale.numpy())
    ring = table.rings.get(row_ids.device)
    if ring is None:
        ring = table.rings.setdefault(row_ids.device, StagingRing(StreamRuntime(row_ids.device)))
    rows_per_task = _FILE_ROWS_PER_TASK if table.files and not table.direct else _ROWS_PER_TASK
    fetch = ranged("stage", ring.fetch)
    descriptor, local = fetch(sources, ids, table.rows, table.descriptor.scale_bits, rows_per_task)
    return local.view(row_ids.shape), TableView(descriptor, table.format.name, table.width, "device")


def check_stageable(where: str) -> None:
    """Raise ValueError where a staged table cannot be read: nothing of its work is on the GPU."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            f"{where}: placement 'staged' reads row ids on the CPU, which no CUDA graph and no torch.compile can hold; "
            "call it outside, or use placement 'host' or 'shared'"
        )


def _layout(widths: list[int], n: int) -> tuple[list[int], int]:
    """Where behind the descriptor the local ids, rows and scales of ``n`` rows begin, and the bytes of all.

    widths: bytes of one local id, one row, and one row's scales where there are some.
    """
    starts, end = [], _ALIGNED
    for width in widths:
        starts.append(end)
        end = -(-(end + n * width) // _ALIGNED) * _ALIGNED
    return starts, end
