"""The specification of the n-gram cache: against streams worked by hand, and a cache that is written key by key."""

import numpy as np
import pytest
import torch

from engram_kernels import reference
from engram_kernels.reference.cache.simulator import LAG, CacheSimulator, ngram_keys, scramble, set_of, unscramble
from tests.ops.test_hashing import ragged, small_plan

LOWEST, GOLDEN = -(2**63), 0x9E3779B97F4A7C15
LOW, HIGH = LOWEST >> 1, 2**62  # keys of the lower and the upper of two sets start at these


def counts(sim):
    return [int(count[0]) for count in (sim.asked, sim.hits, sim.read, sim.inserted, sim.evicted)]


def test_keys_are_splitmix64s_numbers():
    # The published first outputs of that generator from seed 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = np.array([(1234567 + GOLDEN * step) % 2**64 for step in range(1, 6)], dtype=np.uint64)
    mixes = (states ^ np.uint64(GOLDEN)).view(np.int64)
    assert scramble(mixes).view(np.uint64).tolist() == outputs


def test_keys_are_exact_and_only_a_negative_mix_has_key_0():
    generator = np.random.default_rng(0)
    mixes = generator.integers(LOWEST, 2**63 - 1, 1000, endpoint=True)
    mixes[:4] = 0, -1, LOWEST, 2**63 - 1
    assert (unscramble(scramble(mixes)) == mixes).all()
    assert unscramble(np.zeros(1, dtype=np.int64)).tolist() == [GOLDEN - 2**64]
    assert scramble(mixes)[0] != 0


def test_sets_share_all_keys_in_ascending_order():
    keys = np.array([LOWEST, -1, 0, 2**63 - 1])
    assert set_of(keys, 2).tolist() == [0, 0, 1, 1]
    assert set_of(keys, 1).tolist() == [0, 0, 0, 0]
    assert set_of(keys, 2**31 - 1).tolist() == [0, 2**30 - 1, 2**30 - 1, 2**31 - 2]
    spread = np.sort(scramble(np.arange(21_000)))
    assert (np.diff(set_of(spread, 21)) >= 0).all()
    assert np.bincount(set_of(spread, 21)).min() > 850


def test_keys_have_the_rows_of_ngram_hash():
    """Every row id follows from the key of its n-gram; wrapping multipliers, so that mixes of both signs come."""
    plan = small_plan(wrapping=True)
    ids, cu, history, dead = ragged(invalid=True)
    options = dict(cu_seqlens=cu, history=history, dead=dead)
    keys = ngram_keys(ids, plan, **options)
    assert keys.shape == (2 * 2, len(ids)) and keys.dtype == np.int64
    per_layer = torch.from_numpy(keys).view(2, 2, -1)
    rows = reference.ngram_hash(ids, plan, **options)
    for column, order in enumerate(plan.orders.tolist()):
        of_order = per_layer[:, order - 2].T
        mixes = torch.from_numpy(unscramble(of_order.numpy()))
        expected = torch.remainder(mixes, plan.primes[:, column]) + plan.offsets[:, column]
        assert torch.equal(rows[..., column].long(), torch.where(of_order == 0, -1, expected))
    assert (rows < 0).any() and (rows >= 0).any()


def test_the_lowest_stamps_make_room():
    """One set of two ways, worked by hand. The clock starts at the lag, 8 times its 2 entries."""
    sim = CacheSimulator(1, 1, 2)
    steps = [
        # keys asked for, hits, then key and stamp of both ways; the lag (16) is taken from the stamps of new keys
        ([5, 5], [0, 0], [(5, 18 - 16), (0, 0)]),  # read once for both; way 0 is the first of the empty ones
        ([0, 5, 7], [0, 1, 0], [(5, 21), (7, 21 - 16)]),  # 0 is no n-gram
        ([9], [0], [(5, 21), (9, 22 - 16)]),  # evicts 7, which was not hit
        ([4, 5], [0, 1], [(5, 24), (4, 24 - 16)]),
        ([5, 3, 2], [1, 0, 0], [(5, 27), (2, 27 - 16)]),  # of 2 and 3 one finds a way; 5 is in use
        ([0] * 16, [0] * 16, [(5, 27), (2, 27 - 16)]),  # time passes
        ([1], [0], [(5, 27), (1, 44 - 16)]),  # 2 is still the older one
        ([2], [0], [(2, 45 - 16), (1, 44 - 16)]),  # 5 was hit 17 tokens before 1 was read
        ([2, 1], [1, 1], [(2, 47), (1, 47)]),
        ([8, 7, 6], [0, 0, 0], [(6, 50 - 16), (7, 50 - 16)]),  # equal stamps: the lower way first; 8 finds none
    ]
    for asked, hits, ways in steps:
        found = sim.look_up(np.array([asked]))
        assert found.tolist() == [[bool(hit) for hit in hits]]
        assert list(zip(sim.keys[0, 0], sim.stamps[0, 0], strict=True)) == ways
    # 11 were read, 9 of them kept, 2 of these in empty ways.
    assert counts(sim) == [17, 5, 11, 9, 7]


