"""NgramCache without kernels: sizes, errors, what empties it, order between streams, statistics, warm start, files."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels import HashPlan, NgramCache, Prefetcher, RowAdagrad, hash_lookup, reference
from engram_kernels.cache.policy import fewest_tokens
from engram_kernels.reference.cache.simulator import ngram_keys
from engram_kernels.testing import tables
from tests.ops.test_hashing import ragged, small_plan
from tests.support.gpu.fake_streams import FakeStreams
from tests.support.gpu.ordering import ordered_by

from .test_lookup import CPU, Pair, stream

ROOT = Path(__file__).parents[2]


def test_the_reference_is_the_simulator():
    """On a CPU without kernels: hits and counts of the specification, rows from the tables."""
    pair = Pair(CPU, small_plan(layers=3, heads=3), 8, "float32", sets=6, ways=4)
    for ids in stream():
        pair.look_up(ids)
    ids, cu, history, dead = ragged()
    pair.look_up(ids.view(1, 19))
    pair.look_up(ids, cu_seqlens=cu, history=history, dead=dead, storage=True)
    assert pair.simulator.hits.min() > 5
    assert pair.cache.state.rows.numel() == 0, "rows are read from the tables"
    pair.cache.clear()
    pair.simulator.stamps[:] = 0
    pair.look_up(ids)


def test_sizes():
    """What the memory formula says: V4.1, 3 orders of 8 rows of 264 bytes, and 16 bytes of key and stamp."""
    plan = HashPlan.from_parts(torch.ones(2, 4).long(), torch.full((2, 24), 3), pad=0, vocab_size=9)
    placed = [tables.place(*tables.random_parts(72, 256, "e4m3_ue8m0"), CPU)] * 2
    cache = NgramCache(plan, placed, entries=1000)
    assert (cache.entries, cache.sets, cache.ways, cache.entry_bytes) == (1000, 125, 8, 2112)
    assert cache.nbytes == 6 * 1000 * (2112 + 16)
    again = NgramCache(plan, placed, bytes=cache.nbytes, ways=8)
    assert again.entries == 1000 and NgramCache(plan, placed, bytes=cache.nbytes - 1).entries == 992
    assert cache.min_tokens == fewest_tokens(6 * 2112) == 497


def test_short_calls_go_past_the_cache():
    pair = Pair(CPU, small_plan(), 8, "float32")
    pair.cache.min_tokens = 5
    before = int(pair.cache.state.clock)
    for length in (0, 1, 4):
        rows = hash_lookup(torch.arange(length), pair.moved, pair.tables, cache=pair.cache)
        assert torch.equal(rows, reference.hash_lookup(torch.arange(length), pair.plan, pair.on_cpu))
    assert int(pair.cache.state.clock) == before and not pair.cache.state.counts.any()
    stats = pair.cache.stats()
    assert (stats.min_tokens, stats.bypassed_calls, stats.bypassed_tokens) == (5, 3, 5)
    assert str(stats).endswith("with fewer than min_tokens = 5: 3 calls of 5 tokens")
    hash_lookup(torch.arange(5), pair.moved, pair.tables, cache=pair.cache)
    assert pair.cache.stats().bypassed_calls == 3 and pair.cache.stats().asked != stats.asked
    assert int(pair.cache.state.clock) == before + 5 and pair.cache.state.counts.any()


def cached(pair, ids):
    return hash_lookup(ids, pair.moved, pair.tables, cache=pair.cache)


def test_a_changed_table_empties_its_layer():
    """By torch's own writes, by what says so, and by an optimizer's step; the other layer's entries stay."""
    pair = Pair(CPU, small_plan(), 8, "float32", sets=8, ways=4)
    stamps, ids = pair.cache.state.stamps, torch.arange(9)
    changed = pair.tables[1]

    def write():
        changed.weight[:] += 1

    def step():
        changed.requires_row_grad_()
        optimizer = RowAdagrad(changed)
        changed.accumulate_row_grad(torch.tensor([3]), torch.ones(1, 8))
        optimizer.step()
        changed.requires_row_grad_(False)

    for change in (write, changed.rows_changed, step):
        cached(pair, ids)
        before, version = stamps.clone(), changed.version
        assert before[:2].any() and before[2:].any()
        change()
        assert changed.version > version
        pair.cache.refresh()
        assert torch.equal(stamps[:2], before[:2]) and not stamps[2:].any(), change
        assert torch.equal(cached(pair, ids), reference.hash_lookup(ids, pair.plan, pair.tables))
    pair.cache.refresh()
    assert stamps[2:].any(), "nothing has changed since"


