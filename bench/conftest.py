"""Options of the benchmarks under pytest."""

from pathlib import Path

import pytest
import torch

from .running.suite import UsageError, read_result

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption(
        "--baseline", type=Path, metavar="FILE", help="JSON of python -m bench on this GPU, to be no slower than"
    )


def pytest_configure(config):
    """Ends with 2 where nothing could be compared with the baseline that is named."""
    path = config.getoption("--baseline")
    if path is None:
        return
    try:
        read_result(path)
    except UsageError as error:
        there = [each for each in sorted(RESULTS.glob("*.json")) if _is_result(each)]
        choices = ", ".join(map(str, there)) or f"none yet; python -m bench writes one to {RESULTS}"
        pytest.exit(f"--baseline: {error}; there is {choices}", returncode=2)
    if not torch.cuda.is_available():
        pytest.exit(f"--baseline {path}: times are compared on a GPU, and torch finds none", returncode=2)


def _is_result(path: Path) -> bool:
    try:
        return bool(read_result(path))
    except UsageError:
        return False
