"""EngramTable.save_safetensors: equal bits back, whole or not at all, also where it fails or its process is killed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.checkpoints import writing as file_writing
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.tables import files as table_files
from engram_kernels.testing import tables
from tests.support.checkpoints import raw, save, v41_tensors

ROOT = Path(__file__).parents[2]
load = EngramTable.from_safetensors


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks for each file of these tables."""
    monkeypatch.setattr(table_files, "CHUNK", 2000)


def table_of(name="bfloat16", rows=101, width=64, seed=0):
    return tables.cpu_table(rows, width, name, seed)


def same(one, other):
    equal = torch.equal(raw(one.weight), raw(other.weight)) and one.format == other.format
    return equal and one.own_scale == other.own_scale and (one.scale is None or torch.equal(one.scale, other.scale))


def listing(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("shard_bytes", [None, 3000, 1])
@pytest.mark.parametrize("name", FORMATS)
def test_what_was_saved_loads_to_equal_bits(tmp_path, name, shard_bytes):
    table = table_of(name)
    calls = []
    path = table.save_safetensors(
        tmp_path / "t.safetensors", shard_bytes=shard_bytes, progress=lambda *call: calls.append(call)
    )
    assert path.name == ("t.safetensors" if shard_bytes is None else "t.safetensors.index.json")
    for placement in ("cpu", "host"):
        assert same(load(path, placement=placement), table)
    assert calls[0] == (0, table.nbytes) and calls[-1] == (table.nbytes, table.nbytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_files_are_what_other_readers_expect(tmp_path):
    """The library reads them; the index has Hugging Face's form; data begins at a page; parts are even but the last."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    table, prefix = table_of("e4m3_ue8m0"), "layers.1.engram.embed"
    path = table.save_safetensors(tmp_path / "a.safetensors", prefix=prefix, metadata={"source": "a test"})
    tensors = load_file(path)
    assert set(tensors) == {f"{prefix}.weight", f"{prefix}.scale"}
    assert torch.equal(raw(tensors[f"{prefix}.weight"]), raw(table.weight))
    assert tensors[f"{prefix}.scale"].dtype == torch.float8_e8m0fnu
    assert torch.equal(raw(tensors[f"{prefix}.scale"]), table.scale)
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    assert json.loads(texts.pop("engram_table")) == dict(prefix=f"{prefix}.", rows=101, parts=1, token_map=None)
    assert texts == {"format": "pt", "source": "a test"}
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
    assert same(load(path, placement="cpu", layer=1), table)

    index = table.save_safetensors(tmp_path, prefix=prefix, shard_bytes=2000)
    assert index == tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == table.nbytes
    files = sorted(set(content["weight_map"].values()))
    assert all(re.fullmatch(r"model-[0-9a-f]{8}-0000\d-of-00004\.safetensors", file) for file in files)
    rows = [len(load_file(tmp_path / file)[f"{prefix}.shard_{k}.weight"]) for k, file in enumerate(files)]
    assert rows == [26, 26, 26, 23]
    assert same(load(tmp_path, placement="cpu", layer=1), table)


def test_a_table_scale_lies_beside_the_first_part(tmp_path):
    index = table_of("e4m3").save_safetensors(tmp_path, prefix="a.", shard_bytes=2000)
    names = json.loads(index.read_text())["weight_map"]
    assert set(names) == {"a.weight_scale", *(f"a.shard_{k}.weight" for k in range(4))}
    assert names["a.weight_scale"] == names["a.shard_0.weight"]


FORMS = {"one file": {}, "several": {"shard_bytes": 3000}}


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_a_table_is_replaced_whole(tmp_path, before, after):
    """One under the same name goes, all files of it; what lies beside stays."""
    old, new = table_of(seed=1), table_of("e4m3", seed=2)
    save(tmp_path / "other.safetensors", v41_tensors(1))
    (tmp_path / "t-notes.safetensors").write_text("mine")
    old.save_safetensors(tmp_path / "t.safetensors", **FORMS[before])
    path = new.save_safetensors(tmp_path / "t.safetensors", **FORMS[after])
    assert same(load(path, placement="cpu"), new)
    ours = [name for name in listing(tmp_path) if name not in ("other.safetensors", "t-notes.safetensors")]
    if after == "one file":
        assert ours == ["t.safetensors"]
    else:
        assert ours == sorted({"t.safetensors.index.json", *json.loads(path.read_text())["weight_map"].values()})
    assert len(listing(tmp_path)) == len(ours) + 2


class Stop(Exception):
    pass


def stop_half_way(done, total):
    if done > total / 2:
        raise Stop


def fail_after(monkeypatch, name, calls):
    """os.<name> fails at its call number ``calls``; calls are counted together."""
    function, left = getattr(os, name), [calls]

    def failing(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return function(*args, **options)

    monkeypatch.setattr(table_files.os, name, failing)


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path, before, after, monkeypatch):
    old, new = table_of(seed=1), table_of("e4m3", seed=2)
    path = old.save_safetensors(tmp_path / "t.safetensors", **FORMS[before])
    files = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    descriptors = len(os.listdir("/proc/self/fd"))

    def untouched():
        assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == files
        assert same(load(path, placement="cpu"), old) and len(os.listdir("/proc/self/fd")) == descriptors

    with pytest.raises(Stop):
        new.save_safetensors(tmp_path / "t.safetensors", progress=stop_half_way, **FORMS[after])
    untouched()
    # The disk is full at the first write, and later; syncing fails; the last rename fails, whichever file's it is.
    renames = 0 if after == "one file" else 3
    for name, calls in (
        ("pwrite", 0),
        ("pwrite", 3),
        ("ftruncate", 0),
        ("fsync", 0),
        ("rename", 0),
        ("rename", renames),
    ):
        with monkeypatch.context() as patch:
            fail_after(patch, name, calls)
            with pytest.raises(OSError, match="No space left"):
                new.save_safetensors(tmp_path / "t.safetensors", **FORMS[after])
        untouched()
    monkeypatch.setattr(file_writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"save_safetensors: [\d,]+ bytes are to be written and there is room for 100: "):
        new.save_safetensors(tmp_path / "t.safetensors", **FORMS[after])
    untouched()


CHILD = r"""
import os, sys, threading
import torch
from engram_kernels import EngramTable
from engram_kernels.tables import files as table_files
table_files.CHUNK = 2000
table = EngramTable.from_tensors(torch.full((1000, 64), 2.0), placement="cpu")
def save(name, options):
    def progress(done, total):
        if done > total / 2:
            os.write(1, name.encode() + b"\n")  # in one piece
            threading.Event().wait()
    table.save_safetensors(f"{sys.argv[1]}/{name}.safetensors", progress=progress, **options)
threads = [threading.Thread(target=save, args=a) for a in (("one", {}), ("several", {"shard_bytes": 30_000}))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_a_killed_save_leaves_what_was_there(tmp_path):
    """A real process, killed in the middle of two saves; its files are left alone while it lives, and removed after."""
    old, new = table_of(seed=1), table_of(seed=2)
    paths = {name: old.save_safetensors(tmp_path / f"{name}.safetensors", **form) for name, form in named_forms()}
    kept = set(listing(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert {child.stdout.readline().strip(), child.stdout.readline().strip()} == {"one", "several"}
            partial = set(listing(tmp_path)) - kept
            assert len(partial) == 10 and all(name.startswith(".") and name.endswith(".partial") for name in partial)
            # A save by another process at the same time: it leaves the files that are being written.
            old.save_safetensors(tmp_path / "one.safetensors")
            assert partial <= set(listing(tmp_path))
        finally:
            child.kill()
    for path in paths.values():
        assert same(load(path, placement="cpu"), old)
    for name, form in named_forms():
        path = new.save_safetensors(tmp_path / f"{name}.safetensors", **form)
        assert same(load(path, placement="cpu"), new)
    assert not [name for name in listing(tmp_path) if name.startswith(".")]
    assert len(listing(tmp_path)) == 1 + 1 + len(set(json.loads(paths["several"].read_text())["weight_map"].values()))


def named_forms():
    return zip(("one", "several"), FORMS.values(), strict=True)


def test_shards_whose_index_never_came_are_removed(tmp_path):
    """Killed between the renames and the index: complete shards that nothing refers to."""
    table = table_of()
    table.save_safetensors(tmp_path / "t.safetensors", **FORMS["several"])
    index = tmp_path / "t.safetensors.index.json"
    lost = [name for name in listing(tmp_path) if name != index.name]
    index.unlink()
    table.save_safetensors(tmp_path / "t.safetensors", **FORMS["several"])
    assert not set(lost) & set(listing(tmp_path)) and same(load(index, placement="cpu"), table)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Nobody can tell what is left over there, so that it stays; saving works."""
    table = table_of()
    table.save_safetensors(tmp_path / "t.safetensors", **FORMS["several"])
    left = tmp_path / ".t-0123abcd-00001.partial"
    left.touch()

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(file_writing.fcntl, "flock", refuse)
        path = table.save_safetensors(tmp_path / "t.safetensors")
    assert same(load(path, placement="cpu"), table) and listing(tmp_path) == [left.name, path.name]
    table.save_safetensors(path)
    assert listing(tmp_path) == [path.name]


def test_saving_over_the_file_a_table_is_mapped_from(tmp_path):
    first, second = table_of(seed=1), table_of(seed=2)
    path = first.save_safetensors(tmp_path / "t.safetensors")
    mapped = load(path, placement="cpu", mapped=True)
    second.save_safetensors(path)
    ids = torch.arange(101)
    assert torch.equal(lookup(mapped, ids), lookup(first, ids))
    assert same(load(path, placement="cpu"), second)
    mapped.save_safetensors(path)  # and onto itself
    assert same(load(path, placement="cpu"), first)


def test_files_that_hold_more_than_a_table_are_not_replaced(tmp_path):
    table = table_of()
    model = save(tmp_path / "model.safetensors", v41_tensors(1))
    text = tmp_path / "text.safetensors"
    text.write_text("my notes")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(v41_tensors(4), "model.safetensors")}))
    pruned = save(tmp_path / "pruned.safetensors", {"weight": torch.zeros(4, 64), "weight_mask": torch.ones(4, 64)})
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    for path, expected in (
        (pruned, "pruned.safetensors holds 2 tensors that are not one table's own"),
        (model, "model.safetensors holds 7 tensors that are not one table's own, and is not replaced; save to another"),
        (tmp_path, "model.safetensors holds 7 tensors"),
        (tmp_path / "m.safetensors", "m.safetensors.index.json holds 7 tensors"),
        (text, "text.safetensors is in the way and cannot be read; remove it first"),
    ):
        with pytest.raises(ValueError, match=f"^EngramTable.save_safetensors: .*{expected}"):
            table.save_safetensors(path, prefix="layers.1.engram.embed")
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_bad_arguments(tmp_path):
    table, path = table_of(), tmp_path / "t.safetensors"
    for error, expected, arguments in (
        (
            ValueError,
            "path must end in .safetensors or be a folder that exists, got '.*t.bin'",
            {"path": tmp_path / "t.bin"},
        ),
        (FileNotFoundError, "no such folder: .*nope", {"path": tmp_path / "nope" / "t.safetensors"}),
        (TypeError, "path must be a file or a folder, got int", {"path": 3}),
        (TypeError, "prefix must be a text, got int", {"prefix": 3}),
        (ValueError, "shard_bytes must be a positive int or None, got 0", {"shard_bytes": 0}),
        (ValueError, "shard_bytes must be a positive int or None, got '5GB'", {"shard_bytes": "5GB"}),
        (TypeError, "metadata must be a mapping from a text to a text or None, got dict", {"metadata": {"rows": 3}}),
    ):
        with pytest.raises(error, match=f"^EngramTable.save_safetensors: {expected}"):
            table.save_safetensors(**({"path": path} | arguments))
    table.close()
    with pytest.raises(ValueError, match="the table is closed"):
        table.save_safetensors(path)
    assert listing(tmp_path) == []
