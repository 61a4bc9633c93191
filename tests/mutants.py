"""One mutant is one kernel broken in one way; python -m tests.mutation sees whether a test notices.

A change reads like a patch: its kind (and what tells two of a kind apart) and file, the text that the file holds
exactly once, and what replaces it. A change in a helper stands for every kernel whose own tests have to notice it.
``-k`` goes straight to the test that sees a change, and keeps one that writes out of bounds to cases with guard bands
wide enough. Left out is what no result can show: an ``other=`` never used, a swap of the norms inside their product.
"""

import re
from dataclasses import dataclass

# What the list has to hold at least once; a kernel without the thing that is broken is spared it.
KINDS = (
    "mask dropped, other dropped, stride swapped, 32-bit product, truncated remainder, window off by one, "
    "cu_seqlens ignored, history reversed, offset omitted, last tile skipped, scale byte off by one, "
    "eps outside the mean, norms swapped, branch fixed to 0, taps reversed, dilation minus one"
).split(", ")


@dataclass(frozen=True)
class Mutant:
    """``old``, once in ``engram_kernels/<file>.py``, becomes ``new``.

    ``tests`` are files, of which ``select`` keeps what pytest's -k would; ``cases`` are those of compile_cases.py that
    it must compile in.
    """

    kernel: str
    kind: str
    detail: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str
    cases: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


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
history reversed @ hashing
- * (MAX_NGRAM - 1) + slot
+ * (MAX_NGRAM - 1) + (MAX_NGRAM - 2 - slot)
offset omitted @ hashing
- mask_column, NON_NEGATIVE) + offset
+ mask_column, NON_NEGATIVE)
branch fixed to 0: layer of the primes @ hashing -k golden_v41 or real_geometry
- offs_param = layer * num_columns + column
+ offs_param = column + mix.to(tl.int32) * 0
branch fixed to 0: layer of the multipliers @ hashing
- multipliers_ptr + layer * MAX_NGRAM + shift
+ multipliers_ptr + shift
"""

# copy_rows and what it decodes with, in both kernels that read rows.
ROWS = """\
mask dropped: end of a row @ rows -k test_kernel and bfloat16-80
- mask_out = mask_out & (offs_w < WIDTH)
+ mask_out = mask_out
32-bit product @ rows -k beyond
- weight_ptr + row[:, None, None] * WIDTH
+ weight_ptr + row[:, None, None].to(tl.uint32) * WIDTH
scale byte off by one: exponent @ rows
- exponent << 23)
+ (exponent + 1) << 23)
scale byte off by one: eight to a word @ rows
- (8 * offs)[None, :].to(tl.uint64)
+ (8 * (offs ^ 1))[None, :].to(tl.uint64)
"""

# branch_gate, in both kernels that gate.
GATE = """\
mask dropped: end of the hidden state @ gate
- tl.load(hidden_row + offs_d, mask=mask_row & mask_d, other=0).to(tl.float32)
+ tl.load(hidden_row + offs_d, mask=mask_row, other=0).to(tl.float32)
other dropped @ gate
- tl.load(key_row + offs_d, mask=mask_row & mask_d, other=0)
+ tl.load(key_row + offs_d, mask=mask_row & mask_d, other=1)
last tile skipped: sums over D @ gate
- product = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
-     for begin in range(0, HIDDEN_SIZE, BLOCK_D)
+ product = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
eps outside the mean: hidden @ gate -k size_of_eps
- tl.sum(hidden_square, axis=2) / HIDDEN_SIZE + eps
+ (tl.sum(hidden_square, axis=2) + eps) / HIDDEN_SIZE
eps outside the mean: key @ gate -k size_of_eps
- tl.sum(key_square, axis=2) / HIDDEN_SIZE + eps
+ (tl.sum(key_square, axis=2) + eps) / HIDDEN_SIZE
norms swapped: one for both @ gate
- tl.load(key_norm_ptr + offs_h
+ tl.load(query_norm_ptr + offs_h
branch fixed to 0: query norm @ gate
- tl.load(query_norm_ptr + offs_h * HIDDEN_SIZE + offs_d
+ tl.load(query_norm_ptr + offs_h * 0 + offs_d
clamp dropped @ gate
- tl.where(magnitude < clamp, clamp, magnitude)
+ magnitude
sign of zero @ gate
- logit = tl.where(d < 0, -root, root)
+ logit = tl.where(d <= 0, -root, root)
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

LOOKUP = """\
mask dropped: negative ids @ rows -k missing_row
- mask_row & (row >= 0) & (row < num_table_rows)
+ mask_row & (row < num_table_rows)
mask dropped: missing rows under a scale @ rows -k missing_row
- tl.where(present[:, None, None], decode_e4m3(value) * scale, 0.0)
+ decode_e4m3(value) * scale
NaN dropped: row @ rows
- return tl.where(tl.abs(value) == 480.0, float("nan"), value)
+ return value
NaN dropped: scale @ rows
- tl.where(exponent == 255, 0x7FC00000, bits)
+ bits
stride swapped @ rows -k strided_ids
- offs_t * stride_ids_t + offs_c * stride_ids_c
+ offs_t * stride_ids_c + offs_c * stride_ids_t
last tile skipped @ rows
- tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs
+ num_rows // BLOCK_ROWS, tl.num_programs
scale byte off by one: first chunk for all @ rows
- scale_address, begin // GROUP, NUM_SCALES
+ scale_address, 0, NUM_SCALES
scale byte off by one: four to a word @ rows
- word = tl.load(word_ptr + row, mask=present, other=0)
-         return (word[:, None] >> (8 * offs)
+ word = tl.load(word_ptr + row, mask=present, other=0)
+         return (word[:, None] >> (8 * (offs ^ 1))
scale byte off by one: two to a word @ rows
- word_ptr + row, mask=present, other=0).to(tl.uint32)
-         return (word[:, None] >> (8 * offs)
+ word_ptr + row, mask=present, other=0).to(tl.uint32)
+         return (word[:, None] >> (8 * (offs ^ 1))
scale byte off by one: zero @ rows
- tl.where(exponent == 0, 0x00400000,
+ tl.where(exponent == 0, 0,
scale byte off by one: storage @ rows -k test_kernel_storage
- offs_s = begin // GROUP + offs_scale
+ offs_s = offs_scale
"""

HASH_LOOKUP = """\
stride swapped: layers and rows @ hash_rows
- layer.to(tl.int64) * num_rows + index
+ index.to(tl.int64) * NUM_LAYERS + layer
stride swapped: tokens and columns @ hash_rows
- index // NUM_COLUMNS,
-             mask_row,
-             index % NUM_COLUMNS
+ index % num_tokens,
+             mask_row,
+             index // num_tokens
last tile skipped @ hash_rows
- tl.cdiv(num_rows, BLOCK_ROWS)
+ num_rows // BLOCK_ROWS
branch fixed to 0: layer of the tables @ hash_rows
- tables_ptr + layer * 4
+ tables_ptr
"""

GATE_RESIDUAL = """\
mask dropped: end of D @ gate -k test_kernel and 7-4-80
- tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty), mask=mask_row & mask_d)
+ tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty), mask=mask_row)
mask dropped: branches @ gate -k test_kernel and 4-5-7
- mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
+ mask_row = mask_t[:, None, None] & (offs_h >= 0)
mask dropped: value of masked tokens @ gate -k test_kernel_mask
- mask=live[:, None, None] & mask_d, other=0)
+ mask=mask_t[:, None, None] & mask_d, other=0)
mask dropped: bits of masked tokens @ gate -k test_kernel_mask
- result = tl.where(live[:, None, None], result, hidden)
+ result = result
stride swapped @ gate -k views_of_kv
- token_rows(key_ptr, token, offs_h, stride_key_t, stride_key_h, ALIGNED)
+ token_rows(key_ptr, token, offs_h, stride_key_h, stride_key_t, ALIGNED)
32-bit product @ gate -k beyond
- token = tl.program_id(0).to(tl.int64) * BLOCK_T
+ token = tl.program_id(0) * BLOCK_T
last tile skipped: output @ gate
- mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
-     for begin in range(0, HIDDEN_SIZE, BLOCK_D)
+ mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
"""

GATE_SCALE = """\
mask dropped: gate of masked tokens @ gate_scale
- gate = tl.where(live[:, None], gate, 0.0)
+ gate = gate
mask dropped: masked tokens @ gate_scale
- live = live & (tl.load(mask_ptr + token, mask=mask_t, other=0) != 0)
+ live = live
mask dropped: end of value @ gate_scale
- mask = live[:, None] & (offs_d < HIDDEN_SIZE)
+ mask = live[:, None] & (offs_d >= 0)
mask dropped: branches @ gate_scale -k test_kernel and 12-3-80
- mask_out = mask_t[:, None] & (offs_h < NUM_BRANCHES)
+ mask_out = mask_t[:, None] & (offs_h >= 0)
stride swapped @ gate_scale
- offs_out = token[:, None] * NUM_BRANCHES + offs_h
+ offs_out = token[:, None] + offs_h * num_tokens
32-bit product @ gate_scale -k beyond
- token = tl.program_id(0).to(tl.int64) * BLOCK_T
+ token = tl.program_id(0) * BLOCK_T
window off by one: end of the last sequence @ gate_scale
- (token < tl.load(cu_seqlens_ptr + num_seqs))
+ (token < tl.load(cu_seqlens_ptr + num_seqs) - 1)
last tile skipped: mean of value @ gate_scale
- square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
-     for begin in range(0, HIDDEN_SIZE, BLOCK_D)
+ square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
+     for begin in range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
eps outside the mean: value @ gate_scale
- tl.rsqrt(gate * gate * mean + conv_eps)
+ tl.rsqrt(gate * gate * (mean + conv_eps))
"""

CONV_RESIDUAL = """\
mask dropped: end of D @ gate_conv -k test_kernel and 12-3-80
- mask = mask_t[:, None] & mask_d[None, :]
+ mask = mask_t[:, None] & (offs_d >= 0)[None, :]
mask dropped: masked tokens @ gate_conv
- inside = inside & (tl.load(mask_ptr + source, mask=inside, other=0) != 0)
+ inside = inside
mask dropped: padding @ gate_conv
- result = tl.where(padding[:, None], hidden, result)
+ result = result
stride swapped: hidden @ gate_conv -k test_kernel and 12-4-64
- token64[:, None] * stride_hidden_t + branch * stride_hidden_h
+ token64[:, None] * stride_hidden_h + branch * stride_hidden_t
stride swapped: weight @ gate_conv
- stride_weight_d,
-     stride_weight_k,
+ stride_weight_k,
+     stride_weight_d,
32-bit product @ gate_conv -k beyond
- source64 = source.to(tl.int64)
+ source64 = source
window off by one @ gate_conv
- (source >= start) & (source >= 0)
+ (source > start) & (source >= 0)
cu_seqlens ignored: start @ gate_conv
- (source >= start) & (source >= 0)
+ (source >= 0)
cu_seqlens ignored: search @ sequences
- start = tl.load(cu_seqlens_ptr + seq)
+ start = token * 0
history reversed @ gate_conv
- slot = seq.to(tl.int64) * SPAN + SPAN + source - start
+ slot = seq.to(tl.int64) * SPAN - 1 - source + start
last tile skipped @ gate_conv
- mask_t, mask_d = token < num_tokens, offs_d < HIDDEN_SIZE
+ mask_t, mask_d = token < num_tokens, offs_d < HIDDEN_SIZE // BLOCK_D * BLOCK_D
norms swapped: query norm for conv norm @ gate_conv
- scale,
-                 conv_norm,
+ scale,
+                 query_norm,
branch fixed to 0: conv norm @ gate_conv
- conv_norm_ptr + branch * HIDDEN_SIZE
+ conv_norm_ptr
branch fixed to 0: weight @ gate_conv
- conv_weight_ptr + branch * stride_weight_h
+ conv_weight_ptr
branch fixed to 0: gate @ gate_conv
- gate_ptr + token64 * NUM_BRANCHES + branch
+ gate_ptr + token64 * NUM_BRANCHES
taps reversed @ gate_conv
- tap * stride_weight_k
+ (NUM_TAPS - 1 - tap) * stride_weight_k
dilation minus one @ gate_conv
- (NUM_TAPS - 1 - tap) * DILATION
+ (NUM_TAPS - 1 - tap) * (DILATION - 1)
"""

ADVANCE_STATE = """\
mask dropped: masked tokens @ conv_state
- present = present & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
+ present = present
mask dropped: branches @ conv_state -k in_bounds
- scale, mask=mask_h)
+ scale, mask=offs_h >= 0)
mask dropped: end of D @ conv_state -k in_bounds
- value, mask=mask_d)
+ value, mask=offs_d >= 0)
stride swapped @ conv_state
- state_scale_ptr + slot * NUM_BRANCHES + offs_h
+ state_scale_ptr + slot + offs_h * SPAN
32-bit product @ conv_state -k beyond
- tl.where(inside, start + position, 0).to(tl.int64)
+ tl.where(inside, start + position, 0)
window off by one @ conv_state
- position = length - SPAN + entry
+ position = length - SPAN - 1 + entry
cu_seqlens ignored @ conv_state
- start = tl.load(cu_seqlens_ptr + seq)
+ start = seq * 0
history reversed @ conv_state
- tl.where(inside, 0, position + SPAN)
+ tl.where(inside, 0, -1 - position)
last tile skipped @ conv_state
- range(0, HIDDEN_SIZE, BLOCK_D)
+ range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
branch fixed to 0 @ conv_state
- (scale_ptr + token * NUM_BRANCHES + offs_h
+ (scale_ptr + token * NUM_BRANCHES + offs_h * 0
"""


_CHANGE = re.compile(r"(.+?)(?:: (.+))? @ (\w+)(?: -k (.+))?\n((?:- .*\n)+)((?:\+ .*\n)+)")


def mutants(kernel, tests, cases, *changes):
    """The mutants of one kernel, from texts like those above."""
    found, files = [], tuple(f"tests/test_{name}.py" for name in (tests, "extremes"))
    for match in _CHANGE.finditer("".join(changes)):
        kind, detail, file, select, *texts = match.groups(default="")
        old, new = ("\n".join(line[2:] for line in text.splitlines()) for text in texts)
        found.append(Mutant(kernel, kind, detail, file, old, new, files, select, cases))
    return found


_CONV = "gate_conv", ("gate_conv/27b-packed-state",)

MUTANTS = (
    *mutants("ngram_hash_kernel", "hashing", ("hash/v41-packed", "hash/qwen-overflow"), HASH, NGRAM_HASH),
    *mutants("lookup_kernel", "rows", ("lookup/v41", "lookup/v41-storage", "lookup/27b"), ROWS, LOOKUP),
    *mutants("hash_lookup_kernel", "hash_rows", ("hash_lookup/v41-packed",), HASH, ROWS, HASH_LOOKUP),
    *mutants("gate_residual_kernel", "gate", ("gate/v41-masked",), GATE, GATE_RESIDUAL),
    *mutants("gate_scale_kernel", *_CONV, GATE, GATE_SCALE),
    *mutants("conv_residual_kernel", *_CONV, CONV_RESIDUAL),
    *mutants("advance_state_kernel", *_CONV, ADVANCE_STATE),
)
