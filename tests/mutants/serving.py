"""Mutants of the state by slot: history, and the convolution's ring."""

from .change import mutants

COPY_TOKENS = """\
mask dropped: slots that do not exist @ serving/inputs
- known = (row >= 0) & (row < num_slots)
+ known = row >= 0
mask dropped: sequences without a slot @ serving/inputs
- known = (row >= 0) & (row < num_slots)
+ known = row < num_slots
slots ignored @ serving/inputs
- row = tl.load(slots_ptr + row, mask=mask_past, other=-1)
+ row = row
history reversed @ serving/inputs
- * DEPTH + offs % DEPTH, mask=known
+ * DEPTH + DEPTH - 1 - offs % DEPTH, mask=known
other dropped @ serving/inputs
- mask=known, other=-1)
+ mask=known, other=0)
mask dropped: tokens @ serving/inputs
- mask_token, mask_end, mask_past = offs < num_tokens
+ mask_token, mask_end, mask_past = offs < num_tokens + 1
mask dropped: history @ serving/inputs
- offs < num_ends, offs < num_past
+ offs < num_ends, offs < num_past + BLOCK
last ends skipped @ serving/inputs
- offs < num_ends, offs
+ offs < num_ends - 1, offs
"""

COMMIT_HISTORY = """\
mask dropped: slots that do not exist @ serving/history -k equals_reference
- writes = (slot >= 0) & (slot < num_slots)
+ writes = slot >= -1
mask dropped: dead tokens @ serving/history -k equals_reference
- tl.where(tl.load(dead_ptr + token, mask=inside, other=0) != 0, NO_TOKEN, id)
+ id
invalid ids missing @ serving/history -k equals_reference
- id = tl.where(id == NO_TOKEN, INVALID, id)
+ id = id
accepted ignored @ serving/history -k equals_reference
- tl.minimum(tl.maximum(tl.load(accepted_ptr + seq, mask=mask_b, other=0), 0), length)
+ length
window off by one: old ids @ serving/history -k equals_reference
- row + offs_n + taken, mask=mask & (position < 0)
+ row + offs_n + taken - 1, mask=mask & (position < 0)
cu_seqlens ignored @ serving/history -k equals_reference
- start = tl.load(cu_seqlens_ptr + seq, mask=mask_b, other=0)
+ start = seq * 0
offset omitted: tokens the ring has no room for @ serving/history -k equals_reference
- cursor + taken - tl.maximum(length - (RING - SPAN), 0)
+ cursor + taken
offset omitted: beyond the ring @ serving/history -k equals_reference
- tl.where(moved < RING, moved, RING + moved % RING)
+ tl.where(moved < RING, moved, moved % RING)
last tile skipped @ serving/history -k equals_reference
- mask_b = seq < num_seqs
+ mask_b = seq < num_seqs // BLOCK_B * BLOCK_B
"""

# slot_cursor, in both kernels that read slots.
SLOTS = """\
window off by one: the first slot @ ops/conv_kernels/slots -k kernel_equals_dense
- known = (slot >= 0) & (slot < num_slots)
+ known = (slot > 0) & (slot < num_slots)
32-bit product: slots @ ops/conv_kernels/slots -k slots_beyond
- return slot.to(tl.int64), tl.load
+ return slot, tl.load
"""

SLOTS_RESIDUAL = """\
mask dropped: entries before the first @ ops/conv_kernels/residual
- before & known & (position >= 0)
+ before & known
window off by one: cursor @ ops/conv_kernels/residual
- position = cursor + source - start
+ position = cursor + source - start - 1
branch fixed to 0: slot @ ops/conv_kernels/residual
- slot = seq_slot * RING + position % RING
+ slot = position % RING
"""

STORE_CONV = """\
mask dropped: masked tokens @ ops/conv_kernels/slots -k reference_does and 80-2
- present = present & (tl.load(mask_ptr + token, mask=live, other=0) != 0)
+ present = present
mask dropped: branches @ ops/conv_kernels/slots -k reference_does and 1056
- mask_h = live & (offs_h < NUM_BRANCHES)
+ mask_h = live & (offs_h >= 0)
mask dropped: end of D @ ops/conv_kernels/slots -k reference_does and 80-2
- mask_d = offs_d < HIDDEN_SIZE
+ mask_d = offs_d >= 0
window off by one: the first token @ ops/conv_kernels/slots -k reference_does and 80-2
- live = known & (position >= 0)
+ live = known & (position > 0)
window off by one @ ops/conv_kernels/slots -k reference_does and 80-2
- position = length - num_rows + index % num_rows
+ position = length - 1 - num_rows + index % num_rows
window off by one: chunks longer than the ring has room for @ ops/conv_kernels/slots -k reference_does and 80-2
- tl.maximum(length - (RING - SPAN), 0)) % RING
+ tl.maximum(length - (RING - SPAN), 0) * 0) % RING
branch fixed to 0: slot @ ops/conv_kernels/slots -k reference_does and 80-2
- tl.where(live, slot * RING + entry, 0)
+ tl.where(live, entry.to(tl.int64), 0)
restart ignored @ ops/conv_kernels/slots -k reference_does and 80-2
- cursor = seq * 0
+ cursor = cursor
last tile skipped @ ops/conv_kernels/slots -k reference_does and 1056
- range(0, HIDDEN_SIZE, BLOCK_D)
+ range(0, HIDDEN_SIZE - HIDDEN_SIZE % BLOCK_D, BLOCK_D)
"""

_HISTORY, _CONV = (
    ("serving/history", ("history/27b-packed",)),
    ("ops/conv_kernels/slots", ("gate_conv/27b-packed-slots",)),
)
MUTANTS = (
    *mutants("copy_tokens_kernel", "serving/inputs", ("history/27b-packed",), COPY_TOKENS),
    *mutants("commit_history_kernel", *_HISTORY, COMMIT_HISTORY),
    *mutants("conv_residual_kernel", *_CONV, SLOTS, SLOTS_RESIDUAL),
    *mutants("store_conv_kernel", *_CONV, SLOTS, STORE_CONV),
)
