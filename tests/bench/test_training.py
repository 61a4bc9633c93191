"""``python -m bench train`` and ``updates``: wrong steps are seen, and the committed results show what they claim."""

import dataclasses
import json

import pytest
import torch

from bench.running.timing import Measurement
from bench.training import optimizers, train, updates

from .toys import CPU

TINY = train.Settings(
    vocab=60, hidden=16, feed_forward=32, table_size=50, row_width=8, context=12, batch=2, steps=4, seeds=(0, 1)
)


def test_a_small_training_run():
    result = train.run(TINY, CPU)
    assert result["largest_difference"] < train.TOLERANCE
    sizes = {kind: each[0]["dense_parameters"] for kind, each in result["runs"].items()}
    assert sizes["engram"] == sizes["dense"] and abs(sizes["without"] - sizes["engram"]) <= 2 * 2 * TINY.hidden
    assert [len(each) for each in result["runs"].values()] == [2, 1, 2]
    assert all(len(each["losses"]) == TINY.steps for runs in result["runs"].values() for each in runs)
    held_out = result["held_out"]
    assert result["gain"] == pytest.approx(sum(held_out["without"]) / 2 - sum(held_out["engram"]) / 2)


def test_a_wrong_update_is_seen(monkeypatch):
    """Control: where the dense run leaves its rows alone the losses part."""
    monkeypatch.setattr(train.DenseAdagrad, "step", lambda self: None)
    result = train.run(dataclasses.replace(TINY, seeds=(0,), row_rate=1.0, steps=8), CPU)
    assert result["largest_difference"] > train.TOLERANCE and not train.holds(result)


def test_the_committed_training_run_holds():
    result = json.loads(train.RESULT.read_text())
    assert result["settings"] == json.loads(json.dumps(dataclasses.asdict(train.Settings())))
    pairs = zip(result["runs"]["engram"][0]["losses"], result["runs"]["dense"][0]["losses"], strict=True)
    assert max(abs(ours - dense) / dense for ours, dense in pairs) < train.TOLERANCE
    held_out = {kind: [each["held_out"] for each in result["runs"][kind]] for kind in ("engram", "without")}
    spread = max(max(losses) - min(losses) for losses in held_out.values())
    gain = sum(held_out["without"]) / len(held_out["without"]) - sum(held_out["engram"]) / len(held_out["engram"])
    assert gain > spread and train.holds(result)


class CountingTimer:
    """Calls each step once; a time that grows with the number of measurements."""

    def __init__(self):
        self.measured = 0

    def measure(self, calls):
        for call in calls:
            call()
        self.measured += 1
        return Measurement(float(self.measured), 0.0, 0.0, len(calls))


def test_every_optimizer_steps_over_every_size_that_fits(monkeypatch):
    timer = CountingTimer()
    result = updates.run([64_000, 256_000], 100, CPU, timer)
    names = [f"{name}/cpu" for name in updates.COPIES]
    assert [each["name"] for each in result["records"]] == [name for name in names for _ in range(2)]
    assert timer.measured == 8 and not result["left_out"]
    assert result["growth"] == dict(zip(names, (2 / 1, 4 / 3, 6 / 5, 8 / 7), strict=True))
    assert all(0 < each["distinct_rows"] <= 100 for each in result["records"])
    monkeypatch.setattr(updates, "available_host_memory", lambda: 1_000_000)
    result = updates.run([250_000], 100, CPU, CountingTimer())
    assert {each["name"] for each in result["records"]} == {"RowAdagrad/cpu", "RowAdam/cpu", "SparseAdam/cpu"}
    assert result["left_out"] == ["Adam/cpu, 0.00025 GB: takes 0.0 GB, 0.0 are free"]
    names = [subject.name for subject in updates.subjects(torch.device("cuda"))]
    ours = ["RowAdagrad/device", "RowAdam/device"]
    assert names == ["RowAdagrad/host", "RowAdam/host", *ours, "SparseAdam/device", "Adam/device"]


@pytest.mark.parametrize("optimizer", updates.COPIES)
def test_a_step_that_does_nothing_is_seen(optimizer, monkeypatch):
    """Control: the check before the timing."""
    kind = getattr(updates, optimizer, None) or getattr(torch.optim, optimizer)
    monkeypatch.setattr(kind, "step", lambda self: None)
    with pytest.raises(RuntimeError, match="a step moved 0 of"):
        updates.run([64_000], 100, CPU, CountingTimer())


def test_the_updates_command_and_its_committed_result(tmp_path, capsys):
    """Ours touch the rows of a batch alone; a dense step grows with the table."""
    result = json.loads(updates.RESULT.read_text())
    assert result["growth"] == updates.growth(result["records"])
    sizes = {each["table_bytes"] for each in result["records"]}
    assert max(sizes) >= 16 * min(sizes)
    ours = [factor for name, factor in result["growth"].items() if name.startswith("Row")]
    dense = next(factor for name, factor in result["growth"].items() if name.startswith("Adam/"))
    assert len(ours) >= 2 and max(ours) <= 1.5 < 8 < dense
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "updates.json"
    assert updates.main(["--device", "cpu", "--gb", "0.0001", "0.0002", "--ids", "50", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ids"] == 50 and out.with_suffix(".png").stat().st_size > 1000
    assert "RowAdam/cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        updates.main(["--gb", "0.0000001"])


def test_committed_results_say_what_they_are_of():
    """Units, and what torch was built for; and the optimizers' table of the document is that of the JSON."""
    for path in train.RESULT.parent.glob("*.json"):
        environment = json.loads(path.read_text()).get("environment", {})
        assert "None" not in str(environment.get("runtime")) or not environment, path.name
    for path in (train.RESULT, updates.RESULT, optimizers.RESULT):
        assert json.loads(path.read_text())["unit"], path.name
    text = (train.RESULT.parents[2] / "docs" / "training.md").read_text()
    for name, each in json.loads(optimizers.RESULT.read_text())["optimizers"].items():
        rates = [float(rate) for rate in each["by_rate"]]
        assert min(rates) < each["rate"] < max(rates), f"{name}: the best rate is at an end of those tried"
        losses = ", ".join(f"{loss:.3f}" for loss in each["held_out"])
        assert f"| `{name}` | {each['rate']:g} | {losses} |" in text
