"""What the machine can do at best, measured in the same run as the cases that are compared with it.

    device_copy   bytes read and written by a copy within device memory
    zero_copy     bytes read in address order from registered host memory by a kernel
    copy_engine   bytes copied from the same memory by the driver
    empty         time of a kernel that does nothing, between the same events as every case
    round_trip    time of one read from the table that depends on the one before, at random over all of it

Rates are the best over programs, load widths and tile sizes; each combination is kept in the result. What changes with
the memory's extent and its pages is in footprints.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PROGRAMS = (1, 2, 4, 8, 16, 32, 64, 132)
WIDTHS = (4, 8, 16)  # bytes of one load
TILES = (2048, 8192, 16_384)  # bytes that a program reads at once
LINE = 128  # bytes of a request over the link
_WARPS = 4
COPY_BYTES = 128 << 20  # of the largest copy over the link
_DEVICE_BYTES = 1 << 30  # of the copy within device memory, so that a launch is below 1 % of its time
CHASE_STEPS = 256


@dataclass(frozen=True)
class CopyShape:
    """Programs, bytes of a load and bytes of a tile of :func:`linear_copy_kernel`."""

    programs: int
    width: int
    tile: int


@triton.jit(do_not_specialize=["source", "target", "num_tiles", "place_mask"])
def linear_copy_kernel(source, target, num_tiles, place_mask, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Copies tiles of TILE int32 words from address ``source`` to ``target``, in loads of WIDTH bytes.

    Persistent grid: program p takes tiles p, p + programs, and so on. Tile t goes to place ``t & place_mask``, so that
    a small target takes any number of them. Relies on addresses that are multiples of 16.
    """
    source_ptr = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int32)), WIDTH)
    target_ptr = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.int32)), WIDTH)
    offs = tl.arange(0, TILE)
    # int64 from the start: a table has more than 2^31 words.
    for tile in range(tl.program_id(0).to(tl.int64), num_tiles, tl.num_programs(0)):
        word = tl.load(source_ptr + tile * TILE + offs)
        tl.store(target_ptr + (tile & place_mask) * TILE + offs, word)


@triton.jit(do_not_specialize=["source", "num_lines", "seed", "steps"])
def chase_kernel(source, num_lines, seed, steps, out_ptr):
    """Reads ``steps`` lines of 128 bytes in turn: the word read last, and a key of its own, say which comes next.

    Grid (1,). Relies on fewer than 2^31 lines; what they hold is free, since the key alone spreads over all of them.
    """
    source_ptr = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.uint32)), 4)
    num_lines = num_lines.to(tl.uint32)
    key = seed.to(tl.uint32)
    word = key ^ key
    for _ in range(steps):
        # Between two reads only these three instructions wait: about 10 ns. The key is computed meanwhile.
        line = tl.umulhi(word ^ key, num_lines)
        word = tl.load(source_ptr + line.to(tl.int64) * 32)
        key = key * 1664525 + 1013904223
    tl.store(out_ptr, word)


@triton.jit
def empty_kernel(out_ptr):
    """Nothing. Grid (1,)."""


