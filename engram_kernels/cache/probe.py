"""The first launch of a cached lookup: which n-grams the cache has, and the rows of those.

    key = scramble(mix)                                      (a bijection of 64 bits; 0 stands for no n-gram)
    set = (((key >> 32) + 2^31) * S) >> 32                   (rises with key, as signed numbers)

G groups, one for each layer and order; S sets of W ways; T tokens. cache/lookup.py has the launches that follow.
"""

import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.ops.hash_kernels.mix import mix_rows, ngram_mix
from engram_kernels.ops.row_kernels.copy import copy_rows

NOT_MISSED = tl.constexpr(2**63 - 1)  # in place of a value to sort by

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
# Eight programs of two warps a multiprocessor fit with 128.
CEILINGS = {
    "probe_cache_kernel": dict(sm_80=(128, 2048), sm_90=(128, 2048), sm_100=(128, 2048), gfx942=(96, 4096)),
}


@triton.jit
def scramble(mix):
    """The key of a mix: SplitMix64's finalizer, behind an XOR that no mix of a non-negative plan turns into key 0."""
    word = (mix ^ -0x61C8864680B583EB).to(tl.uint64, bitcast=True)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return (word ^ (word >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def unscramble(key):
    """The mix of a key: each step of :func:`scramble` undone, products by the inverses of their factors."""
    word = key.to(tl.uint64, bitcast=True)
    word = (word ^ (word >> 31) ^ (word >> 62)) * 0x319642B2D24D8EC3
    word = (word ^ (word >> 27) ^ (word >> 54)) * 0x96DE1B173F119089
    return (word ^ (word >> 30) ^ (word >> 60)).to(tl.int64, bitcast=True) ^ -0x61C8864680B583EB


@triton.jit
def set_of(key, num_sets):
    """The set of a key within its group, int64."""
    return (((key >> 32) + 2147483648) * num_sets) >> 32


@triton.jit
def sort_value(key):
    """What a missed key, which is not 0, is sorted by: in the same order, and below NOT_MISSED."""
    return key - (key > 0).to(tl.int64)


@triton.jit
def key_of(value):
    """The key of a sort value."""
    return value + (value >= 0).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_seqs",
        "search_steps",
        "seq_len",
        "num_slots",
        "vocab_size",
        "pad",
        "eos",
        "num_sets",
    ]
)
def probe_cache_kernel(
    token_ids_ptr,
    cu_seqlens_ptr,
    history_ptr,
    dead_ptr,
    slots_ptr,
    token_map_ptr,
    multipliers_ptr,
    primes_ptr,
    offsets_ptr,
    reciprocals_ptr,
    tables_ptr,
    keys_ptr,
    stamps_ptr,
    clock_ptr,
    counts_ptr,
    entries_ptr,
    missed_ptr,
    now_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    num_seqs,
    search_steps,
    seq_len,
    num_slots,
    vocab_size,
    pad,
    eos,
    num_sets,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
    WAYS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compare the n-grams of one group at BLOCK_ROWS tokens with the cache; copy rows of hits, note what is missed.

    Writes a sort value for each group and token, and the time of this call. Persistent grid. Relies on G * T < 2^31,
    and on writing tags and entries nowhere: a stamp gets the same value from all writers.
    """
    tokens = (token_ids_ptr, cu_seqlens_ptr, history_ptr, dead_ptr, slots_ptr, num_slots)
    sequences = (num_seqs, search_steps, seq_len)
    vocabulary = (token_map_ptr, vocab_size, pad, eos)
    parameters = (None, primes_ptr, offsets_ptr, reciprocals_ptr)
    NUM_ORDERS: tl.constexpr = MAX_NGRAM - 1
    NUM_GROUPS: tl.constexpr = NUM_LAYERS * NUM_ORDERS
    token_steps = (num_tokens - 1) // BLOCK_ROWS + 1
    follow_predecessor()
    if tl.program_id(0) == 0:
        tl.store(now_ptr, tl.load(clock_ptr) + num_tokens)
    for block in range(tl.program_id(0), NUM_GROUPS * token_steps, tl.num_programs(0)):
        group = block // token_steps
        layer = group // NUM_ORDERS
        order = group - layer * NUM_ORDERS
        token = (block - group * token_steps) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask_t = token < num_tokens
        mix, absent = ngram_mix(
            token, mask_t, order + 2, layer, tokens, sequences, vocabulary, multipliers_ptr, MAX_NGRAM, HAS_EOS
        )
        absent = absent != 0  # of a scalar order the interpreter makes integers
        key = scramble(mix)
        asked = mask_t & ~absent & (key != 0)
        first_slot = (group.to(tl.int64) * num_sets + set_of(key, num_sets)) * WAYS
        slots = first_slot[:, None] + tl.arange(0, WAYS)[None, :]
        held = tl.load(keys_ptr + slots, mask=asked[:, None], other=0)
        stamp = tl.load(stamps_ptr + slots, mask=asked[:, None], other=0)
        same = asked[:, None] & (stamp > 0) & (held == key[:, None])
        # Loaded where it is needed: kept through the loop, ptxas spills it to reach the next number of programs.
        tl.store(stamps_ptr + slots, tl.load(clock_ptr) + num_tokens + slots * 0, mask=same)
        slot = tl.max(tl.where(same, slots, -1), axis=1)
        hit = slot >= 0
        value = tl.where(asked & ~hit, sort_value(key), NOT_MISSED)
        tl.store(missed_ptr + group * num_tokens + token, value, mask=mask_t)
        tl.atomic_add(counts_ptr + group, tl.sum(asked.to(tl.int64), axis=0), sem="relaxed")
        tl.atomic_add(counts_ptr + NUM_GROUPS + group, tl.sum(hit.to(tl.int64), axis=0), sem="relaxed")
        out_row = ((layer.to(tl.int64) * num_tokens + token) * NUM_ORDERS + order) * NUM_HEADS
        written = mask_t & (hit | absent)
        table_ptr = tables_ptr + layer * 4
        if not NON_NEGATIVE:
            # Key 0 stands for no n-gram: what has it is never kept, and read from its table every time.
            keyless = mask_t & ~absent & (key == 0)
            written = written | keyless
        if tl.max(written.to(tl.int32), axis=0) > 0:
            for head in range(NUM_HEADS):
                row = tl.where(hit, slot * NUM_HEADS + head, -1)
                weight_address, scale_address = tl.load(entries_ptr), tl.load(entries_ptr + 1)
                num_source_rows = tl.load(entries_ptr + 2)
                if not NON_NEGATIVE:
                    weight_address = tl.where(keyless, tl.load(table_ptr), weight_address)
                    scale_address = tl.where(keyless, tl.load(table_ptr + 1), scale_address)
                    num_source_rows = tl.where(keyless, tl.load(table_ptr + 2), num_source_rows)
                    offs_param = group * NUM_HEADS + head + token * 0
                    own = mix_rows(mix, offs_param, keyless, parameters, NON_NEGATIVE)
                    row = tl.where(keyless, own, row)
                copy_rows(
                    row,
                    out_row + head,
                    written,
                    (weight_address, scale_address, num_source_rows, tl.load(table_ptr + 3)),
                    (out_ptr, out_scale_ptr),
                    (WIDTH, ELEMENT, SCALING, STORAGE, GROUP, CHUNK),
                )
