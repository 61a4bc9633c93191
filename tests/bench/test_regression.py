"""The benchmarks under pytest: every body runs on a CPU, and the threshold does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import test_regression as benchmarks
from bench.running.cases import load_cases
from tests.support.patience import HANG

from .toys import FakeTimer

ROOT = Path(__file__).parents[2]
CASE = next(case for case in load_cases() if case.name == "gate_residual/v41/T1")
pytest.importorskip("pytest_benchmark")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it times every case at its full size")
def test_under_pytest(tmp_path):
    kept = tmp_path / "times.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--benchmark-only", f"--benchmark-json={kept}", "-k", "ngram_hash and v41"]
    # A process of pytest-xdist names itself in the environment, and pytest-benchmark measures nothing there.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG)
    others = sum(case.tokens <= benchmarks.CPU_TOKENS for case in load_cases()) - 2
    assert ran.returncode == 0 and f"2 passed, {others} deselected" in ran.stdout, ran.stdout + ran.stderr
    times = json.loads(kept.read_text())["benchmarks"]
    assert [entry["group"] for entry in times] == ["ngram_hash"] * 2
    assert all(entry["extra_info"]["CPU_median"] > 0 and entry["extra_info"]["nbytes"] for entry in times)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read {path}: .*; there is none yet; python -m bench writes one to .*results"),
        ("[]", "{path} is no result of python -m bench; there is none yet"),
        ('{"cases": [], "environment": {}}', "{path}: times are compared on a GPU, and torch finds none"),
    ],
)
def test_a_baseline_that_nothing_is_compared_with_is_an_error(tmp_path, content, message):
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "--baseline", path]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    hidden = env | dict(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    ran = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=HANG)
    text = ran.stdout + ran.stderr
    assert ran.returncode == 2 and re.search(f"Exit: --baseline:? {message.format(path=path)}", text), text


class Benchmark:
    """What the cases use of pytest-benchmark's fixture."""

    def __init__(self, enabled):
        self.enabled, self.extra_info, self.ran = enabled, {}, 0

    def __call__(self, body):
        self.ran += 1
        return body()

    def pedantic(self, body, rounds, warmup_rounds):
        self.ran += rounds + warmup_rounds
        return body()


def test_slower_than_the_baseline_fails(bench):
    # The timer says a millisecond.
    for seconds, enabled, passes in ((0.9e-3, True, True), (0.8e-3, True, False), (0.8e-3, False, True)):
        benchmark = Benchmark(enabled)
        machine = benchmarks.Machine(bench, FakeTimer(), {CASE.name: seconds})
        if passes:
            benchmarks.test_case(CASE, machine, benchmark)
        else:
            with pytest.raises(AssertionError, match="1000.00 us, 1.25 times the baseline's 800.00 us"):
                benchmarks.test_case(CASE, machine, benchmark)
        assert benchmark.ran == (1 if not enabled else benchmarks.ROUNDS + 1)
        if enabled:
            assert benchmark.extra_info["fake_median"] == 1e-3 and benchmark.extra_info["baseline"] == seconds


@pytest.mark.parametrize("enabled", [True, False])
def test_a_wrong_result_fails(bench, monkeypatch, enabled):
    module = __import__("bench.ops.bench_gate", fromlist=["bench"])
    monkeypatch.setattr(module, "gate_residual", lambda *arguments, out, **options: out)
    with pytest.raises(AssertionError, match="off the reference"):
        benchmarks.test_case(CASE, benchmarks.Machine(bench, FakeTimer(), {}), Benchmark(enabled))


def test_a_baseline_holds_for_its_machine_and_its_tables():
    environment = dict(gpu="A", host_table_bytes=5, device_table_bytes=3)
    cases = [dict(name="a", status="ok", median=1.0), dict(name="b", status="failed"), dict(name="c", status="ok")]
    content = dict(environment=environment, cases=cases)
    assert benchmarks.table_sizes(content, "A") == (5, 3) and benchmarks.table_sizes(None, "B") == (16 << 30, 8 << 30)
    with pytest.raises(pytest.fail.Exception, match="measured on A, and this is B"):
        benchmarks.table_sizes(content, "B")
    assert benchmarks.baseline_medians(content) == {"a": 1.0} and benchmarks.baseline_medians(None) == {}
    assert benchmarks.regression("z", 5.0, {"a": 1.0}) is None
