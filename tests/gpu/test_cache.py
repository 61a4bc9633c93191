"""What only a GPU shows of the n-gram cache: no waiting host, replays that go on, streams that take turns.

Written to need nothing but torch, Triton, numpy and pytest.
"""

import numpy as np
import pytest
import torch

from engram_kernels import NgramCache, hash_lookup
from engram_kernels.reference.cache.simulator import CacheSimulator, ngram_keys
from tests.ops.test_registration import same
from tests.support.gpu.ordering import ordered_by

from .test_kernels import graph_of
from .test_prefetch import LONG, TOKENS, Dropping, batches, setting, values

pytestmark = pytest.mark.gpu

SETS, WAYS = 8, 4


def cache_of(plan, placed, **options):
    return NgramCache(plan, placed, entries=SETS * WAYS, ways=WAYS, min_tokens=0, **options)


def simulated(plan, calls) -> CacheSimulator:
    simulator = CacheSimulator(4, SETS, WAYS)
    for ids in calls:
        simulator.look_up(ngram_keys(ids.cpu(), plan.to("cpu")))
    return simulator


def equals(cache, simulator) -> bool:
    """Whether stamps, the keys in use, time and counts are the simulator's."""
    torch.cuda.synchronize()
    keys, stamps, clock, counts = (part.cpu().numpy() for part in cache.state[:4])
    held = simulator.stamps > 0
    counted = np.stack([simulator.asked, simulator.hits, simulator.read, simulator.inserted, simulator.evicted])
    same_keys = np.array_equal(keys[held], simulator.keys[held])
    return same_keys and np.array_equal(stamps, simulator.stamps) and np.array_equal(counts, counted)


@pytest.mark.parametrize("order", ["direct", "head"])
def test_the_host_does_not_wait(device, order):
    plan, placed = setting(device)
    cache, given = cache_of(plan, placed), batches(device, 2)
    hash_lookup(given[0], plan, placed, cache=cache, order=order)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = hash_lookup(given[1], plan, placed, cache=cache, order=order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(rows, values(given[1], plan, placed))
    assert equals(cache, simulated(plan, given))


def test_replays_go_on(device):
    """Time, contents and counts after eager calls and replays are those of as many calls."""
    plan, placed = setting(device)
    cache, ids = cache_of(plan, placed), torch.zeros(TOKENS, dtype=torch.int64, device=device)
    graph, rows = graph_of(lambda: hash_lookup(ids, plan, placed, cache=cache))
    calls = [torch.zeros_like(ids)] * 3  # of the warm-up
    for high in (2, 40, 7, 40):
        ids.copy_(torch.randint(0, high, (TOKENS,)))
        calls.append(ids.clone())
        graph.replay()
        assert same(rows.clone(), values(ids, plan, placed))
        assert equals(cache, simulated(plan, calls))
    calls += batches(device, 1)
    assert same(hash_lookup(calls[-1], plan, placed, cache=cache), values(calls[-1], plan, placed))
    assert equals(cache, simulated(plan, calls))


def test_a_changed_table_before_a_replay(device):
    plan, placed = setting(device, "device", name="float32")
    cache, (ids,) = cache_of(plan, placed), batches(device, 1)
    graph, rows = graph_of(lambda: hash_lookup(ids, plan, placed, cache=cache))
    placed[1].weight.add_(1)
    cache.refresh()
    graph.replay()
    assert same(rows, values(ids, plan, placed))


@pytest.mark.parametrize("dropped", [None, ("late", "early")])
def test_streams_take_turns(device, dropped):
    """A call on a stream that sleeps first, then one on another: the second comes after, by the event alone."""
    plan, placed = setting(device)
    early, late = torch.cuda.Stream(), torch.cuda.Stream()
    streams = Dropping(device, dropped, {early: "early", late: "late"})
    with ordered_by(streams):
        cache, given = cache_of(plan, placed), batches(device, 2)
    hash_lookup(given[0], plan, placed, cache=cache)  # compiled: that takes longer than the sleep
    cache.clear()
    cache.state.clock.fill_(cache.state.lag)
    cache.state.counts.zero_()
    torch.cuda.synchronize()
    found = []
    for stream, ids in zip((early, late), given, strict=True):
        with torch.cuda.stream(stream):
            if stream == early:
                torch.cuda._sleep(LONG)
            found.append(hash_lookup(ids, plan, placed, cache=cache))
    assert equals(cache, simulated(plan, given)) == (dropped is None)
    if dropped is None:
        assert all(same(rows, values(ids, plan, placed)) for rows, ids in zip(found, given, strict=True))


def test_a_file_across_placements(device, tmp_path):
    """Hot keys of tables on the host, loaded beside tables on the device: the same rows, all of them hits."""
    plan, placed = setting(device)
    (ids,) = batches(device, 1, 20)
    first = NgramCache(plan, placed, entries=512, min_tokens=0)
    first.warm(ids)
    path = first.save(tmp_path / "hot.npz")
    plan, placed = setting(device, "device")
    second = NgramCache(plan, placed, entries=512, min_tokens=0)
    second.load(path)
    assert same(hash_lookup(ids, plan, placed, cache=second), values(ids, plan, placed))
    stats = second.stats()
    assert stats.hits == stats.asked and not np.array(stats.read).any()
