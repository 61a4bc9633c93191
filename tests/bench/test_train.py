"""``python -m bench train``: its steps agree with the dense run, and the committed result shows what it claims."""

import dataclasses
import json

import pytest
import torch

from bench.training import train

TINY = train.Settings(
    vocab=60, hidden=16, feed_forward=32, table_size=50, row_width=8, context=12, batch=2, steps=4, seeds=(0, 1)
)


def test_a_small_run():
    result = train.run(TINY, torch.device("cpu"))
    assert result["largest_difference"] < train.TOLERANCE
    sizes = {kind: each[0]["dense_parameters"] for kind, each in result["runs"].items()}
    assert sizes["engram"] == sizes["dense"] and abs(sizes["without"] - sizes["engram"]) <= 2 * 2 * TINY.hidden
    assert [len(each) for each in result["runs"].values()] == [2, 1, 2]
    assert all(len(each["losses"]) == TINY.steps for runs in result["runs"].values() for each in runs)
    assert result["gain"] == pytest.approx(
        sum(result["held_out"]["without"]) / 2 - sum(result["held_out"]["engram"]) / 2
    )


def test_a_wrong_update_is_seen(monkeypatch):
    """Control: where the dense run leaves its rows alone the losses part."""
    monkeypatch.setattr(train.DenseAdagrad, "step", lambda self: None)
    settings = dataclasses.replace(TINY, seeds=(0,), row_rate=1.0, steps=8)
    result = train.run(settings, torch.device("cpu"))
    assert result["largest_difference"] > train.TOLERANCE and not train.holds(result)


def test_the_committed_result_holds():
    result = json.loads(train.RESULT.read_text())
    assert result["settings"] == json.loads(json.dumps(dataclasses.asdict(train.Settings())))
    pairs = zip(result["runs"]["engram"][0]["losses"], result["runs"]["dense"][0]["losses"], strict=True)
    assert max(abs(ours - dense) / dense for ours, dense in pairs) < train.TOLERANCE
    held_out = {kind: [each["held_out"] for each in result["runs"][kind]] for kind in ("engram", "without")}
    spread = max(max(losses) - min(losses) for losses in held_out.values())
    gain = sum(held_out["without"]) / len(held_out["without"]) - sum(held_out["engram"]) / len(held_out["engram"])
    assert gain > spread and train.holds(result)
