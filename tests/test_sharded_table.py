"""A table over real processes (Gloo): the bits of one process, training, nodes and meshes."""

import re

import pytest

from .ranks import World

SIZES = (2, 3, 4, 8)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def world(request, tmp_path_factory):
    made = World(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "kind, format, tokens, split, capacity",
    [
        ("wide", "e4m3_ue8m0", "uneven", "columns", None),
        ("wide", "e4m3_ue8m0", "one_empty", "rows", 200),
        ("wide", "e4m3", "all_on_one", "columns", 400),
        ("wide", "bfloat16", "all_on_one", "rows", None),
        ("tiny", "float32", "uneven", "columns", None),  # of 8 ranks some hold no row
        ("tiny", "float16", "none", "rows", 3),
    ],
)
def test_bits_are_those_of_one_process(world, kind, format, tokens, split, capacity):
    for found, (became, rows), *_ in world.run("lookups", kind, format, tokens, split, capacity):
        assert all(found.values()), found
        columns = 8 if kind == "wide" else 2
        assert became == ("columns" if split == "columns" and columns % world.size == 0 else "rows")
        assert (0 in rows) == (kind == "tiny" and world.size == 8)


def test_a_capacity_that_is_too_small_is_an_error_on_all_ranks(world):
    """Ranks that asked for little as well; what did not fit reads as NaN, and the next lookup is whole again."""
    answers = world.run("overflow")
    assert len({(first, second) for first, second, *_ in answers}) == 1
    needed = int(re.search(r"^ShardedTable: capacity must be at least (\d+), .*, got 20;", answers[0][0])[1])
    assert 20 < needed < 100
    for rank, (_, _, fits, lost, again) in enumerate(answers):
        assert again
        assert [a != b for a, b in zip(fits, lost, strict=True)] == [True] * len(fits)
        assert all(fits) == (rank != 1) and sum(fits) >= min(20, len(fits))


@pytest.mark.parametrize(
    "optimizer, tokens, split, format",
    [
        ("adagrad", "uneven", "columns", "float32"),
        ("adam", "one_empty", "rows", "bfloat16"),
        ("adagrad", "all_on_one", "columns", "bfloat16"),
    ],
)
def test_training_has_the_bits_of_one_process(world, optimizer, tokens, split, format):
    """Over the batches of all ranks one after the other, whatever the number of ranks."""
    answers = world.run("train", optimizer, tokens, split, format)
    assert all(answer["equal"] and answer["changed"] for answer in answers), answers
    assert len({str([ours for ours, _ in answer["norms"]]) for answer in answers}) == 1
    for ours, alone in answers[0]["norms"]:
        assert ours == pytest.approx(alone, rel=1e-6) and ours > 0


def test_clipping_counts_the_rows_of_all_ranks(world):
    """The norm is summed over ranks, which rounds otherwise than one process: one step of float32 apart, no more."""
    for answer in world.run("train", "adagrad", "uneven", clip=0.1):
        assert answer["norms"][0][0] > 1
        assert answer["furthest"] < 1e-5


def test_the_module_takes_it(world):
    for equal, has_gradient in world.run("module"):
        assert all(equal) and has_gradient


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    made = World(4, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def test_a_part_per_node(four, shared_name):
    """Two nodes of two ranks: one copy each, lookups across nodes, and one writer whose steps both ranks see."""
    for rank, (members, equal, seen, trained) in enumerate(four.run("nodes", shared_name, "adagrad")):
        assert members == [[0, 1] if rank < 2 else [2, 3], [rank % 2, rank % 2 + 2]]
        assert equal and seen and trained["equal"] and trained["changed"]


def test_a_mesh_of_data_and_table(four):
    for equal, size, trained in four.run("mesh", "adam"):
        assert equal and size == 2 and trained["equal"] and trained["changed"]


def test_nodes_of_different_sizes_are_refused(four):
    (error,) = set(four.errors("uneven_nodes"))
    assert error == (
        "ValueError: ShardedTable.node_groups: every node must have the same number of ranks, got {'a': 1, 'b': 3}"
    )
