"""What the machine can do at best, measured in the same run as the cases that are compared with it.

    device_copy   bytes read and written by a copy within device memory
    zero_copy     bytes read in address order from registered host memory by a kernel
    copy_engine   bytes copied from the same memory by the driver
    empty         time of a kernel that does nothing, between the same events as every case
    round_trip    time of one read from host memory that depends on the one before

Rates are the best over programs, load widths and tile sizes; each combination is kept in the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.host_memory import HostMapping, RuntimeDriver

PROGRAMS = (1, 2, 4, 8, 16, 32, 64, 132)
WIDTHS = (4, 8, 16)  # bytes of one load
TILES = (2048, 8192, 16_384)  # bytes that a program reads at once
_WARPS = 4
_WORDS = 1 << 25  # int32 words of the largest copy over the link: 128 MiB
_DEVICE_WORDS = 1 << 28  # of the copy within device memory: 1 GiB, so that a launch is below 1 % of its time
_CHASE_BYTES, _CHASE_STEPS, _LINE = 64 << 20, 256, 128


@dataclass(frozen=True)
class CopyShape:
    """Programs, bytes of a load and bytes of a tile of :func:`linear_copy_kernel`."""

    programs: int
    width: int
    tile: int


@triton.jit(do_not_specialize=["source", "target", "num_words"])
def linear_copy_kernel(source, target, num_words, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Copies int32 words from address ``source`` to ``target``, TILE words at a time, in loads of WIDTH bytes.

    Persistent grid: program p takes tiles p, p + programs, and so on. Relies on addresses that are multiples
    of 16 and on fewer than 2^31 words.
    """
    source_ptr = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int32)), WIDTH)
    target_ptr = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.int32)), WIDTH)
    for tile in range(tl.program_id(0), tl.cdiv(num_words, TILE), tl.num_programs(0)):
        offs = tile * TILE + tl.arange(0, TILE)
        mask = offs < num_words
        # The mask must not split a load: words come in groups of four, and the tile starts at one.
        mask = tl.max_constancy(mask, 4)
        word = tl.load(source_ptr + offs, mask=mask, other=0)
        tl.store(target_ptr + offs, word, mask=mask)


@triton.jit(do_not_specialize=["source", "first", "steps"])
def chase_kernel(source, first, steps, out_ptr):
    """Follows ``steps`` links from entry ``first``: each read of an int64 tells where the next one is.

    Grid (1,). Relies on a list of links that never leaves its memory.
    """
    source_ptr = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int64)), 8)
    entry = first.to(tl.int64)
    for _ in range(steps):
        entry = tl.load(source_ptr + entry)
    tl.store(out_ptr, entry)


@triton.jit
def empty_kernel(out_ptr):
    """Nothing. Grid (1,)."""


