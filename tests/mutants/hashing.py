"""Mutants of ngram_hash."""

from .change import mutants

# ngram_rows, remainder and find_sequence, in both kernels that hash.
HASH = """\
mask dropped: padding and invalid ids @ hashing
- return tl.where(bad, -1, row)
+ return row
mask dropped: dead tokens @ hashing
- blocked = blocked | (tl.load(dead_ptr + source, mask=inside, other=0) != 0)
+ blocked = blocked
other dropped @ hashing -k test_kernel_lengths or equals_hash_then_lookup
- tl.load(token_ids_ptr + source, mask=inside, other=-1)
+ tl.load(token_ids_ptr + source, mask=inside)
truncated remainder @ hashing
- return tl.where(truncated < 0, truncated + prime, truncated)
+ return truncated
truncated remainder: quotient one less @ hashing -k test_kernel_lengths or real_geometry
- return tl.where(residue >= divisor, residue - divisor, residue).to(tl.int64)
+ return residue.to(tl.int64)
window off by one: order @ hashing
- reads = order > shift
+ reads = order >= shift
window off by one: history @ hashing
- slot = MAX_NGRAM - 1 + source
+ slot = MAX_NGRAM - 2 + source
window off by one: first token @ hashing
- (source >= start)
+ (source > start)
window off by one: sequence @ sequences
- (first <= token)
+ (first < token)
cu_seqlens ignored: start @ sequences
- start = tl.load(cu_seqlens_ptr + seq)
+ start = token * 0
cu_seqlens ignored: padding @ sequences
- padding = token >= tl.load(cu_seqlens_ptr + num_seqs)
+ padding = token < 0
mask dropped: ids that only a longer n-gram reads @ hashing
- bad | (reads & ~valid & ~blocked)
+ bad | (~valid & ~blocked)
history reversed @ hashing
- * (MAX_NGRAM - 1) + slot
+ * (MAX_NGRAM - 1) + (MAX_NGRAM - 2 - slot)
offset omitted @ hashing
- mask_param, NON_NEGATIVE) + offset
+ mask_param, NON_NEGATIVE)
branch fixed to 0: layer of the primes @ hashing -k golden_v41 or real_geometry
- offs_param = layer * num_columns + column
+ offs_param = column + mix.to(tl.int32) * 0
branch fixed to 0: layer of the multipliers @ hashing
- multipliers_ptr + layer * MAX_NGRAM + shift
+ multipliers_ptr + shift
"""

NGRAM_HASH = """\
mask dropped: columns @ hashing -k test_kernel_lengths
- mask=mask_token & mask_column)
+ mask=mask_token)
stride swapped @ hashing
- (token.to(tl.int64) * NUM_LAYERS + layer) * NUM_COLUMNS + column
+ (layer.to(tl.int64) * num_tokens + token) * NUM_COLUMNS + column
32-bit product @ hashing -k int64_rows
- row.to(out_ptr.dtype.element_ty), mask
+ row.to(tl.int32).to(out_ptr.dtype.element_ty), mask
last tile skipped @ hashing
- mask_token = token < num_tokens
+ mask_token = token < num_tokens // BLOCK_T * BLOCK_T
"""

MUTANTS = mutants("ngram_hash_kernel", "hashing", ("hash/v41-packed", "hash/qwen-overflow"), HASH, NGRAM_HASH)
