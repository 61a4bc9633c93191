"""Rows of other ranks that a rank keeps: the bits of one process, the specified policy, and only misses exchanged."""

import re

import numpy as np
import pytest
import torch

from engram_kernels.commands.traffic import exchange_a_token, lookup_exchange
from engram_kernels.ranks.kept import KeptRows, least_bytes
from engram_kernels.reference.cache.simulator import WAYS, CacheSimulator, scramble, scramble_tensor
from tests.support.documents import Document
from tests.support.rank_cases import WIDTH
from tests.support.ranks import Each, World


@pytest.fixture(scope="module", params=(2, 3), ids=lambda size: f"{size} ranks")
def world(request, tmp_path_factory):
    made = World(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "kind, format, split, entries, evicts",
    [
        ("wide", "e4m3_ue8m0", "columns", 64, True),
        ("wide", "nvfp4", "rows", 8, True),
        ("wide", "bfloat16", "columns", 10_000, False),
        ("tiny", "float32", "rows", 8, None),
    ],
)
def test_only_misses_are_exchanged(world, kind, format, split, entries, evicts):
    """Bits, the bytes of each exchange, and hits as the specification has them, of ranks that may ask for nothing."""
    answers = world.run("rank_caches.kept", kind, format, split, entries)
    row = {"e4m3_ue8m0": WIDTH + WIDTH // 32, "nvfp4": WIDTH // 2 + WIDTH // 16}.get(
        format, WIDTH * (2 if format == "bfloat16" else 4)
    )
    for rank, (found, moved, missed, metrics, cache_bytes) in enumerate(answers):
        assert all(found), found
        for step, calls in enumerate(moved):
            given = sum(other[2][step][rank] for other in answers)
            assert tuple(calls) == lookup_exchange(world.size, sum(missed[step]), given, row, 4, cached=True)
        assert metrics["lookups"] == len(moved) + 2 and 0 < metrics["nbytes"] <= cache_bytes
        assert metrics["hits"] + metrics["received"] == metrics["distinct"] and metrics["hits"] > 0
        assert metrics["received"] >= sum(map(sum, missed))
        assert evicts is None or evicts == (metrics["received"] > metrics["entries"])


@pytest.mark.parametrize("cached", [False, True])
def test_bytes_of_a_token_are_those_of_the_plan(world, cached):
    """With the share of rows that one stream misses, of all ranks' rows: counted bytes are within 5 %."""
    answers = world.run("rank_caches.modelled", 20, 5, cached)
    sent = sum(sent for sent, *_ in answers) / world.size
    share = sum(share for _, share, _ in answers) / world.size
    size, tokens, columns, row = answers[0][2]
    assert size == world.size and 0.3 < share < (0.7 if cached else 0.95)
    assert sent == pytest.approx(exchange_a_token(size, tokens, share * columns, row, 4, cached), rel=0.05)


@pytest.mark.parametrize("how", ["write_rows", "torch", "rows_changed"])
def test_a_rank_changes_its_rows_alone(world, how):
    """All ranks kept them; the next lookup of all has the new ones."""
    for answer in world.run("rank_caches.changed_alone", how):
        assert all(answer), answer


def test_overlays_are_seen(world, tmp_path):
    path = str(tmp_path / "overlay.safetensors")
    for found in world.run("rank_overlays.overlaid", "wide", "e4m3_ue8m0", "columns", path, cache_bytes=1 << 20):
        assert len(found) == 9 and all(found), found


def test_rows_that_are_trained_are_not_kept(world):
    wrong = "rows that are trained are not kept; make the table without cache_bytes"
    for texts in world.run("rank_caches.trained"):
        assert texts == [f"ShardedTable.requires_row_grad_: {wrong}", f"ShardedTable.lookup: {wrong}"]


def test_prometheus_is_shown_what_is_counted(world):
    """By docs/metrics.md too, in the order of metrics()."""
    pytest.importorskip("prometheus_client", reason="of the extra metrics")
    written = Document("docs/metrics.md").text.split("\n## `ShardedTable.metrics()`")[1].split("\n## ")[0]
    names = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", written, re.M))
    answers = world.run("rank_caches.collected")
    for metrics, samples in answers:
        assert list(names) == list(metrics)
        assert samples == {names[key]: ({"name": "rows", "layer": "4"}, value) for key, value in metrics.items()}
        assert metrics["lookups"] == 2 and metrics["distinct"] == 2 * metrics["received"] == 2 * metrics["hits"] > 0
    assert sum(metrics["given"] for metrics, _ in answers) == sum(metrics["received"] for metrics, _ in answers)


