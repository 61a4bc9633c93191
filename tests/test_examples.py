"""The programs under examples/ run as they are, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name):
    """Output of one example. It sees no GPU: there its tables would be pinned, beside those of other tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_quickstart():
    lines = run("quickstart.py").splitlines()
    assert len([line for line in lines if line.startswith("EngramTable(") and "x 32 bfloat16, cpu" in line]) == 2
    assert lines[2:] == [
        "rows   [2, 6, 8, 32] = layers, tokens, columns, row width",
        "hidden [6, 4, 256] = tokens, branches, hidden size",
    ]