def launch_copy(source: int, target: int, num_words: int, shape: CopyShape) -> None:
    """One launch; addresses of memory that the device can read and write, ``num_words`` a multiple of four."""
    linear_copy_kernel[(shape.programs,)](
        source,
        target,
        num_words,
        WIDTH=shape.width,
        TILE=shape.tile // 4,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def launch_chase(source: int, first: int, steps: int, out: torch.Tensor) -> None:
    chase_kernel[(1,)](source, first, steps, out, num_warps=1, enable_fp_fusion=True)


def launch_empty(out: torch.Tensor) -> None:
    empty_kernel[(1,)](out, num_warps=1, enable_fp_fusion=True)


def copy_shapes(full: bool) -> Iterator[CopyShape]:
    """All combinations; without ``full`` narrow loads only on the grids that fill the link."""
    for programs in PROGRAMS:
        for width in WIDTHS:
            for tile in TILES:
                if full or width == 16 or programs >= 32:
                    yield CopyShape(programs, width, tile)


def links(num_bytes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A cycle through every line of ``num_bytes``: int64 words for that memory, and their places in its order."""
    stride = _LINE // 8
    order = torch.randperm(num_bytes // _LINE, generator=generator) * stride
    words = torch.zeros(num_bytes // 8, dtype=torch.int64)
    words[order] = order.roll(-1)
    return words, order


def measure_roofs(
    timer,
    device: torch.device,
    host: torch.Tensor,
    full: bool = False,
    words: int = _WORDS,
    device_words: int = _DEVICE_WORDS,
) -> dict:
    """Every roof. ``host``: bytes of registered host memory, ideally of the table that is read later.

    Rates in bytes per second, times in seconds; ``sweep`` lists what every combination of the kernel reached.
    """
    words = min(words, host.numel() // 4 // 4 * 4)
    target = torch.empty(words, dtype=torch.int32, device=device)
    roofs = {"host_bytes": host.numel(), "copy_bytes": 4 * words}
    roofs["empty"] = timer.measure([lambda: launch_empty(target)]).median
    roofs["round_trip"] = _round_trip(timer, device)
    roofs["copy_engine"] = _best_copy(timer, target, _parts(host, 4 * words))
    sweep = []
    for shape in copy_shapes(full):
        # A few programs read little at a time: less is enough, and takes no longer.
        count = min(words, max(4, words * shape.programs // 16 // 4 * 4))
        sources = [part.data_ptr() for part in _parts(host, 4 * count)]
        calls = [lambda at=at, n=count, s=shape: launch_copy(at, target.data_ptr(), n, s) for at in sources]
        sweep.append(
            dict(programs=shape.programs, width=shape.width, tile=shape.tile, rate=4 * count / _median(timer, calls))
        )
    roofs["sweep"], roofs["zero_copy"] = sweep, max(entry["rate"] for entry in sweep)
    roofs["device_copy"] = _device_copy(timer, device, device_words)
    return roofs


def _parts(host: torch.Tensor, num_bytes: int, most: int = 4) -> list[torch.Tensor]:
    """Up to ``most`` stretches of ``num_bytes``, spread over all of the host memory, none across two registrations."""
    stretches = max(1, host.numel() // num_bytes)
    step = max(1, stretches // most)
    return [host[index * num_bytes :][:num_bytes] for index in range(0, stretches, step)][:most]


def _median(timer, calls: Sequence) -> float:
    return timer.measure(calls).median


def _best_copy(timer, target: torch.Tensor, sources: list[torch.Tensor]) -> float:
    """Bytes per second of the copy engine from host memory."""
    view = target.view(torch.uint8)[: sources[0].numel()]
    calls = [lambda source=source: view.copy_(source, non_blocking=True) for source in sources]
    return view.numel() / _median(timer, calls)


def _device_copy(timer, device: torch.device, words: int) -> float:
    """Bytes read and written per second, by the framework's copy or by the kernel, whichever is faster."""
    source, target = torch.zeros(2, words, dtype=torch.int32, device=device)
    nbytes = 2 * 4 * words
    times = [_median(timer, [lambda: target.copy_(source)])]
    processors = 2
    if target.is_cuda:
        processors = torch.cuda.get_device_properties(target.device).multi_processor_count
    for per_processor in (4, 8, 16):
        for tile in (8192, 16_384):
            shape = CopyShape(processors * per_processor, 16, tile)
            call = [lambda s=shape: launch_copy(source.data_ptr(), target.data_ptr(), target.numel(), s)]
            times.append(_median(timer, call))
    return nbytes / min(times)


def _round_trip(timer, device: torch.device, nbytes: int = _CHASE_BYTES, steps: int = _CHASE_STEPS) -> float:
    """Seconds of one dependent read; what a launch costs cancels between chases of two lengths."""
    mapping = HostMapping(nbytes, RuntimeDriver() if device.type == "cuda" else None)
    try:
        words, order = links(nbytes, torch.Generator().manual_seed(20260112))
        source = mapping.bytes.view(torch.int64)
        source.copy_(words)
        out = torch.empty(1, dtype=torch.int64, device=device)
        starts = order[:: 2 * steps][:64].tolist()

        def seconds(count: int) -> float:
            calls = [lambda at=at: launch_chase(source.data_ptr(), at, count, out) for at in starts]
            return _median(timer, calls)

        return (seconds(2 * steps) - seconds(steps)) / steps
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        mapping.close()
