"""`make gpu` without a GPU: which steps run, and what one that fails, hangs or breaks the GPU costs the others."""

import json
import sys

import pytest

from tests.project.test_lanes import lane
from tests.support.documents import Document
from tests.support.gpu import room, watch

from . import __main__ as command

STEP = """
import sys
print("step", *sys.argv[1:])
print("trouble", file=sys.stderr)
raise SystemExit({code})
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Modules of its own in place of pytest and of the benchmarks: they say what they were asked for, and fail."""

    def write(**codes):
        for name, code in codes.items():
            (tmp_path / f"{name}.py").write_text(STEP.format(code=code))

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    return write


@pytest.mark.parametrize(("codes", "worst"), [((0, 0), 0), ((1, 0), 1), ((0, 2), 2), ((1, 2), 2), ((5, 0), 5)])
def test_benchmarks_follow_red_tests(tmp_path, steps, capsys, codes, worst):
    """Both run, the worse code is the command's, and the log holds what both said."""
    steps(pytest=codes[0], bench=codes[1])
    out = tmp_path / "deep" / "out"
    assert command.main(["--out", str(out)]) == worst
    log = (out / "log.txt").read_text()
    assert capsys.readouterr().out == f"{log}Everything of it to send: {out / 'first_run.json'}\n"
    assert f"step --lane gpu --out {out} tests\n" in log and f"step --out {out}\n" in log and log.count("trouble") == 3


def test_a_step_that_a_signal_ends_is_a_failure(tmp_path, steps):
    steps(pytest="__import__('os').kill(__import__('os').getpid(), 9)", bench=0)
    assert command.main(["--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", ["tests", "bench"])
def test_steps_run_alone(tmp_path, steps, name):
    steps(pytest=3, bench=4)
    assert command.main(["--out", str(tmp_path), name]) == {"tests": 3, "bench": 4}[name]
    assert (tmp_path / "log.txt").read_text().count("step ") == {"tests": 2, "bench": 1}[name]


def test_processes_share_the_tests_where_xdist_is_there(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: sys)
    steps(pytest=0)
    command.main(["--out", str(tmp_path), "--processes", "7", "tests"])
    ran = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("step ")]
    lane = f"--lane gpu --out {tmp_path} tests"
    assert ran == [f"step -n 7 {lane}", f"step --alone {lane}"], "what looks at times comes last, in one process"


def test_sanitizers_run_where_they_are(tmp_path, steps, monkeypatch, capsys):
    """The step is asked for by name; its results are apart, and what is missing is said and no failure."""
    steps(pytest=0)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert command.main(["--out", str(tmp_path), "sanitize"]) == 0
    assert capsys.readouterr().out.count("is not here: left out") == 2
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "tool $*"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setattr(command.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: sys)
    assert command.main(["--out", str(tmp_path), "sanitize"]) == 9
    ran = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith(("tool", "step"))]
    assert [line.split()[:3] for line in ran] == [
        ["tool", "--tool", "memcheck"],
        ["tool", "--tool", "racecheck"],
        ["step", "-p", "tests.support.gpu.gsan"],
    ]
    for line, name in zip(ran, ("memcheck", "racecheck", "gsan"), strict=True):
        assert f"--lane gpu --out {tmp_path / 'sanitizers' / name} --cases one" in line


def test_one_file_holds_what_all_steps_left(tmp_path, steps, capsys):
    """Also what a run left that was killed, of which nothing else knows. What was skipped is said, and why."""
    tests = {"gpu": "a", "tests": {"s": "skipped", "t": "passed"}, "reasons": {"s": "needs more memory"}}
    (tmp_path / "gpu_results.json").write_text(json.dumps(tests))
    steps(pytest=0, bench="open('gpu-2026.json', 'w').write('{\"cases\": [1]}') and 2")
    command.main(["--out", str(tmp_path), "bench"])
    command.main(["--out", str(tmp_path), "tests"])
    content = json.loads((tmp_path / "first_run.json").read_text())
    assert [(step["step"], step["code"]) for step in content["steps"]] == [("bench", 2), ("tests", 0)]
    assert "Tests: 1 skipped, 1 passed\nSkipped: s: needs more memory\n" in capsys.readouterr().out
    assert content["tests"] == tests and content["benchmarks"] == {"cases": [1]}


def test_the_guide_names_the_steps_and_what_they_leave(tmp_path, steps):
    guide = Document("docs/first_run.md").text
    steps(pytest=0, bench=0)
    command.main(["--out", str(tmp_path)])
    assert all(f"DIR/{name}`" in guide for name in ("first_run.json", "log.txt") if (tmp_path / name).exists())
    for step in ("tests", "bench", "sanitize"):
        assert f"make gpu OUT=DIR ARGS={step}" in guide
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "else"])


def test_want_of_memory_is_said(monkeypatch):
    monkeypatch.setattr(room, "available_host_memory", lambda: 3 << 29)
    monkeypatch.setattr(room, "total_host_memory", lambda: 8 << 30)
    room.need_host_memory(1 << 30)
    with pytest.raises(pytest.skip.Exception, match="needs 70.0 GiB .*; this machine has 1.5 GiB free now, of 8.0 GiB"):
        room.need_host_memory(70 << 30)


