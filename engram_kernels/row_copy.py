"""What kernels that read rows share: copying rows from a table to the output, dequantised or as they are stored."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .row_format import FORMATS, SCALE_GROUP
from .table import TableView

_POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class RowsConfig:
    """Rows per step of a program, elements of a row read at once, warps, and programs of the persistent grid."""

    block_rows: int
    chunk: int
    num_warps: int
    programs: int


@lru_cache
def rows_config(width: int, itemsize: int, num_rows: int, processors: int, placement: str) -> RowsConfig:
    """A step moves about 4 KiB, four 16-byte loads a thread: rows of 256 B come 16 at a time.

    Two warps, because every warp repeats the hash of a step's rows: 159 warp instructions a V4.1 row, 208 with four.
    One program per multiprocessor has 132 x 4 KiB in flight on an H200, more than the 72 KB that PCIe Gen5 needs;
    device memory needs eight times as many. Wider chunks would only add registers.
    """
    chunk = min(256, next_power_of_2(width))
    block_rows = max(4, min(32, 4096 // (chunk * itemsize)))
    wanted = processors * (8 if placement == "device" else 1)
    return RowsConfig(block_rows, chunk, 2, max(1, min(wanted, cdiv(num_rows, block_rows))))


@triton.jit
def decode_e4m3(byte):
    """float32 of e4m3 bytes, from their bits: the interpreter's own conversion gives 480 for NaN, and sm_80 has none.

    Sign, exponent and mantissa in their float32 places read 2^120 too small, subnormals included. Only the NaN bytes
    0x7F and 0xFF come out as 480; testing for that takes two instructions, a test of the bits four.
    """
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496  # 0x87F00000
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(tl.abs(value) == 480.0, float("nan"), value)


@triton.jit
def decode_ue8m0(byte):
    """float32 2^(byte - 127) of scale bytes (any integer type): 0 is the subnormal 2^-127, 255 is NaN."""
    exponent = byte.to(tl.uint32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def copy_rows(
    row,
    out_row,
    mask_row,
    weight_address,
    scale_address,
    num_table_rows,
    scale_bits,
    out_ptr,
    out_scale_ptr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    kept_ptr=None,
    kept_scale_ptr=None,
    kept_row=None,
):
    """Read rows ``row [BLOCK]`` (int64) of the table at ``weight_address``; write them to output rows ``out_row``.

    Chunks of CHUNK elements as tiles [BLOCK, CHUNK / GROUP, GROUP], so that one scale serves a group. Addresses are
    int64 and 16-byte aligned, scalars like the rest about the table or ``[BLOCK]``. The scale bytes of a row are read
    as one word where they are 1, 2, 4 or a multiple of 8. Stored rows also go to ``kept_ptr``, where kept_row >= 0.
    """
    present = mask_row & (row >= 0) & (row < num_table_rows)
    row_ptr = tl.multiple_of(weight_address.to(tl.pointer_type(ELEMENT)), 16) + row * WIDTH
    NUM_SCALES: tl.constexpr = WIDTH // GROUP
    CHUNK_SCALES: tl.constexpr = CHUNK // GROUP
    offs_scale = tl.arange(0, CHUNK_SCALES)
    for begin in tl.static_range(0, WIDTH, CHUNK):
        offs_w = begin + offs_scale[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        mask = present[:, None, None]
        mask_out = mask_row[:, None, None]
        if begin + CHUNK > WIDTH:
            mask = mask & (offs_w < WIDTH)
            mask_out = mask_out & (offs_w < WIDTH)
        value = tl.load(row_ptr[:, None, None] + offs_w, mask=mask, other=0)
        if kept_ptr is not None:
            mask_kept = mask_out & (kept_row >= 0)[:, None, None]
            tl.store(kept_ptr + kept_row[:, None, None] * WIDTH + offs_w, value, mask=mask_kept)
        if SCALING == "group":
            scales = load_scales(row, present, scale_address, begin // GROUP, NUM_SCALES, CHUNK_SCALES)
            offs_s = begin // GROUP + offs_scale
            mask_s = mask_row[:, None] & (offs_s < NUM_SCALES)[None, :]
            if kept_ptr is not None:
                kept_s = kept_scale_ptr + kept_row[:, None] * NUM_SCALES + offs_s[None, :]
                tl.store(kept_s, scales.to(tl.uint8), mask=mask_s & (kept_row >= 0)[:, None])
            if STORAGE:
                out_s = out_scale_ptr + out_row[:, None] * NUM_SCALES + offs_s[None, :]
                tl.store(out_s, scales.to(tl.uint8), mask=mask_s)
            else:
                value = decode_e4m3(value) * decode_ue8m0(scales)[:, :, None]
        elif SCALING == "table" and not STORAGE:
            scale = (scale_bits + row * 0).to(tl.int32).to(tl.float32, bitcast=True)
            # A missing row is zero even where the scale is infinite.
            value = tl.where(present[:, None, None], decode_e4m3(value) * scale[:, None, None], 0.0)
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row[:, None, None] * WIDTH + offs_w, value, mask=mask_out)


@triton.jit
def load_scales(row, present, scale_address, begin, NUM_SCALES: tl.constexpr, CHUNK_SCALES: tl.constexpr):
    """Scale bytes ``begin`` .. ``begin + CHUNK_SCALES`` of each row, as integers ``[BLOCK, CHUNK_SCALES]``."""
    offs = tl.arange(0, CHUNK_SCALES)
    if NUM_SCALES % 8 == 0 and CHUNK_SCALES == 8:
        word_ptr = tl.multiple_of(scale_address.to(tl.pointer_type(tl.uint64)), 8)
        word = tl.load(word_ptr + row * (NUM_SCALES // 8) + begin // 8, mask=present, other=0)
        return ((word[:, None] >> (8 * offs)[None, :].to(tl.uint64)) & 0xFF).to(tl.uint32)
    elif NUM_SCALES == 4:
        word_ptr = tl.multiple_of(scale_address.to(tl.pointer_type(tl.uint32)), 4)
        word = tl.load(word_ptr + row, mask=present, other=0)
        return (word[:, None] >> (8 * offs)[None, :].to(tl.uint32)) & 0xFF
    elif NUM_SCALES == 2:
        word_ptr = tl.multiple_of(scale_address.to(tl.pointer_type(tl.uint16)), 2)
        word = tl.load(word_ptr + row, mask=present, other=0).to(tl.uint32)
        return (word[:, None] >> (8 * offs)[None, :].to(tl.uint32)) & 0xFF
    else:
        byte_ptr = scale_address.to(tl.pointer_type(tl.uint8)) + row * NUM_SCALES
        mask = present[:, None] & (begin + offs < NUM_SCALES)[None, :]
        return tl.load(byte_ptr[:, None] + begin + offs[None, :], mask=mask, other=0).to(tl.uint32)


def row_constants(view: TableView, storage: bool, config: RowsConfig) -> dict:
    """Compile-time constants that every kernel reading rows takes."""
    row_format = FORMATS[view.format]
    return dict(
        WIDTH=view.width,
        ELEMENT=_POINTEE.get(row_format.dtype, tl.uint8),
        SCALING=row_format.scaling,
        STORAGE=storage,
        GROUP=SCALE_GROUP if row_format.scaling == "group" else config.chunk,
        BLOCK_ROWS=config.block_rows,
        CHUNK=config.chunk,
    )
