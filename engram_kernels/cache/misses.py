"""What a cached lookup does with the n-grams that its cache does not have: each is read once, given to all, and kept.

Within each group missed keys come sorted, and behind them what was not missed: equal keys are a run, and the keys of a
set lie together. An entry here is an index into these keys; what a cache keeps of an n-gram is a way of a set. G
groups, one for each layer and order; S sets of W ways; T tokens, E columns of an order. cache/lookup.py has the
launches before.
"""

import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.ops.hash_kernels.mix import mix_rows
from engram_kernels.ops.row_kernels.copy import copy_rows

from .probe import NOT_MISSED, key_of, set_of, unscramble

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
# What reads is given 208 registers and uses them: with a limit that it would keep by itself ptxas spills one or two.
CEILINGS = {
    "read_missed_kernel": dict(sm_80=(208, 2048), sm_90=(208, 2048), sm_100=(208, 2048), gfx942=(112, 8192)),
    "keep_missed_kernel": dict(sm_80=(64, 0), sm_90=(64, 0), sm_100=(64, 0), gfx942=(48, 0)),
}


@triton.jit
def has_missed(missed_ptr, step, num_steps, BLOCK_ROWS: tl.constexpr):
    """Whether anything of a step was missed: by its first entry, since what was not missed comes last."""
    return tl.load(missed_ptr + step * BLOCK_ROWS, mask=step < num_steps, other=NOT_MISSED) != NOT_MISSED


@triton.jit
def first_step(group, num_steps):
    """The first step of a group of ``num_steps`` for this program: groups go on where the last one ended."""
    return (tl.program_id(0) + tl.num_programs(0) - group * num_steps % tl.num_programs(0)) % tl.num_programs(0)


@triton.jit
def run_begin(entry, value, mask, missed_ptr, search_steps):
    """The first entry of the run of ``value`` that ``entry`` is in, by binary search where it is not that.

    ``search_steps`` is the bit length of the number of entries.
    """
    behind = mask & (entry > 0)
    behind = behind & (tl.load(missed_ptr + entry - 1, mask=behind, other=0) == value)
    begin = entry
    if tl.max(behind.to(tl.int32), axis=0) > 0:
        # The number of entries below ``value``.
        below = entry * 0
        for i in range(search_steps):
            probe = below + (1 << (search_steps - 1 - i))
            inside = behind & (probe <= entry)
            lower = tl.load(missed_ptr + probe - 1, mask=inside, other=0) < value
            below = tl.where(inside & lower, probe, below)
        begin = tl.where(behind, below, begin)
    return begin


@triton.jit
def rank_in_set(entry, own_set, first, missed_ptr, search_steps, num_sets, WAYS: tl.constexpr):
    """How many runs of its set come before each ``first`` entry of a run; WAYS for that many or more."""
    rank = entry * 0
    before = entry - 1
    looking = first & (before >= 0)
    while tl.max(looking.to(tl.int32), axis=0) > 0:
        other = tl.load(missed_ptr + before, mask=looking, other=0)
        looking = looking & (set_of(key_of(other), num_sets) == own_set)
        rank += looking.to(tl.int32)
        before = run_begin(before, other, looking, missed_ptr, search_steps) - 1
        looking = looking & (before >= 0) & (rank < WAYS)
    return rank


@triton.jit
def way_of_rank(stamps_ptr, first_slot, first, rank, WAYS: tl.constexpr):
    """Of each set at ``first_slot`` the way with the ``rank``-th lowest stamp, of equals the lower one, and that stamp.

    Where rank is WAYS, so that no way is left, the stamp is above all others.
    """
    way = tl.arange(0, WAYS)[None, :]
    stamp = tl.load(stamps_ptr + first_slot[:, None] + way, mask=first[:, None], other=0)
    left = stamp * WAYS + way  # all different; time stays far below 2^58
    lowest = tl.min(left, axis=1)
    found = 0
    while tl.max(tl.where(first, rank, 0), axis=0) > found:
        left = tl.where((left == lowest[:, None]) & (found < rank)[:, None], 2**63 - 1, left)
        lowest = tl.min(left, axis=1)
        found += 1
    return lowest % WAYS, lowest // WAYS


