"""Mutants of ngram_hash."""

from .change import mutants

# look_back, remainder and find_sequence, in both kernels that hash.
HASH = """\
mask dropped: dead tokens @ ops/hash_kernels/mix
- blocked = blocked | (tl.load(dead_ptr + source, mask=inside, other=0) != 0)
+ blocked = blocked
other dropped @ ops/hash_kernels/mix -k test_kernel_lengths or equals_hash_then_lookup
- tl.load(token_ids_ptr + source, mask=inside, other=-1)
+ tl.load(token_ids_ptr + source, mask=inside)
truncated remainder @ ops/hash_kernels/mix
- return tl.where(truncated < 0, truncated + prime, truncated)
+ return truncated
truncated remainder: quotient one less @ ops/hash_kernels/mix -k test_kernel_lengths or real_geometry
- return tl.minimum(residue, residue - divisor).to(tl.int64)
+ return residue.to(tl.int64)
window off by one: history @ ops/hash_kernels/mix
- slot = MAX_NGRAM - 1 + source
+ slot = MAX_NGRAM - 2 + source
window off by one: first token @ ops/hash_kernels/mix
- (source >= start)
+ (source > start)
window off by one: sequence @ ops/hash_kernels/sequences
- (first <= token)
+ (first < token)
cu_seqlens ignored: start @ ops/hash_kernels/sequences
- start = tl.load(cu_seqlens_ptr + seq)
+ start = token * 0
cu_seqlens ignored: padding @ ops/hash_kernels/sequences
- padding = token >= tl.load(cu_seqlens_ptr + num_seqs)
+ padding = token < 0
history reversed @ ops/hash_kernels/mix
- tl.load(history_ptr + past + slot, mask
+ tl.load(history_ptr + past + (MAX_NGRAM - 2 - slot), mask
offset omitted @ ops/hash_kernels/mix
- mask_param, NON_NEGATIVE) + offset
+ mask_param, NON_NEGATIVE)
"""

# history_start, in both kernels that hash and in the cache's.
HISTORY_BY_SLOT = """\
slots ignored @ ops/hash_kernels/mix
- slot = tl.load(slots_ptr + seq, mask=mask_token & (token - start < MAX_NGRAM - 1), other=-1)
+ slot = seq
mask dropped: slots that do not exist @ ops/hash_kernels/mix
- slot = tl.where(slot < num_slots, slot, -1)
+ slot = slot + num_slots * 0
mask dropped: sequences without a slot @ ops/hash_kernels/mix
- before = before & (past >= 0)
+ before = before
window off by one: tokens that read history @ ops/hash_kernels/mix
- (token - start < MAX_NGRAM - 1)
+ (token - start < MAX_NGRAM - 2)
"""

# ngram_rows, by which hash_lookup hashes.
ROWS_OF_COLUMNS = """\
mask dropped: padding and invalid ids @ ops/hash_kernels/mix
- return tl.where(bad, -1, row)
+ return row
window off by one: order @ ops/hash_kernels/mix
- reads = order > shift
+ reads = order >= shift
mask dropped: ids that only a longer n-gram reads @ ops/hash_kernels/mix
- bad | (reads & invalid)
+ bad | invalid
branch fixed to 0: layer of the primes @ ops/hash_kernels/mix -k real_geometry
- offs_param = layer * num_columns + column
+ offs_param = column + mix.to(tl.int32) * 0
branch fixed to 0: layer of the multipliers @ ops/hash_kernels/mix
- multipliers_ptr + layer * MAX_NGRAM + shift
+ multipliers_ptr + shift
"""

NGRAM_HASH = """\
mask dropped: padding and invalid ids @ ops/hash_kernels/row_ids
- tl.where(bad, -1, row)
+ row
mask dropped: ids that a shorter n-gram reads too @ ops/hash_kernels/row_ids
- bad = bad | invalid
+ bad = invalid
mask dropped: columns of an order @ ops/hash_kernels/row_ids -k selected_columns
- mask_token & (head < HEADS[entry // BLOCK_L])
+ mask_token
window off by one: columns of an order @ ops/hash_kernels/row_ids
- column += HEADS[shift - 1]
+ column += HEADS[shift - 1] - 1
branch fixed to 0: layer of the primes @ ops/hash_kernels/row_ids -k golden_v41
- offs_param = layer * NUM_COLUMNS + column
+ offs_param = column
branch fixed to 0: layer of the multipliers @ ops/hash_kernels/row_ids
- multipliers_ptr + layer * MAX_NGRAM + shift
+ multipliers_ptr + shift
branch fixed to 0: layers of a program @ ops/hash_kernels/row_ids -k layers_come
- first_layer = tl.program_id(1) * BLOCK_L
+ first_layer = tl.program_id(1) * 0
last tile skipped: rows that are stored last @ ops/hash_kernels/row_ids -k test_kernel_lengths
- 0 if STORES_LAST else
+ 1 if STORES_LAST else
stride swapped @ ops/hash_kernels/row_ids
- (token.to(tl.int64) * NUM_LAYERS + layer) * NUM_COLUMNS + column
+ (layer.to(tl.int64) * num_tokens + token) * NUM_COLUMNS + column
32-bit product @ ops/hash_kernels/row_ids -k int64_rows
- row.to(out_ptr.dtype.element_ty), mask
+ row.to(tl.int32).to(out_ptr.dtype.element_ty), mask
last tile skipped @ ops/hash_kernels/row_ids
- mask_token = token < num_tokens
+ mask_token = token < num_tokens // BLOCK_T * BLOCK_T
"""

MUTANTS = (
    *mutants("ngram_hash_kernel", "ops/hashing", ("hash/v41-packed", "hash/qwen-overflow"), HASH, NGRAM_HASH),
    *mutants("ngram_hash_kernel", "ops/slots", ("hash/v41-slots",), HISTORY_BY_SLOT),
)
