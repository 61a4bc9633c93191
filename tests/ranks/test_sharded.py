"""A table over real processes (Gloo): the bits of one process, training, nodes and meshes."""

import re
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.commands.traffic import fixed_exchange, gradient_exchange, lookup_exchange, replica_exchange
from tests.support.rank_cases import WIDTH, config_of, whole
from tests.support.ranks import World

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
        ("wide", "nvfp4", "one_empty", "rows", 200),
        ("wide", "e4m3", "all_on_one", "columns", 400),
        ("wide", "bfloat16", "all_on_one", "rows", None),
        ("tiny", "float32", "uneven", "columns", None),  # of 8 ranks some hold no row
        ("tiny", "float16", "none", "rows", 3),
    ],
)
def test_bits_are_those_of_one_process(world, kind, format, tokens, split, capacity):
    for found, (became, rows) in world.run("lookups", kind, format, tokens, split, capacity):
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


def test_balanced_momentum_is_that_of_one_process(world):
    """Sums over columns and thresholds go over the ranks, and differ from one process's in the order of addition."""
    answers = world.run("train", "sinkhorn", "uneven")
    assert all(answer["changed"] for answer in answers)
    furthest = max(answer["furthest"] for answer in answers)
    assert 0 < furthest < 1e-5, furthest


@pytest.mark.parametrize("clip", ["norm", "sum", "largest", "value"])
def test_clipping_counts_the_rows_of_all_ranks(world, clip):
    """The norm is summed over ranks, which rounds otherwise than one process: one step of float32 apart, no more."""
    for answer in world.run("train", "adagrad", "uneven", clip=clip):
        assert answer["norms"][0][0] > 1
        assert answer["furthest"] < 1e-5


def test_the_module_takes_it(world):
    for equal, has_gradient, refused in world.run("module"):
        assert all(equal) and has_gradient
        assert refused == "Engram: table must be of layer 1, got that of layer 4"


ROW, ENTRY, ID = 2 * WIDTH, 2 * WIDTH, 4  # bfloat16 rows and gradients


@pytest.mark.parametrize("kind", ["wide", "tiny"])
def test_bytes_are_those_of_the_traffic_model(world, kind):
    """Of each exchange and rank, exactly; of its own number of rows, which is a mean, within 5 %."""
    size, tokens = world.size, 300
    answers = world.run("traffic", kind, tokens=tokens)
    for rank, (forward, backward, distinct, entries) in enumerate(answers):
        asked = sum(distinct) - distinct[rank]
        given = sum(other[2][rank] for other in answers) - distinct[rank]
        assert tuple(forward) == lookup_exchange(size, asked, given, ROW, ID)
        assert tuple(backward) == gradient_exchange(size, sum(entries) - entries[rank], ENTRY, ID)
    # The model counts (W - 1) / W of what is fetched, which holds on average over ranks.
    fetched = sum(sum(distinct) for _, _, distinct, _ in answers) / size * (size - 1) / size
    sent = sum(sum(forward) for forward, *_ in answers) / size
    assert sent == pytest.approx(sum(lookup_exchange(size, fetched, fetched, ROW, ID)), rel=0.05)
    for forward, *_ in world.run("traffic", kind, capacity=400, tokens=tokens):
        assert tuple(forward) == fixed_exchange(size, 400, ROW, ID)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    made = World(4, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize("copies", [False, True], ids=["shards", "copies"])
def test_shared_memory_of_two_nodes(four, shared_name, tmp_path, copies):
    """Two nodes of two ranks: one shard or one table each, and one writer per node whose steps both ranks see."""
    config = config_of("wide", "float32")
    answers = four.run("nodes", shared_name, "adagrad", str(tmp_path), copies)
    for rank, (members, equal, seen, trained) in enumerate(answers):
        assert members == [[0, 1] if rank < 2 else [2, 3], [rank % 2, rank % 2 + 2]]
        assert equal and seen and trained["equal"] and trained["changed"]
    with EngramTable.from_safetensors(tmp_path, placement="cpu") as saved:
        assert torch.equal(saved.weight, whole(config, 4)[0])


def test_a_mesh_of_data_and_table(four):
    for equal, size, trained in four.run("mesh", "adam"):
        assert equal and size == 2 and trained["equal"] and trained["changed"]


def test_bytes_of_replicas_are_those_of_the_traffic_model(four):
    answers = four.run("traffic", "wide", meshed=True)
    for rank, (_, backward, _, entries) in enumerate(answers):
        column, pair = rank % 2, [rank // 2 * 2, rank // 2 * 2 + 1]  # its rank in the table's group; that group
        received = sum(answers[other][3][column] for other in pair)
        mine = gradient_exchange(2, entries[1 - column], ENTRY, ID)
        assert tuple(backward) == (*mine, *replica_exchange(2, 2, received, ENTRY, ID))


@pytest.mark.parametrize(
    "kind, messages",
    [
        ("parts", ["part must be the same on all 4 ranks, got 0 on rank 0 and 1 on rank 1"] * 4),
        ("split", ["split must be the same on all 2 ranks, got 'columns' on rank 0 and 'rows' on rank 1"] * 4),
        # With its own error on the rank, and told on through its group and its replicas.
        ("memory", ["making its part failed on rank 1 of 2"] * 3 + ["placement 'device' needs a GPU"]),
    ],
)
def test_replicas_that_do_not_match(four, kind, messages):
    errors = four.errors("ill_matched", kind)
    assert all(message in error for message, error in zip(messages, errors, strict=True)), errors


def test_nodes_of_different_sizes_are_refused(four):
    (error,) = set(four.errors("uneven_nodes"))
    assert error == (
        "ValueError: ShardedTable.node_groups: every node must have the same number of ranks, got {'a': 1, 'b': 3}"
    )


def test_the_blocks_of_the_document_run(four, tmp_path, shared_name):
    """One after the other, by four ranks of one node; the step of the first is in the file it writes."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/ranks.md").read_text(), re.S)
    assert len(blocks) == 5
    config = config_of("wide", "float32")
    EngramTable.from_tensors(*whole(config, 4), placement="cpu").save_safetensors(tmp_path)
    rows = config.rows_per_layer[1]
    for shapes, has_gradient in four.run("rank_documents.documented", blocks, str(tmp_path), shared_name):
        assert shapes[0][:2] == ("host", 4) and 0 < shapes[0][2] < rows / 2
        assert shapes[1] == ("shared", 1, rows) and shapes[2][:2] == ("host", 2)
        assert shapes[3] == ("host", None, rows)
        assert has_gradient
    with EngramTable.from_safetensors(tmp_path, placement="cpu") as table:
        moved = (table.weight != whole(config, 4)[0]).any(1).sum()
        assert 0 < moved < rows
