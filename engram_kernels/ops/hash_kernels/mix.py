"""What kernels that hash n-grams share: the window of a token, the mixes of its n-grams, and the rows of these.

Formulas and symbols are those of ops/hashing.py. What travels together comes as a tuple:

    tokens       token_ids_ptr, cu_seqlens_ptr, history_ptr, dead_ptr, slots_ptr, num_slots
    sequences    num_seqs, search_steps, seq_len                           as sequence_arguments says
    vocabulary   token_map_ptr, vocab_size, pad, eos
    parameters   orders_ptr, primes_ptr, offsets_ptr, reciprocals_ptr      of columns
"""

import triton
import triton.language as tl

from .sequences import find_sequence


@triton.jit
def remainder(mix, prime, reciprocals_ptr, offs_param, mask_param, NON_NEGATIVE: tl.constexpr):
    """``floor_mod(mix, prime)`` as int64.

    With 0 <= mix < 2^63 and prime < 2^31, ``umulhi(mix, floor(2^64 / prime))`` is the quotient or one less, so that the
    32-bit residue needs one correction: 11 instructions instead of about 90 for a 64-bit division.
    """
    if NON_NEGATIVE:
        reciprocal = tl.load(reciprocals_ptr + offs_param, mask=mask_param, other=0).to(tl.uint64, bitcast=True)
        quotient = tl.umulhi(mix.to(tl.uint64, bitcast=True), reciprocal).to(tl.uint32)
        divisor = prime.to(tl.uint32)
        residue = mix.to(tl.uint32) - quotient * divisor
        return tl.minimum(residue, residue - divisor).to(tl.int64)  # the difference wraps where it is negative
    else:
        truncated = mix % prime  # takes the sign of mix
        return tl.where(truncated < 0, truncated + prime, truncated)


@triton.jit
def mix_rows(mix, offs_param, mask_param, parameters, NON_NEGATIVE: tl.constexpr):
    """Row ids, int64, of mixes in the columns whose parameters are at ``offs_param``."""
    _, primes_ptr, offsets_ptr, reciprocals_ptr = parameters
    prime = tl.load(primes_ptr + offs_param, mask=mask_param, other=1)
    offset = tl.load(offsets_ptr + offs_param, mask=mask_param, other=0)
    return remainder(mix, prime, reciprocals_ptr, offs_param, mask_param, NON_NEGATIVE) + offset


@triton.jit
def history_start(token, mask_token, seq, start, tokens, MAX_NGRAM: tl.constexpr):
    """Where the history of each token's sequence begins, int64; below 0 where it has none, or the token reads none."""
    _, _, _, _, slots_ptr, num_slots = tokens
    slot = seq
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + seq, mask=mask_token & (token - start < MAX_NGRAM - 1), other=-1)
        slot = tl.where(slot < num_slots, slot, -1)
    return slot.to(tl.int64) * (MAX_NGRAM - 1)


@triton.jit
def look_back(
    token,
    mask_token,
    past,
    start,
    blocked,
    tokens,
    vocabulary,
    SHIFT: tl.constexpr,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
):
    """The id, int64, that each token's look-back by SHIFT hashes, whether it is blocked, and whether it is invalid.

    ``blocked`` tells whether a newer one was; ``past`` is what :func:`history_start` found.
    """
    token_ids_ptr, _, history_ptr, dead_ptr, slots_ptr, _ = tokens
    token_map_ptr, vocab_size, pad, eos = vocabulary
    source = token - SHIFT
    inside = mask_token & (source >= start) & (source >= 0)
    raw = tl.load(token_ids_ptr + source, mask=inside, other=-1).to(tl.int64)
    if SHIFT > 0:
        if history_ptr is not None:
            slot = MAX_NGRAM - 1 + source - start
            before = mask_token & (source < start) & (slot >= 0)
            if slots_ptr is not None:
                before = before & (past >= 0)
            older = tl.load(history_ptr + past + slot, mask=before, other=-1)
            raw = tl.where(inside, raw, older.to(tl.int64))
        blocked = blocked | ((raw == -1) & ~inside)
        if HAS_EOS:
            blocked = blocked | (raw == eos)
    if dead_ptr is not None:
        blocked = blocked | (tl.load(dead_ptr + source, mask=inside, other=0) != 0)
    valid = (raw >= 0) & (raw < vocab_size)
    if token_map_ptr is not None:
        raw = tl.load(token_map_ptr + raw, mask=mask_token & valid & ~blocked, other=0).to(tl.int64)
    return tl.where(blocked, pad, raw), blocked, ~valid & ~blocked


@triton.jit
def ngram_mix(
    token,
    mask_token,
    order,
    layer,
    tokens,
    sequences,
    vocabulary,
    multipliers_ptr,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
):
    """The mix, int64, of every (token, order) pair of one layer, and whether it has none: padding and invalid ids.

    ``token`` and ``order`` broadcast against each other.
    """
    seq, start, bad = find_sequence(token, tokens[1], sequences)
    past = history_start(token, mask_token, seq, start, tokens, MAX_NGRAM)
    blocked = token < 0
    mix = (token * 0).to(tl.int64) + (order * 0).to(tl.int64)
    for shift in tl.static_range(MAX_NGRAM):
        value, blocked, invalid = look_back(
            token, mask_token, past, start, blocked, tokens, vocabulary, shift, MAX_NGRAM, HAS_EOS
        )
        multiplier = tl.load(multipliers_ptr + layer * MAX_NGRAM + shift)
        reads = order > shift
        mix = mix ^ tl.where(reads, value * multiplier, 0)
        bad = bad | (reads & invalid)
    # An invalid id makes its column -1; what it does to the mix must stay within the reciprocal's range.
    return tl.where(bad, 0, mix), bad


@triton.jit
def ngram_rows(
    token,
    mask_token,
    column,
    mask_column,
    layer,
    tokens,
    sequences,
    vocabulary,
    multipliers_ptr,
    parameters,
    num_columns,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
):
    """Row ids, int64, of every (token, column) pair of one layer; -1 for padding and invalid ids.

    ``token`` and ``column`` broadcast against each other: ``[BLOCK_T, 1]`` and ``[1, BLOCK_C]``, both ``[BLOCK]``, or
    one column alone.
    """
    order = tl.load(parameters[0] + column, mask=mask_column, other=0)
    mix, bad = ngram_mix(
        token, mask_token, order, layer, tokens, sequences, vocabulary, multipliers_ptr, MAX_NGRAM, HAS_EOS
    )
    offs_param = layer * num_columns + column
    row = mix_rows(mix, offs_param, mask_column, parameters, NON_NEGATIVE)
    return tl.where(bad, -1, row)
