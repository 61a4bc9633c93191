"""What ran on a GPU: the gpu lane writes each test's outcome to ``gpu_results.json``, in ``tests`` by default.

The README's "last run on" comes from the file there; a test compares the two. Nothing else writes it.
"""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parents[2] / "gpu_results.json"


class Recorder:
    """A pytest plugin that keeps the outcome of every test and writes all of them at the end."""

    def __init__(self, folder):
        self.path = folder / RESULTS.name
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        known = self.outcomes.get(report.nodeid)
        if report.when == "call" or report.failed or (report.skipped and known is None):
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session):
        if self.outcomes and not hasattr(session.config, "workeroutput"):
            self.path.write_text(
                json.dumps({**environment(), "tests": dict(sorted(self.outcomes.items()))}, indent=1) + "\n"
            )


def environment():
    """GPU, driver, versions and commit of this run."""
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver[0] if driver else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _output("git", "rev-parse", "HEAD") or "not a git checkout",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python3 -m pytest --lane gpu tests",
    }


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def last_run(op_file):
    """GPU and date of the last run in which all of ``tests/test_<op_file>.py`` passed; "" where there is none."""
    if not RESULTS.exists():
        return ""
    results = json.loads(RESULTS.read_text())
    outcomes = {name: outcome for name, outcome in results["tests"].items() if f"test_{op_file}.py::" in name}
    passed = outcomes and set(outcomes.values()) <= {"passed", "skipped"} and "passed" in outcomes.values()
    return f"{results['gpu']}, {results['date']}" if passed else ""
