"""Mutants of the n-gram cache: of what it finds, of what takes which place, and of the rows that go there."""

from .change import mutants

PROBE = """\
mask dropped: tags of other n-grams @ cache/probe -k evicts
- same = asked[:, None] & (stamp > 0) & (held == key[:, None])
+ same = asked[:, None] & (held >> 62 == key[:, None] >> 62)
mask dropped: n-grams without a key @ cache/probe -k key_0
- keyless = mask_t & ~absent & (key == 0)
+ keyless = mask_t & ~absent & (key == 1)
branch fixed to 0: set of another group @ cache/probe -k equals_the_simulator and float16
- first_slot = (group.to(tl.int64) * num_sets + set_of(key, num_sets)) * WAYS
+ first_slot = (group.to(tl.int64) * 0 + set_of(key, num_sets)) * WAYS
mask dropped: rows of what has no n-gram @ cache/probe -k windows
- written = mask_t & (hit | absent)
+ written = mask_t & hit
"""

READ = """\
mask dropped: ways in use @ cache/misses -k equals_the_simulator and float16
- kept = first & (stamp < tl.load(now_ptr))
+ kept = first
branch fixed to 0: groups apart @ cache/misses -k equals_the_simulator and e4m3_ue8m0
- first_slot = (group * num_sets + own_set) * WAYS
+ first_slot = (group * 0 + own_set) * WAYS
window off by one: start of a run @ cache/misses -k equals_the_simulator and float16
- mask=inside, other=0) < value
+ mask=inside, other=0) <= value
mask dropped: n-grams asked for again @ cache/misses -k evicts
- first = missed & (begin == entry)
+ first = missed
stride swapped: ways of equal age @ cache/misses -k equals_the_simulator and float16
- left = stamp * WAYS + way  #
+ left = stamp * WAYS + (WAYS - 1 - way)  #
window off by one: the way of a rank @ cache/misses -k equals_the_simulator and float16
- while tl.max(tl.where(first, rank, 0), axis=0) > found:
+ while tl.max(tl.where(first, rank - 1, 0), axis=0) > found:
stride swapped: rows of an entry @ cache/misses -k equals_the_simulator and float16
- target.to(tl.int64) * NUM_HEADS + head, -1)
+ target.to(tl.int64) * NUM_HEADS + (head ^ 1), -1)
branch fixed to 0: heads in head order @ cache/misses -k short_calls
- head = turn + other_head
+ head = turn * 0 + other_head
"""

KEEP = """\
stride swapped: source and target @ cache/misses -k evicts
- tl.load(out_ptr + source_row[:, None] * WIDTH
+ tl.load(out_ptr + target_row[:, None] * WIDTH
branch fixed to 0: order of the copies @ cache/misses -k evicts
- target_row = ((first_token + token) * NUM_ORDERS + group % NUM_ORDERS).to(tl.int64)
+ target_row = ((first_token + token) * NUM_ORDERS).to(tl.int64)
mask dropped: scales of the copies @ cache/misses -k windows
- if out_scale_ptr is not None:
+ if out_scale_ptr is not None and NUM_ORDERS == 0:
window off by one: lag @ cache/misses -k equals_the_simulator and float16
- (now - lag) + value * 0
+ (now - lag + 1) + value * 0
window off by one: clock @ cache/misses -k equals_the_simulator and float16
- tl.store(clock_ptr, now)
+ tl.store(clock_ptr, now - 1)
window off by one: keys @ cache/misses -k equals_the_simulator and float16
- tl.store(keys_ptr + target, key_of(value), mask=kept)
+ tl.store(keys_ptr + target, value, mask=kept)
"""

_CACHED = "cache/lookup", ("cached_lookup/v41-packed",)

MUTANTS = (
    *mutants("probe_cache_kernel", *_CACHED, PROBE),
    *mutants("read_missed_kernel", *_CACHED, READ),
    *mutants("keep_missed_kernel", *_CACHED, KEEP),
)
