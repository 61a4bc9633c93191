"""Options of the benchmarks under pytest."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--baseline", type=Path, metavar="FILE", help="JSON of python -m bench on this GPU, to be no slower than"
    )