STAND_IN = """
# A GPU as far as the lane itself asks for one: what it finds and whether it still answers.
import types
import torch
import triton

broken = []
def synchronize(device=None):
    if broken:
        raise RuntimeError(broken[0] if broken[0].startswith("sticky") else broken.pop())

def compile():
    times = types.SimpleNamespace(total=2_000_000)
    triton.knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=False)

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(name="stand-in", major=9, minor=0)
"""
IMPATIENT = """
def pytest_runtest_setup(item):
    item.config.pluginmanager.getplugin("watch").patience = 1 if "[5]" in item.name else 90
"""
TESTS = """
import os, time
import pytest, stand_in
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("number", range(8))
def test_one(number):
    assert not stand_in.broken, "an error of a test before this one"
    {fault}
"""


@pytest.fixture
def gpu_lane(tmp_path, monkeypatch):
    """``run(fault, *words)``: eight tests on a stand-in, of which one has a fault; exit code, output, results."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "impatient.py").write_text(IMPATIENT)

    def run(fault, *words):
        words = ("-p", "stand_in", "--out", tmp_path, *words)
        code, output = lane(tmp_path, TESTS.format(fault=fault), "gpu", *words, PYTHONPATH=str(tmp_path))
        path = tmp_path / "gpu_results.json"
        return code, output, json.loads(path.read_text()) if path.exists() else {}

    return run


def by_number(results):
    return {int(name[-2]): outcome for name, outcome in results["tests"].items()}


def expected(*failed):
    return dict.fromkeys(range(8), "passed") | dict.fromkeys(failed, "failed")


def test_an_error_is_the_failure_of_its_own_test(gpu_lane):
    """One that a test leaves behind is found before the next test, and does not touch it. Compilations are counted."""
    code, output, results = gpu_lane("stand_in.compile(); number == 3 and stand_in.broken.append('a copy failed')")
    assert results["compiled"] == dict(variants=8, seconds=16.0)
    assert "compiled 8 kernels, in 16 s of one core" in output
    assert code == 1 and "after this test the GPU reports an error: a copy failed" in output
    assert by_number(results) == expected(3)


FAULTS = """
    stand_in.compile()
    number == 1 and stand_in.broken.append('a copy failed')
    number == 3 and stand_in.broken.append('sticky: illegal access')
    number == 5 and time.sleep(1800)
"""


def test_a_process_that_is_lost_is_replaced(gpu_lane):
    """Among two. An illegal access makes every later call of its process fail: another one runs the other tests. Not
    even the end of a wait for the GPU comes: the process goes, its stacks are shown, and the rest runs."""
    code, output, results = gpu_lane(FAULTS, "-p", "impatient", "-n", "2")
    assert code == 1
    for error in ("a copy failed", "sticky: illegal access"):
        assert f"after this test the GPU reports an error: {error}" in output
    assert "Timeout (0:00:01)!" in output and "in test_one" in output
    assert by_number(results) == expected(1, 3, 5)
    assert "crashed while running" in results["reasons"]["test_it.py::test_one[5]"]
    assert results["compiled"]["variants"] > 0, "those of processes that came to their end"


def test_outcomes_are_there_before_the_end(gpu_lane):
    """A run that is killed has left what it had: the test it was at is one that started."""
    code, _, results = gpu_lane("os._exit(9) if number == 3 else number == 2 and pytest.skip('no room')")
    assert code == 9
    assert by_number(results) == {0: "passed", 1: "passed", 2: "skipped", 3: "started"}
    assert results["reasons"] == {"test_it.py::test_one[2]": "Skipped: no room"}
    assert results["gpu"] == "stand-in" and results["commit"]


ALONE = """
import pytest
pytestmark = pytest.mark.gpu

def test_bits(): pass

@pytest.mark.alone
def test_times(): assert False, "too slow"
"""


def test_what_looks_at_times_runs_alone(tmp_path):
    """Not among the others, whose work it would measure; both outcomes are in one file."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    words = ("-p", "stand_in", "--out", tmp_path)
    for more in ((), ("--alone",)):
        _, output = lane(tmp_path, ALONE, "gpu", *words, *more, PYTHONPATH=str(tmp_path))
        assert "1 deselected" in output
    outcomes = json.loads((tmp_path / "gpu_results.json").read_text())["tests"]
    assert outcomes == {"test_it.py::test_bits": "passed", "test_it.py::test_times": "failed"}


def test_without_xdist_the_rest_runs_in_another_process(gpu_lane, tmp_path, monkeypatch):
    """After a hang, whose process ends itself, and after the GPU was lost: the test has the blame, the others run."""
    assert command.LOST == watch.LOST
    fault = "number == 2 and os._exit(1), number == 5 and stand_in.broken.append('sticky: illegal access')"
    codes, outputs = [], []

    def run(chosen, module, *words):
        own = [word for word in words if word in ("--go-on", "--alone")]
        code, output, _ = gpu_lane(fault, *own)
        codes.append(code)
        outputs.append(output)
        return code

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "run", run)
    assert command.main(["--out", str(tmp_path), "tests"]) == max(codes)
    assert codes[:2] == [1, command.LOST] and len(codes) == 4
    assert by_number(json.loads((tmp_path / "gpu_results.json").read_text())) == expected(2, 5)
    assert "5 deselected" not in outputs[0]
    assert "2 passed" in outputs[2] and "6 deselected" in outputs[2]
