"""Overlays in files: whose they are is checked before a row is written, and no other file is replaced."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram_kernels import EngramTable
from engram_kernels.geometry.row_format import FORMATS

from .test_overlay import bits, edits, same, table_of


def test_files(tmp_path):
    """A file of an overlay that is applied or not; loaded by a table like it, which has the same rows then."""
    for name in FORMATS:
        table, again = table_of(name), table_of(name)
        table.token_map = "0" * 64
        overlay = table.overlay(*edits(name))
        path = overlay.save_safetensors(tmp_path, metadata={"who": "me"})
        content = path.read_bytes()
        assert path == tmp_path / "rows.safetensors"
        loaded = again.load_overlay(path)
        assert same(bits(again), bits(table)) and torch.equal(loaded.ids, overlay.ids)
        loaded.remove()
        overlay.remove()
        assert same(bits(again), bits(table))
        overlay.save_safetensors(tmp_path)
        assert load_file(path).keys() == {"ids", "rows", *(["scales"] if table.format.group else [])}
        assert len(content) == path.stat().st_size


def test_files_of_other_tables_are_refused(tmp_path):
    table = table_of("e4m3")
    table.token_map = "0" * 64
    path = table.overlay(*edits("e4m3")).save_safetensors(tmp_path)
    others = {
        "format": table_of("e4m3_ue8m0"),
        "rows": table_of("e4m3", rows=41),
        "width": table_of("e4m3", width=48),
        "scale": EngramTable.from_tensors(table.weight, 0.25, placement="cpu"),
        "token_map": table_of("e4m3"),
    }
    others["token_map"].token_map = "1" * 64
    for fact, other in others.items():
        before = bits(other)
        with pytest.raises(ValueError, match=f"^EngramTable.load_overlay: .*is of rows for a table with {fact} "):
            other.load_overlay(path)
        assert same(bits(other), before) and not other.overlays
    unknown = table_of("e4m3")
    unknown.load_overlay(path)


def test_damaged_files_are_refused(tmp_path):
    table = table_of("float32")
    path = table.overlay(*edits("float32")).save_safetensors(tmp_path / "good.safetensors")
    table.overlays[0].remove()
    tensors = load_file(path)
    text = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")].decode()
    said = json.loads(text)["__metadata__"]["table_rows"]
    bad = tmp_path / "bad.safetensors"
    for match, content, words in (
        ("no 'table_rows'", tensors, None),
        ("is no JSON", tensors, "{"),
        ("is no object", tensors, "[]"),
        ("for a table with version", tensors, "{}"),
        ("must hold ids, rows, got ids", {"ids": tensors["ids"]}, said),
        ("must hold ids I64", tensors | {"ids": tensors["ids"].int()}, said),
        (r"must hold rows F32 \[5, 32\]", tensors | {"rows": tensors["rows"][:4].clone()}, said),
        ("got 4000", tensors | {"ids": torch.arange(5) * 1000}, said),
        ("distinct", tensors | {"ids": torch.zeros(5, dtype=torch.int64)}, said),
    ):
        save_file(content, bad, None if words is None else {"table_rows": words})
        with pytest.raises(ValueError, match=f"^EngramTable.load_overlay: .*{match}"):
            table.load_overlay(bad)
    assert not table.overlays


def test_a_file_that_is_none_of_an_overlay_is_not_replaced(tmp_path):
    table = table_of("float32")
    path = table.save_safetensors(tmp_path / "table.safetensors")
    overlay = table.overlay(*edits("float32"))
    with pytest.raises(ValueError, match="holds no rows of an overlay, and is not replaced"):
        overlay.save_safetensors(path)
    overlay.save_safetensors(tmp_path / "overlay.safetensors")
    overlay.remove()
    # A folder may hold overlays beside its table.
    assert same(bits(EngramTable.from_safetensors(tmp_path, placement="cpu")), bits(table))
