"""Rows of a table in exchange for others, in place: ``table[ids[i]] <-> rows[i]``, scales of groups with them.

What an overlay does when it is applied, and again when it is removed. n rows, as bytes; R elements a row. On a GPU it
is one launch on the current stream, over UVA where rows or scales are on the host: what the stream was given before
reads the old rows, what it is given afterwards the new ones. On the CPU, which also gathers the rows of staged tables,
it is done when the call returns.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of, takes_kernels
from engram_kernels.reference.tables.editing import exchange as reference

from ..placed import PlacedRows


class StoredRows(NamedTuple):
    """Rows as a table stores them, on the device that writes them; dense."""

    ids: torch.Tensor  #: int64 ``[n]``, distinct, within the table
    rows: torch.Tensor  #: uint8 ``[n, row bytes]``
    scales: torch.Tensor | None  #: uint8 scale bytes, of formats with scales of groups


@dataclass(frozen=True)
class ExchangeConfig:
    """Rows per program, 4-byte words of a row and words of its scales (powers of two), and warps."""

    block_rows: int
    block_w: int
    block_s: int
    num_warps: int


def exchange_config(words: int, scales: int) -> ExchangeConfig:
    """Tiles of 2,048 words: with 4 warps each thread has 64 bytes of either side under way."""
    block_w = next_power_of_2(words)
    return ExchangeConfig(max(1, min(16, 2048 // block_w)), block_w, next_power_of_2(scales), 4)


#: Types of the words that scales are moved in, by their bytes: V4.1 has one of 8 bytes a row.
_SCALE_WORDS = {1: (torch.uint8, tl.uint8), 2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32)}
_SCALE_WORDS |= {8: (torch.int64, tl.int64)}
# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "exchange_rows_kernel": dict(sm_80=(48, 0), sm_90=(48, 0), sm_100=(48, 0), gfx942=(32, 0)),
}


@triton.jit(do_not_specialize=["weight_address", "scale_address", "num_rows"])
def exchange_rows_kernel(
    ids_ptr,
    rows_ptr,
    scales_ptr,
    weight_address,
    scale_address,
    num_rows,
    SCALE_WORD: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BLOCK_ROWS rows, in 4-byte words, and their scales, in words of SCALE_WORD.

    Grid over blocks of rows. Relies on distinct ids within the table, on dense buffers, and on rows of the table that
    start at multiples of 16 bytes, its scales at multiples of 8.
    """
    weight_ptr = tl.multiple_of(weight_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 16)
    place = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    taken = place < num_rows
    follow_predecessor()
    row = tl.load(ids_ptr + place, mask=taken, other=0)
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    mask = taken & (offs_w < WORDS)
    mine, other_row = rows_ptr + place * WORDS + offs_w, weight_ptr + row * WORDS + offs_w
    new = tl.load(mine, mask=mask, other=0)
    old = tl.load(other_row, mask=mask, other=0)
    if SCALES:
        scale_ptr = tl.multiple_of(scale_address.to(tl.int64).to(tl.pointer_type(SCALE_WORD)), 8)
        offs_s = tl.arange(0, BLOCK_S)[None, :]
        mask_s = taken & (offs_s < SCALES)
        mine_s, other_s = scales_ptr + place * SCALES + offs_s, scale_ptr + row * SCALES + offs_s
        new_scale = tl.load(mine_s, mask=mask_s, other=0)
        old_scale = tl.load(other_s, mask=mask_s, other=0)
    tl.debug_barrier()  # every warp has loaded what one stores
    tl.store(mine, old, mask=mask)
    tl.store(other_row, new, mask=mask)
    if SCALES:
        tl.store(mine_s, old_scale, mask=mask_s)
        tl.store(other_s, new_scale, mask=mask_s)


def launch_exchange_rows(weight: torch.Tensor, scale: torch.Tensor | None, stored: StoredRows) -> None:
    """One launch on the device of ``stored``. weight ``[rows, R]`` and scale uint8 ``[rows, R / 32]``: the table's."""
    ids, rows, scales = stored
    words = rows.shape[1] // 4
    dtype, scale_word = _SCALE_WORDS[1 if scales is None else math.gcd(scales.shape[1], 8)]
    scale_words = 0 if scales is None else scales.shape[1] // dtype.itemsize
    config = exchange_config(words, scale_words)
    with on_device_of(ids):
        exchange_rows_kernel[(cdiv(len(ids), config.block_rows),)](
            ids_ptr=ids,
            rows_ptr=rows.view(torch.int32),
            scales_ptr=None if scales is None else scales.view(dtype),
            weight_address=weight.data_ptr(),
            scale_address=0 if scales is None else scale.data_ptr(),
            num_rows=len(ids),
            SCALE_WORD=scale_word,
            WORDS=words,
            SCALES=scale_words,
            BLOCK_ROWS=config.block_rows,
            BLOCK_W=config.block_w,
            BLOCK_S=config.block_s,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
        )


def exchange_rows(table: PlacedRows, stored: StoredRows) -> None:
    """Write the rows of ``stored`` to the table, and those that were there to ``stored``."""
    table.rows_changed(stored.ids)
    if not len(stored.ids):
        return
    weight, scale = table.weight, table.scale
    if not stored.ids.is_cpu or (takes_kernels(stored.ids.device) and _read_by_kernels(table)):
        launch_exchange_rows(weight, scale, stored)
        return
    reference.exchange_rows(stored.ids, stored.rows, weight.view(torch.uint8))
    if stored.scales is not None:
        reference.exchange_rows(stored.ids, stored.scales, scale)


def _read_by_kernels(table: PlacedRows) -> bool:
    """In Triton's interpreter: whether the table lies as kernels need it, which a staged one need not."""
    return table.aligned and table.placement != "staged" and table.format.name != "float64"
