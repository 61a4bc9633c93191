"""hash_lookup through an n-gram cache: the same bits as without, and what it holds and hits as the simulator says."""

import numpy as np
import pytest
import torch

from engram_kernels import HashPlan, NgramCache, hash_lookup, reference
from engram_kernels.cache import lookup as cache_lookup
from engram_kernels.cache.store import COUNTS
from engram_kernels.ops import hash_rows
from engram_kernels.reference.cache.simulator import CacheSimulator, ngram_keys, scramble
from engram_kernels.testing import tables
from engram_kernels.testing.guards import Guarded
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import ragged, small_plan

CPU = torch.device("cpu")


class Pair:
    """A cache and the simulator, given the same calls; rows are compared with those of the reference without either."""

    def __init__(self, device, plan, width=32, name="e4m3_ue8m0", *, sets=3, ways=2, dtype=torch.float32):
        parts = parts_of(plan, width, name)
        self.device, self.plan, self.dtype = device, plan, dtype
        self.on_cpu = [tables.place(*part, CPU) for part in parts]
        self.tables = self.on_cpu if device.type == "cpu" else [tables.place(*part, device) for part in parts]
        self.moved = plan.to(device)
        self.cache = NgramCache(self.moved, self.tables, entries=sets * ways, ways=ways, min_tokens=0)
        self.groups = plan.primes.shape[0] * (plan.max_ngram - 1)
        self.simulator = CacheSimulator(self.groups, sets, ways)

    def look_up(self, ids, storage=False, **options):
        moved = {name: value.to(self.device) for name, value in options.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in options.items() if name not in moved}
        simulated = {name: options[name] for name in moved}
        self.simulator.look_up(ngram_keys(ids, self.plan, **simulated))
        shape = (len(self.tables), *ids.shape, self.plan.primes.shape[1], self.tables[0].width)
        at = dict(cache=self.cache, **moved, **rest)
        if storage:
            at |= dict(out_format="storage")
            found = hash_lookup(ids.to(self.device), self.moved, self.tables, **at)
            wanted = reference.hash_lookup(ids, self.plan, self.on_cpu, out_format="storage", **simulated)
            for part, expected in zip(found, wanted, strict=True):
                if expected is not None:
                    assert torch.equal(part.cpu().view(torch.uint8), expected.view(torch.uint8))
        else:
            out = Guarded(shape, self.dtype, self.device)
            hash_lookup(ids.to(self.device), self.moved, self.tables, out=out.tensor, out_dtype=self.dtype, **at)
            wanted = reference.hash_lookup(ids, self.plan, self.on_cpu, out_dtype=self.dtype, **simulated)
            assert tables.same_bits(out.check(), wanted, truncated=False)
        self.check()

    def check(self):
        """State and counts are the simulator's, and entries hold the rows of their keys."""
        state, simulator = self.cache.state, self.simulator
        assert np.array_equal(state.stamps.cpu().numpy(), simulator.stamps)
        held = simulator.stamps > 0
        assert np.array_equal(state.keys.cpu().numpy()[held], simulator.keys[held])
        counted = dict(zip(COUNTS, state.counts.cpu().numpy(), strict=True))
        for name in COUNTS:
            assert counted[name].tolist() == getattr(simulator, name).tolist(), name
        assert int(state.clock) == simulator.clock


def stream(lengths=(19, 1, 9, 13)):
    """Calls of several lengths whose n-grams come again, some often, some within a call."""
    generator = torch.Generator().manual_seed(3)
    text = (torch.rand(100, generator=generator) ** 3 * 40).long()
    text[25:40] = text[:15]
    text[20:24] = text[19]
    at = 0
    for length in lengths:
        yield text[at : at + length]
        at += length // 2


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "width", "dialect", "wrapping", "sets", "ways"),
    [
        ("e4m3_ue8m0", 96, "map", False, 3, 2),
        ("e4m3", 16, "eos", True, 5, 1),
        ("float16", 80, "raw", False, 1, 4),
    ],
)
def test_kernel_equals_the_simulator(device, name, width, dialect, wrapping, sets, ways):
    plan = small_plan(layers=1 if sets == 1 else 2, dialect=dialect, wrapping=wrapping)
    pair = Pair(device, plan, width, name, sets=sets, ways=ways)
    for ids in stream():
        pair.look_up(ids)
    counts = {count: int(getattr(pair.simulator, count).sum()) for count in COUNTS}
    assert min(counts["hits"], counts["evicted"], counts["read"] - counts["inserted"]) > 5, counts


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("order", "name", "width"),
    [
        ("direct", "e4m3_ue8m0", 32),
        ("head", "bfloat16", 64),
        ("address", "e4m3", 128),
        ("direct", "nvfp4", 32),
        ("head", "mxfp4", 96),
    ],
)
def test_kernel_short_calls(device, order, name, width):
    """Calls of one to three tokens beside a longer one; rows of up to 128 bytes, which come 32 a step."""
    pair = Pair(device, small_plan(layers=1), width, name, sets=2, ways=2)
    for storage, ids in enumerate(stream((3, 1, 2, 9, 1))):
        pair.look_up(ids, order=order, storage=bool(storage % 2), programs=2 if len(ids) == 2 else None)
    assert pair.simulator.hits.min() > 2 and pair.simulator.evicted.min() > 0


