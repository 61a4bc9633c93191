"""``--json``: one object on stdout, with the keys that docs/commands.md has and the numbers that the text has."""

import json
import os
import re

import pytest
import torch

from engram_kernels import EngramConfig, EngramTable
from engram_kernels.__main__ import main
from engram_kernels.commands import cache as cache_command
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.traffic import LINKS, floor_seconds, layer_traffic
from tests.support import checkpoints
from tests.support.documents import Document

from .test_cache import Bytes, map_of

PAGE = Document("docs/commands.md").text
V41 = EngramConfig.deepseek_v41_flash()
#: Keys that are names of something: what documents call them.
NAMES = {
    **dict.fromkeys(LINKS, "<link>"),
    **dict.fromkeys(("engram_kernels", "python", "torch", "triton", "numpy"), "<package>"),
    **dict.fromkeys(("hf", "demo", "bench"), "<extra>"),
}


def paths(facts, prefix=""):
    """Keys of an object and of those within it, as the document writes them."""
    if isinstance(facts, list):
        return set().union(*(paths(each, f"{prefix}[]") for each in facts), {f"{prefix}[]"} if not facts else set())
    if not isinstance(facts, dict):
        return {prefix}
    dot = "." if prefix else ""
    return set().union(*(paths(each, f"{prefix}{dot}{NAMES.get(name, name)}") for name, each in facts.items()))


def documented(command):
    """Keys in the first column of the command's table."""
    section = PAGE.split(f"\n### {command}\n")[1].split("\n###")[0]
    return {
        key
        for line in section.splitlines()
        if line.startswith("|")
        for key in re.findall("`(.+?)`", line.split("|")[1])
    }


def facts_of(capsys, *words, code=0):
    assert main([*map(str, words), "--json"]) == code
    text, errors = capsys.readouterr()
    assert errors == ""
    return json.loads(text)


def test_size(capsys):
    words = ("--tokens", 7, "--tokens", 8192, "--ranks", 8, "--hit-rate", 0.25, "--link", 50)
    facts = facts_of(capsys, "size", *words, "--plan", "--nodes", 4, "--ram-gib", 64)
    assert paths(facts) | {"ranks", "plan"} == documented("size")
    assert facts["config"] == PRESETS[0] and facts["rates"] == {"link": 50, "memory": 4300, "hit_rate": 0.25}
    assert [layer["rows"] for layer in facts["layers"]] == list(V41.rows_per_layer)
    assert facts["layers"][0]["bytes"] == V41.rows_per_layer[0] * 264 and facts["layers"][0]["layer"] == 1
    assert facts["bytes"] == sum(V41.rows_per_layer) * 264
    step, traffic = facts["traffic"][0], layer_traffic(V41, 7)
    assert step["tokens"] == 7 and step["link_bytes"] == 0.75 * traffic.gather_bytes
    assert step["seconds"] == floor_seconds(traffic, 50, 4300, 0.25)
    ranks = facts["ranks"]
    assert (ranks["ranks"], ranks["tokens"], ranks["links"]) == (8, 8192, LINKS)
    assert ranks["crossovers"]["NVLink"]["most_ranks"] is None  # any number
    plan = facts["plan"]
    assert (plan["nodes"], plan["ram_bytes"], plan["tokens"], plan["reads"]) == (4, 64 << 30, 8192, None)
    assert [option["fits"] for option in plan["layers"][0]["options"][:2]] == [False, True]  # a copy, and a quarter
    facts = facts_of(capsys, "size")
    assert facts["ranks"] is None and facts["plan"] is None


def test_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_command, "_tokenizer", lambda path: Bytes())
    monkeypatch.setattr(cache_command, "build_token_map", map_of)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the rat sat on the cat; " * 6)
    words = ("cache", "--text", tmp_path / "text.txt", "--tokens", 51, "--entries")
    facts = facts_of(capsys, *words, 8)
    assert paths(facts) == documented("cache")
    assert (facts["text_tokens"], facts["tokens"], facts["ways"]) == (306, 51, 8)
    none, cached = facts["sizes"]
    assert none["entries"] == 0 and none["hits"] == [0, 0, 0] and none["gain_on_dedup"] == 1
    assert cached["entries"] == 8 and 0 < cached["hit"] < 1 and cached["bytes"] == 2 * 3 * 8 * (2112 + 16)
    assert facts["direct_link_bytes"] / cached["link_bytes"] == pytest.approx(cached["gain"])
    assert facts_of(capsys, *words, 512)["sizes"][1]["link_bytes"] == 0  # all of the second half came before
    assert facts_of(capsys, *words, 512)["sizes"][1]["gain"] is None


