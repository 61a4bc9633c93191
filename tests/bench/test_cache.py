"""The benchmarks of the n-gram cache on a CPU: what is predicted, what is counted, and that wrong rows have no time."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.cache import prediction as cache_prediction
from bench.cache.prediction import predict
from bench.text import load_token_ids


def test_the_committed_prediction_is_what_the_command_gives(monkeypatch, tmp_path, capsys):
    """Its smallest cache, again; the whole takes half a minute."""
    committed = json.loads(cache_prediction.RESULT.read_text())
    assert committed["kind"] == "simulated, not measured"
    assert len(committed["points"]) == len(cache_prediction.TOKENS) * (1 + len(cache_prediction.ENTRIES))
    again = json.loads(json.dumps(cache_prediction.predict(load_token_ids(), (1 << 14,), (8192,))))
    assert all(point in committed["points"] for point in again) and len(again) == 2
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cache_prediction, "load_token_ids", lambda: load_token_ids()[:5000])
    monkeypatch.setattr(cache_prediction, "predict", lambda ids: predict(ids, (64, 256), (512, 1024)))
    assert main(["cache", "--out", str(tmp_path / "found" / "cache.json")]) == 0
    content = json.loads((tmp_path / "found" / "cache.json").read_text())
    assert [point["entries"] for point in content["points"]] == [0, 64, 256] * 2
    assert (tmp_path / "found" / "cache.png").stat().st_size > 10_000
    for point in content["points"]:
        assert np.isclose(point["link_bytes"], 2 * 2112 * sum(point["read"]))
        assert np.isclose(point["gain"], 3 / sum(point["read"]))
    assert "none, read once" in capsys.readouterr().out


def test_a_text_too_short_for_a_call_has_no_prediction(capsys):
    cache_prediction.print_prediction(load_token_ids()[:1000], "mine.txt")
    assert "fewer than two calls of 8,192" in capsys.readouterr().out