def launch_copy(source: int, target: int, nbytes: int, shape: CopyShape, target_bytes: int | None = None) -> None:
    """One launch over addresses that the device can read and write; ``nbytes`` is a multiple of the tile.

    target_bytes: size of a target that is smaller than that, a power of two times the tile.
    """
    linear_copy_kernel[(shape.programs,)](
        source,
        target,
        nbytes // shape.tile,
        -1 if target_bytes is None else target_bytes // shape.tile - 1,
        WIDTH=shape.width,
        TILE=shape.tile // 4,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def launch_chase(source: int, nbytes: int, seed: int, steps: int, out: torch.Tensor) -> None:
    """One launch over ``nbytes`` from address ``source``; the last word read goes to ``out``, one int32."""
    num_lines = min(nbytes // LINE, 2**31 - 1)
    chase_kernel[(1,)](source, num_lines, seed, steps, out, num_warps=1, enable_fp_fusion=True)


def launch_empty(out: torch.Tensor) -> None:
    empty_kernel[(1,)](out, num_warps=1, enable_fp_fusion=True)


def copy_shapes(full: bool) -> Iterator[CopyShape]:
    """All combinations; without ``full`` narrow loads only on the grids that fill the link."""
    for programs in PROGRAMS:
        for width in WIDTHS:
            for tile in TILES:
                if full or width == 16 or programs >= 32:
                    yield CopyShape(programs, width, tile)


def measure_roofs(
    timer,
    device: torch.device,
    host: torch.Tensor,
    full: bool = False,
    copy_bytes: int = COPY_BYTES,
    device_bytes: int = _DEVICE_BYTES,
) -> dict:
    """Every roof. ``host``: bytes of registered host memory, those of the table that is read later.

    Rates in bytes per second, times in seconds; ``sweep`` lists what every combination of the kernel reached.
    """
    copy_bytes = min(copy_bytes, host.numel()) // max(TILES) * max(TILES)
    target = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    roofs: dict = {"host_bytes": host.numel(), "copy_bytes": copy_bytes}
    roofs["empty"] = _median(timer, [lambda: launch_empty(target)])
    roofs["round_trip"] = round_trip(timer, host, device)
    roofs["copy_engine"] = _best_copy(timer, target, parts(host, copy_bytes))
    roofs["sweep"] = sweep_shapes(timer, host, target, full)
    roofs["zero_copy"] = max(entry["rate"] for entry in roofs["sweep"])
    roofs["device_copy"] = _device_copy(timer, device, device_bytes)
    return roofs


def sweep_shapes(timer, host: torch.Tensor, target: torch.Tensor, full: bool) -> list[dict]:
    """Bytes per second of a linear read by every shape, from up to four stretches of ``host`` in turn."""
    sweep = []
    for shape in copy_shapes(full):
        # A few programs read little at a time: less is enough, and takes no longer.
        nbytes = max(1, min(target.numel(), target.numel() * shape.programs // 16) // shape.tile) * shape.tile
        sources = [part.data_ptr() for part in parts(host, nbytes)]
        calls = [lambda at=at, n=nbytes, s=shape: launch_copy(at, target.data_ptr(), n, s) for at in sources]
        sweep.append({**vars(shape), "rate": nbytes / _median(timer, calls)})
    return sweep


def best_shapes(sweep: list[dict], count: int) -> list[CopyShape]:
    """The fastest of a sweep."""
    ranked = sorted(sweep, key=lambda entry: -entry["rate"])
    return [CopyShape(entry["programs"], entry["width"], entry["tile"]) for entry in ranked[:count]]


def parts(host: torch.Tensor, num_bytes: int, most: int = 4) -> list[torch.Tensor]:
    """Up to ``most`` stretches of ``num_bytes``, spread over all of the host memory, none across two registrations."""
    stretches = max(1, host.numel() // num_bytes)
    step = max(1, stretches // most)
    return [host[index * num_bytes :][:num_bytes] for index in range(0, stretches, step)][:most]


def round_trip(timer, memory: torch.Tensor, device: torch.device) -> float:
    """Seconds of one dependent read anywhere in ``memory``; a launch cancels between chases of two lengths."""
    out = torch.empty(1, dtype=torch.int32, device=device)
    source, nbytes = memory.data_ptr(), memory.numel()

    def seconds(count: int) -> float:
        # Other lines in every sample: none that a cache or the translation has seen in the one before.
        calls = [lambda seed=seed: launch_chase(source, nbytes, 2_654_435 * seed, count, out) for seed in range(64)]
        return _median(timer, calls)

    return (seconds(2 * CHASE_STEPS) - seconds(CHASE_STEPS)) / CHASE_STEPS


def _median(timer, calls: Sequence) -> float:
    return timer.measure(calls).median


def _best_copy(timer, target: torch.Tensor, sources: list[torch.Tensor]) -> float:
    """Bytes per second of the copy engine from host memory."""
    calls = [lambda source=source: target.copy_(source, non_blocking=True) for source in sources]
    return target.numel() / _median(timer, calls)


def _device_copy(timer, device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second, by the framework's copy or by the kernel, whichever is faster."""
    # Random: of zeros a memory that compresses, and wires that switch less, make a copy that no data has.
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [_median(timer, [lambda: target.copy_(source)])]
    processors = 2
    if target.is_cuda:
        processors = torch.cuda.get_device_properties(target.device).multi_processor_count
    for per_processor in (4, 8, 16):
        for tile in (8192, 16_384):
            shape = CopyShape(processors * per_processor, 16, tile)
            call = [lambda s=shape: launch_copy(source.data_ptr(), target.data_ptr(), nbytes, s)]
            times.append(_median(timer, call))
    return 2 * nbytes / min(times)
