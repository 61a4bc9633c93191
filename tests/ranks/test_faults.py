"""Errors of tables over ranks: on every rank, soon, and with what is wrong in words."""

import time

import pytest
import torch

from engram_kernels import EngramConfig, RowAdagrad, ShardedTable, lookup
from tests.support.patience import HANG, TIMEOUT
from tests.support.rank_cases import config_of
from tests.support.ranks import Each, World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(3, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(capacity=5),
            "ShardedTable: capacity must be the same on all 3 ranks, got None on rank 0 and 5 on rank 1",
        ),
        (dict(split="rows"), "ShardedTable: split must be the same on all 3 ranks, got 'columns' on rank 0 and 'rows'"),
        (dict(layer=1), "must be the same on all 3 ranks|weight must have shape"),
        (dict(config=config_of("tiny", "bfloat16")), "weight must have shape [12, 64], got [720, 64]"),
        (dict(cut=True), "weight must have shape [720, 64], got [719, 64]"),
        (dict(capacity=0), "capacity must be a positive int or None, got 0"),
        (dict(placement="device"), "placement 'device' needs a GPU"),
        (dict(scales="device"), "scales='device' is for formats with scales of groups"),
        (dict(placement=None), "ShardedTable.from_tensors: placement must be one of 'device', 'host', "),
        (dict(weight=[1.0]), "ShardedTable.from_tensors: weight must be a tensor, got list"),
        (dict(weight=torch.ones(3)), "ShardedTable.from_tensors: weight must have shape [720, 64], got [3]"),
        (dict(config=None), "ShardedTable.from_tensors: config must be an EngramConfig, got NoneType None"),
        (dict(layer="4"), "ShardedTable.from_tensors: layer must be an int of at least 0, got '4'"),
        (dict(split=["rows"]), "ShardedTable: split must be one of 'columns', 'rows', got list"),
        (dict(capacity=True), "ShardedTable: capacity must be a positive int or None, got True"),
        (dict(keep=True), "ShardedTable: parts of a table over ranks cannot be kept (keep=True)"),
        (dict(colour="red"), "EngramTable.empty: got an unexpected keyword argument 'colour'"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(world, change, message):
    errors = world.errors("construct", Each([None, change, None]))
    assert all(any(part in error for part in message.split("|")) for error in errors), errors


@pytest.mark.parametrize(
    "call, arguments, message",
    [
        ("lookup", dict(row_ids=torch.ones(3, 1)), "row_ids must be a tensor of int32 or int64, got float32 [3, 1]"),
        ("lookup", dict(row_ids=None), "row_ids must be a tensor of int32 or int64, got NoneType None"),
        ("lookup", dict(out_format="rows"), "out_format must be one of 'values', 'storage', got 'rows'"),
        ("lookup", dict(out=torch.ones(1)), "out must have shape [10, 1, 64], got [1]"),
        ("hash_lookup", dict(token_ids=torch.tensor([999])), "token_ids must be valid ids, 0 <= id < 50, got 999"),
        ("hash_lookup", dict(plan=None), "plan must be a HashPlan, got NoneType"),
        ("hash_lookup", dict(out_dtype=[]), "out_dtype must be bfloat16, float16, float32 or float64 or None, got"),
    ],
)
def test_what_one_rank_asks_wrongly(world, call, arguments, message):
    """Its own error there, and its peers do not wait; the next lookup is right."""
    world.run("keep")
    errors = world.errors("ask", call, Each([{}, arguments, {}]))
    assert f"ShardedTable.{call}: {message}" in errors[1], errors
    assert all("rank 1 of 3 refused its arguments; its own error says why" in errors[rank] for rank in (0, 2)), errors
    world.run("ask", call)


@pytest.mark.parametrize(
    "call, arguments, message",
    [
        ("save_safetensors", dict(path=None), "path must be a file or a folder, got NoneType None"),
        ("save_safetensors", dict(shard_bytes=0), "shard_bytes must be a positive int or None, got 0"),
        ("save_safetensors", dict(metadata={1: "a"}), "metadata must be a mapping from a text to a text or None"),
        ("from_safetensors", dict(paths=7), "paths must be a file, a folder, an index or a list of them, got int 7"),
        ("from_safetensors", dict(threads=0), "threads must be a positive int, got 0"),
        ("node_groups", dict(node=3), "node must be a text or None, got int 3"),
        ("node_groups", dict(timeout=5), "timeout must be a timedelta or None, got int 5"),
    ],
)
def test_what_is_wrong_in_one_rank_of_a_call(world, tmp_path, call, arguments, message):
    world.run("keep", str(tmp_path / "table.safetensors"))
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    errors = world.errors("ask", call, Each([{}, {}, arguments]))
    assert all(f"ShardedTable.{call}: {message}" in error for error in errors), errors
    assert all("failed on rank 2 of 3" in errors[rank] for rank in (0, 1)), errors
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_config_that_differs(world):
    change = dict(config=EngramConfig(**{**vars(config_of("wide", "bfloat16")), "seed": 5}))
    (error,) = set(world.errors("construct", Each([None, None, change])))
    assert error.startswith(
        "ValueError: ShardedTable: config's seed must be the same on all 3 ranks, got 0 on rank 0 and 5"
    )


def test_rows_that_cannot_be_written(world):
    """A fill that fails on one rank; the shards of the others are closed as well."""
    errors = world.errors("construct_filled", Each([False, False, True]))
    assert errors[2] == "KeyError: 'no rows here'"
    assert all("making its part failed on rank 2 of 3: KeyError: 'no rows here'" in error for error in errors[:2])


STEPS = {
    "construct": "ShardedTable.from_tensors: report on checking its tensors",
    "lookup": "ShardedTable.lookup: the number of rows asked for",
    "backward": "ShardedTable.backward: the number of row gradients",
}


@pytest.mark.parametrize(
    "step, what", [("construct", "die"), ("lookup", "die"), ("lookup", "hang"), ("backward", "die")]
)
def test_a_rank_that_dies_or_hangs(tmp_path, step, what):
    """Its peers' next step is an error: at once where the connection breaks, else after the time-out."""
    world = World(3, tmp_path, timeout=TIMEOUT if what == "hang" else HANG)
    try:
        world.run("keep")
        start = time.monotonic()
        world.start("use", step, Each(["work", "work", what]))
        for worked, text in world.answers(ranks=(0, 1)):
            assert not worked and f"{STEPS[step]} failed on rank" in text, text
            assert "a rank has died, has not come within the group's time-out, or made another call" in text
        assert what == "die" or time.monotonic() - start >= TIMEOUT
    finally:
        world.close()


def test_without_a_group():
    with pytest.raises(ValueError, match=r"^ShardedTable: torch.distributed must be initialised first"):
        ShardedTable(config_of(), 4, placement="cpu")


def test_what_takes_tables_in_one_piece_says_so():
    table = object.__new__(ShardedTable)
    with pytest.raises(TypeError, match="^lookup: table must be an EngramTable, got ShardedTable$"):
        lookup(table, torch.tensor([[1]]))
    with pytest.raises(TypeError, match="^RowAdagrad: tables must be an EngramTable or a sequence, got ShardedTable$"):
        RowAdagrad(table)
