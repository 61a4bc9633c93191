"""``table convert --out``: folders that it makes, all layers at once, and never one layer in the place of another."""

import json
import os

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.checkpoints import convert
from engram_kernels.commands.table import actions
from tests.support import checkpoints
from tests.support.checkpoints import V41, V41_FIELDS, finite_table, raw, save, save_config, saved_table

from .test_table import plain, run  # noqa: F401  (plain is a fixture)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two layers with its config."""
    found, _ = checkpoints.v41_folder(tmp_path / "v41")
    save_config(found, **V41_FIELDS)
    return found


def rows_of(path, layer=None):
    return raw(EngramTable.from_safetensors(path, placement="cpu", layer=layer).weight)


def test_all_layers_at_once_into_a_folder_that_is_made(folder, tmp_path, capsys):
    out = tmp_path / "a" / "b-1.0"
    code, text, _ = run(capsys, "convert", folder, "--out", out)
    assert code == 0 and sorted(os.listdir(out)) == ["layer-1.safetensors", "layer-4.safetensors"]
    assert all(f"written  {out / f'layer-{layer}.safetensors'}" in text for layer in V41.layers)
    assert run(capsys, "verify", out, "--config", folder)[0] == 0
    for layer in V41.layers:
        assert torch.equal(rows_of(out, layer), rows_of(folder, layer))


def test_one_layer_after_the_other_leaves_the_first(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for layer in V41.layers:
        assert run(capsys, "convert", folder, "--layer", layer, "--out", f"{out}/")[0] == 0
    assert sorted(os.listdir(out)) == ["layer-1.safetensors", "layer-4.safetensors"]
    assert run(capsys, "convert", folder, "--layer", 4, "--format", "bfloat16", "--out", out)[0] == 0, "a new format"
    assert run(capsys, "inspect", out)[1].count("bfloat16, ") == 1


def test_layers_in_many_files_have_one_index(folder, tmp_path, capsys):
    """A folder with an index of each layer would be none to read; later conversions keep it true."""
    out, words = tmp_path / "out", ("--shard-bytes", "3kB")
    for more in ((), (), ("--layer", 4), ("--layer", 1, "--shard-bytes", "1GB")):
        assert run(capsys, "convert", folder, "--out", out, *words, *more)[0] == 0
        for layer in V41.layers:
            assert torch.equal(rows_of(out, layer), rows_of(folder, layer))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {name for name in os.listdir(out) if name.endswith(".safetensors")}


def test_a_table_of_another_layer_stays(folder, tmp_path, capsys):
    one = tmp_path / "one.safetensors"
    assert run(capsys, "convert", folder, "--layer", 1, "--out", one)[0] == 0
    before = one.read_bytes()
    code, text, errors = run(capsys, "convert", folder, "--layer", 4, "--out", one)
    first, second = (f"layers.{layer}.engram.embed of {V41.rows_per_layer[i]} rows" for i, layer in enumerate((1, 4)))
    assert (code, text) == (2, "") and errors == (
        f"engram-kernels table convert: {one} holds {first} and would hold {second}; "
        "choose another --out or remove it\n"
    )
    # Under a name that says no layer, the number of rows tells.
    renamed = tmp_path / "renamed.safetensors"
    words = ("--out-prefix", "t", "--out", renamed)
    assert run(capsys, "convert", folder, "--layer", 1, *words)[0] == 0
    code, _, errors = run(capsys, "convert", folder, "--layer", 4, *words)
    assert code == 2 and f"holds t of {V41.rows_per_layer[0]} rows and would hold t of" in errors
    # In files with an index as well.
    many = tmp_path / "many.safetensors"
    assert run(capsys, "convert", folder, "--layer", 1, "--out", many, "--shard-bytes", "3kB")[0] == 0
    assert run(capsys, "convert", folder, "--layer", 4, "--out", many)[0] == 2
    assert one.read_bytes() == before and not many.exists()


def test_a_table_in_its_own_place_may_change_its_name(tmp_path, capsys):
    for shard_bytes in (None, 2000):
        path = saved_table(tmp_path, "float32", shard_bytes=shard_bytes)
        target = tmp_path / "float32.safetensors"
        assert run(capsys, "convert", path, "--out-prefix", "layers.3.engram.embed", "--out", target)[0] == 0
        assert torch.equal(rows_of(target, 3), raw(finite_table("float32").weight))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "TMP/x.safetensors"], "tables of layers [1, 4] are to be written, and --out must be a folder; or"),
        (["--out", "TMP/out", "--out-prefix", "a"], "and --out-prefix would give all of them one name; or choose"),
        (["--out", "TMP/out", "--layer", "2"], "no Engram table of layer 2"),
        (["--out", "TMP/v41/config.json"], "--out must be a file that ends in .safetensors, or a folder, got "),
        (["--out", "TMP/v41"], "model.safetensors.index.json is of another checkpoint, with model-0000"),
    ],
)
def test_mistakes_leave_no_folder(folder, tmp_path, capsys, words, message):
    code, text, errors = run(capsys, "convert", folder, *(word.replace("TMP", str(tmp_path)) for word in words))
    assert code == 2 and text == "" and message in errors and errors.count("\n") == 1, errors
    assert os.listdir(tmp_path) == ["v41"] and len(os.listdir(folder)) == 4


def test_a_failure_on_the_way_takes_away_what_was_made(tmp_path, capsys):
    tensors = {f"layers.{layer}.engram.embed.weight": torch.full((4, 64), float(layer)) for layer in (1, 2)}
    tensors["layers.2.engram.embed.weight"][3, 3] = float("inf")
    path = save(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b" / "c"
    code, _, errors = run(capsys, "convert", path, "--layer", 2, "--format", "e4m3_ue8m0", "--out", out)
    assert code == 2 and "infinity" in errors and os.listdir(tmp_path) == ["a.safetensors"]
    assert run(capsys, "convert", path, "--format", "e4m3_ue8m0", "--out", out)[0] == 2
    assert os.listdir(out) == ["layer-1.safetensors"], "each table appears as a whole or not at all"


def test_each_table_has_a_bar_of_its_own(folder, tmp_path, capsys, monkeypatch):
    shown, bar = [], actions.byte_bar
    monkeypatch.setattr(actions, "byte_bar", lambda text: shown.append(text) or bar(text))
    monkeypatch.setattr(convert, "CHUNK", 3000)
    assert run(capsys, "convert", folder, "--out", tmp_path / "out")[0] == 0
    assert shown == ["convert to layer-1.safetensors", "convert to layer-4.safetensors"]
