"""The order in which rows are read from a table, and rows that are asked for more than once read once.

    direct    as asked for, all columns of a token together
    head      column by column: what is read at one time lies within the rows of one head
    address   by rising address, each distinct row once; one launch sorts, and one copies the others of each run

Sorting is by key, ``row`` in a single table and ``layer * key_stride + row`` where layers are sorted together, with row
-1 for what reads as zeros and a key_stride above every layer's rows + 1. Equal keys form a run: its first entry is read
from the table, and the others are copied from where that one went. No order changes a bit of the result. Sizes depend
on shapes alone and the host waits for nothing, so that all of it can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of
from engram_kernels.tables.memory.pages import HUGE_PAGE
from engram_kernels.tables.placement import REGISTERED
from engram_kernels.tables.view import TableView

ORDERS = ("direct", "address", "head")
_REACH = 512  # pages
_IN_FLIGHT = 2048  # rows
_SORTED_FROM = 16_384  # rows, with huge pages
_COHERENT_SORTED_FROM, _SMALLEST_PAGE = 36_864, 4096  # rows, bytes: vLLM 0.33's
_MOST_SORTED = 2**31  # rows; torch.sort takes fewer, and kernels count entries in int32


def read_order(num_rows: int, table_bytes: int, page_bytes: int, placement: str, link: str = "pcie") -> str:
    """The order for one call that asks for ``num_rows`` rows (L * T * C) of a table in pages of ``page_bytes``.

    Published figures and arithmetic; none of it is measured here yet (bench/ops/bench_read_order.py will).
    Only reads over the link pay for address translation. Up to 1 GiB it costs little: an A100 reads 25.1 GB/s from 1
    GiB and 16.5 from 20 GiB. In pages of 2 MiB that is 512 of them, and the same number of smaller pages reach less.
    That loss is 5.5 ns a row of 264 bytes there, 2.7 over a link twice as fast, and a sort of so few keys takes an
    estimated 50 us: 9,000 to 18,000 rows pay for it. Of real text it also saves the quarter that is asked for twice.
    Without huge pages lookups are about ten times slower (SGLang), and the sort pays at a tenth.
    Below that, head order costs nothing, and a head's window of V4.1 is 4 GB where a table is 94; but a persistent
    grid has 132 x 16 rows in flight, and so many are on their way at once in any order.
    Where host and GPU have one memory, rows are read as device memory is. Over NVLink-C2C, at 450 GB/s, a row takes 0.6
    ns, and the quarter that comes twice pays for a sort from 340,000 rows on, which no step asks for: SGLang never
    sorts there, vLLM from 36,864 rows and for pages of 4 KiB alone, of which the GPU's translations reach least.
    """
    if placement not in REGISTERED or link == "unified" or table_bytes <= _REACH * page_bytes:
        return "direct"
    if link == "coherent":
        if page_bytes == _SMALLEST_PAGE and _COHERENT_SORTED_FROM <= num_rows < _MOST_SORTED:
            return "address"
        return "head" if num_rows > _IN_FLIGHT else "direct"
    sorted_from = _SORTED_FROM if page_bytes >= HUGE_PAGE else _SORTED_FROM // 10
    if sorted_from <= num_rows < _MOST_SORTED:
        return "address"
    return "head" if num_rows > _IN_FLIGHT else "direct"


def choose_order(order: str | None, view: TableView, num_rows: int) -> str:
    """``order`` where one was asked for, else :func:`read_order` for the largest table that is read over the link.

    Registered ops ask when they run: a compiled graph that held the choice would be compiled again for other counts.
    """
    if order is not None:
        return order
    return read_order(num_rows, view.link_bytes, view.page_bytes, "host", view.link) if view.link_bytes else "direct"


def check_order(where: str, order: str | None, num_rows: int) -> None:
    """Raise where ``order`` cannot sort so many rows."""
    if order == "address" and num_rows >= _MOST_SORTED:
        raise ValueError(f"{where}: order 'address' sorts fewer than 2^31 rows, got {num_rows}")


@dataclass(frozen=True)
class CopyConfig:
    """Entries per step of a program, elements of a row copied at once, and warps."""

    block_rows: int
    chunk: int
    num_warps: int


def copy_config(width: int, itemsize: int) -> CopyConfig:
    """A step moves at most 8 KiB, four 16-byte loads a thread: rows of 512 B come 16 at a time.

    Narrower ones too: first entries are found by comparing all pairs of a step, and 32 of them take 102 registers.
    """
    chunk = min(256, next_power_of_2(width))
    return CopyConfig(max(4, min(16, 8192 // (chunk * itemsize))), chunk, 4)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "copy_duplicates_kernel": dict(sm_80=(72, 512), sm_90=(64, 512), sm_100=(64, 512), gfx942=(64, 512)),
}


@triton.jit(do_not_specialize=["num_rows", "search_steps"])
def copy_duplicates_kernel(
    keys_ptr,
    places_ptr,
    out_ptr,
    num_rows,
    search_steps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Within ``out [., WIDTH]`` copy the row of the first entry of each run of sorted keys to the places of its others.

    Persistent grid over BLOCK_ROWS entries a step: program p takes steps p, p + programs, and so on. Relies on the
    rows of first entries being there, on places that are all different, and on fewer than 2^31 entries.
    """
    num_steps = (num_rows - 1) // BLOCK_ROWS + 1  # not tl.cdiv, whose sum wraps for the last number below 2^31
    follow_predecessor()
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        begin = step * BLOCK_ROWS
        index = begin + tl.arange(0, BLOCK_ROWS)
        mask_row = index < num_rows
        key = tl.load(keys_ptr + index, mask=mask_row, other=0)
        before = tl.load(keys_ptr + index - 1, mask=mask_row & (index > 0), other=0)
        first = (index == 0) | (key != before)
        start = run_start(keys_ptr, begin, search_steps)
        # The last first entry at or before each entry; within the run that the step begins in, where that one starts.
        earlier = first[None, :] & (index[None, :] <= index[:, None])
        head = tl.max(tl.where(earlier, index[None, :], start), axis=1)
        copied = mask_row & ~first
        source = tl.load(places_ptr + head, mask=copied, other=0).to(tl.int64)
        target = tl.load(places_ptr + index, mask=copied, other=0).to(tl.int64)
        for offset in tl.static_range(0, WIDTH, CHUNK):
            offs_w = offset + tl.arange(0, CHUNK)
            mask = copied[:, None]
            if offset + CHUNK > WIDTH:
                mask = mask & (offs_w < WIDTH)[None, :]
            value = tl.load(out_ptr + source[:, None] * WIDTH + offs_w[None, :], mask=mask, other=0)
            tl.store(out_ptr + target[:, None] * WIDTH + offs_w[None, :], value, mask=mask)