def test_info(capsys):
    facts = facts_of(capsys, "info")
    gpu = {key for key in documented("info") if key.startswith("gpus[].")}
    assert len(gpu) == 7 and paths(facts) - {"gpus[]"} | gpu == documented("info")
    assert facts["versions"]["torch"] == torch.__version__ and "lookup" in facts["operations"]
    assert [preset["name"] for preset in facts["presets"]] == [*PRESETS]


def test_inspect(capsys, tmp_path):
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    facts = facts_of(capsys, "table", "inspect", folder)
    assert (facts["tensors"], facts["files"], len(facts["tables"])) == (14, 2, 2)
    table = facts["tables"][1]
    assert (table["name"], table["layer"], table["format"]) == ("layers.4.engram.embed", 4, "e4m3_ue8m0")
    assert table["rows"] == checkpoints.V41.rows_per_layer[1] and table["bytes"] == table["rows"] * 66
    assert table["paths"] == [str(folder / "model-00002-of-00002.safetensors")] and table["fits"] == []
    config = EngramConfig.deepseek_demo()
    tensors = {"layers.1.engram.embed.weight": torch.zeros(config.rows_per_layer[0], 64, dtype=torch.bfloat16)}
    tensors |= {"layers.2.engram.embed.weight": torch.zeros(4, 84, dtype=torch.int8)}
    fitting = facts_of(capsys, "table", "inspect", checkpoints.save(tmp_path / "a.safetensors", tensors))
    assert fitting["tables"][0]["fits"] == [{"config": "deepseek_demo", "layer": 1, "format": "bfloat16"}]
    assert set(fitting["tables"][1]) == {"name", "refused"}
    assert paths(fitting) == documented("table inspect")


def test_verify(capsys, tmp_path):
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    facts = facts_of(capsys, "table", "verify", folder)
    assert facts["holds"] and paths(facts) == documented("table verify")
    assert [(check["of"], check["check"]) for check in facts["checks"]] == [
        ("files", "files"),
        ("layers.1.engram.embed", "values"),
        ("layers.4.engram.embed", "values"),
    ]
    facts = facts_of(capsys, "table", "verify", folder, "--config", "engram_27b", code=1)
    failed = [check for check in facts["checks"] if not check["holds"]]
    assert not facts["holds"] and failed[0]["check"] == "config" and "of layer 1" in failed[0]["says"]
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    facts = facts_of(capsys, "table", "verify", folder, code=1)
    (check,) = facts["checks"]
    assert (check["of"], check["check"], check["holds"]) == ("files", "files", False) and "in 0 bytes" in check["says"]


def test_shared(capsys, monkeypatch, shared_name, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = checkpoints.save(tmp_path / "a.safetensors", {"embed.weight": torch.ones(4, 64)})
    table = EngramTable.from_safetensors(path, placement="shared", name=shared_name, keep=True)
    facts = facts_of(capsys, "table", "shared")
    (found,) = [each for each in facts["tables"] if each["name"] == shared_name]
    assert (found["format"], found["rows"], found["width"], found["bytes"]) == ("float32", 4, 64, 1024)
    assert (found["digest"], found["kept"], found["state"]) == (table.digest, True, "complete")
    assert found["path"].endswith(f"engram-{shared_name}") and found["pids"] == [os.getpid()]
    freed = facts_of(capsys, "table", "shared", "--free", shared_name)
    assert freed["freed"] == [found] and shared_name not in [each["name"] for each in freed["tables"]]
    keys = {f"{place}[].{key}" for place in ("freed", "tables") for key in found if key != "pids"}
    assert keys | {"freed[].pids[]", "tables[].pids[]"} == documented("table shared")
    table.close()


def test_a_mistake_leaves_stdout_empty(capsys, tmp_path):
    checkpoints.save(tmp_path / "a.safetensors", {"a.bias": torch.ones(4)})
    assert main(["table", "inspect", str(tmp_path), "--json"]) == 2
    text, errors = capsys.readouterr()
    assert text == "" and errors.count("\n") == 1
