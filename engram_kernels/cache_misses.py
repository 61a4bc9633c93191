"""What a cached lookup does with the n-grams that its cache does not have: each is read once, given to all, and kept.

Missed keys come sorted: equal ones of one group are a run, and the keys of a set lie together. An entry is a place in
that order; a place is group * T + token. G groups, one for each layer and order; S sets of W ways; T tokens, E columns
of an order. cache_lookup.py has the launches before and between.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .cache_probe import set_of, unscramble
from .hashing import mix_rows
from .row_copy import copy_rows

COUNTED = 16  # groups counted at once


@dataclass(frozen=True)
class PlaceConfig:
    """Sorted n-grams per program, and its warps."""

    block: int
    num_warps: int


def place_config(ways: int) -> PlaceConfig:
    """All pairs of a set's ways are compared: at most 4,096 at once, 16 a thread (64 n-grams with 8 ways).

    With half as many of either, ptxas of Triton 3.6 spills two registers to reach the next number of programs.
    """
    return PlaceConfig(max(1, min(64, 4096 // (ways * ways))), 8)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
# Rows of several layers are read in one step, each from an address of its own.
CEILINGS = {
    "place_missed_kernel": dict(sm_80=(88, 4096), sm_90=(88, 4096), sm_100=(88, 4096), gfx942=(64, 4096)),
    "read_missed_kernel": dict(sm_80=(144, 2048), sm_90=(144, 2048), sm_100=(144, 2048), gfx942=(112, 4096)),
    "repeat_rows_kernel": dict(sm_80=(64, 0), sm_90=(64, 0), sm_100=(64, 0), gfx942=(48, 0)),
}


@triton.jit
def run_begin(entry, key, group, mask, missed_ptr, places_ptr, num_tokens, search_steps):
    """The first entry of the run of ``key`` in ``group`` that ``entry`` is in, by binary search where it is not that.

    Entries are sorted by key, and equal keys by group, of which ``places`` tell. ``search_steps`` is the bit length of
    the number of entries.
    """
    first_place = group * num_tokens
    begin = entry
    behind = mask & (entry > 0)
    other = tl.load(missed_ptr + entry - 1, mask=behind, other=0)
    behind = behind & (other == key) & (tl.load(places_ptr + entry - 1, mask=behind, other=0) >= first_place)
    if tl.max(behind.to(tl.int32), axis=0) > 0:
        # The number of entries below (key, group).
        below = entry * 0
        for i in range(search_steps):
            probe = below + (1 << (search_steps - 1 - i))
            inside = behind & (probe <= entry)
            other = tl.load(missed_ptr + probe - 1, mask=inside, other=0)
            place = tl.load(places_ptr + probe - 1, mask=inside, other=0)
            lower = (other < key) | ((other == key) & (place < first_place))
            below = tl.where(inside & lower, probe, below)
        begin = tl.where(behind, below, begin)
    return begin


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "search_steps", "num_sets"])
def place_missed_kernel(
    missed_ptr,
    places_ptr,
    stamps_ptr,
    clock_ptr,
    counts_ptr,
    sources_ptr,
    targets_ptr,
    num_tokens,
    num_entries,
    search_steps,
    num_sets,
    NUM_GROUPS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """For BLOCK sorted entries: the place of the n-gram that reads for each, and the slot that it takes, -1 for none.

    The r-th distinct missed n-gram of a set takes its r-th least recently used way, of equals the lower one, but none
    that was used in this step. Grid (cdiv(entries, BLOCK),). Relies on stamps that nothing writes.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < num_entries
    key = tl.load(missed_ptr + entry, mask=mask, other=0)
    place = tl.load(places_ptr + entry, mask=mask, other=0).to(tl.int32)
    group = place // num_tokens
    missed = mask & (key != 0)
    begin = run_begin(entry, key, group, missed, missed_ptr, places_ptr, num_tokens, search_steps)
    first = missed & (begin == entry)
    source = tl.load(places_ptr + begin, mask=missed, other=0).to(tl.int32)
    tl.store(sources_ptr + place, tl.where(missed, source, place), mask=mask)

    # Its place among those of its set: runs before it, until there is one of another set or a way for none.
    own_set = set_of(key, num_sets)
    rank = entry * 0
    before = entry - 1
    looking = first & (before >= 0)
    while tl.max(looking.to(tl.int32), axis=0) > 0:
        other = tl.load(missed_ptr + before, mask=looking, other=0)
        other_group = tl.load(places_ptr + before, mask=looking, other=0).to(tl.int32) // num_tokens
        looking = looking & (set_of(other, num_sets) == own_set)
        begin = run_begin(before, other, other_group, looking, missed_ptr, places_ptr, num_tokens, search_steps)
        rank += (looking & (other != 0) & (other_group == group)).to(tl.int32)
        before = begin - 1
        looking = looking & (before >= 0) & (rank < WAYS)

    way = tl.arange(0, WAYS)
    first_slot = (group.to(tl.int64) * num_sets + own_set) * WAYS
    stamp = tl.load(stamps_ptr + first_slot[:, None] + way[None, :], mask=first[:, None], other=0)
    one, two = stamp[:, :, None], stamp[:, None, :]
    older = (two < one) | ((two == one) & (way[None, None, :] < way[None, :, None]))
    turn = tl.sum(older.to(tl.int32), axis=2)
    unused = stamp < tl.load(clock_ptr) + num_tokens  # in this call
    taken = first[:, None] & unused & (turn == rank[:, None])
    slot = tl.max(tl.where(taken, first_slot[:, None] + way[None, :], -1), axis=1)
    tl.store(targets_ptr + place, slot.to(tl.int32), mask=mask)

    inserted = slot >= 0
    evicted = tl.max((taken & (stamp > 0)).to(tl.int32), axis=1)
    for begin_group in tl.static_range(0, NUM_GROUPS, COUNTED):
        counted = begin_group + tl.arange(0, COUNTED)
        of_group = group[:, None] == counted[None, :]
        count_ptr = counts_ptr + 2 * NUM_GROUPS + counted
        mask_g = counted < NUM_GROUPS
        for part in tl.static_range(3):
            if part == 0:
                what = first
            elif part == 1:
                what = inserted
            else:
                what = evicted > 0
            number = tl.sum((of_group & what[:, None]).to(tl.int64), axis=0)
            tl.atomic_add(count_ptr + part * NUM_GROUPS, number, mask=mask_g & (number > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "lag"])