@triton.jit
def run_start(keys_ptr, entry, search_steps):
    """The first entry of the run of sorted keys that ``entry`` (a scalar) is in, by binary search where it is not that.

    ``search_steps`` is the bit length of the number of entries.
    """
    start = entry
    key = tl.load(keys_ptr + entry)
    if tl.load(keys_ptr + entry - 1, mask=entry > 0, other=0) == key:
        # The number of entries below ``key``; without effect at entry 0, where nothing is.
        start = entry * 0
        for i in range(search_steps):
            probe = start + (1 << (search_steps - 1 - i))
            inside = probe <= entry
            start = tl.where(inside & (tl.load(keys_ptr + probe - 1, mask=inside, other=0) < key), probe, start)
    return start


def key_range(num_layers: int, most_rows: int) -> tuple[torch.dtype, int]:
    """Type of the keys of layers that are sorted together, and key_stride; int32 is sorted in half as many passes."""
    key_stride = most_rows + 1
    return (torch.int32 if num_layers * key_stride <= 2**31 else torch.int64), key_stride


def launch_copy_duplicates(keys, places, out: torch.Tensor, programs: int) -> None:
    """One launch; ``out [..., WIDTH]`` contiguous, whose rows are counted by ``places``."""
    width = out.shape[-1]
    config = copy_config(width, out.element_size())
    with on_device_of(keys):
        copy_duplicates_kernel[(min(programs, cdiv(keys.numel(), config.block_rows)),)](
            keys,
            places,
            out,
            keys.numel(),
            keys.numel().bit_length(),
            WIDTH=width,
            BLOCK_ROWS=config.block_rows,
            CHUNK=config.chunk,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
        )


def scale_words(scales: torch.Tensor) -> torch.Tensor:
    """Scale bytes ``[..., R / G]`` as the widest integers that a row and its address are whole numbers of."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        if scales.shape[-1] % size == 0 and scales.data_ptr() % size == 0 and scales.storage_offset() % size == 0:
            return scales.view(dtype)
    return scales