@triton.jit(do_not_specialize=["num_tokens", "search_steps", "num_sets"])
def read_missed_kernel(
    missed_ptr,
    tokens_ptr,
    sources_ptr,
    targets_ptr,
    primes_ptr,
    offsets_ptr,
    reciprocals_ptr,
    tables_ptr,
    stamps_ptr,
    now_ptr,
    counts_ptr,
    rows_ptr,
    scales_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    search_steps,
    num_sets,
    NUM_LAYERS: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
    WAYS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_MAJOR: tl.constexpr,
):
    """For BLOCK_ROWS entries of a group: the token that reads for each and the way it takes, -1 for none; these rows.

    The r-th distinct missed n-gram of a set takes its r-th least recently used way, of equals the lower one, but none
    that was used in this step; its rows go from their table to the output and to that way. Persistent grid, which goes
    over a group's entries head by head with HEAD_MAJOR. Relies on stamps that nothing writes, on rows of the cache that
    nothing reads, and on L * T * C < 2^31.
    """
    NUM_GROUPS: tl.constexpr = NUM_LAYERS * NUM_ORDERS
    TURNS: tl.constexpr = NUM_HEADS if HEAD_MAJOR else 1
    parameters = (None, primes_ptr, offsets_ptr, reciprocals_ptr)
    num_steps = (num_tokens - 1) // BLOCK_ROWS + 1
    follow_predecessor()
    for group in range(NUM_GROUPS):
        first_entry = group * num_tokens
        group_ptr = missed_ptr + first_entry
        layer = group // NUM_ORDERS
        table_ptr = tables_ptr + layer * 4
        for turn in range(TURNS):
            step = first_step(group, num_steps)
            while has_missed(group_ptr, step, num_steps, BLOCK_ROWS):
                entry = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
                mask = entry < num_tokens
                value = tl.load(group_ptr + entry, mask=mask, other=NOT_MISSED)
                token = tl.load(tokens_ptr + first_entry + entry, mask=mask, other=0).to(tl.int32)
                missed = value != NOT_MISSED
                begin = run_begin(entry, value, missed, group_ptr, search_steps)
                first = missed & (begin == entry)
                key = key_of(value)
                own_set = set_of(key, num_sets)
                rank = rank_in_set(entry, own_set, first, group_ptr, search_steps, num_sets, WAYS)
                first_slot = (group * num_sets + own_set) * WAYS
                way, stamp = way_of_rank(stamps_ptr, first_slot, first, rank, WAYS)
                kept = first & (stamp < tl.load(now_ptr))
                target = tl.where(kept, first_slot + way, -1).to(tl.int32)
                if turn == 0:
                    source = tl.load(tokens_ptr + first_entry + begin, mask=mask, other=0).to(tl.int32)
                    tl.store(sources_ptr + first_entry + entry, source, mask=missed)
                    tl.store(targets_ptr + first_entry + entry, target, mask=missed)
                    count_ptr = counts_ptr + 2 * NUM_GROUPS + group
                    evicted = kept & (stamp > 0)
                    tl.atomic_add(count_ptr, tl.sum(first.to(tl.int64), axis=0), sem="relaxed")
                    tl.atomic_add(count_ptr + NUM_GROUPS, tl.sum(kept.to(tl.int64), axis=0), sem="relaxed")
                    tl.atomic_add(count_ptr + 2 * NUM_GROUPS, tl.sum(evicted.to(tl.int64), axis=0), sem="relaxed")
                mix = unscramble(key)
                # Orders come one after the other in a layer's columns, as groups do.
                out_row = ((layer * num_tokens + token) * NUM_ORDERS + group % NUM_ORDERS).to(tl.int64) * NUM_HEADS
                for other_head in range(NUM_HEADS // TURNS):
                    head = turn + other_head
                    offs_param = group * NUM_HEADS + head
                    always = num_tokens > 0
                    copy_rows(
                        mix_rows(mix, offs_param, always, parameters, NON_NEGATIVE),
                        out_row + head,
                        first,
                        (tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)),
                        (out_ptr, out_scale_ptr),
                        (WIDTH, ELEMENT, SCALING, STORAGE, GROUP, CHUNK),
                        rows_ptr,
                        scales_ptr,
                        tl.where(kept, target.to(tl.int64) * NUM_HEADS + head, -1),
                    )
                step += tl.num_programs(0)


