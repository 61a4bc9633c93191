"""Whether all parts of a table are there, with an index or without: by names of files, and by what saving wrote."""

import json

import pytest
import torch

from engram_kernels import EngramTable, RowAdagrad
from engram_kernels.__main__ import main
from engram_kernels.checkpoints.files import CheckpointError
from engram_kernels.commands import console
from tests.support.checkpoints import QWEN, QWEN_TABLE, save

load = EngramTable.from_safetensors


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Lines as they are, whatever the width of a terminal."""
    monkeypatch.setattr(console, "has_rich", lambda: False)


def parts_in_files(folder, sizes, name):
    """Parts of as many rows, a file each, that is called one of all; no index."""
    tensors = [torch.full((rows, 16), float(k)).bfloat16() for k, rows in enumerate(sizes)]
    return [
        save(folder / name.format(k + 1, len(sizes)), {f"{QWEN_TABLE}shard_{k}.weight": rows})
        for k, rows in enumerate(tensors)
    ]


@pytest.mark.parametrize(
    "gone, name", [(2, "model-{:05d}-of-{:05d}"), (1, "model-{:05d}-of-{:05d}"), (2, "rows_{}_of_{}")]
)
def test_files_called_one_of_several_are_all_there(tmp_path, gone, name, capsys):
    """An interrupted download: the last parts are gone, as is the index, and numbers have no hole."""
    rows = QWEN.rows_per_layer[0]
    files = parts_in_files(tmp_path, (200, 200, rows - 400), name + ".safetensors")
    for paths in (tmp_path, files, files[::-1]):
        assert load(paths, placement="cpu", prefix=QWEN_TABLE).rows == rows
    for file in files[gone:]:
        file.unlink()
    missing = f"may lack parts: {3 - gone} of 3 files like .* were not given, number {gone + 1} the first; give all"
    for paths in (tmp_path, files[:gone], files[0]):
        with pytest.raises(CheckpointError, match=missing if paths != files[0] else "2 of 3 files like"):
            load(paths, placement="cpu")
    for action in ("verify", "inspect"):
        assert main(["table", action, str(tmp_path)]) == (action == "verify")
        assert "may lack parts" in capsys.readouterr().out
    # A config knows the rows, so that the files of other layers need not be there.
    with pytest.raises(CheckpointError, match=f"{rows} rows expected, got {200 * gone} in"):
        load(tmp_path, placement="cpu", config=QWEN)
    whole = save(tmp_path / "table-00003-of-00009.safetensors", {QWEN_TABLE + "shard_0.weight": torch.zeros(rows, 16)})
    assert load(whole, placement="cpu", config=QWEN).rows == rows
    save(whole, {QWEN_TABLE + "weight": torch.zeros(rows, 16)})  # and what is no part lacks none
    assert load(whole, placement="cpu").rows == rows


@pytest.mark.parametrize("prefix", ["", "layers.1.engram.embed."])
def test_files_of_save_safetensors_tell_rows_and_parts(tmp_path, prefix, capsys):
    made = EngramTable.from_tensors(torch.randn(60, 64), placement="cpu")
    made.save_safetensors(tmp_path, prefix=prefix, shard_bytes=6000)
    (tmp_path / "model.safetensors.index.json").unlink()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 and load(tmp_path, placement="cpu").rows == load(files, placement="cpu").rows == 60
    files = [file.rename(tmp_path / f"part{k}.safetensors") for k, file in enumerate(files)]  # as a tool might
    files[2].unlink()
    for paths in (tmp_path, files[:2]):
        with pytest.raises(CheckpointError, match="was saved with 60 rows, and these files have 40$"):
            load(paths, placement="cpu")
    assert main(["table", "verify", str(tmp_path)]) == 1 and "was saved with 60 rows" in capsys.readouterr().out
    other = EngramTable.from_tensors(torch.randn(45, 64), placement="cpu")
    other.save_safetensors(tmp_path / "other.safetensors", prefix=prefix, shard_bytes=4000)
    mixed = [*files[:2], next(tmp_path.glob("other-*-00003-of-00003.safetensors"))]
    with pytest.raises(CheckpointError, match=r"other-.* is of another save than .*part0"):
        load(mixed, placement="cpu")


def test_what_a_tool_wrote_elsewhere_is_left_alone(tmp_path):
    """The text of another table's name counts for nothing, and one that cannot be read is an error."""
    for said, error in (
        ({"prefix": "another.", "rows": 3}, None),
        ({}, None),
        ({"rows": 5}, "the table was saved with 5 rows, and these files have 4"),
        ({"parts": 2}, "the table was saved with 2 parts, and these files have 1"),
        ({"rows": "4"}, "has a 'engram_table' in its header that cannot be read"),
        ({"token_map": 7}, "has a 'engram_table' in its header that cannot be read"),
        ("{", "has a 'engram_table' in its header that cannot be read: '{'"),
        ("[4]", "has a 'engram_table' in its header that cannot be read"),
    ):
        whole = {"prefix": "", "rows": 4, "parts": 1, "token_map": None}
        text = said if isinstance(said, str) else json.dumps(whole | said)
        path = save(tmp_path / "a.safetensors", {"weight": torch.zeros(4, 64)}, metadata={"engram_table": text})
        if error is None:
            assert load(path, placement="cpu").rows == 4
        else:
            with pytest.raises(CheckpointError, match=error):
                load(path, placement="cpu")


def test_a_folder_may_hold_the_optimizers_of_its_table(tmp_path):
    """Of several ranks too; alone they are no table, and by their name they are read."""
    made = EngramTable.from_tensors(torch.randn(20, 16), placement="cpu").requires_row_grad_()
    optimizer = RowAdagrad(made)
    states = [optimizer.save_safetensors(tmp_path / f"rows-rank{rank}.safetensors") for rank in range(2)]
    with pytest.raises(CheckpointError, match="hold states of optimizers or overlays alone"):
        load(tmp_path, placement="cpu")
    with pytest.raises(CheckpointError, match="no Engram table; the 1 tensors are 0.sums"):
        load(states[0], placement="cpu")
    path = made.save_safetensors(tmp_path)
    for paths in (tmp_path, path, [path, *states], [states[1], path]):
        assert torch.equal(load(paths, placement="cpu").weight, made.weight)
    assert made.save_safetensors(tmp_path) == path
    optimizer.load_safetensors(states[0])
