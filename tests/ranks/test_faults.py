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
        (dict(scales="device"), "scales='device' is for format e4m3_ue8m0"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(world, change, message):
    errors = world.errors("construct", Each([None, change, None]))
    assert all(any(part in error for part in message.split("|")) for error in errors), errors


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
