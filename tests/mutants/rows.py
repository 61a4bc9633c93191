"""Mutants of lookup and hash_lookup."""

from .change import mutants
from .hashing import HASH, ROWS_OF_COLUMNS

# copy_rows and what it decodes with, in both kernels that read rows.
ROWS = """\
mask dropped: end of a row @ row_copy -k test_kernel and bfloat16-80
- mask_out = mask_out & (offs_w < WIDTH)
+ mask_out = mask_out
other dropped: missing rows @ row_copy -k test_kernel
- row_ptr[:, None, None] + offs_w, mask=mask, other=0)
+ row_ptr[:, None, None] + offs_w, mask=mask, other=1)
32-bit product @ row_copy -k beyond
- 16) + row * WIDTH
+ 16) + row.to(tl.uint32) * WIDTH
scale byte off by one: exponent @ row_copy
- exponent << 23)
+ (exponent + 1) << 23)
scale byte off by one: eight to a word @ row_copy
- (8 * offs)[None, :].to(tl.uint64)
+ (8 * (offs ^ 1))[None, :].to(tl.uint64)
"""

LOOKUP = """\
mask dropped: negative ids @ row_copy -k missing_row
- mask_row & (row >= 0) & (row < num_table_rows)
+ mask_row & (row < num_table_rows)
mask dropped: missing rows under a scale @ row_copy -k missing_row
- tl.where(present[:, None, None], decode_e4m3(value) * scale[:, None, None], 0.0)
+ decode_e4m3(value) * scale[:, None, None]
NaN dropped: row @ row_copy
- return tl.where(tl.abs(value) == 480.0, float("nan"), value)
+ return value
NaN dropped: scale @ row_copy
- tl.where(exponent == 255, 0x7FC00000, bits)
+ bits
stride swapped @ rows -k strided_ids
- offs_t * stride_ids_t + offs_c * stride_ids_c
+ offs_t * stride_ids_c + offs_c * stride_ids_t
last tile skipped @ rows
- num_steps = (num_rows - 1) // BLOCK_ROWS + 1
+ num_steps = num_rows // BLOCK_ROWS
scale byte off by one: first chunk for all @ row_copy
- scale_address, begin // GROUP, NUM_SCALES
+ scale_address, 0, NUM_SCALES
scale byte off by one: four to a word @ row_copy
- word = tl.load(word_ptr + row, mask=present, other=0)
-         return (word[:, None] >> (8 * offs)
+ word = tl.load(word_ptr + row, mask=present, other=0)
+         return (word[:, None] >> (8 * (offs ^ 1))
scale byte off by one: two to a word @ row_copy
- word_ptr + row, mask=present, other=0).to(tl.uint32)
-         return (word[:, None] >> (8 * offs)
+ word_ptr + row, mask=present, other=0).to(tl.uint32)
+         return (word[:, None] >> (8 * (offs ^ 1))
scale byte off by one: zero @ row_copy
- tl.where(exponent == 0, 0x00400000,
+ tl.where(exponent == 0, 0,
scale byte off by one: storage @ row_copy -k test_kernel_storage
- offs_s = begin // GROUP + offs_scale
+ offs_s = offs_scale
"""

HASH_LOOKUP = """\
stride swapped: layers and rows @ hash_rows
- layer.to(tl.int64) * num_rows + index
+ index.to(tl.int64) * NUM_LAYERS + layer
stride swapped: tokens and columns @ hash_rows
- index // NUM_COLUMNS, index % NUM_COLUMNS, mask_row
+ index % num_tokens, index // num_tokens, mask_row
last tile skipped @ hash_rows
- (num_rows - 1) // BLOCK_ROWS + 1
+ num_rows // BLOCK_ROWS
branch fixed to 0: layer of the tables' rows @ hash_rows
- tl.load(table_ptr + 2)
+ tl.load(tables_ptr + 2)
branch fixed to 0: layer of the tables' scales @ hash_rows
- tl.load(table_ptr + 3)
+ tl.load(tables_ptr + 3)
branch fixed to 0: layer of the tables @ hash_rows
- tables_ptr + layer * 4
+ tables_ptr
"""

MUTANTS = (
    *mutants("lookup_kernel", "rows", ("lookup/v41", "lookup/v41-storage", "lookup/27b"), ROWS, LOOKUP),
    *mutants("hash_lookup_kernel", "hash_rows", ("hash_lookup/v41-packed",), HASH, ROWS_OF_COLUMNS, ROWS, HASH_LOOKUP),
)
