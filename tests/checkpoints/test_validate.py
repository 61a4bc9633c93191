"""What from_safetensors refuses, before it asks for memory: files, indices, names, dtypes, shapes and row counts."""

import sys

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.checkpoints.files import CheckpointError
from tests.support import checkpoints
from tests.support.checkpoints import QWEN_TABLE, V41, by_hand, save

load = EngramTable.from_safetensors
E4M3, E8M0, U8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8
ROWS = V41.rows_per_layer[0]


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype) if dtype.itemsize > 1 else torch.zeros(shape, dtype=U8).view(dtype)


def fp8(*shape):
    return zeros(*shape, dtype=E4M3)


def table(prefix="layers.1.engram.embed.", **tensors):
    """Tensors under a prefix; two underscores stand for a dot."""
    return {prefix + name.replace("__", "."): tensor for name, tensor in tensors.items()}


# what is wrong -> tensors, words of the error, and arguments
FAULTS = {
    "no table": ({"norm.weight": zeros(3), "b": zeros(2)}, "no Engram table; the 2 tensors are b, norm.weight", {}),
    "another layer": (table(weight=zeros(4, 64)), r"no Engram table of layer 2; there is layers\.1\.", {"layer": 2}),
    "two tables": (
        table(weight=zeros(4, 64)) | table("layers.2.engram.embed.", weight=zeros(4, 64)),
        r"2 tables \(choose by layer= or prefix=\); there is layers.1",
        {},
    ),
    "no such prefix": (table(weight=zeros(4, 64)), "no tensor em.weight or em.shard_0.weight; there", {"prefix": "em"}),
    "no scale": (
        table(weight=fp8(4, 64)),
        r"F8_E4M3 \[4, 64\] has no scale: expected .*embed.scale, one ue8m0 .* or .*embed.weight_scale, one float",
        {},
    ),
    "float scales of groups": (
        table(weight=fp8(4, 64), scale=zeros(4, 2)),
        r"must be F8_E8M0 or U8 \[4, 2\], or one float for the table, got .*scale BF16 \[4, 2\]$",
        {},
    ),
    "scales of other groups": (table(weight=fp8(4, 64), scale=zeros(4, 1, dtype=E8M0)), r"got .*F8_E8M0 \[4, 1\]", {}),
    "a scale per row": (
        table(weight=fp8(4, 64), weight_scale=zeros(4, 1)),
        "one scale per row is none of our formats: load the model's fp8 or bfloat16 checkpoint instead",
        {},
    ),
    "a scale per channel": (
        table(weight=fp8(4, 64), weight_scale=zeros(1, 64)),
        r"got .*weight_scale BF16 \[1, 64\]; one scale per channel is none of our formats: load the model's",
        {},
    ),
    "a scale per block": (
        table(weight=fp8(256, 256), weight_scale_inv=zeros(2, 2)),
        "got .*weight_scale_inv .*; one scale per block is none of our formats: load the model's",
        {},
    ),
    "a scale per part": (
        table(
            QWEN_TABLE,
            shard_0__weight=fp8(4, 64),
            shard_0__weight_scale=torch.ones(1),
            shard_1__weight=fp8(4, 64),
            shard_1__weight_scale=torch.ones(1) * 2,
        ),
        "shard_0.weight_scale F32 .* and those of other parts are one scale per part, which is none of our formats: ",
        {},
    ),
    "scales of parts in one tensor": (
        table(weight_scale=torch.ones(2), shard_0__weight=fp8(4, 64), shard_1__weight=fp8(4, 64)),
        r"got .*weight_scale F32 \[2\]; one scale per part is none of our formats",
        {},
    ),
    "scales of all rows in one tensor": (
        table(weight_scale=torch.ones(8, 1), shard_0__weight=fp8(4, 64), shard_1__weight=fp8(4, 64)),
        r"got .*weight_scale F32 \[8, 1\]; one scale per row is none of our formats",
        {},
    ),
    "a zero point": (
        table(weight=fp8(4, 64), weight_scale=torch.ones(1), weight_zero_point=torch.ones(1)),
        "embed.weight_zero_point beside the rows is part of none of our formats, float32, .*: load the model's fp8 or",
        {},
    ),
    "a zero point, by prefix": (
        table("my.", weight=zeros(4, 64), weight_zero_point=torch.ones(1)),
        "my.weight_zero_point beside the rows is part of none of our formats",
        {"prefix": "my"},
    ),
    "an adapter": (
        table(QWEN_TABLE, weight=zeros(4, 64), lora_embedding_A=zeros(4, 4)),
        "ngram_embedding.lora_embedding_A beside the rows is part of none",
        {},
    ),
    "MLX": (
        table(QWEN_TABLE, shards__0__weight=zeros(4, 64), shards__1__weight=zeros(4, 64)),
        r"shards.0.weight is of MLX's layout, shards.\{k\}.weight; load the model's own .* table convert` makes one",
        {},
    ),
    "MLX, quantised": (
        table(
            QWEN_TABLE,
            shards__0__weight=zeros(4, 8, dtype=torch.int32).view(torch.uint32),
            shards__0__scales=zeros(4, 1),
            shards__0__biases=zeros(4, 1),
        ),
        r"shards.0.weight U32 \[4, 8\] is an MLX table of packed elements \(a scale and a bias per group\), which",
        {},
    ),
    "GPTQ": (
        table(QWEN_TABLE, qweight=zeros(4, 8, dtype=torch.int32), scales=zeros(4, 1)),
        "expected either .* got neither; there is .*ngram_embedding.qweight, .*ngram_embedding.scales$",
        {},
    ),
    "two parts of one number": (
        table(shard_0__weight=zeros(4, 64), shard_1__weight=zeros(4, 64), shard_01__weight=zeros(4, 64)),
        "has two parts of number 1",
        {},
    ),
    "a part of a huge number": (
        table(shard_0__weight=zeros(4, 64), shard_999999999__weight=zeros(4, 64)),
        r"shard_\{k\}.weight is missing for 999,999,998 k, 1 the first",
        {},
    ),
    "scales of some parts": (
        table(shard_0__weight=fp8(4, 64), shard_0__scale=zeros(4, 2, dtype=U8), shard_1__weight=fp8(4, 64)),
        "shard_1.scale is missing, where other parts have one",
        {},
    ),
    "two kinds of scale": (
        table(weight=fp8(4, 64), scale=zeros(4, 2, dtype=U8), weight_scale=zeros(1)),
        "expected one kind of scale, got .*embed.scale, .*embed.weight_scale",
        {},
    ),
    "a scale of 0": (table(weight=fp8(4, 64), weight_scale=zeros(1)), "must be a positive number, got 0.0", {}),
    "a scale beyond float32": (
        table(weight=fp8(4, 64), weight_scale=torch.full((1,), 1e300, dtype=torch.float64)),
        r"weight_scale F64 \[1\]: the table's scale must be a positive number, got 1e\+300, which is inf in float32",
        {},
    ),
    "a scale of dense rows": (table(weight=zeros(4, 64), scale=zeros(1)), "takes no scale, got .*embed.scale", {}),
    "integers": (table(weight=zeros(4, 64, dtype=torch.int32)), "a table of packed or integer elements, I32", {}),
    "e5m2": (
        table(weight=zeros(4, 64, dtype=torch.float8_e5m2)),
        r"rows must be of dtype F8_E4M3, U8 \(pairs of e2m1\), F32, .*F8_E5M2",
        {},
    ),
    "nvfp4 without its table's scale": (
        table(QWEN_TABLE, shard_0__weight=zeros(4, 32, dtype=U8), shard_0__weight_scale=fp8(4, 4)),
        "nvfp4, takes one float for the table as .*ngram_embedding.weight_scale_2, got none",
        {},
    ),
    "nvfp4 with a scale for each row beside": (
        table(
            QWEN_TABLE, shard_0__weight=zeros(4, 32, dtype=U8), shard_0__weight_scale=fp8(4, 4), weight_scale_2=zeros(4)
        ),
        r"weight_scale_2 must be one float for the table, got .*\[4\]",
        {},
    ),
    "nvfp4 whose table's scale is no number": (
        table(
            QWEN_TABLE, shard_0__weight=zeros(4, 32, dtype=U8), shard_0__weight_scale=fp8(4, 4), weight_scale_2=zeros(1)
        ),
        "the table's scale must be a positive number, got 0.0",
        {},
    ),
    "nvfp4 with scales of 32": (
        table(weight=zeros(4, 32, dtype=U8), weight_scale=fp8(4, 2), weight_scale_2=zeros(1)),
        r"scales of .* must be F8_E4M3 \[4, 4\], got .*\[4, 2\]",
        {},
    ),
    "nvfp4, of which a part lacks scales": (
        table(
            QWEN_TABLE,
            shard_0__weight=zeros(4, 32, dtype=U8),
            shard_1__weight=zeros(4, 32, dtype=U8),
            shard_0__weight_scale=fp8(4, 4),
            weight_scale_2=zeros(1),
        ),
        "ngram_embedding.shard_1.weight_scale is missing, where other parts have one",
        {},
    ),
    "mxfp4 with a table's scale": (
        table(weight=zeros(4, 32, dtype=U8), scale=zeros(4, 2, dtype=U8), weight_scale_2=zeros(1)),
        "mxfp4, takes none as .*weight_scale_2, got",
        {},
    ),
    "mxfp4 with scales of 16": (
        table(weight=zeros(4, 32, dtype=U8), scale=zeros(4, 4, dtype=U8)),
        r"scales of .* must be F8_E8M0 or U8 \[4, 2\], got",
        {},
    ),
    "nf4": (
        table(QWEN_TABLE, shard_0__weight=zeros(4, 36, dtype=U8)),
        "is an nf4 table .* none of our formats.* `python -m engram_kernels table convert`",
        {},
    ),
    "nf4 of bitsandbytes": (
        table(weight=zeros(128, 1, dtype=U8), weight__absmax=zeros(4), weight__quant_state=zeros(9)),
        "an nf4 table",
        {},
    ),
    "packed": (table(weight_packed=zeros(4, 48, dtype=U8), weight_scale=zeros(4, 2)), "packed or integer", {}),
    "a part is missing": (
        table(shard_0__weight=zeros(4, 64), shard_2__weight=zeros(4, 64)),
        r"shard_\{k\}.weight is missing for 1 k, 1 the",
        {},
    ),
    "parts of two widths": (
        table(shard_0__weight=zeros(4, 64), shard_1__weight=zeros(4, 32)),
        "must be alike in all parts",
        {},
    ),
    "parts of two types": (
        table(shard_0__weight=zeros(4, 64), shard_1__weight=zeros(4, 64).half()),
        "must be alike in all parts",
        {},
    ),
    "whole and in parts": (table(weight=zeros(4, 64), shard_0__weight=zeros(4, 64)), "expected either .* got both", {}),
    "scales alone": (table(scale=zeros(4, 2, dtype=U8)), "expected either .* got neither", {}),
    "no rows": (table(weight=zeros(0, 64)), "has no rows", {}),
    "a vector": (table(weight=zeros(64)), r"must be alike in all parts, \[rows, width\]", {}),
    "a width of no kernel": (
        table(weight=zeros(4, 20)),
        "bytes of a row must be a multiple of 16, got 20 x bfloat16",
        {},
    ),
    "rows of another model": (
        table(weight=zeros(4, 64)),
        rf"layer 1: {ROWS} rows expected, got 4 in 1",
        {"config": V41},
    ),
    "width of another model": (
        table(weight=zeros(ROWS, 32)),
        "layer 1: rows of 64 elements expected, got 32",
        {"config": V41},
    ),
    "a layer the config has not": (
        table(weight=zeros(4, 64)),
        r"layer must be one of the config's, \(1, 4\), got 2",
        {"config": V41, "layer": 2},
    ),
    "a table of a layer the config has not": (
        table("layers.9.engram.embed.", weight=zeros(4, 64)),
        r"one of the config's, \(1, 4\), for layers\.9",
        {"config": V41},
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_tables(tmp_path, case, monkeypatch):
    tensors, expected, options = FAULTS[case]
    monkeypatch.setattr(EngramTable, "_new", lambda *_, **__: pytest.fail("asked for memory"))
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=f"^EngramTable.from_safetensors: .*{expected}") as raised:
        load(path, placement="cpu", **options)
    _, _, there_is = str(raised.value).partition("there is ")
    assert set(filter(None, there_is.split(", "))) <= tensors.keys()


@pytest.mark.parametrize(
    "wanted", [{}, {"layer": 1}, {"layer": 2}, {"prefix": "no"}, {"prefix": QWEN_TABLE + "shards"}]
)
@pytest.mark.parametrize("names", [("shards.0.weight", "shards.1.weight"), ("qweight", "scales"), ("weight_q", "max")])
def test_messages_name_tensors_that_are_there(tmp_path, names, wanted):
    """Whatever they are called, and whatever was asked for."""
    path = save(tmp_path / "a.safetensors", table(QWEN_TABLE, **{name: zeros(4, 64) for name in names}))
    with pytest.raises(CheckpointError) as raised:
        load(path, placement="cpu", **wanted)
    assert "shards.0.weight is of MLX's layout" in str(raised.value) or "there is " in str(raised.value)
    _, _, there_is = str(raised.value).partition("there is ")
    assert set(filter(None, there_is.split(", "))) <= {QWEN_TABLE + name for name in names}


def test_parts_of_one_scale_each_that_are_equal(tmp_path):
    parts = {f"shard_{k}__weight": fp8(4, 64) for k in range(2)}
    scales = {f"shard_{k}__weight_scale": torch.full((1,), 0.25) for k in range(2)}
    loaded = load(save(tmp_path / "a.safetensors", table(**parts, **scales)), placement="cpu")
    assert (loaded.format.name, loaded.rows, float(loaded.scale)) == ("e4m3", 8, 0.25)


def test_files(tmp_path):
    whole = save(tmp_path / "whole.safetensors", {"weight": torch.ones(8, 64)}).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entry = dict(dtype="F32", shape=[8, 65], data_offsets=[0, 2048])
    cases = {
        f"is truncated: its header tells of {len(whole):,} bytes, and it has {len(whole) - 1:,} ": whole[:-1],
        f"is truncated: its header takes {8 + length} bytes, and it has 40 ": whole[:40],
        "has 1 bytes behind the last tensor": whole + b"0",
        "is no safetensors file, in 0 bytes": b"",
        "is no safetensors file, in 22 bytes": b"<html>404 not found</h",
        "is a Git LFS pointer, not the file itself: git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid",
        "has a header that cannot be read": whole[:8] + b"{" * length + whole[8 + length :],
        "has a header that contradicts itself": by_hand(tmp_path / "b", {"weight": entry}, bytes(2048)).read_bytes(),
    }
    path = tmp_path / "a.safetensors"
    for expected, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^EngramTable.from_safetensors: .*a\.safetensors {expected}"):
            load(path, placement="cpu")


def test_paths_and_arguments(tmp_path):
    first = save(tmp_path / "a.safetensors", checkpoints.v41_tensors(1))
    with pytest.raises(FileNotFoundError, match="no such file: .*nope"):
        load(tmp_path / "nope.safetensors", placement="cpu")
    with pytest.raises(TypeError, match="paths must be a file, a folder, an index or a list of them, got int 3"):
        load(3, placement="cpu")
    with pytest.raises(ValueError, match="paths must name at least one file, got none"):
        load([], placement="cpu")
    with pytest.raises(CheckpointError, match="empty holds no .safetensors file"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty", placement="cpu")
    with pytest.raises(CheckpointError, match="two files hold layers.1"):
        load([first, save(tmp_path / "twice.safetensors", checkpoints.v41_tensors(1))], placement="cpu")
    with pytest.raises(ValueError, match="threads must be a positive int, got 0"):
        load(first, placement="cpu", threads=0)
    with pytest.raises(TypeError, match="config must be an EngramConfig or None, got dict"):
        load(first, placement="cpu", config={})
    with pytest.raises(TypeError, match="prefix must be a text.*, got int"):
        load(first, placement="cpu", prefix=1)
    with pytest.raises(ValueError, match="placement must be one of .device., .host., .shared., .staged., .cpu."):
        load(first, placement="pinned")


def test_indices(tmp_path):
    """Files that are not asked for need not be there; those that are, do, and hold what the index says."""
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    _, second = sorted(folder.glob("*.safetensors"))
    index, other = (folder / f"{name}.safetensors.index.json" for name in ("model", "other"))
    second.unlink()
    load(folder, placement="cpu", layer=1).close()
    with pytest.raises(FileNotFoundError, match=f"no such file: {second}"):
        load(folder, placement="cpu", layer=4)
    save(second, {"weight": torch.ones(2, 64)})
    with pytest.raises(CheckpointError, match="the index places layers.4.engram.embed.weight in .* does not hold"):
        load(folder, placement="cpu", layer=4)
    other.write_text("{}")
    load(folder, placement="cpu", layer=1).close()
    index.write_text("{")
    with pytest.raises(CheckpointError, match="index.json is no JSON"):
        load(folder, placement="cpu", layer=1)
    index.rename(folder / "third.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"more than one index \(other.safetensors.index.json, third"):
        load(folder, placement="cpu")
    with pytest.raises(CheckpointError, match="other.safetensors.index.json has no 'weight_map'"):
        load(other, placement="cpu")


def test_the_extra_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(2, 64)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"safetensors files need the extra 'hf': pip install 'engram_kernels\[hf\]'"):
        load(path, placement="cpu")
