"""Memory that a test of the gpu lane needs, on machines that may have less, or less as yet."""

import pytest

from engram_kernels.tables.memory.report import available_host_memory, total_host_memory

GIB = 1 << 30


def need_host_memory(nbytes):
    """Skip the test where the host has less to give now, and say what it has: memory may grow while it is used."""
    available = available_host_memory()
    if available < nbytes:
        has = f"{available / GIB:.1f} GiB free now, of {total_host_memory() / GIB:.1f} GiB"
        pytest.skip(f"needs {nbytes / GIB:.1f} GiB of free host memory; this machine has {has}")
