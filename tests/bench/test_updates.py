"""``python -m bench updates``: what it steps, what it leaves out, and what the committed result shows."""

import json

import pytest
import torch

from bench.timing import Measurement
from bench.training import updates


class CountingTimer:
    """Calls each step once; a time that grows with the number of measurements."""

    def __init__(self):
        self.measured = 0

    def measure(self, calls):
        for call in calls:
            call()
        self.measured += 1
        return Measurement(float(self.measured), 0.0, 0.0, len(calls))


def test_every_optimizer_steps_over_every_size():
    timer = CountingTimer()
    result = updates.run([64_000, 256_000], 100, torch.device("cpu"), timer)
    names = [f"{name}/cpu" for name in updates.COPIES]
    assert [each["name"] for each in result["records"]] == [name for name in names for _ in range(2)]
    assert timer.measured == 8 and not result["left_out"]
    assert result["growth"] == dict(zip(names, (2 / 1, 4 / 3, 6 / 5, 8 / 7), strict=True))
    assert all(0 < each["distinct_rows"] <= 100 for each in result["records"])


@pytest.mark.parametrize("optimizer", updates.COPIES)
def test_a_step_that_does_nothing_is_seen(optimizer, monkeypatch):
    """Control: the check before the timing."""
    kind = getattr(updates, optimizer, None) or getattr(torch.optim, optimizer)
    monkeypatch.setattr(kind, "step", lambda self: None)
    with pytest.raises(RuntimeError, match="a step moved 0 of"):
        updates.run([64_000], 100, torch.device("cpu"), CountingTimer())


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(updates, "available_host_memory", lambda: 1_000_000)
    result = updates.run([250_000], 100, torch.device("cpu"), CountingTimer())
    assert {each["name"] for each in result["records"]} == {"RowAdagrad/cpu", "RowAdam/cpu", "SparseAdam/cpu"}
    assert result["left_out"] == ["Adam/cpu, 0.00025 GB: takes 0.0 GB, 0.0 are free"]


def test_subjects_on_a_gpu():
    names = [subject.name for subject in updates.subjects(torch.device("cuda"))]
    ours = ["RowAdagrad/device", "RowAdam/device"]
    assert names == ["RowAdagrad/host", "RowAdam/host", *ours, "SparseAdam/device", "Adam/device"]


def test_the_command_writes_a_result_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "updates.json"
    assert updates.main(["--device", "cpu", "--gb", "0.0001", "0.0002", "--ids", "50", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ids"] == 50 and out.with_suffix(".png").stat().st_size > 1000
    assert "RowAdam/cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        updates.main(["--gb", "0.0000001"])


def test_the_committed_result():
    """Ours touch the rows of a batch alone; a dense step grows with the table."""
    result = json.loads(updates.RESULT.read_text())
    assert result["growth"] == updates.growth(result["records"])
    sizes = {each["table_bytes"] for each in result["records"]}
    assert max(sizes) >= 16 * min(sizes)
    ours = [factor for name, factor in result["growth"].items() if name.startswith("Row")]
    dense = next(factor for name, factor in result["growth"].items() if name.startswith("Adam/"))
    assert len(ours) >= 2 and max(ours) <= 1.5 < 8 < dense
