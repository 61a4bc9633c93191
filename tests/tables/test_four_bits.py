"""Tables of four-bit rows: which tensors they are made of, which they refuse, and what kernels are told of them."""

import struct

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from tests.commands.test_table import run
from tests.support import checkpoints
from tests.support.checkpoints import QWEN_TABLE

E4M3, E8M0, FP4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2
ROWS = 6


def parts(name):
    return tables.random_parts(ROWS, 64, name)


@pytest.mark.parametrize("placement", ["cpu", "host", "staged"])
@pytest.mark.parametrize(
    "name, dtypes", [("nvfp4", (torch.uint8, E4M3)), ("mxfp4", (torch.uint8, E8M0))], ids=["nvfp4", "mxfp4"]
)
def test_the_dtype_or_the_number_of_scales_tells_the_format(name, dtypes, placement):
    weight, scale = parts(name)
    own = 0.25 if name == "nvfp4" else None
    for given in (weight, weight.view(FP4)):
        for dtype in dtypes:
            table = EngramTable.from_tensors(given, scale.view(dtype), own_scale=own, placement=placement)
            assert (table.format.name, table.rows, table.width, table.own_scale) == (name, ROWS, 64, own)
            assert torch.equal(table.weight, weight) and table.weight.dtype == torch.uint8
            assert torch.equal(table.scale, scale) and table.scale.dtype == torch.uint8
            assert (table.weight.data_ptr() == weight.data_ptr()) == (placement != "host")
            assert table.nbytes == ROWS * (32 + (4 if name == "nvfp4" else 2)) == table.memory_report().bytes
            table.close()


def test_the_own_scale_comes_as_number_or_tensor():
    weight, scale = parts("nvfp4")
    for own in (3.5, torch.tensor(3.5), torch.full((1,), 3.5, dtype=torch.bfloat16)):
        table = EngramTable.from_tensors(weight, scale, own_scale=own, placement="cpu")
        assert table.own_scale == 3.5
        bits = struct.unpack("<i", struct.pack("<f", 3.5))[0]
        address = table.weight.data_ptr(), table.scale.data_ptr()
        assert view_tables((table,), torch.device("cpu")).descriptors.tolist() == [[*address, ROWS, bits]]
    made = EngramTable.empty(ROWS, 64, "nvfp4", placement="host", scale=3.5)
    assert made.own_scale == 3.5 and not made.weight.any()


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(own_scale=None), "own_scale must be one float32 for the table, got None"),
        (dict(own_scale=torch.ones(2)), r"own_scale must be one float, got torch.float32 \[2\]"),
        (dict(own_scale=torch.ones(1, dtype=torch.uint8)), "own_scale must be one float, got torch.uint8"),
        (dict(own_scale=-1.0), "the table's scale must be a positive number, got -1.0"),
        (dict(own_scale=1e300), "the table's scale must be a positive number, got 1e.300, which is inf in float32"),
        (dict(own_scale=torch.ones(1, device="meta")), "own_scale must hold numbers"),
        (dict(scale=None), r"scale of a uint8 weight must be uint8 or float8_e4m3fn \[6, 4\], contiguous, got None"),
        (dict(scale=0.5), r"scale of a uint8 weight must be uint8 or float8_e4m3fn \[6, 4\], contiguous, got 0.5"),
        (dict(scale=torch.ones(6, 3).byte()), r"must be uint8 or float8_e4m3fn \[6, 4\], contiguous, got torch.uint8"),
        (dict(scale=torch.ones(6, 4).to(E8M0)), r"uint8 or float8_e8m0fnu \[6, 2\].*got|own_scale must be None"),
        (dict(scale=torch.ones(6, 2).byte()), "own_scale must be None for mxfp4, got 0.25"),
        (dict(weight=torch.ones(6, 24).byte(), scale=torch.ones(6, 3).byte()), "must be a multiple of 16, got 48 x"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, expected):
    weight, scale = parts("nvfp4")
    arguments = dict(weight=weight, scale=scale, own_scale=0.25) | change
    with pytest.raises(ValueError, match=f"^EngramTable.from_tensors: .*{expected}"):
        EngramTable.from_tensors(**arguments, placement="cpu")


def test_no_other_format_takes_an_own_scale():
    for name in ("bfloat16", "e4m3", "e4m3_ue8m0", "mxfp4"):
        weight, scale = parts(name)
        with pytest.raises(ValueError, match=f"own_scale must be None for {name}, got 0.5"):
            EngramTable.from_tensors(weight, scale, own_scale=0.5, placement="cpu")


def test_a_published_nvfp4_table_in_parts(tmp_path, capsys):
    """vLLM's names: codes and scales of each part, one scale for all; loaded whole, converted to the same values."""
    weight, scale = checkpoints.finite_parts(50, 64, "nvfp4")
    tensors = {f"{QWEN_TABLE}weight_scale_2": torch.tensor(0.25)}
    for k, (codes, scales) in enumerate(zip(weight.split(20), scale.split(20), strict=True)):
        tensors[f"{QWEN_TABLE}shard_{k}.weight"] = codes.clone()
        tensors[f"{QWEN_TABLE}shard_{k}.weight_scale"] = scales.clone().view(E4M3)
    path = checkpoints.save(tmp_path / "model.safetensors", tensors)
    ids = torch.arange(50)
    expected = EngramTable.from_tensors(weight, scale, own_scale=0.25, placement="cpu")
    values = lookup(expected, ids, out_dtype=torch.float32)
    with EngramTable.from_safetensors(path, placement="cpu") as table:
        assert (table.format.name, table.own_scale) == ("nvfp4", 0.25)
        assert torch.equal(table.weight, weight) and torch.equal(table.scale, scale)
    assert run(capsys, "inspect", path)[1].count("nvfp4, 50 rows x 64") == 1
    code, text, _ = run(capsys, "verify", path)
    assert code == 0 and "no NaN, no infinity; 50 rows read" in text
    code, text, _ = run(capsys, "convert", path, "--format", "float32", "--out", tmp_path / "out.safetensors")
    assert code == 0 and "inf dB of signal to noise, at most 0" in text
    with EngramTable.from_safetensors(tmp_path / "out.safetensors", placement="cpu") as table:
        assert torch.equal(table.weight, values)
    code, text, _ = run(capsys, "convert", path, "--format", "mxfp4", "--out", tmp_path / "m.safetensors", "--nearest")
    assert code == 0 and "dB of signal to noise" in text and "of rows have an error above 0.125 of their norm" in text


def test_readers_of_a_shared_table_ask_for_its_own_scale(tmp_path):
    name = f"engram-test-{tmp_path.name}"
    weight, scale = parts("nvfp4")
    with EngramTable.from_tensors(weight, scale, own_scale=0.25, placement="shared", name=name) as table:
        with pytest.raises(ValueError, match="0.25"):
            EngramTable.attach(name, ROWS, 64, "nvfp4", scale=0.5, timeout=1)
        with EngramTable.attach(name, ROWS, 64, "nvfp4", scale=0.25, timeout=1) as reader:
            ids = torch.arange(ROWS)
            found = [lookup(each, ids, out_dtype=torch.float32).nan_to_num(7) for each in (reader, table)]
            assert torch.equal(*found) and reader.own_scale == 0.25


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_training_asks_for_a_master_table(name):
    with pytest.raises(ValueError, match=f"got EngramTable.6 x 64 {name}.*train a master table in bfloat16 or float32"):
        tables.cpu_table(ROWS, 64, name).requires_row_grad_()
