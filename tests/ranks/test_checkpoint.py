"""Checkpoints of tables over ranks: one whatever their number, whole or not at all."""

import os

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.testing import tables
from tests.support import rank_cases
from tests.support.patience import HANG, TIMEOUT
from tests.support.ranks import Each, World


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {size: World(size, tmp_path_factory.mktemp("ranks")) for size in (3, 4)}
    yield made
    for world in made.values():
        world.close()


def whole(kind, format):
    config = rank_cases.config_of(kind, format)
    return rank_cases.in_one_piece(config)


@pytest.mark.parametrize(
    "kind, format, options",
    [
        ("wide", "e4m3_ue8m0", dict(prefix="layers.4.engram.embed", metadata={"step": "7"})),
        ("wide", "bfloat16", dict(shard_bytes=20_000)),
        ("tiny", "e4m3", {}),
        ("wide", "nvfp4", dict(shard_bytes=5_600)),
    ],
)
def test_saved_by_four_and_loaded_by_three(worlds, tmp_path, kind, format, options):
    """The file is the one that a single process writes, to the byte."""
    path = tmp_path / "table.safetensors"
    (saved,) = set(worlds[4].run("save", str(path), kind, format, **options))
    alone = whole(kind, format)
    alone.token_map = "0" * 64
    alone = alone.save_safetensors(tmp_path / "alone.safetensors", **options)
    if "shard_bytes" not in options:
        assert path.read_bytes() == alone.read_bytes()
    files = sorted(file.name for file in tmp_path.iterdir() if "alone" not in file.name)
    assert len(files) == (1 if "shard_bytes" not in options else 6) and os.path.basename(saved) in files
    for split in ("columns", "rows"):
        for equal, read in worlds[3].run("load", saved, kind, format, split):
            assert equal and read  # its own rows, and no byte besides
    with EngramTable.from_safetensors(saved, placement="cpu") as table:
        assert torch.equal(table.weight.view(torch.uint8), whole(kind, format).weight.view(torch.uint8))


def test_a_rank_that_cannot_write_leaves_what_was_there(worlds, tmp_path):
    path = tmp_path / "table.safetensors"
    weight, _ = tables.random_parts(20, 8, "float32")
    EngramTable.from_tensors(weight, placement="cpu").save_safetensors(path)
    before = path.read_bytes()
    errors = worlds[4].errors("save", str(path), "wide", "bfloat16", fault="error", shard_bytes=20_000)
    assert errors.pop(1) == "OSError: [Errno 28] No space left on device"
    told = "writing its rows failed on rank 1 of 4: OSError: [Errno 28] No space left on device"
    assert set(errors) == {f"engram_kernels.launching.exchange.RankError: ShardedTable.save_safetensors: {told}"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
    worlds[4].run("save", str(path), "wide", "bfloat16")
    assert path.read_bytes() != before and len(list(tmp_path.iterdir())) == 1


def test_where_files_cannot_be_laid_out(worlds, tmp_path):
    """Rank 0 alone finds out, and all of them say so."""
    (tmp_path / "table.safetensors").write_bytes(b"something else")
    errors = worlds[4].errors("save", str(tmp_path / "table.safetensors"), "wide", "bfloat16")
    assert "is in the way and cannot be read" in errors[0]
    assert all("laying out the files failed on rank 0 of 4: ValueError" in error for error in errors[1:])


@pytest.mark.parametrize(
    "kind, format, paths, message",
    [
        ("tiny", "bfloat16", None, "weight does not fit layer 4: 12 rows expected, got 720 in 1 tensors"),
        ("wide", "bfloat16", ["table", "table", "missing"], "missing"),
        ("wide", "bfloat16", ["table", "other", "table"], "checkpoint's tensors must be the same on all 3 ranks"),
    ],
)
def test_checkpoints_that_do_not_fit(worlds, tmp_path, kind, format, paths, message):
    """Of another model, missing on one rank, or another on one rank: every rank says so, and none has a table."""
    names = {name: tmp_path / f"{name}.safetensors" for name in ("table", "other", "missing")}
    whole("wide", "bfloat16").save_safetensors(names["table"])
    whole("wide", "bfloat16").save_safetensors(names["other"], prefix="else")
    chosen = Each([str(names[name]) for name in paths or ["table"] * 3])
    errors = worlds[3].errors("load", chosen, kind, format)
    assert all(message in error for error in errors), errors


@pytest.mark.parametrize("fault", ["death", "hang"])
def test_a_rank_that_dies_or_hangs_while_saving(tmp_path, fault):
    """The others know at once or after the time-out, and the folder is as it was."""
    world = World(3, tmp_path, timeout=TIMEOUT if fault == "hang" else HANG)
    folder = tmp_path / "out"
    folder.mkdir()
    try:
        world.start("save", str(folder), "wide", "bfloat16", fault=fault)
        for worked, text in world.answers(ranks=(0, 2)):
            assert not worked and "ShardedTable.save_safetensors: report on writing its rows failed on rank" in text
            assert "a rank has died, has not come within the group's time-out, or made another call" in text
        assert list(folder.iterdir()) == []
    finally:
        world.close()


def test_rank_0_dies_while_saving(tmp_path):
    """What was there stays; what rank 0 had begun is nobody's checkpoint, and the next save removes it."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = whole("wide", "bfloat16").save_safetensors(folder)
    before = path.read_bytes()
    world = World(3, tmp_path)
    try:
        world.start("save", str(folder), "wide", "bfloat16", fault="death", struck=0, metadata={"step": "2"})
        for worked, text in world.answers(ranks=(1, 2)):
            assert not worked and "ShardedTable.save_safetensors: report on writing its rows failed on rank" in text
    finally:
        world.close()
    left = [file for file in folder.iterdir() if file != path]
    assert len(left) == 1 and left[0].name.endswith(".partial") and path.read_bytes() == before
    whole("wide", "bfloat16").save_safetensors(folder)
    assert list(folder.iterdir()) == [path]
