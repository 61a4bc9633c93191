"""``python -m engram-kernels table inspect | verify | shared``, and mistakes: what it says and returns."""

import dataclasses
import json
import os
import re

import pytest
import torch

from engram_kernels import EngramConfig, EngramTable, HashPlan
from engram_kernels.__main__ import main
from engram_kernels.checkpoints import verify
from engram_kernels.checkpoints.files import Checkpoint
from engram_kernels.commands import console
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.table.verify import verify_sections
from engram_kernels.geometry.row_format import FORMATS
from tests.support import checkpoints
from tests.support.checkpoints import (
    QWEN_PLE,
    QWEN_SCALE,
    QWEN_TABLE,
    V41,
    V41_FIELDS,
    by_hand,
    save,
    save_config,
    saved_table,
)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Lines as they are, whatever the width of a terminal; chunks that end inside parts."""
    monkeypatch.setattr(console, "has_rich", lambda: False)
    monkeypatch.setattr(verify, "CHUNK", 3000)


def run(capsys, *words):
    """(exit code, output, errors)."""
    try:
        code = main(["table", *map(str, words)])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def load(path, **options):
    return EngramTable.from_safetensors(path, placement="cpu", **options)


def test_a_layer_without_a_table(tmp_path, capsys):
    """Nothing was checked, so nothing has failed: a mistake, which says what there is."""
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    code, text, error = run(capsys, "verify", folder, "--layer", 2)
    assert (code, text) == (2, "")
    assert error == "engram-kernels table verify: layer must be one with a table, [1, 4], got 2\n"


def test_inspect_names_what_there_is(tmp_path, capsys):
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    code, text, _ = run(capsys, "inspect", folder)
    assert code == 0
    for words in (
        "14 tensors in 2 files, 2 tables among them",
        f"layers.4.engram.embed  e4m3_ue8m0, {V41.rows_per_layer[1]} rows x 64, {V41.rows_per_layer[1] * 66:,} bytes",
        "stored as              F8_E4M3 in 1 tensor, scale F8_E8M0, in ",
        "fits                   no preset",
    ):
        assert words in text, words
    folder, *_ = checkpoints.qwen_folder(tmp_path / "qwen", 8)
    code, text, _ = run(capsys, "inspect", *sorted(folder.glob("*.safetensors")))
    assert code == 0 and f"F8_E4M3 in 8 tensors, weight_scale {float(QWEN_SCALE):.6g}, in 3 files" in text
    assert f"e4m3, {checkpoints.QWEN.rows_per_layer[0]} rows x 16" in text


@pytest.mark.parametrize("preset", PRESETS)
def test_inspect_and_verify_know_the_published_models(tmp_path, capsys, preset):
    """Sparse files of full size: headers alone are read, whatever the size."""
    config = getattr(EngramConfig, preset)()
    fmt, width, sizes = FORMATS[config.format], config.row_width, {}
    dtype = {"e4m3": "F8_E4M3", "e4m3_ue8m0": "F8_E4M3", "bfloat16": "BF16"}[config.format]
    for layer, rows in zip(config.layers, config.rows_per_layer, strict=True):
        name = f"layers.{layer}.engram.embed." if config.window == "pad" else QWEN_TABLE
        size, header = rows * fmt.row_bytes(width), {}
        header[f"{name}weight"] = dict(dtype=dtype, shape=[rows, width], data_offsets=[0, size])
        if fmt.scaled:
            groups = fmt.group
            scale = dict(dtype="F8_E8M0", shape=[rows, width // 32]) if groups else dict(dtype="F32", shape=[])
            more = rows * fmt.scale_bytes(width) or 4
            header[f"{name}{'scale' if groups else 'weight_scale'}"] = scale | {"data_offsets": [size, size + more]}
            size += more
        path = by_hand(tmp_path / f"{layer}.safetensors", header)
        sizes[path] = path.stat().st_size + size
    for path, size in sizes.items():
        os.truncate(path, size)
        if config.format == "e4m3":
            with open(path, "r+b") as file:
                file.seek(size - 4)
                file.write(b"\0\0\x80?")  # 1.0
    code, text, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and all("fits " in text and f" {preset} layer {layer}" in text for layer in config.layers)
    code, text, _ = run(capsys, "verify", tmp_path, "--headers-only", "--config", preset)
    assert code == 0 and f"ok: rows and width of layer {config.layers[-1]} of {preset}" in text
    list(sizes)[-1].unlink()
    if len(sizes) > 1:
        code, text, _ = run(capsys, "verify", tmp_path, "--headers-only", "--config", preset)
        assert code == 1 and f"layer {config.layers[-1]}" in text and "FAILED" in text


def test_inspect_lists_tables_that_are_refused(tmp_path, capsys):
    tensors = {QWEN_TABLE + "shard_0.weight": torch.zeros(4, 84, dtype=torch.uint8)}
    tensors |= {"layers.1.engram.embed.weight": torch.zeros(4, 64)}
    code, text, _ = run(capsys, "inspect", save(tmp_path / "a.safetensors", tensors))
    assert code == 0 and "refused: " in text and "is an nf4 table" in text and "float32, 4 rows x 64" in text


def with_rows(path, change, **options):
    """The same file with other content."""
    with Checkpoint(path, "test") as checkpoint:
        place = checkpoint.tensor(options.pop("name", "weight"))
    content = bytearray(path.read_bytes())
    change(memoryview(content)[place.offset : place.offset + place.nbytes])
    path.write_bytes(content)
    return path


def put(at, value):
    def change(content):
        content[at : at + len(value)] = value

    return change


def test_verify_reads_every_row(tmp_path, capsys):
    for name in FORMATS:
        for options in ({}, {"shard_bytes": 2000}):
            code, text, _ = run(capsys, "verify", saved_table(tmp_path, name, **options))
            assert code == 0 and "ok: no NaN, no infinity; 90 rows read, 0 of them zero" in text, text
    cases = (
        ("e4m3", put(64 * 89 + 3, b"\xff\x7f"), "weight", "FAILED: 2 elements are NaN (90 rows read"),
        ("e4m3_ue8m0", put(7, b"\xff"), "scale", "FAILED: 1 scale bytes are 255, which is NaN (90 rows"),
        ("mxfp4", put(7, b"\xff\x7f"), "scale", "FAILED: 1 scale bytes are 255, which is NaN (90 rows"),
        ("nvfp4", put(7, b"\xff\x7f"), "weight_scale", "FAILED: 2 scale bytes are 127 or 255, which is NaN (90 rows"),
        (
            "bfloat16",
            put(128, b"\xc0\x7f\x80\x7f\x80\xff"),
            "weight",
            "1 elements are NaN; 2 elements are infinite (",
        ),
        ("float64", put(8, b"\0\0\0\0\0\0\xf0\x7f"), "weight", "FAILED: 1 elements are infinite (90 rows"),
        ("e4m3", put(64 * 20, bytes(64 * 9)), "weight", "FAILED: rows 20 to 28 are zero, 10.0% of the table, as in a"),
    )
    for name, change, tensor, expected in cases:
        path = with_rows(saved_table(tmp_path, name), change, name=tensor)
        code, text, _ = run(capsys, "verify", path)
        assert code == 1 and expected in text, text
        assert run(capsys, "verify", path, "--headers-only")[0] == 0
    # One zero row is a row like any other, and a scale byte of 0 is a scale.
    path = with_rows(with_rows(saved_table(tmp_path, "e4m3_ue8m0"), put(0, bytes(64))), put(100, b"\0"), name="scale")
    code, text, _ = run(capsys, "verify", path)
    assert code == 0 and "90 rows read, 1 of them zero, 1 scale bytes are 0" in text


@pytest.mark.parametrize("rows", [(0, 90), (0, 50), (40, 90), (45, 50), (46, 48)])
def test_verify_finds_runs_of_zero_rows_across_chunks(tmp_path, capsys, rows):
    begin, end = rows
    path = saved_table(tmp_path, "float32")
    path = with_rows(path, put(begin * 256, bytes((end - begin) * 256)))
    code, text, _ = run(capsys, "verify", path)
    assert code == 1 and f"rows {begin} to {end - 1} are zero, {(end - begin) / 90:.1%} of the table" in text, text
    assert f"{end - begin} of them zero" in text


def test_verify_against_a_config(tmp_path, capsys):
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    save_config(folder, **V41_FIELDS)
    code, text, _ = run(capsys, "verify", folder, "--config", folder)
    assert code == 0 and text.count("ok: rows and width of layer") == 2 and f"of {folder / 'config.json'}" in text
    other = dataclasses.replace(V41, table_sizes=(130, 130))
    save_config(folder, **V41_FIELDS | dict(engram_vocab_size=130, engram_num_embeddings=list(other.rows_per_layer)))
    code, text, _ = run(capsys, "verify", folder, "--config", folder / "config.json")
    expected = f"FAILED: layer 1 of {folder / 'config.json'}: {other.rows_per_layer[0]} rows expected"
    assert code == 1 and expected in text
    code, text, _ = run(capsys, "verify", folder, "--layer", 4)
    assert code == 0 and "layers.4.engram" in text and "layers.1.engram" not in text
    code, text, _ = run(capsys, "verify", folder, "--prefix", "layers.1.engram.embed", "--config", "engram_27b")
    assert code == 1 and "FAILED: engram_27b has tables at layers (2, 15), and this is of layer 1" in text
    code, text, _ = run(capsys, "verify", folder, "--prefix", "layers.1.attn.wq_b")
    assert code == 0 and re.search(r"layers.1.attn.wq_b +float32, 4 rows x 4, 64 bytes", text)
    code, text, _ = run(capsys, "verify", folder / "model-00001-of-00002.safetensors", "--config", folder)
    assert code == 1 and "and these files have none" in text
    (folder / "model-00002-of-00002.safetensors").unlink()
    code, text, _ = run(capsys, "verify", folder)
    assert code == 1 and text.count("FAILED: no such file: ") == 2


def test_verify_compares_the_constants_of_qwens_hash(tmp_path):
    config = checkpoints.QWEN
    plan = HashPlan.build(config)
    _, pieces = checkpoints.qwen_table(4)
    constants = {
        "layer_multipliers": plan.multipliers[0],
        "ngram_heads_vocab_sizes": plan.primes[0],
        "ngram_heads_offsets": plan.offsets[0],
    }
    named = {f"{QWEN_PLE}ple_embedding.{name}": value.clone() for name, value in constants.items()}
    path = save(tmp_path / "a.safetensors", pieces | named)

    def sections():
        return verify_sections(path, "t", config=("small", config), bar=console.byte_bar)

    found, holds = sections()
    assert (
        holds and ("hash", "ok: the checkpoint's multipliers, primes and offsets are those of the config") in found[1]
    )
    for name in named:
        changed = named[name].clone()
        changed[-1] += 2
        save(path, pieces | named | {name: changed})
        found, holds = sections()
        assert not holds and any(f"FAILED: {name} I64" in text for label, text in found[1] if label == "hash")


def test_verify_of_files_that_are_not_whole(tmp_path, capsys):
    path = saved_table(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    code, text, _ = run(capsys, "verify", path)
    assert code == 1 and "FAILED: " in text and "is truncated: its header tells of" in text
    index = saved_table(tmp_path, "e4m3_ue8m0", shard_bytes=2000)
    shard = tmp_path / sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    os.truncate(shard, shard.stat().st_size - 5)
    code, text, _ = run(capsys, "verify", index)
    assert code == 1 and f"{shard} is truncated" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["inspect", "nope.safetensors"], "table inspect: argument FILE: no such file: nope.safetensors"),
        (["inspect", "TMP/linear"], "table inspect: no Engram table among 2 tensors (a.weight, b.weight"),
        (["verify", "nope"], "table verify: argument FILE: no such file: nope"),
        (["verify", "TMP/t", "--config", "gpt"], "argument --config: expected one of deepseek_v41_flash, "),
        (["verify", "TMP/t", "--config", "TMP/config.json"], "config.json: EngramConfig.from_hf: config has"),
        (["convert", "TMP/t", "--out", "TMP/config.json"], "--out must be a file that ends in .safetensors, or a"),
        (["convert", "TMP/t", "--out", "TMP/o", "--scale", "2"], "a scale is a positive number"),
        (["convert", "TMP/t", "--out", "TMP/linear"], "holds 2 tensors that are not one"),
        (["convert", "TMP/n", "--out", "TMP/o", "--format", "e4m3_ue8m0"], "needs a row width"),
        (["shared", "--free", "nope"], "table shared: this user has no shared table 'nope'; there is "),
        (["shared", "--free", "../nope"], "needs a name of 1 to 128 letters"),
        (["convert", "TMP/d", "--out", "TMP/o", "--format", "bfloat16"], "float64 rows"),
    ],
)
def test_mistakes_take_one_line(tmp_path, capsys, words, message):
    save(tmp_path / "t.safetensors", {"weight": torch.ones(4, 64)})
    save(tmp_path / "n.safetensors", {"weight": torch.ones(4, 48)})
    save(tmp_path / "d.safetensors", {"weight": torch.ones(4, 64).double()})
    save(tmp_path / "linear.safetensors", {"a.weight": torch.ones(4, 64), "b.weight": torch.ones(4, 64)})
    (tmp_path / "config.json").write_text("{}")
    words = [re.sub(r"^TMP(/\w+)$", rf"{tmp_path}\1.safetensors", word) for word in words]
    code, text, errors = run(capsys, *(word.replace("TMP", str(tmp_path)) for word in words))
    assert code == 2 and text == "" and errors.count("\n") == 1
    assert errors.startswith("engram-kernels table ") and message in errors, errors


@pytest.mark.parametrize(
    "words, message",
    [
        (["convert", "."], "the following arguments are required: --out"),
        (["convert", ".", "--out", "b", "--shard-bytes", "5 apples"], "expected a positive number of bytes"),
        (["convert", ".", "--out", "b", "--format", "int8"], "invalid choice: 'int8'"),
        (["convert", ".", "--out", "b", "--scale", "0"], "expected a positive number, got '0'"),
    ],
)
def test_wrong_words(capsys, words, message):
    code, text, errors = run(capsys, *words)
    assert code == 2 and text == "" and message in errors and errors.count("\n") == 1


def test_shared(capsys, monkeypatch, shared_name):
    """What is there, who holds it, and what becomes of its memory when it is freed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = EngramTable.from_tensors(torch.ones(4, 64), placement="shared", name=shared_name, keep=True)
    code, text, _ = run(capsys, "shared")
    assert code == 0 and re.search(rf"{shared_name} .*float32, 4 rows x 64, 1,024 bytes", text)
    assert f"engram-{shared_name}" in text and "kept until it is freed" in text and f"1 process: {os.getpid()}" in text
    code, text, _ = run(capsys, "shared", "--free", shared_name)
    assert code == 0 and re.search(rf"{shared_name} .*freed: 1,024 bytes", text)
    assert f"stays until these let go of it: 1 process: {os.getpid()}" in text
    assert table.weight.eq(1).all()
    table.close()
    with EngramTable.empty(4, 64, "float32", placement="shared", name=shared_name):
        assert f"is being filled by process {os.getpid()}" in run(capsys, "shared")[1]
        code, text, errors = run(capsys, "shared", "--free", shared_name)
        assert (code, text) == (2, "") and f"process {os.getpid()} is filling" in errors
    EngramTable.from_tensors(torch.ones(4, 64), placement="shared", name=shared_name, keep=True).close()
    code, text, _ = run(capsys, "shared", "--free", shared_name)
    assert code == 0 and "given back" in text
