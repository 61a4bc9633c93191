"""Overlays of a table over real processes (Gloo): the bits of one process, or an error on all ranks."""

import os

import pytest

from tests.support.ranks import World


@pytest.fixture(scope="module", params=(2, 3), ids=lambda size: f"{size} ranks")
def world(request, tmp_path_factory):
    made = World(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "kind, format, split, capacity",
    [
        ("wide", "e4m3_ue8m0", "columns", None),
        ("wide", "nvfp4", "rows", 1000),
        ("tiny", "bfloat16", "rows", None),
    ],
)
def test_bits_are_those_of_one_process(world, tmp_path, kind, format, split, capacity):
    path = str(tmp_path / "overlay.safetensors")
    for found in world.run("rank_overlays.overlaid", kind, format, split, path, capacity):
        assert len(found) == 9 and all(found), found


@pytest.mark.parametrize(
    "what, match",
    [
        ("other ids", "ids of the overlay must be the same on all"),
        ("not distinct", "ids must be distinct"),
        ("not a tensor", "ids must be a tensor of int32 or int64, got list"),
        ("too few rows", "rows must have 9 rows, one per id, got [8, 64]"),
        ("trainable on one rank", "is trainable"),
        ("under another", "ids must have no row of an overlay that is applied"),
    ],
)
def test_what_one_rank_refuses_none_does(world, what, match):
    texts = world.errors("rank_overlays.refused", what)
    assert all("ShardedTable.overlay: " in text for text in texts)
    assert all(match in text for text in texts), texts


def test_a_shard_that_a_node_shares(world):
    answers = world.run("rank_overlays.on_a_node", f"test-overlay-{os.getpid()}-{world.size}")
    assert [attached for _, attached, _ in answers] == [False] + [True] * (world.size - 1)
    assert all(right and changed for right, _, changed in answers)
