"""Mutants of lookup and hash_lookup."""

from .change import mutants
from .hashing import HASH, ROWS_OF_COLUMNS

# copy_rows and what it decodes with, in both kernels that read rows.
ROWS = """\
mask dropped: end of a row @ ops/row_kernels/copy -k test_kernel and bfloat16-80
- mask_out = mask_out & (offs_w < WIDTH)
+ mask_out = mask_out
other dropped: missing rows @ ops/row_kernels/copy -k test_kernel
- value = tl.load(value_ptr, mask=mask, other=0)
+ value = tl.load(value_ptr, mask=mask, other=1)
32-bit product @ ops/row_kernels/copy -k beyond
- 16) + row * (WIDTH // PACKED)
+ 16) + row.to(tl.uint32) * (WIDTH // PACKED)
scale byte off by one: exponent @ ops/row_kernels/copy
- byte.to(tl.int32) << 23,
+ (byte.to(tl.int32) + 1) << 23,
scale byte off by one: bytes @ ops/row_kernels/copy
- byte_ptr[:, None] + begin + offs[None, :]
+ byte_ptr[:, None] + begin + (offs[None, :] ^ 1)
"""

LOOKUP = """\
mask dropped: negative ids @ ops/row_kernels/copy -k missing_row
- present = row >= 0
+ present = row >= -1
NaN dropped: row @ ops/row_kernels/copy
- value = tl.where(tl.abs(value) == 480.0, float("nan"), value)
+ value = value * 1.0
NaN dropped: scale @ ops/row_kernels/copy
- return tl.fma(scale, 0.0, scale)
+ return scale
stride swapped @ ops/row_kernels/by_id -k strided_ids
- offs_t * stride_ids_t + offs_c * stride_ids_c
+ offs_t * stride_ids_c + offs_c * stride_ids_t
last tile skipped @ ops/row_kernels/by_id
- num_steps = (num_rows - 1) // BLOCK_ROWS + 1
+ num_steps = num_rows // BLOCK_ROWS
scale byte off by one: first chunk for all @ ops/row_kernels/copy
- scale_address, begin // GROUP, NUM_SCALES
+ scale_address, 0, NUM_SCALES
scale byte off by one: bytes of a word @ ops/row_kernels/copy -k test_kernel_storage
- (8 * tl.arange(0, WORD))[None, None, :]
+ (8 * (tl.arange(0, WORD) ^ 1))[None, None, :]
scale byte off by one: words @ ops/row_kernels/copy -k test_kernel_storage
- offs = begin // WORD + tl.arange(0, CHUNK_SCALES // WORD)
+ offs = tl.arange(0, CHUNK_SCALES // WORD)
mask dropped: words of scales @ ops/row_kernels/copy -k test_kernel_storage
- mask = mask & (offs < NUM_SCALES // WORD)[None, :]
+ mask = mask
codes swapped: halves of a word @ ops/row_kernels/copy -k e2m1_code
- tl.join(words << 16, words)
+ tl.join(words, words << 16)
codes swapped: halves of a byte @ ops/row_kernels/copy -k e2m1_code
- tl.join(eighths << 4, eighths)
+ tl.join(eighths, eighths << 4)
codes swapped: sign @ ops/row_kernels/copy -k e2m1_code
- & -2118123520  # 0x81C00000
+ & 0x01C00000
scale byte off by one: the table's, dropped @ ops/row_kernels/copy -k e2m1_code
- value *= (scale_bits + row * 0).to(tl.int32).to(tl.float32, bitcast=True)[:, None, None]
+ value *= 1.0
mask dropped: words of a row @ ops/row_kernels/copy -k test_kernel and nvfp4-160
- mask=present[:, None] & mask_w, other=0)
+ mask=present[:, None], other=0)
branch fixed to 0: chunk of words @ ops/row_kernels/copy -k test_kernel and nvfp4-1024
- offs_word = begin // PACKED + tl.arange(0, CHUNK // PACKED)
+ offs_word = tl.arange(0, CHUNK // PACKED)
scale byte off by one: zero @ ops/row_kernels/copy
- << 23, 0x00400000)
+ << 23, 0)
scale byte off by one: storage @ ops/row_kernels/copy -k test_kernel_storage
- offs_s = begin // GROUP + offs_scale
+ offs_s = offs_scale
"""

HASH_LOOKUP = """\
stride swapped: layers and rows @ ops/row_kernels/hashed
- first_row = layer.to(tl.int64) * num_rows + first
+ first_row = first.to(tl.int64) * NUM_LAYERS + layer
stride swapped: tokens and columns @ ops/row_kernels/hashed
- index // NUM_COLUMNS, index % NUM_COLUMNS, mask_row
+ index % num_tokens, index // num_tokens, mask_row
last tile skipped @ ops/row_kernels/hashed
- (num_rows - 1) // BLOCK_HASH + 1
+ num_rows // BLOCK_HASH
last tile skipped: rows hashed at once @ ops/row_kernels/hashed -k many_rows
- tl.minimum(left, BLOCK_HASH) if
+ tl.minimum(left // BLOCK_ROWS * BLOCK_ROWS, BLOCK_HASH) if
branch fixed to 0: part of the rows hashed at once @ ops/row_kernels/hashed -k many_rows
- tl.gather(hashed, begin + local, 0)
+ tl.gather(hashed, local, 0)
branch fixed to 0: layer of the tables' rows @ ops/row_kernels/hashed
- tl.load(table_ptr + 2)
+ tl.load(tables_ptr + 2)
branch fixed to 0: layer of the tables' scales @ ops/row_kernels/hashed
- tl.load(table_ptr + 3)
+ tl.load(tables_ptr + 3)
branch fixed to 0: layer of the tables @ ops/row_kernels/hashed
- tables_ptr + layer * 4
+ tables_ptr
"""

MUTANTS = (
    *mutants("lookup_kernel", "ops/rows", ("lookup/v41", "lookup/v41-storage", "lookup/27b"), ROWS, LOOKUP),
    *mutants(
        "hash_lookup_kernel", "ops/hash_rows", ("hash_lookup/v41-packed",), HASH, ROWS_OF_COLUMNS, ROWS, HASH_LOOKUP
    ),
)
