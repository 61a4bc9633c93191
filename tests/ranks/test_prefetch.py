"""A Prefetcher over tables of several ranks, which are real processes: bits of whole tables, and errors of one rank."""

import pytest
import torch

from tests.support.ranks import Each, World


@pytest.fixture(scope="module", params=(2, 3), ids=lambda size: f"{size} ranks")
def world(request, tmp_path_factory):
    made = World(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "format, options, depth, out_format",
    [
        ("e4m3_ue8m0", dict(cache_bytes=1 << 20), 3, "values"),
        ("bfloat16", dict(cache_bytes=5000, split="rows"), 2, "values"),
        ("nvfp4", dict(cache_bytes=1 << 20), 2, "storage"),
        ("e4m3", {}, 1, "storage"),
        ("float32", dict(capacity=200), 2, "values"),
    ],
)
def test_bits_are_those_of_whole_tables(world, format, options, depth, out_format):
    """Steps of other lengths on every rank, up to ``depth`` in flight; tokens that come again are kept."""
    for found, counts, hits in world.run("rank_caches.prefetched", format, options, depth, out_format):
        assert all(found) and len(found) == 7 * 2 * (2 if out_format == "values" else 1), found
        assert counts == (7, 0)
        assert all(hit > 0 for hit in hits) if "cache_bytes" in options else hits == [0, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(token_ids=torch.tensor([999])), "Prefetcher.start: token_ids must be valid ids, 0 <= id < 50, got 999"),
        (
            dict(token_ids=torch.arange(30)),
            "Prefetcher.start: token_ids must be at most max_tokens = 20 tokens, got 30",
        ),
        (dict(slots=torch.tensor([1])), "Prefetcher.start: "),
    ],
)
def test_what_one_rank_starts_wrongly(world, change, message):
    """Its own error there, and its peers learn of it; starts before and after have their rows."""
    answers = world.run("rank_caches.refused_start", Each([{}, change, {}]))
    assert all(all(found) and len(found) == 4 for found, _ in answers), answers
    assert message in answers[1][1]
    assert all("rank 1 of" in text and "refused its arguments" in text for _, text in (answers[0], *answers[2:]))


@pytest.mark.parametrize("what", ["mixed", "order", "programs", "one"])
def test_what_does_not_go_together(world, what):
    wrong = "tables must be one per layer of the plan, 2, got 1"
    wrong = wrong if what == "one" else "a ShardedTable takes no programs, order or cache, nor other tables beside it"
    assert set(world.errors("rank_caches.mixed_tables", what)) == {f"ValueError: Prefetcher: {wrong}"}
