"""``python -m engram_kernels table convert``: other formats and other files, in chunks, whole or not at all."""

import math
import os

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.checkpoints import convert as table_conversion
from engram_kernels.checkpoints.encoding import decode_rows, encode_rows
from engram_kernels.commands import console
from engram_kernels.geometry.row_format import FORMATS
from tests.commands.test_table import run
from tests.support import checkpoints
from tests.support.checkpoints import V41, finite_table, raw, save, saved_table


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Lines as they are, whatever the width of a terminal; chunks that end inside parts."""
    monkeypatch.setattr(console, "has_rich", lambda: False)
    monkeypatch.setattr(table_conversion, "CHUNK", 3000)
    monkeypatch.setattr(table_conversion, "DECODED", 2000)


def load(path, **options):
    return EngramTable.from_safetensors(path, placement="cpu", **options)


PAIRS = [
    ("e4m3_ue8m0", "bfloat16"),
    ("bfloat16", "e4m3_ue8m0"),
    ("e4m3", "e4m3_ue8m0"),
    ("float32", "float16"),
    ("float16", "e4m3"),
    ("float64", "float32"),
    ("float32", "nvfp4"),
    ("nvfp4", "mxfp4"),
    ("mxfp4", "e4m3_ue8m0"),
    ("e4m3_ue8m0", "nvfp4"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_convert(tmp_path, capsys, source, target):
    """In chunks and from parts, the result is that of encoding the whole table at once."""
    table, path = finite_table(source), saved_table(tmp_path, source, prefix="a.b", shard_bytes=4000)
    code, text, _ = run(capsys, "convert", path, "--format", target, "--out", tmp_path / "out.safetensors")
    assert code == 0 and f"table    {target}, 90 rows x 64, " in text and "overflows" not in text
    result = load(tmp_path / "out.safetensors", prefix="a.b")
    scale = result.own_scale
    values = decode_rows(table.weight, table.scale, FORMATS[source], table.own_scale)
    rows, groups = encode_rows(values, FORMATS[target], "t", scale=scale)
    assert result.format.name == target and torch.equal(raw(result.weight), raw(rows))
    assert groups is None or torch.equal(result.scale, groups)
    error = (decode_rows(result.weight, result.scale, FORMATS[target], scale) - values).double()
    noise, signal = error.square().sum(1), values.double().square().sum(1)
    decibels = 10 * math.log10(float(signal.sum() / noise.sum())) if noise.any() else math.inf
    share = float((noise > 0.125**2 * signal).double().mean())
    assert f"{decibels:.2f} dB of signal to noise, at most {float(error.abs().max()):.3g}\n" in text
    assert f"{share:.3%} of rows have an error above 0.125 of their norm" in text
    if scale is not None:
        assert (
            scale == float(values.abs().max() / dict(e4m3=448, nvfp4=2688)[target]) and f"scale    {scale:.9g}" in text
        )


@pytest.mark.parametrize("name", FORMATS)
def test_convert_into_other_files_copies_bytes(tmp_path, capsys, name):
    table, path = finite_table(name), saved_table(tmp_path, name, shard_bytes=4000)
    raw(table.weight)[5, :2] = 0xFF  # NaN, which a conversion would have to keep
    path = table.save_safetensors(tmp_path / f"{name}.safetensors", shard_bytes=4000)
    for out, options in (("one", []), ("many", ["--shard-bytes", "2kB", "--out-prefix", "layers.7.engram.embed"])):
        code, text, _ = run(capsys, "convert", path, "--out", tmp_path / f"{out}.safetensors", *options)
        assert code == 0
        result = load(text.split("written  ")[1].splitlines()[0])
        assert torch.equal(raw(result.weight), raw(table.weight)) and result.format == table.format
        assert result.scale is None or torch.equal(result.scale, table.scale)
    assert load(tmp_path / "many.safetensors.index.json", layer=7).rows == 90


def test_convert_chooses_a_table_and_counts_overflows(tmp_path, capsys):
    folder, tensors = checkpoints.v41_folder(tmp_path / "v41")
    code, _, errors = run(capsys, "convert", folder, "--out", tmp_path / "a.safetensors")
    assert code == 2 and "tables of layers [1, 4] are to be written, and --out must be a folder" in errors
    code, *_ = run(capsys, "convert", folder, "--layer", 4, "--out", tmp_path / "a.safetensors")
    assert code == 0
    result = load(tmp_path / "a.safetensors", layer=4, config=V41)
    assert torch.equal(raw(result.weight), raw(tensors["layers.4.engram.embed.weight"]))
    values = torch.ones(40, 64)
    values[3, :3] = torch.tensor([70_000.0, -70_000.0, 65_504.0])
    path = save(tmp_path / "b.safetensors", {"weight": values})
    code, text, _ = run(capsys, "convert", path, "--format", "float16", "--out", tmp_path / "c.safetensors")
    assert code == 0 and "2 values were beyond the format's range and are infinite now" in text
    words = ("--format", "e4m3", "--scale", "150", "--out", tmp_path / "c.safetensors")
    code, text, _ = run(capsys, "convert", path, *words)
    assert code == 0 and "2 values were beyond the format's range and are 448 times the scale now" in text
    assert (
        load(tmp_path / "c.safetensors").weight[3, 0].float() == 448
        and float(load(tmp_path / "c.safetensors").scale) == 150
    )


def test_convert_onto_itself_and_a_failing_one(tmp_path, capsys):
    path = saved_table(tmp_path, "float32")
    assert run(capsys, "convert", path, "--format", "bfloat16", "--out", path)[0] == 0
    assert torch.equal(load(path).weight, finite_table("float32").weight.bfloat16())
    table = finite_table("float32")
    table.weight[80, 3] = float("inf")
    table.save_safetensors(path)
    before = path.read_bytes()
    for target in ("e4m3", "e4m3_ue8m0"):
        code, _, errors = run(capsys, "convert", path, "--format", target, "--out", path)
        assert code == 2 and "infinity" in errors and errors.count("\n") == 1
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
