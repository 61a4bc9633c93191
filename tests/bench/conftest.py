"""A workbench of small tables on the CPU for all tests of benchmarks."""

import pytest

from bench.running.cases import Workbench

from .toys import CPU, LIMIT


@pytest.fixture(scope="session")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench
