"""Reads from host memory over how much of it is read and in which pages: what address translation costs.

A footprint is a stretch of registered memory that is read from end to end by the fastest shapes of the roofs' kernel,
and then chased through at random. Huge pages are those that a table asks for; small ones are the kernel's own 4 KiB.
The default covers the table itself and 4 GiB of small pages; the full run most of the host's free memory, twice.
"""

import mmap
from collections.abc import Sequence
from functools import partial

import torch

from engram_kernels.tables.memory.host import HostMapping, RuntimeDriver

from .environment import huge_share
from .roofs import COPY_BYTES, TILES, CopyShape, best_shapes, launch_copy, measure_roofs, round_trip, sweep_shapes
from .timing import Budget

GIB = 1 << 30
SMALLEST, FIRST = 64 << 20, GIB
SMALL_PAGES_DEFAULT = 4 * GIB
#: Seconds that a mapping of a GiB may take to be faulted in, zeroed and registered, before one has been made.
SLOWEST_MAPPING = 2.0
_CHUNK = 64 * GIB  # bytes per registration: larger ones fail on some drivers


class SmallPages:
    """A mapping of ``nbytes`` in pages that the kernel must not merge into huge ones, registered with the driver."""

    def __init__(self, nbytes: int, driver):
        self._driver, self._registered = driver, []
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:  # a kernel without huge pages has small ones anyway
            pass
        self.bytes: torch.Tensor | None = torch.frombuffer(memory, dtype=torch.uint8)
        address = self.bytes.data_ptr()
        for start in range(0, nbytes, _CHUNK) if driver is not None else ():
            error = driver.register(address + start, min(_CHUNK, nbytes - start))
            if error is not None:
                self.close()
                raise RuntimeError(f"the driver refused to register {nbytes:,} bytes of small pages: {error}")
            self._registered.append(address + start)

    def close(self) -> None:
        """Unregister; the memory goes with the last tensor that views it. A GPU must be done with it."""
        for address in self._registered:
            self._driver.unregister(address)
        self._registered, self.bytes = [], None


def sizes(most: int, full: bool) -> list[int]:
    """Footprints up to ``most`` bytes: 64 MiB, then from 1 GiB by factors of four (full: two), then ``most`` itself."""
    found, size = [SMALLEST] if most > SMALLEST else [], FIRST
    while size < most:
        found.append(size)
        size *= 2 if full else 4
    return [*found, most // max(TILES) * max(TILES)]


def measure_footprints(
    timer, memory: torch.Tensor, pages: str, target: torch.Tensor, shapes: Sequence[CopyShape], full: bool
) -> list[dict]:
    """Linear rate (bytes per second) and round trip (seconds) of each footprint that ``memory`` starts with.

    target: device memory for what is read; a power of two of bytes.
    """
    share, found = huge_share(memory.data_ptr()), []
    for nbytes in sizes(memory.numel(), full):
        part = memory[:nbytes]
        read = partial(launch_copy, part.data_ptr(), target.data_ptr(), nbytes, target_bytes=target.numel())
        linear = nbytes / min(timer.measure([partial(read, shape=shape)]).median for shape in shapes)
        entry = dict(bytes=nbytes, pages=pages, huge_share=share, linear=linear)
        found.append(entry | dict(round_trip=round_trip(timer, part, target.device)))
    return found


def all_roofs(
    timer, device: torch.device, table: torch.Tensor, full: bool, wide: list[dict], budget: Budget, say, **sizes: int
) -> dict:
    """The roofs over the table's memory, and footprints: those of ``wide``, or of the table where it is empty.

    The zero-copy roof is the fastest linear read of huge pages in either.
    """
    roofs = measure_roofs(timer, device, table, full, **sizes)
    roofs["footprints"] = wide or table_footprints(timer, device, table, roofs, budget, say)
    huge = [entry["linear"] for entry in roofs["footprints"] if entry["pages"] == "huge"]
    roofs["zero_copy"] = max([roofs["zero_copy"], *huge])
    return roofs


def table_footprints(
    timer, device: torch.device, table: torch.Tensor, roofs: dict, budget: Budget, say, copy_bytes: int = COPY_BYTES
) -> list[dict]:
    """The default: the table that is there, and a few GiB of small pages where ``budget`` has time for them."""
    target = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    shapes = best_shapes(roofs["sweep"], 1)
    found = measure_footprints(timer, table, "huge", target, shapes, False)
    nbytes = min(SMALL_PAGES_DEFAULT, table.numel())
    if budget.left() < SLOWEST_MAPPING * nbytes / GIB:
        say("footprints of small pages are left out for time")
        return found
    return found + _mapped(timer, nbytes, "small", target, shapes, False, say)


def wide_footprints(timer, device: torch.device, nbytes: int, say, copy_bytes: int = COPY_BYTES) -> list[dict]:
    """The full run: ``nbytes`` of host memory, in huge and then in small pages, before any table is made."""
    target = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    return [entry for pages in ("huge", "small") for entry in _mapped(timer, nbytes, pages, target, None, True, say)]


def _mapped(timer, nbytes: int, pages: str, target, shapes, full: bool, say) -> list[dict]:
    """Footprints of memory that is mapped for this alone; none, and a line, where it cannot be had."""
    say(f"footprints: {nbytes / GIB:.1f} GiB in {pages} pages")
    driver = RuntimeDriver() if target.is_cuda else None
    mapping = memory = None
    try:
        mapping = HostMapping(nbytes, driver) if pages == "huge" else SmallPages(nbytes, driver)
        memory = mapping.bytes
        if shapes is None:
            shapes = best_shapes(sweep_shapes(timer, memory, target, full), 4)
        return measure_footprints(timer, memory, pages, target, shapes, full)
    except (OSError, RuntimeError) as error:
        say(f"footprints of {pages} pages are left out: {' '.join(str(error).split())}")
        return []
    finally:
        memory = None
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        if mapping is not None:
            mapping.close()
