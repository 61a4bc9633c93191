"""Shared tables of tests: made, attached to, and filled by a process that can be killed."""

import contextlib
import os
import signal
import time
from pathlib import Path

from engram_kernels import EngramTable
from tests.support.patience import HANG

SHAPE = (3000, 64, "e4m3_ue8m0")
SHM = Path("/dev/shm")


def file_of(name):
    return SHM / f"engram-{name}"


def made(name, shape=SHAPE, **options):
    return EngramTable.empty(*shape, placement="shared", name=name, **options)


def attach(name, shape=SHAPE, timeout=0.0, **options):
    return EngramTable.attach(name, *shape, timeout=timeout, **options)


@contextlib.contextmanager
def forked_writer(name, publish=False, **options):
    """A process that has made a table and sleeps; killed in the end, if not before."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            table = made(name, **options)
            if publish:
                table.publish()
            os.write(writer, b"x")
            time.sleep(HANG)
        os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
