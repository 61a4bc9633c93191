"""docs/checkpoints.md: its Python blocks, on checkpoints with the published names; a whole layer from a folder."""

import pytest
import torch

from engram_kernels import Engram, EngramTable, HashPlan
from engram_kernels.tables import files as table_files
from tests.support import checkpoints
from tests.support.checkpoints import QWEN, QWEN_FIELDS, V41, V41_FIELDS, raw
from tests.support.documents import Document

CHECKPOINTS = Document("docs/checkpoints.md")
PLACE = dict(device="cpu", placement="cpu")


def v41(tmp_path):
    folder, tensors = checkpoints.v41_folder(tmp_path / "v41")
    checkpoints.save_config(folder, **V41_FIELDS)
    return folder, tensors


def test_every_block_is_run_here():
    assert len(CHECKPOINTS.blocks()) == 5 and len(CHECKPOINTS.text.splitlines()) < 175


def test_a_layer_of_deepseek(tmp_path):
    folder, tensors = v41(tmp_path)
    names = dict(folder=folder, tokenizer=None, build_token_map=lambda _: torch.arange(40), **PLACE)
    result = CHECKPOINTS.run("Load a layer of DeepSeek-V4.1", **names)
    assert result.config == V41
    prefix = "layers.1.engram."
    assert torch.equal(raw(result.table.weight), raw(tensors[prefix + "embed.weight"]))
    weight = tensors[prefix + "wkv.weight"].float().unflatten(1, (8, 32))
    factor = torch.exp2(raw(tensors[prefix + "wkv.scale"]).float() - 127).repeat_interleave(32, 0)[:48]
    expected = Engram(V41, 1, result.plan, result.table, dtype=torch.bfloat16)
    own = {"wkv.weight": (weight * factor[..., None]).flatten(1)}
    own |= {name: tensors[prefix + name] for name in ("q_weight", "k_weight")}
    expected.load_checkpoint(own)
    hidden, ids = torch.randn(6, 2, 16).bfloat16(), torch.randint(0, 40, (6,))
    out = result.engram(hidden, ids)
    assert out.isfinite().all() and torch.equal(out, expected(hidden, ids))


def test_a_layer_of_qwen(tmp_path):
    folder, weight, tensors = checkpoints.qwen_folder(tmp_path / "qwen")
    checkpoints.save_config(folder, text_config=QWEN_FIELDS)
    result = CHECKPOINTS.run("Load Qwen3.8-Flash-Next", folder=folder, **PLACE)
    assert result.config == QWEN and torch.equal(raw(result.table.weight), raw(weight))
    expected = Engram(QWEN, 1, result.plan, result.table, dtype=torch.bfloat16)
    expected.load_checkpoint(tensors, checkpoints.QWEN_PLE)
    for name, parameter in result.engram.named_parameters():
        assert torch.equal(parameter, expected.state_dict()[name]), name


def test_mapped_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "CHUNK", 1000)
    folder, tensors = v41(tmp_path)
    table = CHECKPOINTS.run("Without loading", 1, files=sorted(folder.glob("*.safetensors"))).table
    assert table.mapped and torch.equal(raw(table.weight), raw(tensors["layers.1.engram.embed.weight"]))
    (tmp_path / "out").mkdir()
    again = CHECKPOINTS.run("Save", table=table, out=tmp_path / "out", **PLACE).again
    assert torch.equal(raw(again.weight), raw(table.weight)) and torch.equal(again.scale, table.scale)


def test_load_checkpoint_from_files(tmp_path):
    """Files and a prefix of one's own, and what is said where a layer is not there, or twice."""
    folder, tensors = v41(tmp_path)
    plan = HashPlan.build(V41, torch.arange(40))
    engram = Engram(V41, 4, plan, EngramTable.from_safetensors(folder, placement="cpu", layer=4))
    engram.load_checkpoint(folder)
    assert torch.equal(engram.q_weight, tensors["layers.4.engram.q_weight"])
    mine = {f"my.{name.removeprefix('layers.1.')}": value for name, value in tensors.items() if "layers.1.e" in name}
    path = checkpoints.save(tmp_path / "mine.safetensors", mine)
    with pytest.raises(ValueError, match=r"load_checkpoint: expected layers.4.engram.wkv.weight .*, got neither"):
        engram.load_checkpoint(path)
    engram.load_checkpoint([path], "my.engram.")
    assert torch.equal(engram.q_weight, tensors["layers.1.engram.q_weight"])
    mine["my.engram.wkv.scale"] = torch.ones(5, 8)
    checkpoints.save(path, mine)
    with pytest.raises(ValueError, match=r"wkv.scale must have one entry per block of .*\[48, 256\], got \[5, 8\]"):
        engram.load_checkpoint(path, "my.engram.")
    entry = dict(dtype="F6_E2M3", shape=[4, 4], data_offsets=[0, 12])
    odd = checkpoints.by_hand(tmp_path / "odd.safetensors", {"a.wkv.weight": entry}, bytes(12))
    with pytest.raises(ValueError, match=r"load_checkpoint: a.wkv.weight F6_E2M3 \[4, 4\] cannot be read"):
        engram.load_checkpoint(odd, "a")
    both = tensors | {f"mtp.{name}": value.clone() for name, value in tensors.items()}
    path = checkpoints.save(tmp_path / "both.safetensors", both)
    with pytest.raises(ValueError, match=r"got both (mtp.)?layers.4.engram. and .* \(choose by prefix=\)"):
        engram.load_checkpoint(path)