@triton.jit
def repeat_rows(out_ptr, source_row, target_row, copied, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Within ``out [., WIDTH]`` copy rows ``source_row`` to rows ``target_row``, int64, where ``copied``."""
    for offset in tl.static_range(0, WIDTH, CHUNK):
        offs_w = offset + tl.arange(0, CHUNK)
        mask = copied[:, None]
        if offset + CHUNK > WIDTH:
            mask = mask & (offs_w < WIDTH)[None, :]
        value = tl.load(out_ptr + source_row[:, None] * WIDTH + offs_w[None, :], mask=mask, other=0)
        tl.store(out_ptr + target_row[:, None] * WIDTH + offs_w[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "lag"])
def keep_missed_kernel(
    missed_ptr,
    tokens_ptr,
    sources_ptr,
    targets_ptr,
    keys_ptr,
    stamps_ptr,
    now_ptr,
    clock_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    lag,
    NUM_LAYERS: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    SCALE_CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """For BLOCK_ROWS entries of a group: key and stamp of ways that were taken; in ``out [L, T, orders, WIDTH]``, and
    in scales alike, the rows of n-grams that others read for. The clock goes on.

    Persistent grid. Relies on targets that are all different, on sources that copy from themselves, and on doing
    nothing else with the clock.
    """
    follow_predecessor()
    now = tl.load(now_ptr)
    if tl.program_id(0) == 0:
        tl.store(clock_ptr, now)
    num_steps = (num_tokens - 1) // BLOCK_ROWS + 1
    for group in range(NUM_LAYERS * NUM_ORDERS):
        first_entry = group * num_tokens
        step = first_step(group, num_steps)
        while has_missed(missed_ptr + first_entry, step, num_steps, BLOCK_ROWS):
            offs_entry = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            mask = offs_entry < num_tokens
            entry = first_entry + offs_entry
            value = tl.load(missed_ptr + entry, mask=mask, other=NOT_MISSED)
            token = tl.load(tokens_ptr + entry, mask=mask, other=0).to(tl.int32)
            source = tl.load(sources_ptr + entry, mask=mask, other=-1)
            target = tl.load(targets_ptr + entry, mask=mask, other=-1)
            missed = value != NOT_MISSED
            kept = missed & (target >= 0)
            tl.store(keys_ptr + target, key_of(value), mask=kept)
            tl.store(stamps_ptr + target, (now - lag) + value * 0, mask=kept)
            copied = missed & (source != token)
            if tl.max(copied.to(tl.int32), axis=0) > 0:
                first_token = (group // NUM_ORDERS) * num_tokens
                source_row = ((first_token + source) * NUM_ORDERS + group % NUM_ORDERS).to(tl.int64)
                target_row = ((first_token + token) * NUM_ORDERS + group % NUM_ORDERS).to(tl.int64)
                repeat_rows(out_ptr, source_row, target_row, copied, WIDTH, CHUNK)
                if out_scale_ptr is not None:
                    repeat_rows(out_scale_ptr, source_row, target_row, copied, SCALE_WIDTH, SCALE_CHUNK)
            step += tl.num_programs(0)
