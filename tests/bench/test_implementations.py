"""``--implementation``: a function of the user's timed beside ours, in the JSON, and on a CPU."""

import json

import pytest
import torch

from bench import __main__ as command
from bench.running import suite
from bench.running.cases import load_cases
from bench.running.without_gpu import PLAIN
from engram_kernels import reference
from engram_kernels.testing.implementations import OPS, Implementation

from .toys import CPU, MACHINE, ROOFS, FakeTimer, ample

MINE = """
from engram_kernels import reference


def gather(table, row_ids):
    if table.format.name == "nvfp4":
        raise NotImplementedError("nvfp4")
    return reference.lookup(table, row_ids)


def wrong(table, row_ids, *, out=None):
    return out


def gate_residual(hidden, key, value, query_norm, key_norm, *, eps):
    return reference.gate_residual(hidden, key, value, query_norm, key_norm, eps=eps, zero_gate="copysign")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module of implementations."""
    (tmp_path / "mine_of_bench.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("engram_kernels.commands.console.has_rich", lambda: False)
    return "mine_of_bench"


@pytest.mark.parametrize("op", OPS)
def test_cases_of_every_op_take_one(op, bench, monkeypatch):
    """Ours are called with what the reference takes as well; baselines that nobody asked for stay few."""
    monkeypatch.setattr(bench, "implementations", [Implementation(op, "mine", getattr(reference, op))])
    of_op = [case for case in load_cases() if case.op == op and case.tokens == 1 and case.variant in PLAIN]
    for case in of_op[:2]:
        record = suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=0)
        assert list(record["baselines"]) == ["mine"] and record["baselines"]["mine"]["median"] > 0, record


def entry_of(function, bench, monkeypatch, name="lookup/v41/host/uniform/T8", op="lookup"):
    monkeypatch.setattr(bench, "implementations", [Implementation(op, "mine", function)])
    (case,) = [case for case in load_cases() if case.name == name]
    return suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=0)["baselines"]["mine"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda table, ids, *, out=None: out, "ValueError: 49152 of 49152 elements differ from ours"),
        (
            lambda table, ids: reference.lookup(table, ids).float(),
            "its result is float32 [8, 24, 256] on cpu, and ours bf",
        ),
        (lambda table, ids: None, "its result is NoneType, and ours bfloat16 [8, 24, 256] on cpu"),
        (lambda table, ids: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["unwritten", "dtype", "nothing", "error"],
)
def test_a_wrong_one_has_no_time(function, message, bench, monkeypatch):
    entry = entry_of(function, bench, monkeypatch)
    assert list(entry) == ["failed"] and message in entry["failed"]


def test_a_wrong_last_set_is_found(bench, monkeypatch):
    """A kernel that keeps the first result looks fast."""
    kept = []

    def keeps(table, ids):
        kept.append(reference.lookup(table, ids))
        return kept[0]

    assert "elements differ from ours" in entry_of(keeps, bench, monkeypatch)["failed"]


def test_one_that_lacks_an_option_is_skipped(bench, monkeypatch):
    def gate(hidden, key, value, query_norm, key_norm, *, eps):
        return reference.gate_residual(hidden, key, value, query_norm, key_norm, eps=eps)

    sign, copysign = (
        entry_of(gate, bench, monkeypatch, f"gate_residual/{model}/T1", "gate_residual") for model in ("27b", "v41")
    )
    assert sign == {"skipped": "takes no zero_gate"} and "median" in copysign


def test_a_run_keeps_it_in_its_json(mine, tmp_path, monkeypatch, capsys):
    """Of cases alone, without steps; the exit code is 1 where it is wrong or was never timed."""
    monkeypatch.setattr(command, "all_roofs", lambda *arguments: ROOFS)
    words = ["--out", str(tmp_path), "--only", "*v41*host/uniform/T8"]
    for name, code in ((f"{mine}:gather", 0), (f"lookup={mine}:wrong", 1)):
        chosen = command.parse(["--implementation", name, *words])
        environment = dict(MACHINE, date=f"2026-01-1{code} 10:00 UTC")
        assert command.measure(chosen, ample(), CPU, environment, FakeTimer()) == code
        content = json.loads((tmp_path / f"nvidia-test-2026-01-1{code}.json").read_text())
        assert {record["op"] for record in content["cases"]} == {"lookup"} and not content["steps"]
        assert content["environment"]["implementations"] == [f"lookup={name.removeprefix('lookup=')}"]
        (entry,) = [
            record["baselines"][name.removeprefix("lookup=")]
            for record in content["cases"]
            if record["name"] == "lookup/v41/host/uniform/T8"
        ]
        assert ("median" in entry) == (code == 0)
    out = capsys.readouterr()
    assert f"{mine}:gather 1x" in out.out and f"{mine}:gather skipped (raised NotImplementedError: nvfp4)" in out.out
    assert f"FAILED: {mine}:wrong was never timed" in out.err
    with pytest.raises(suite.UsageError, match="its implementations is"):
        path = tmp_path / "nvidia-test-2026-01-10.json"
        suite.ResultFile.resume(path, dict(MACHINE, implementations=None))


def test_without_a_gpu_it_is_timed_too(mine, capsys):
    words = ["--seconds", "3", "--only", "*v41/host/uniform/T1"]
    assert command.main(["--implementation", f"{mine}:gather", *words]) == 0
    printed = capsys.readouterr().out
    assert "nothing here ran on a GPU" in printed and "gate" not in printed and "hash" not in printed
    (line,) = [line for line in printed.splitlines() if "lookup/v41/host/uniform/T1 " in line]
    assert f"{mine}:gather " in line and "; embedding " in line and "failed" not in line
    assert command.main(["--implementation", f"lookup={mine}:wrong", *words]) == 1
    assert f"FAILED: {mine}:wrong, lookup/v41/host/uniform/T1: ValueError" in capsys.readouterr().err


def test_without_a_gpu_its_json_is_asked_for(mine, tmp_path, capsys):
    words = ["--seconds", "3", "--only", "*v41/host/uniform/T1", "--out", str(tmp_path)]
    assert command.main(["--implementation", f"{mine}:gather", *words]) == 0
    (path,) = tmp_path.glob("no-gpu-*.json")
    content = json.loads(path.read_text())
    (record,) = content["cases"]
    assert record["timer"] == "CPU" and record["baselines"][f"{mine}:gather"]["median"] > 0
    assert content["environment"]["implementations"] == [f"lookup={mine}:gather"]
    assert f"Wrote {path}" in capsys.readouterr().out
    assert command.main(["--out", str(tmp_path)]) == 2, "without an implementation there is none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--implementation", "nothing:gather"],
            "--implementation nothing:gather: MODULE must be a module in the current",
        ),
        (
            ["--implementation", "mine_of_bench:wrong"],
            "--implementation mine_of_bench:wrong: NAME must be one of ngram_h",
        ),
        (
            ["--implementation", "mine_of_bench:gather", "--only", "gate"],
            "no case matches --only 'gate'; there are lookup",
        ),
        (["--implementation", "mine_of_bench:gather", "--report", "x"], "--report makes tables from a run's JSON, and"),
        (["--implementation", "mine_of_bench:gather", "--full"], "--full: only on a GPU, and torch finds none"),
    ],
)
def test_wrong_words_are_errors(mine, capsys, words, message):
    assert command.main(words) == 2
    text, errors = capsys.readouterr()
    assert text == "" and errors.startswith(f"bench: {message}") and errors.count("\n") == 1