@pytest.mark.kernel
def test_kernel_windows_and_batches(device, monkeypatch):
    """Sequences, history, dead and invalid ids; int32 ids; [B, S]; storage; head order and direct order."""
    monkeypatch.setattr(hash_rows, "check_token_values", lambda *_: None)  # on a GPU nobody asks
    ids, cu, history, dead = ragged(invalid=True)
    pair = Pair(device, small_plan(), 64, "e4m3_ue8m0", sets=4, ways=4)
    options = dict(cu_seqlens=cu, history=history, dead=dead)
    pair.look_up(ids, **options, order="direct")
    pair.look_up(ids.int(), **options, storage=True, programs=1)
    assert pair.simulator.hits.min() > 2
    assert pair.simulator.asked.max() < 2 * 19, "padding is not asked for"
    pair.look_up(torch.full((3, 5), 7), storage=True)
    assert (pair.simulator.asked - pair.simulator.hits > pair.simulator.read).all(), "some are copied from others"
    pair.look_up(ids[:0])


@pytest.mark.kernel
def test_kernel_evicts_everything_in_every_call(device):
    """One set of one way: distinct n-grams take it from each other, and one asked for again stays."""
    pair = Pair(device, small_plan(layers=1), 4, "float32", sets=1, ways=1)
    for start in (0, 10, 20, 0):
        pair.look_up(torch.arange(start, start + 9))
    assert pair.simulator.evicted.tolist() == [3, 3] and not pair.simulator.hits.any()
    pair.look_up(torch.full((40,), 5))
    pair.look_up(torch.full((7,), 5))
    assert pair.simulator.hits.sum() >= 6


@pytest.mark.kernel
def test_kernel_most_ways(device):
    """One set of 32 ways that fills, is taken from by more n-grams than it has, and keeps what was hit."""
    pair = Pair(device, small_plan(layers=1, max_ngram=2, heads=1), 4, "float32", sets=1, ways=32)
    for ids in (torch.arange(40), torch.arange(28, 40), torch.arange(20).flip(0)):
        pair.look_up(ids)
    assert pair.simulator.evicted.min() > 5 and pair.simulator.hits.min() > 2


@pytest.mark.kernel
def test_kernel_many_groups(device):
    pair = Pair(device, small_plan(layers=6, max_ngram=4, heads=1), 4, "float32", sets=2, ways=2)
    assert pair.groups == 18
    for start in (0, 2):
        pair.look_up(torch.arange(start, start + 4))
    assert pair.simulator.inserted.min() > 0


@pytest.mark.kernel
def test_kernel_key_0(device):
    """The one mix whose key is 0 is read like any other, in every call, and never kept."""
    mix = 0x9E3779B97F4A7C15 - 2**64
    assert scramble(np.array([mix]))[0] == 0
    # Ids are not negative, so the multiplier is: its product with 1 is the mix.
    plan = HashPlan.from_parts(torch.tensor([[mix, 1]]), torch.tensor([[101, 103]]), pad=0)
    pair = Pair(device, plan, 4, "float32", sets=2, ways=2)
    for _ in range(2):
        pair.look_up(torch.tensor([1, 0, 1, 0, 0]))
    assert pair.simulator.asked.tolist() == [2 * 3]


@pytest.mark.kernel
def test_kernel_empties_what_was_left_half_written(device, monkeypatch):
    """Where the last launch fails ways have new rows and old keys: none of them is a hit afterwards."""
    pair = Pair(device, small_plan(), 8, "float32", sets=1, ways=2)
    pair.look_up(torch.arange(5))

    class Fails:
        def __getitem__(self, grid):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_lookup, "keep_missed_kernel", Fails())
        hash_lookup(torch.arange(20, 25).to(device), pair.moved, pair.tables, cache=pair.cache)
    state, simulator = pair.cache.state, pair.simulator
    assert not state.stamps.any()
    for name in COUNTS:
        getattr(simulator, name)[:] = state.counts[COUNTS.index(name)].cpu().numpy()
    simulator.stamps[:] = 0
    pair.look_up(torch.arange(5))


@pytest.mark.kernel
def test_kernel_loads_what_was_saved(device, tmp_path):
    """Keys from a file, rows from the tables, into a cache of the same and of a smaller size; then goes on."""
    plan = small_plan()
    pair = Pair(device, plan, 96, "e4m3_ue8m0", sets=4, ways=4)
    pair.look_up(torch.arange(19) % 7)
    pair.look_up(torch.arange(19) % 11)
    path = pair.cache.save(tmp_path / "hot.npz")
    for sets in (4, 1):
        other = Pair(device, plan, 96, "e4m3_ue8m0", sets=sets, ways=4)
        other.cache.load(path)
        for name in ("keys", "stamps"):
            getattr(other.simulator, name)[:] = getattr(other.cache.state, name).cpu().numpy()
        other.simulator.clock = int(other.cache.state.clock)
        held = [set(keys[stamps > 0]) for keys, stamps in zip(pair.simulator.keys, pair.simulator.stamps, strict=True)]
        kept = [
            set(keys[stamps > 0]) for keys, stamps in zip(other.simulator.keys, other.simulator.stamps, strict=True)
        ]
        assert kept == held if sets == 4 else all(a < b and len(a) == 4 for a, b in zip(kept, held, strict=True))
        other.look_up(torch.arange(7))
        assert other.simulator.hits.sum() > 5
