"""What type checkers make of the public names: ``program.py`` by mypy --strict and by pyright, line for line."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from engram_kernels.geometry import choices
from engram_kernels.geometry.config import KINDS
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.ops.row_kernels.order import ORDERS
from engram_kernels.ranks.rows import REDUCES as RANK_REDUCES
from engram_kernels.ranks.sharding import SPLITS
from engram_kernels.tables.placement import PLACEMENTS
from engram_kernels.training.replicas import REDUCES
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")
#: Of the whole package's sources errors are not shown: they are not the user's.
MYPY = ("mypy", "--strict", "--follow-imports=silent", "--cache-dir=/dev/null", "--config-file=/dev/null")
PYRIGHT = ("pyright", "--pythonpath", sys.executable)
CHECKERS = {"mypy": (MYPY, r":(\d+): error: (.*)"), "pyright": (PYRIGHT, r":(\d+):\d+ - error: (.*)")}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_program(checker):
    """Errors are on the lines that are one, and on no others."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (module, *options), pattern = CHECKERS[checker]
    command = [sys.executable, "-m", module, *options, str(PROGRAM)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    found = {int(line): text for line, text in re.findall(pattern, done.stdout)}
    lines = PROGRAM.read_text().splitlines()
    expected = {number for number, line in enumerate(lines, start=1) if line.endswith("# error")}
    assert len(expected) > 10 and found.keys() == expected, done.stdout + done.stderr


def test_types_are_what_a_running_program_takes():
    taken = {
        "Placement": PLACEMENTS,
        "ReadOrder": ORDERS,
        "FormatName": tuple(FORMATS),
        "ZeroGate": KINDS["zero_gate"].choices,
        "Window": KINDS["window"].choices,
        "MultiplierRule": KINDS["multiplier_rule"].choices,
        "Split": SPLITS,
        "Mean": RANK_REDUCES,
        "Reduce": REDUCES,
        "OutFormat": ("values", "storage"),
    }
    assert {name: get_args(getattr(choices, name)) for name in taken} == taken