@pytest.mark.parametrize("change", [dict(out_format="rows"), dict(row_ids=torch.tensor(1))])
def test_what_one_rank_asks_wrongly(world, change):
    """An error on all, in a lookup where a rank has changed its rows too; the next one is right."""
    answers = world.run("rank_caches.refused", Each([{}, change, {}]))
    assert all(right for right, _ in answers)
    assert "must" in answers[1][1]
    assert all("rank 1 of" in text and "refused its arguments" in text for _, text in (answers[0], *answers[2:]))


def test_a_rank_that_dies(tmp_path):
    """Its peers, which need none of its rows, learn of it all the same."""
    world = World(3, tmp_path)
    try:
        world.start("rank_caches.die", Each([False, False, True]))
        for worked, text in world.answers(ranks=(0, 1)):
            assert not worked and "ShardedTable.lookup: the number of rows asked for failed on rank" in text, text
    finally:
        world.close()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cache_bytes=2000), "cache_bytes must be the same on all {} ranks, got None on rank 0 and 2000 on rank 1"),
        (dict(cache_bytes=1000), "ShardedTable: cache_bytes must be at least 1,296, got 1,000"),
        (dict(cache_bytes=0), "ShardedTable: cache_bytes must be a positive int or None, got 0"),
        (dict(cache_bytes=2000, capacity=5), "ShardedTable: cache_bytes is for lookups without capacity, whose sizes"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(world, change, message):
    errors = world.errors("construct", Each([None, change, None]))
    assert all(message.format(world.size) in error for error in errors), errors


@pytest.mark.parametrize("entries", [8, 80, 4000])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_policy_is_the_specification(where, entries):
    """Keys, stamps and hits of the simulator, call by call, with rows of the ids that were asked for."""
    generator = np.random.default_rng(1)
    kept = KeptRows(10**6, 8, (entries + 1) * (8 + 16), torch.device(where))
    assert kept.entries == entries and kept.nbytes <= (entries + 1) * 24
    simulator = CacheSimulator(1, entries // WAYS, WAYS)
    hits = 0
    for _ in range(30):
        ids = np.unique((generator.pareto(1.0, 400) * 20).astype(np.int64))
        rows = torch.from_numpy(ids).view(torch.uint8).view(-1, 8)
        places = kept.find(torch.from_numpy(ids).to(where)).cpu()
        simulator.clock += len(ids)
        expected = simulator.find(0, scramble(ids))
        assert np.array_equal(np.where(expected < 0, entries, expected), places.numpy())
        found = places < entries
        assert torch.equal(kept.rows.cpu()[places[found]].view(torch.uint8), rows[found])
        kept.keep(torch.from_numpy(ids)[~found].to(where), rows[~found].to(where))
        simulator.keep(0, np.sort(scramble(ids[~found.numpy()])))
        assert np.array_equal(simulator.keys.reshape(-1), kept.keys[:-1].cpu().numpy())
        assert np.array_equal(simulator.stamps.reshape(-1), kept.stamps[:-1].cpu().numpy())
        hits += int(found.sum())
    assert hits > 0
    kept.clear()
    assert (kept.find(torch.from_numpy(ids).to(where)) == entries).all()


def test_an_interrupt_leaves_no_key_without_its_row(monkeypatch):
    kept, ids = KeptRows(100, 8, least_bytes(8), torch.device("cpu")), torch.arange(4)

    def interrupted(*_):
        raise KeyboardInterrupt

    kept.find(ids)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "rows", type("Rows", (), dict(index_copy_=interrupted, dtype=torch.int64))())
        with pytest.raises(KeyboardInterrupt):
            kept.keep(ids, torch.zeros(4, 8, dtype=torch.uint8))
    assert (kept.find(ids) == kept.entries).all()


def test_keys_of_tensors_are_those_of_arrays():
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    assert np.array_equal(scramble_tensor(torch.from_numpy(ids)).numpy(), scramble(ids))
