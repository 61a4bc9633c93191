"""`make gpu` without a GPU: which steps run, and what one that fails, hangs or breaks the GPU costs the others."""

import sys

import pytest

from tests.gpu import __main__ as command

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
    assert log == capsys.readouterr().out
    assert "step --lane gpu tests\n" in log and f"step --out {out}\n" in log and log.count("trouble") == 2


def test_a_step_that_a_signal_ends_is_a_failure(tmp_path, steps):
    steps(pytest="__import__('os').kill(__import__('os').getpid(), 9)", bench=0)
    assert command.main(["--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", ["tests", "bench"])
def test_steps_run_alone(tmp_path, steps, name):
    steps(pytest=3, bench=4)
    assert command.main(["--out", str(tmp_path), name]) == {"tests": 3, "bench": 4}[name]
    assert (tmp_path / "log.txt").read_text().count("step ") == 1


def test_processes_share_the_tests_where_xdist_is_there(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: sys)
    steps(pytest=0)
    command.main(["--out", str(tmp_path), "--processes", "7", "tests"])
    assert "step -n 7 --lane gpu tests\n" in (tmp_path / "log.txt").read_text()