def test_training_through_a_cache():
    """Each step sees the rows that the last one left, and the gradient is the same as without."""
    cached_run, plain = (Pair(CPU, small_plan(), 8, "float32", sets=8, ways=4) for _ in range(2))
    ids, target = torch.arange(30) % 11, torch.randn(2, 30, 4, 8)
    losses = []
    for pair, cache in ((cached_run, cached_run.cache), (plain, None)):
        for table in pair.tables:
            table.requires_row_grad_()
        optimizer = RowAdagrad(pair.tables, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (hash_lookup(ids, pair.moved, pair.tables, cache=cache) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:] and losses[2] < losses[1] < losses[0]
    assert cached_run.cache.stats().evicted == [[0, 0]] * 2, "emptied by each step"


ORDERS = list(itertools.permutations(["one", "two"]))


def run_order(dropped, captured, first):
    """Two calls of two steps each, on streams of their own; then one more on the first."""
    streams, log = FakeStreams("one", dropped), []
    pair = Pair(CPU, small_plan(), 8, "float32")
    with ordered_by(streams):
        cache = NgramCache(pair.moved, pair.tables, entries=8)

    def call(stream):
        with streams.stream(stream), cache.in_order():
            for half in ("begins", "ends"):
                streams.run(stream, lambda half=half: log.append((stream, half)))

    if captured:
        with streams.capture("one") as replay:
            call("one")
    calls = [lambda: replay("one") if captured else call("one"), lambda: call("two")]
    for at in (0, 1, 0):
        calls[at]()
    streams.drain([*first, "side"])
    return log == [(stream, half) for stream in ("one", "two", "one") for half in ("begins", "ends")]


@pytest.mark.parametrize("captured", [False, True])
def test_streams_take_turns(captured):
    assert all(run_order(None, captured, first) for first in ORDERS)


@pytest.mark.parametrize("dropped", [("two", "one"), ("one", "two")])
def test_each_wait_is_needed(dropped):
    assert not all(run_order(dropped, False, first) for first in ORDERS)


def test_a_prefetcher_with_a_cache():
    """Its starts are calls of the cache, with the same rows; what it is given must fit."""
    pair = Pair(CPU, small_plan(), 8, "float32", sets=8, ways=4)
    prefetcher = Prefetcher(pair.moved, pair.tables, 40, cache=pair.cache)
    pair.cache.min_tokens = 5
    ids, cu, history, dead = ragged()
    options = dict(cu_seqlens=cu, history=history, dead=dead)
    for length in (19, 19, 4):
        chosen = options if length == 19 else {}
        prefetcher.start(ids[:length], **chosen)
        expected = reference.hash_lookup(ids[:length], pair.plan, pair.on_cpu, **chosen)
        assert all(torch.equal(prefetcher.rows(layer), expected[layer]) for layer in range(2))
        if length == 19:
            pair.simulator.look_up(ngram_keys(ids, pair.plan, **options))
        pair.check()
    assert pair.simulator.hits.min() > 5
    with pytest.raises(ValueError, match="Prefetcher: cache must be made for this very plan and these tables"):
        Prefetcher(pair.plan, pair.tables, 40, cache=pair.cache)


def test_statistics():
    pair = Pair(CPU, small_plan(max_ngram=4, heads=3), 8, "float32", sets=4, ways=2)
    for ids in stream():
        pair.look_up(ids)
    stats, simulator = pair.cache.stats(), pair.simulator
    for name in ("asked", "hits", "read", "inserted", "evicted"):
        assert np.array_equal(np.array(getattr(stats, name)).reshape(-1), getattr(simulator, name)), name
    assert np.array_equal(np.array(stats.used).reshape(-1), (simulator.stamps > 0).sum((1, 2)))
    assert np.array(stats.misses).sum() == (simulator.asked - simulator.hits).sum()
    saved = (simulator.asked - simulator.read).reshape(2, 3) * 3 * 8 * 4
    assert stats.bytes_saved == saved.tolist() and saved.min() > 0
    lines = str(stats).splitlines()
    assert len(lines) == 1 + 2 * 3 + 1 and f"{stats.asked[1][2]:,}" in lines[-2]


def test_warm_start():
    """What a text leaves, in parts that continue each other, and no count of it."""
    plan, text = small_plan(), torch.cat([torch.arange(40)] * 110)
    pair, whole = (Pair(CPU, plan, 8, "float32", sets=64, ways=4) for _ in range(2))
    told = []
    pair.cache.warm(text, progress=lambda done, total: told.append((done, total)))
    assert told == [(2048, 4400), (4096, 4400), (4400, 4400)]
    assert not np.array(pair.cache.stats().asked).any() and pair.cache.min_tokens == 0
    cached(whole, text)
    assert pair.cache.stats().used == whole.cache.stats().used
    cached(pair, text[:40])
    assert pair.cache.stats().hits == [[40, 40]] * 2
    pair.cache.clear()
    pair.cache.warm(text[:80].view(2, 40).int())
    assert np.array(pair.cache.stats().used).max() <= 40, "sequences start at each row"


def test_keys_of_another_token_map_are_refused(tmp_path):
    """As many ids, of a tokenizer of another revision."""
    plan = small_plan()
    map_ = torch.arange(50, dtype=torch.int32)
    plans = [dataclasses.replace(plan, token_map=token_map) for token_map in (map_, map_.flip(0))]
    pairs = [Pair(CPU, each, 8, "float32", sets=8, ways=4) for each in plans]
    path = pairs[0].cache.save(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="NgramCache.load: .* must hold keys of the cache's own token map"):
        pairs[1].cache.load(path)
    pairs[0].cache.load(path)


def test_save_and_load(tmp_path):
    pair, other = (Pair(CPU, small_plan(), 8, "float32", sets=3, ways=2) for _ in range(2))
    for ids in stream():
        cached(pair, ids)
    path = pair.cache.save(tmp_path / "hot.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["hot.npz"]
    other.cache.load(str(path))
    assert int(other.cache.state.clock) == int(pair.cache.state.clock)
    assert torch.equal(other.cache.state.stamps.sort(dim=2)[0], pair.cache.state.stamps.sort(dim=2)[0])
    assert torch.equal(other.cache.state.keys.sort(dim=2)[0], pair.cache.state.keys.sort(dim=2)[0])
    stranger = Pair(CPU, small_plan(wrapping=True), 8, "float32", sets=3, ways=2)
    with pytest.raises(ValueError, match="NgramCache.load: .* must hold keys of the cache's own plan"):
        stranger.cache.load(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="NgramCache.load: .* must be a file that NgramCache.save wrote"):
        other.cache.load(path)
    with pytest.raises(FileNotFoundError):
        other.cache.load(tmp_path / "none.npz")


ERRORS = [
    (ValueError, "one of bytes and entries must be given", {}),
    (ValueError, "one of bytes and entries must be given", dict(bytes=1 << 20, entries=64)),
    (ValueError, "ways must be one of 1, 2, 4.* 32, got 3", dict(entries=64, ways=3)),
    (ValueError, "ways must be one of 1, 2, 4.* 32, got 64", dict(entries=64, ways=64)),
    (ValueError, "ways must be one of 1, 2, 4.* 32, got True", dict(entries=64, ways=True)),
    (ValueError, "entries must be an int of at least 0 or None, got 64.0", dict(entries=64.0)),
    (ValueError, "min_tokens must be an int of at least 0 or None, got -1", dict(entries=64, min_tokens=-1)),
    (ValueError, "one set of 8 ways needs at least entries=8, got entries=7", dict(entries=7)),
    (ValueError, "one set of 8 ways needs at least bytes=2560, got bytes=2559", dict(bytes=2559)),
    (ValueError, r"groups \* entries must be below 2\^31, got 4 groups of 536870912", dict(entries=1 << 29)),
    (TypeError, "plan must be a HashPlan, got NoneType", dict(entries=64, plan=None)),
    (TypeError, "tables must be a sequence of EngramTable", dict(entries=64, tables=None)),
    (ValueError, "tables must be one per layer of the plan, 2, got 0", dict(entries=64, tables=())),
]


@pytest.mark.parametrize(("error", "words", "changes"), ERRORS)
def test_errors_of_the_constructor(error, words, changes):
    pair = Pair(CPU, small_plan(), 8, "float32")
    options = dict(plan=pair.moved, tables=pair.tables) | changes
    with pytest.raises(error, match=f"NgramCache: {words}"):
        NgramCache(options.pop("plan"), options.pop("tables"), **options)


def test_errors_of_plans_and_formats():
    pair = Pair(CPU, small_plan(), 8, "float32")
    with pytest.raises(ValueError, match=r"equally many columns .* got columns of orders \[2, 3, 3\]"):
        NgramCache(pair.plan.select(columns=[0, 2, 3]), pair.tables, entries=64)
    with pytest.raises(ValueError, match=r"in that order, got columns of orders \[3, 3, 2, 2\]"):
        NgramCache(pair.plan.select(columns=[2, 3, 0, 1]), pair.tables, entries=64)
    doubles = [tables.place(table.weight.double(), None, CPU) for table in pair.tables]
    with pytest.raises(ValueError, match="NgramCache: rows must be of a format that kernels read"):
        NgramCache(pair.plan, doubles, entries=64)


def test_errors_of_lookups():
    pair, other = (Pair(CPU, small_plan(), 8, "float32") for _ in range(2))
    ids = torch.arange(5)
    with pytest.raises(TypeError, match="hash_lookup: cache must be an NgramCache, got str 'yes'"):
        hash_lookup(ids, pair.moved, pair.tables, cache="yes")
    for plan, placed in ((pair.moved, other.tables), (other.moved, pair.tables), (pair.moved, [pair.tables[1]] * 2)):
        with pytest.raises(ValueError, match="hash_lookup: cache must be made for this very plan and these tables"):
            hash_lookup(ids, plan, placed, cache=pair.cache)
    with pytest.raises(TypeError, match="NgramCache.warm: token_ids must be a tensor of int32 or int64"):
        pair.cache.warm([1, 2])
    with pytest.raises(ValueError, match=r"NgramCache.warm: token_ids must have shape \[T\] or \[B, S\]"):
        pair.cache.warm(ids.view(1, 1, 5))


def test_the_documents_examples(tmp_path, monkeypatch):
    """The Python blocks of docs/cache.md behind its set-up, with the bits of the reference."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "cache.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    pair, ids = Pair(CPU, small_plan(), 8, "float32"), torch.arange(400) % 40
    names = dict(NgramCache=NgramCache, hash_lookup=hash_lookup, plan=pair.moved, tables=pair.tables, token_ids=ids)
    for block in blocks[1:]:
        exec(block, names)
    assert torch.equal(names["rows"], reference.hash_lookup(ids, pair.plan, pair.tables))
    assert (tmp_path / "hot.npz").exists()
