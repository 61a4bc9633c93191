"""What kernels that read rows share: copying rows from a table to the output, dequantised or as they are stored."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.launching.device import cdiv, next_power_of_2
from engram_kernels.tables.view import TableView

_POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class RowsConfig:
    """Rows per step of a program, elements of a row read at once, warps, and programs of the persistent grid."""

    block_rows: int
    chunk: int
    num_warps: int
    programs: int


@lru_cache
def rows_config(width: int, itemsize: int, num_rows: int, processors: int, memory: str) -> RowsConfig:
    """A step moves about 4 KiB, 64 bytes a thread: rows of 256 B come 16 at a time.

    Two warps, because each repeats what is worked out for a step's rows, their hash or ids and masks. V4.1's rows take
    37 warp instructions, 43 where a program takes a single step, at 56 registers: 18 programs a multiprocessor, of
    which a device table gets eight.
    One program per multiprocessor has 132 x 4 KiB in flight on an H200, more than the 72 KB that PCIe Gen5 needs.
    NVLink-C2C needs 490 KB at all times, also while programs hash: two of them. Device memory needs eight. Wider chunks
    would only add registers. memory: as of :class:`TableView`.
    """
    chunk = min(256, next_power_of_2(width))
    block_rows = max(4, min(32, 4096 // (chunk * itemsize)))
    wanted = processors * {"device": 8, "coherent": 2}.get(memory, 1)
    return RowsConfig(block_rows, chunk, 2, max(1, min(wanted, cdiv(num_rows, block_rows))))


@triton.jit
def decode_e4m3(byte, ELEMENT: tl.constexpr):
    """float32 of e4m3 bytes, by the target's instructions where ELEMENT is float8e4nv, else from their bits.

    Sign, exponent and mantissa in their float32 places read 2^120 too small, subnormals included. Only the NaN bytes
    0x7F and 0xFF come out as 480; testing for that takes two instructions, a test of the bits four.
    """
    if ELEMENT == tl.float8e4nv:
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496  # 0x87F00000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        value = tl.where(tl.abs(value) == 480.0, float("nan"), value)
    return value


@triton.jit
def decode_e2m1(words):
    """float32 ``[B, 8 W]`` of e2m1 codes, eight in each of ``words [B, W]`` (uint32), the first in the low bits.

    Halves, bytes, then codes go to the top of a word each, one shift for both that come of it. Sign, exponent and
    mantissa in their float32 places read 2^126 too small, and the shift to there fills what is between with signs.
    """
    words = words.to(tl.int32, bitcast=True)
    halves = tl.join(words << 16, words)
    eighths = tl.join(halves << 8, halves)
    codes = tl.reshape(tl.join(eighths << 4, eighths), (words.shape[0], words.shape[1] * 8))
    bits = (codes >> 6) & -2118123520  # 0x81C00000
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def decode_ue8m0(byte):
    """float32 2^(byte - 127) of scale bytes (any integer type): 0 is the subnormal 2^-127, 255 is NaN."""
    bits = tl.maximum(byte.to(tl.int32) << 23, 0x00400000)
    scale = bits.to(tl.float32, bitcast=True)
    return tl.fma(scale, 0.0, scale)  # 255 reads as infinity, of which only this makes NaN in one instruction


@triton.jit
def copy_rows(row, out_row, mask_row, table, out, layout, kept_ptr=None, kept_scale_ptr=None, kept_row=None):
    """Read rows ``row [BLOCK]`` of a table; write them to output rows ``out_row [BLOCK]``.

    table: addresses of rows and of scales, int64 and 16-byte aligned, number of rows, bits of the table's scale; each
    a scalar or ``[BLOCK]``. The number is None where no ``row`` lies beyond the table.
    out: out_ptr, out_scale_ptr. layout: WIDTH, ELEMENT, SCALING, STORAGE, GROUP, CHUNK, of :func:`row_constants`;
    ELEMENT uint32 is eight e2m1 codes, of which WIDTH, GROUP and CHUNK count each.
    ``row`` may be int32; so may ``out_row`` where its product with WIDTH fits.
    Chunks of CHUNK elements are tiles [BLOCK, CHUNK / GROUP, GROUP], so that one scale serves a group; of copies, which
    none serves, [BLOCK, 1, CHUNK].
    Stored rows also go to ``kept_ptr``, and scales beside them, where kept_row >= 0.
    """
    weight_address, scale_address, num_table_rows, scale_bits = table
    out_ptr, out_scale_ptr = out
    WIDTH: tl.constexpr = layout[0]
    ELEMENT: tl.constexpr = layout[1]
    SCALING: tl.constexpr = layout[2]
    STORAGE: tl.constexpr = layout[3]
    GROUP: tl.constexpr = layout[4]
    CHUNK: tl.constexpr = layout[5]
    present = mask_row
    if num_table_rows is not None:
        present = present & (row < num_table_rows)
    # A gather keeps the tile's layout from spreading to where ids come from: an id is worked out by one lane of a warp,
    # not by all that copy its row, and reaches them through shared memory.
    row = tl.gather(tl.where(present, row, -1), tl.arange(0, row.shape[0]), 0)
    present = row >= 0
    row = row.to(tl.int64)
    BYTES: tl.constexpr = ELEMENT.primitive_bitwidth == 8
    POINTEE: tl.constexpr = tl.uint8 if BYTES else ELEMENT
    PACKED: tl.constexpr = 8 if ELEMENT == tl.uint32 else 1
    row_ptr = tl.multiple_of(weight_address.to(tl.pointer_type(POINTEE)), 16) + row * (WIDTH // PACKED)
    NUM_SCALES: tl.constexpr = WIDTH // GROUP
    CHUNK_SCALES: tl.constexpr = CHUNK // GROUP
    # A thread reads as many elements as it stores in 16 bytes, of e4m3 to bfloat16 eight: with all 16 that a load could
    # bring, the tile would go through shared memory on its way to the output.
    STORED: tl.constexpr = 128 // max(POINTEE.primitive_bitwidth, out_ptr.dtype.element_ty.primitive_bitwidth)
    AS_WORDS: tl.constexpr = STORAGE or kept_ptr is not None
    TILE: tl.constexpr = CHUNK if STORAGE else GROUP
    offs_scale = tl.arange(0, CHUNK_SCALES)
    offs_tile = tl.arange(0, CHUNK // TILE)[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    for begin in tl.static_range(0, WIDTH, CHUNK):
        offs_w = begin + offs_tile
        mask = present[:, None, None]
        mask_out = mask_row[:, None, None]
        if begin + CHUNK > WIDTH:
            mask = mask & (offs_w < WIDTH)
            mask_out = mask_out & (offs_w < WIDTH)
        if PACKED == 1:
            value_ptr = tl.max_contiguous(row_ptr[:, None, None] + offs_w, [1, 1, STORED])
            value = tl.load(value_ptr, mask=mask, other=0)
            if kept_ptr is not None:
                mask_kept = mask_out & (kept_row >= 0)[:, None, None]
                tl.store(kept_ptr + kept_row[:, None, None] * WIDTH + offs_w, value, mask=mask_kept)
        else:
            offs_word = begin // PACKED + tl.arange(0, CHUNK // PACKED)
            mask_w = (offs_word < WIDTH // PACKED)[None, :]
            # One word a thread, for the same reason: its codes are what a thread stores.
            word_ptr = tl.max_contiguous(row_ptr[:, None] + offs_word[None, :], [1, 1])
            words = tl.load(word_ptr, mask=present[:, None] & mask_w, other=0)
            if kept_ptr is not None:
                kept_word = kept_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + kept_row[:, None] * (
                    WIDTH // PACKED
                )
                mask_kept = mask_row[:, None] & mask_w & (kept_row >= 0)[:, None]
                tl.store(kept_word + offs_word[None, :], words, mask=mask_kept)
            value = tl.reshape(decode_e2m1(words), (row.shape[0], CHUNK_SCALES, GROUP))
        if SCALING == "ue8m0" or SCALING == "e4m3":
            scales = load_scales(row, present, scale_address, begin // GROUP, NUM_SCALES, CHUNK_SCALES, AS_WORDS)
            offs_s = begin // GROUP + offs_scale
            mask_s = mask_row[:, None] & (offs_s < NUM_SCALES)[None, :]
            if kept_ptr is not None:
                kept_s = kept_scale_ptr + kept_row[:, None] * NUM_SCALES + offs_s[None, :]
                tl.store(kept_s, scales.to(tl.uint8), mask=mask_s & (kept_row >= 0)[:, None])
            if STORAGE:
                out_s = out_scale_ptr + out_row[:, None] * NUM_SCALES + offs_s[None, :]
                tl.store(out_s, scales.to(tl.uint8), mask=mask_s)
            elif SCALING == "e4m3":
                value *= decode_e4m3(scales.to(tl.uint8), tl.uint8)[:, :, None]  # exact
                value *= (scale_bits + row * 0).to(tl.int32).to(tl.float32, bitcast=True)[:, None, None]
            elif PACKED > 1:
                value *= decode_ue8m0(scales)[:, :, None]
            elif ELEMENT == tl.float8e4nv and out_ptr.dtype.element_ty == tl.bfloat16:
                # Factors are bfloat16 numbers and products float32 ones, so that two at a time are rounded once, too.
                value = decode_e4m3(value, ELEMENT).to(tl.bfloat16) * decode_ue8m0(scales).to(tl.bfloat16)[:, :, None]
            else:
                value = decode_e4m3(value, ELEMENT) * decode_ue8m0(scales)[:, :, None]
        elif SCALING == "table" and not STORAGE:
            scale = (scale_bits + row * 0).to(tl.int32).to(tl.float32, bitcast=True)
            # A missing row is zero even where the scale is infinite.
            value = tl.where(present[:, None, None], decode_e4m3(value, ELEMENT) * scale[:, None, None], 0.0)
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row[:, None, None] * WIDTH + offs_w, value, mask=mask_out)


@triton.jit
def load_scales(
    row, present, scale_address, begin, NUM_SCALES: tl.constexpr, CHUNK_SCALES: tl.constexpr, AS_WORDS: tl.constexpr
):
    """Scale bytes ``begin`` .. ``begin + CHUNK_SCALES`` of each row, as integers ``[BLOCK, CHUNK_SCALES]``.

    AS_WORDS, for copies: they are read as the widest words that a row's are a whole number of. Decoded ones come as
    bytes, which the threads share: two each of 16 V4.1 rows, where of words each thread would decode eight.
    """
    WORD: tl.constexpr = 8 if NUM_SCALES % 8 == 0 else 4 if NUM_SCALES % 4 == 0 else 2 if NUM_SCALES % 2 == 0 else 1
    if AS_WORDS and WORD > 1 and WORD <= CHUNK_SCALES:
        TYPE: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32 if WORD == 4 else tl.uint16
        offs = begin // WORD + tl.arange(0, CHUNK_SCALES // WORD)
        word_ptr = tl.multiple_of(scale_address.to(tl.pointer_type(TYPE)), WORD) + row * (NUM_SCALES // WORD)
        mask = present[:, None]
        if NUM_SCALES % CHUNK_SCALES:
            mask = mask & (offs < NUM_SCALES // WORD)[None, :]
        words = tl.load(word_ptr[:, None] + offs[None, :], mask=mask, other=0)
        WIDE: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32
        parts = words.to(WIDE)[:, :, None] >> (8 * tl.arange(0, WORD))[None, None, :].to(WIDE)
        return tl.reshape((parts & 0xFF).to(tl.uint32), (row.shape[0], CHUNK_SCALES))
    else:
        offs = tl.arange(0, CHUNK_SCALES)
        byte_ptr = scale_address.to(tl.pointer_type(tl.uint8)) + row * NUM_SCALES
        mask = present[:, None] & (begin + offs < NUM_SCALES)[None, :]
        return tl.load(byte_ptr[:, None] + begin + offs[None, :], mask=mask, other=0).to(tl.uint32)


def converts_e4m3(storage: bool) -> bool:
    """Whether the target has instructions for e4m3: from sm_89 on. The interpreter's conversion gives 480 for NaN."""
    if storage or triton.knobs.runtime.interpret:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 89


def row_constants(view: TableView, storage: bool, config: RowsConfig) -> dict:
    """Compile-time constants that every kernel reading rows takes."""
    row_format = FORMATS[view.format]
    element = _POINTEE.get(row_format.dtype, tl.float8e4nv if converts_e4m3(storage) else tl.uint8)
    if row_format.packed > 1:
        element = tl.uint8 if storage else tl.uint32
    items = row_format.packed if storage else 1  # elements in what a copy moves
    return dict(
        WIDTH=view.width // items,
        ELEMENT=element,
        SCALING=row_format.group_scale or ("table" if row_format.table_scale else "none"),
        STORAGE=storage,
        GROUP=(row_format.group or config.chunk) // items,
        BLOCK_ROWS=config.block_rows,
        CHUNK=config.chunk // items,
    )
