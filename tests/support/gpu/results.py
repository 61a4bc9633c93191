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
_SAME = ("gpu", "driver", "torch", "triton", "commit")
_REASON = 3000  # characters of a failure that are kept


class Recorder:
    """A pytest plugin that writes the outcome of every test as it comes: a run that is killed loses nothing.

    A test that began and has no outcome yet is "started"; ``reasons`` says why one did not pass.
    """

    def __init__(self, folder, go_on=False):
        """go_on: keep what the file has of a run on the same GPU, driver, versions and commit."""
        self.path = Path(folder) / RESULTS.name
        self.content = {**environment(), "compiled": dict(variants=0, seconds=0.0), "tests": {}, "reasons": {}}
        if go_on and self.path.exists():
            before = json.loads(self.path.read_text())
            if all(before.get(name) == self.content[name] for name in _SAME):
                self.content |= {name: before[name] for name in ("compiled", "tests", "reasons") if name in before}

    def pytest_runtest_logstart(self, nodeid):
        self._set(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        for name, value in getattr(report, "compiled", {}).items():
            self.content["compiled"][name] += value
        known = self.content["tests"].get(report.nodeid)
        if report.failed or report.skipped or (report.when == "call" and known != "failed"):
            self._set(report.nodeid, report.outcome, reason_of(report))

    def pytest_terminal_summary(self, terminalreporter):
        text = "compiled {variants} kernels, in {seconds:.0f} s of one core"
        terminalreporter.write_line(text.format(**self.content["compiled"]))

    def _set(self, nodeid, outcome, reason=""):
        self.content["tests"][nodeid] = outcome
        if reason:
            reasons = self.content["reasons"]
            reasons[nodeid] = "\n".join(filter(None, (reasons.get(nodeid), reason)))
        self._write()

    def _write(self):
        content = self.content | {"tests": dict(sorted(self.content["tests"].items()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)


def reason_of(report):
    """The end of what pytest shows of a test that failed, why one was skipped, "" for one that passed."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[-1]
    return report.longreprtext[-_REASON:] if not report.passed else ""


def environment():
    """GPU, driver, versions and commit of this run."""
    from bench.running.environment import commit

    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver[0] if driver else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
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