def read_missed_kernel(
    missed_ptr,
    places_ptr,
    slots_ptr,
    sources_ptr,
    targets_ptr,
    primes_ptr,
    offsets_ptr,
    reciprocals_ptr,
    tables_ptr,
    keys_ptr,
    stamps_ptr,
    clock_ptr,
    rows_ptr,
    scales_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    num_entries,
    lag,
    NUM_ORDERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_MAJOR: tl.constexpr,
):
    """Read BLOCK_ROWS rows of missed n-grams, first entries of runs, from their tables to the output and their slots.

    Persistent grid; head by head with HEAD_MAJOR. Relies on targets that are all different, on entries that nothing
    reads, and on G * T * E < 2^31.
    """
    entry_steps = (num_entries - 1) // BLOCK_ROWS + 1
    num_steps = NUM_HEADS * entry_steps if HEAD_MAJOR else (num_entries * NUM_HEADS - 1) // BLOCK_ROWS + 1
    stamp = tl.load(clock_ptr) + num_tokens - lag
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        if HEAD_MAJOR:
            head = step // entry_steps
            entry = (step - head * entry_steps) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            head += entry * 0  # of a scalar condition among others the interpreter makes integers
        else:
            index = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            entry, head = index // NUM_HEADS, index % NUM_HEADS
        mask = entry < num_entries
        key = tl.load(missed_ptr + entry, mask=mask, other=0)
        place = tl.load(places_ptr + entry, mask=mask, other=0).to(tl.int32)
        # A mix that maps to key 0 is missed like others, but has no run: it reads for itself.
        # Nothing of it waits for the others: the loads come together, and Triton 3.6 does not compile 32 rows a step
        # where a load's mask comes from another load.
        slot = tl.load(slots_ptr + place, mask=mask, other=-2)
        source = tl.load(sources_ptr + place, mask=mask, other=-1)
        target = tl.load(targets_ptr + place, mask=mask, other=-1).to(tl.int64)
        reads = (slot == -1) & (source == place)
        group = place // num_tokens
        token = place - group * num_tokens
        layer = group // NUM_ORDERS
        column = (group - layer * NUM_ORDERS) * NUM_HEADS + head
        kept = reads & (target >= 0) & (head == 0)
        tl.store(keys_ptr + target, key, mask=kept)
        tl.store(stamps_ptr + target, stamp + target * 0, mask=kept)
        offs_param = layer * (NUM_ORDERS * NUM_HEADS) + column
        row = mix_rows(unscramble(key), offs_param, reads, primes_ptr, offsets_ptr, reciprocals_ptr, NON_NEGATIVE)
        table_ptr = tables_ptr + layer * 4
        copy_rows(
            row,
            (layer.to(tl.int64) * num_tokens + token) * (NUM_ORDERS * NUM_HEADS) + column,
            reads,
            tl.load(table_ptr, mask=reads, other=0),
            tl.load(table_ptr + 1, mask=reads, other=0),
            tl.load(table_ptr + 2, mask=reads, other=0),
            tl.load(table_ptr + 3, mask=reads, other=0),
            out_ptr,
            out_scale_ptr,
            WIDTH,
            ELEMENT,
            SCALING,
            STORAGE,
            GROUP,
            CHUNK,
            rows_ptr,
            scales_ptr,
            tl.where(target >= 0, target * NUM_HEADS + head, -1),
        )


@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def repeat_rows_kernel(
    sources_ptr,
    out_ptr,
    clock_ptr,
    num_tokens,
    num_entries,
    NUM_ORDERS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Within ``out [L, T, orders, WIDTH]`` copy what BLOCK_ROWS n-grams get from others; the clock goes on.

    Persistent grid. Relies on sources that copy from themselves, and on doing nothing else with the clock.
    """
    if clock_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(clock_ptr, tl.load(clock_ptr) + num_tokens)
    num_steps = (num_entries - 1) // BLOCK_ROWS + 1
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        place = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        source = tl.load(sources_ptr + place, mask=place < num_entries, other=-1)
        copied = (source >= 0) & (source != place)
        # Of one group both.
        group = place // num_tokens
        layer = group // NUM_ORDERS
        first = layer.to(tl.int64) * num_tokens - group.to(tl.int64) * num_tokens
        order = group - layer * NUM_ORDERS
        target_row = (first + place) * NUM_ORDERS + order
        source_row = (first + source) * NUM_ORDERS + order
        for offset in tl.static_range(0, WIDTH, CHUNK):
            offs_w = offset + tl.arange(0, CHUNK)
            mask = copied[:, None]
            if offset + CHUNK > WIDTH:
                mask = mask & (offs_w < WIDTH)[None, :]
            value = tl.load(out_ptr + source_row[:, None] * WIDTH + offs_w[None, :], mask=mask, other=0)
            tl.store(out_ptr + target_row[:, None] * WIDTH + offs_w[None, :], value, mask=mask)
