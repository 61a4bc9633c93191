"""Mutants of the orders in which rows are read: of keys, of both lookups, and of the copies of duplicates."""

from .change import mutants

KEYS = """\
branch fixed to 0: layer of the keys @ ops/hash_kernels/row_ids
- row += layer.to(tl.int64) * key_stride
+ row += (layer * 0).to(tl.int64) * key_stride
stride swapped: keys @ ops/hash_kernels/row_ids -k hash_lookup
- (layer.to(tl.int64) * num_tokens + token) * NUM_COLUMNS + column
+ (token.to(tl.int64) * NUM_LAYERS + layer) * NUM_COLUMNS + column
"""

LOOKUP_ORDER = """\
mask dropped: rows asked for before @ ops/row_kernels/by_id -k distinct_row
- mask_row = mask_row & ((entry == 0) | (key != before))
+ mask_row = mask_row
mask dropped: key 0 first @ ops/row_kernels/by_id -k strided_ids
- ((entry == 0) | (key != before))
+ (key != before)
32-bit product: keys @ ops/row_kernels/by_id -k keys_beyond
- row = key.to(tl.int64) - first_key
+ row = key.to(tl.int32).to(tl.int64) - first_key
branch fixed to 0: layer of the keys @ ops/row_kernels/by_id -k hash_lookup
- row = key.to(tl.int64) - first_key
+ row = key.to(tl.int64) - first_key * 0
branch fixed to 0: layer of the entries @ ops/row_kernels/by_id -k hash_lookup
- entry = first_entry + step * BLOCK_ROWS + local
+ entry = step * BLOCK_ROWS + local
stride swapped: places @ ops/row_kernels/by_id
- out_row = tl.load(places_ptr + entry, mask=mask_row, other=0)
+ out_row = entry.to(tl.int64)
stride swapped: head order @ ops/row_kernels/by_id -k strided_ids
- out_row = local.to(tl.int64) * num_columns
+ out_row = local.to(tl.int64)
last tile skipped: head order @ ops/row_kernels/by_id
- num_steps = num_columns * column_steps
+ num_steps = num_columns * (num_tokens // BLOCK_ROWS)
"""

HASH_LOOKUP_ORDER = """\
stride swapped: head order @ ops/row_kernels/hashed -k hash_lookup
- out_row = local.to(tl.int64) * NUM_COLUMNS if
+ out_row = local.to(tl.int64) if
last tile skipped: head order @ ops/row_kernels/hashed -k hash_lookup
- layer_steps = NUM_COLUMNS * column_steps if
+ layer_steps = NUM_COLUMNS * (num_tokens // BLOCK_ROWS) if
"""

COPY_DUPLICATES = """\
mask dropped: end of a row @ ops/row_kernels/order -k bfloat16-80
- mask = mask & (offs_w < WIDTH)[None, :]
+ mask = mask
mask dropped: later entries taken for first @ ops/row_kernels/order
- earlier = first[None, :] & (index
+ earlier = (index
stride swapped: source and target @ ops/row_kernels/order
- tl.load(out_ptr + source[:, None] * WIDTH
+ tl.load(out_ptr + target[:, None] * WIDTH
last tile skipped @ ops/row_kernels/order
- num_steps = (num_rows - 1) // BLOCK_ROWS + 1
+ num_steps = num_rows // BLOCK_ROWS
window off by one: start of a run @ ops/row_kernels/order
- other=0) < key), probe, start)
+ other=0) <= key), probe, start)
window off by one: runs across steps @ ops/row_kernels/order
- start = run_start(keys_ptr, begin, search_steps)
+ start = begin
"""

_SORTED = "ops/row_kernels/order", ("hash_lookup/v41-address",)

MUTANTS = (
    *mutants("ngram_hash_kernel", *_SORTED, KEYS),
    *mutants("lookup_kernel", "ops/row_kernels/order", ("lookup/v41-head", "lookup/v41-storage-address"), LOOKUP_ORDER),
    *mutants("hash_lookup_kernel", "ops/row_kernels/order", ("hash_lookup/v41-head",), HASH_LOOKUP_ORDER),
    *mutants("copy_duplicates_kernel", *_SORTED, COPY_DUPLICATES),
)