def test_sets_and_groups_are_apart():
    sim = CacheSimulator(2, 2, 1)
    asked = np.array([[LOW, HIGH, LOW + 1], [HIGH, HIGH, 0]])
    assert not sim.look_up(asked).any()
    assert sim.keys[..., 0].tolist() == [[LOW, HIGH], [0, HIGH]]
    assert sim.look_up(asked).tolist() == [[True, True, False], [True, True, False]]
    assert sim.evicted.tolist() == [0, 0] and sim.read.tolist() == [4, 1]
    sim.stamps[:] = 0  # emptied: what a way's key was is of no account
    assert not sim.look_up(asked).any() and sim.evicted.tolist() == [0, 0]
    # An empty way holds key 0, and is no hit for what shares its bits.
    assert CacheSimulator(1, 1, 1).look_up(np.array([[0]])).tolist() == [[False]]
    assert CacheSimulator(1, 1, 1).look_up(np.zeros((1, 0), dtype=np.int64)).shape == (1, 0)


class KeyByKey:
    """The same rules without arrays: a dict per set, from key to (way, stamp)."""

    def __init__(self, sets, ways):
        self.sets, self.ways, self.lag = [{} for _ in range(sets)], ways, LAG * sets * ways
        self.clock = self.lag

    def look_up(self, keys):
        self.clock += len(keys)
        before = [dict(content) for content in self.sets]
        hits = [key != 0 and key in before[self.place(key)] for key in keys]
        for key, hit in zip(keys, hits, strict=True):
            if hit:
                self.sets[self.place(key)][key] = (before[self.place(key)][key][0], self.clock)
        taken = [set() for _ in self.sets]
        for key in sorted({key for key, hit in zip(keys, hits, strict=True) if key and not hit}):
            content, gone = self.sets[self.place(key)], taken[self.place(key)]
            held = {way: (stamp, other) for other, (way, stamp) in content.items()}
            left = [way for way in range(self.ways) if way not in gone and held.get(way, (0,))[0] < self.clock]
            if left:
                way = min(left, key=lambda way: (held.get(way, (0,))[0], way))
                content.pop(held.get(way, (0, None))[1], None)
                content[key] = (way, self.clock - self.lag)
                gone.add(way)
        return hits

    def place(self, key):
        return (key + 2**63) * len(self.sets) >> 64


@pytest.mark.parametrize(("sets", "ways"), [(1, 1), (1, 4), (5, 1), (3, 2), (4, 8)])
def test_random_streams_key_by_key(sets, ways):
    generator = np.random.default_rng(sets * 10 + ways)
    pool = scramble(np.arange(3 * sets * ways))
    pool[0] = 0
    sim, plain = CacheSimulator(1, sets, ways), KeyByKey(sets, ways)
    for length in generator.integers(0, 2 * sets * ways + 2, 60):
        asked = pool[(len(pool) * generator.random(length) ** 2).astype(int)]
        assert sim.look_up(asked[None])[0].tolist() == plain.look_up(asked.tolist())
        held = [
            {int(k): (way, int(s)) for way, (k, s) in enumerate(zip(keys, stamps, strict=True)) if s}
            for keys, stamps in zip(sim.keys[0], sim.stamps[0], strict=True)
        ]
        assert held == plain.sets
    assert sim.hits[0] > 10 and sim.evicted[0] > 10
