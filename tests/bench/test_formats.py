"""``python -m bench formats``: a small run, and the committed result with its table and its claims."""

import dataclasses
import json

import pytest

from bench.running.text import load_token_ids
from bench.training import formats
from tests.support.documents import ROOT

from .test_training import TINY
from .toys import CPU

KINDS = ("gaussian", "heavy", "trained")


def by_name(result):
    return {each["name"]: each for each in result["formats"]}


def test_a_small_run(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "ROWS", 200)
    result = formats.run(dataclasses.replace(TINY, row_width=32, seeds=(0,)), CPU)
    found = by_name(result)
    assert list(found) == [formats.name_of(*variant) for variant in formats.VARIANTS]
    assert all(
        each["quality"]["gaussian"].keys() == found["nvfp4"]["quality"]["heavy"].keys() for each in found.values()
    )
    for kind in KINDS:
        assert found["float32"]["quality"][kind]["signal_to_noise"] is None
        better = ["float16", "bfloat16", "e4m3_ue8m0", "nvfp4", "mxfp4"] if kind == "gaussian" else ["nvfp4", "mxfp4"]
        decibels = [found[name]["quality"][kind]["signal_to_noise"] for name in better]
        assert decibels == sorted(decibels, reverse=True), kind
        for name in ("nvfp4", "mxfp4"):
            searched, nearest = (found[each]["quality"][kind] for each in (name, f"{name}, nearest"))
            assert searched["signal_to_noise"] > nearest["signal_to_noise"]
    assert 19 < found["nvfp4"]["quality"]["gaussian"]["signal_to_noise"] < 23  # of 4 bits, about 5 to 6 dB each less 2
    assert all(len(each["held_out"]) == 1 and each["rows_a_second"] > 0 for each in found.values())
    assert abs(found["bfloat16"]["held_out"][0] - found["float32"]["held_out"][0]) < 0.02
    pytest.importorskip("matplotlib")
    formats.plot(result, tmp_path / "formats.png")
    assert (tmp_path / "formats.png").stat().st_size > 1000


def test_the_model_reads_the_table_that_is_measured(monkeypatch):
    """Control: rows that are spoiled on their way into a format cost loss."""
    original = formats.convert

    def spoiled(values, name, searched):
        return original(values if name == "float32" else values * -3, name, searched)

    monkeypatch.setattr(formats, "ROWS", 50)
    monkeypatch.setattr(formats, "convert", spoiled)
    found = by_name(formats.run(dataclasses.replace(TINY, row_width=32, seeds=(0,), steps=8, row_rate=1.0), CPU))
    assert abs(found["bfloat16"]["held_out"][0] - found["float32"]["held_out"][0]) > 1e-3


def test_what_a_cache_holds_in_each_format():
    ids = load_token_ids()[:16_384]
    found = {each["format"]: each for each in formats.cached(ids, nbytes=8 << 20, tokens=512)}
    sizes = dict(bfloat16=512, e4m3_ue8m0=264, nvfp4=144, mxfp4=136)
    assert {name: each["entries"] for name, each in found.items()} == {
        name: (8 << 20) // (6 * (8 * size + 16)) // 8 * 8 for name, size in sizes.items()
    }
    hits = [each["hit"] for each in found.values()]
    assert hits == sorted(hits) and hits[0] < hits[-1]
    assert all(each["link_bytes"] < each["without_cache"] for each in found.values())
    assert found["nvfp4"]["without_cache"] / found["e4m3_ue8m0"]["without_cache"] == pytest.approx(144 / 264)


def test_the_committed_run_and_its_table():
    result = json.loads(formats.RESULT.read_text())
    assert result["settings"] == json.loads(json.dumps(dataclasses.asdict(formats.settings())))
    text = (ROOT / "docs/formats.md").read_text()
    for row in (*formats.table_rows(result), *formats.cache_rows(result), *formats.traffic_rows()):
        assert "| " + " | ".join(row) + " |" in text, row[0]
    found = by_name(result)
    assert (found["e4m3_ue8m0"]["row_bytes"]["256"], found["nvfp4"]["row_bytes"]["256"]) == (264, 144)
    for name in ("nvfp4", "mxfp4"):  # why the search is the default
        for kind in KINDS:
            searched, nearest = (found[each]["quality"][kind] for each in (name, f"{name}, nearest"))
            assert searched["signal_to_noise"] > nearest["signal_to_noise"] + 0.3
