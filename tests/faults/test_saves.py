"""A save that fails, is interrupted or killed at any of its calls: the old table or the new one, and nothing else."""

import errno
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from engram_kernels.checkpoints import writing
from engram_kernels.checkpoints.writing import mode_of

from .saved import KINDS, table_of, value_in
from .system import descriptors, failing, striking


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def saved(request, tmp_path):
    saved = request.param(tmp_path)
    saved.save(1)
    return saved


def count_calls(saved):
    with striking(None, None) as seen:
        saved.save(1)
    return len(seen)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_each_call_fails(saved, code):
    """An error that names a file, or none where the call does not matter; the old table or, at the end, the new one.

    Calls of even numbers fail with the one code, the others with the other.
    """
    total = count_calls(saved)
    assert total > 10
    for number in range(code == errno.EIO, total, 2):
        before, raised = descriptors(), None
        with striking(number, failing(code)) as seen:
            try:
                saved.save(2)
            except (OSError, ValueError) as error:
                raised = error
        gc.collect()
        assert descriptors() == before, f"call {number}, {seen[number]}, leaks"
        if isinstance(raised, OSError):
            assert raised.filename, f"call {number}, {seen[number]}: {raised}"
        expected = (1, 2) if raised else (2,)
        assert saved.value() in expected, f"call {number}, {seen[number]}: {raised}"
        saved.save(1)
    left = [name for name in os.listdir(saved.folder) if "partial" in name]
    assert not left


def test_each_call_is_the_last(saved):
    """The process is killed there, at every other call; the next save removes what was left."""
    total = count_calls(saved)
    for number in range(0, total, 2):
        made = saved.made(2)
        child = os.fork()
        if child == 0:
            with striking(number, lambda *_: os._exit(9)):
                saved.write(made)
            os._exit(0)
        os.waitpid(child, 0)
        assert saved.value() in (1, 2), f"call {number}"
        saved.save(1)
        assert saved.value() == 1
    assert not [name for name in os.listdir(saved.folder) if "partial" in name]
    assert len(os.listdir(saved.folder)) <= 5


def test_interrupts_leave_nothing_open(saved):
    """Ctrl-C at a line of the code that writes: no descriptor, no lock, the old table or the new one."""
    files = [writing.__file__.replace("writing", name) for name in ("writing", "table_writer")]

    def run(stop):
        made, lines = saved.made(2), 0

        def trace(frame, event, arg):
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                lines += 1
                if lines == stop:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            saved.write(made)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return lines

    total = run(None)
    saved.save(1)
    before = descriptors()
    for stop in range(1, total + 1, 29):
        run(stop)
        gc.collect()
        # A folder's descriptor is a number, which an interrupt at the line that closes it loses.
        ours = str(saved.folder)
        opened = {fd: path for fd, path in descriptors().items() if not path.startswith(ours) or Path(path).suffix}
        assert opened == before, f"line {stop}"
        assert saved.value() in (1, 2)
        saved.save(1)
    assert not [name for name in os.listdir(saved.folder) if "partial" in name]


def test_writes_and_reads_come_in_pieces(saved, monkeypatch):
    """The system may write and read less than it was asked for."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    saved.save(3)
    assert saved.value() == 3


def test_permissions_stay(saved):
    """Of files, and of a folder that holds a run."""

    def modes():
        return {mode_of(path) for path in saved.folder.iterdir() if path.is_dir()}, {
            mode_of(path) for path in saved.folder.iterdir() if path.is_file()
        }

    for path in saved.folder.iterdir():
        path.chmod(0o700 if path.is_dir() else 0o600)
    before = modes()
    saved.save(2)
    assert modes() == before and before[1] == {0o600}


@pytest.mark.parametrize("shard_bytes", [(None, None), (3000, 3000), (3000, None)], ids=["one", "several", "both"])
def test_readers_during_saves(tmp_path, shard_bytes):
    """A reader always finds a table, the one before or the one after."""
    table_of(1).save_safetensors(tmp_path, shard_bytes=shard_bytes[0])
    child = os.fork()
    if child == 0:
        try:
            for turn in range(10_000):
                table_of(1 + turn % 2).save_safetensors(tmp_path, shard_bytes=shard_bytes[turn % 2])
        finally:
            os._exit(1)
    try:
        seen = {value_in(tmp_path) for _ in range(40)}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen <= {1.0, 2.0}


def test_savers_at_once(tmp_path):
    """Two processes that save to one name: each file is whole, and one of the two is there."""
    children = []
    for value in (1, 2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for _ in range(10):
                    table_of(value).save_safetensors(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert value_in(tmp_path) in (1, 2) and os.listdir(tmp_path) == ["model.safetensors"]
