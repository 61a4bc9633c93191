"""Mutants of the n-gram cache: of what it finds, of what takes which place, and of the rows that go there."""

from .change import mutants

PROBE = """\
mask dropped: tags of other n-grams @ cache_probe -k evicts
- same = asked[:, None] & (stamp > 0) & (held == key[:, None])
+ same = asked[:, None] & (held >> 62 == key[:, None] >> 62)
branch fixed to 0: set of another group @ cache_probe -k equals_the_simulator and float16
- first_slot = (group.to(tl.int64) * num_sets + set_of(key, num_sets)) * WAYS
+ first_slot = (group.to(tl.int64) * 0 + set_of(key, num_sets)) * WAYS
mask dropped: rows of what has no n-gram @ cache_probe -k windows
- mask_t & (hit | absent),
+ mask_t & hit,
"""

PLACE = """\
mask dropped: ways in use @ cache_misses -k equals_the_simulator and float16
- taken = first[:, None] & unused & (turn == rank[:, None])
+ taken = first[:, None] & (turn == rank[:, None])
branch fixed to 0: groups apart @ cache_misses -k equals_the_simulator and e4m3_ue8m0
- rank += (looking & (other != 0) & (other_group == group)).to(tl.int32)
+ rank += (looking & (other != 0)).to(tl.int32)
window off by one: start of a run @ cache_misses -k equals_the_simulator and float16
- lower = (other < key) | ((other
+ lower = (other <= key) | ((other
"""

READ = """\
mask dropped: n-grams asked for again @ cache_misses -k evicts
- reads = reads & (tl.load(sources_ptr + place, mask=reads, other=-1) == place)
+ reads = reads & (tl.load(targets_ptr + place, mask=reads, other=-1) >= 0)
window off by one: lag @ cache_misses -k equals_the_simulator and float16
- stamp = tl.load(clock_ptr) + num_tokens - lag
+ stamp = tl.load(clock_ptr) + num_tokens - lag + 1
stride swapped: rows of an entry @ cache_misses -k equals_the_simulator and float16
- tl.where(target >= 0, target * NUM_HEADS + head, -1)
+ tl.where(target >= 0, target * NUM_HEADS + (head ^ 1), -1)
"""

REPEAT = """\
stride swapped: source and target @ cache_misses -k evicts
- tl.load(out_ptr + source_row[:, None] * WIDTH
+ tl.load(out_ptr + target_row[:, None] * WIDTH
branch fixed to 0: order of the copies @ cache_misses -k evicts
- target_row = (first + place) * NUM_ORDERS + order
+ target_row = (first + place) * NUM_ORDERS
window off by one: clock @ cache_misses -k equals_the_simulator and float16
- tl.store(clock_ptr, tl.load(clock_ptr) + num_tokens)
+ tl.store(clock_ptr, tl.load(clock_ptr) + num_tokens - 1)
"""

_CACHED = "cache_lookup", ("cached_lookup/v41-packed",)

MUTANTS = (
    *mutants("probe_cache_kernel", *_CACHED, PROBE),
    *mutants("place_missed_kernel", *_CACHED, PLACE),
    *mutants("read_missed_kernel", *_CACHED, READ),
    *mutants("repeat_rows_kernel", *_CACHED, REPEAT),
)
