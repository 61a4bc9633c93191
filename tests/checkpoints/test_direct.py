"""Large writes past the page cache: every byte in its place, wherever blocks begin, and what is no block as ever."""

import errno
import os

import numpy as np
import pytest

from engram_kernels.checkpoints import writing
from engram_kernels.checkpoints.writing import BLOCK, DirectFile

SIZE = 5 << 20


@pytest.fixture
def written(tmp_path, monkeypatch):
    """``written(offset, shift)``: 5 MiB written at ``offset`` from an address ``shift`` bytes after a page; compared.

    Returns (offset, bytes) of the direct writes.
    """
    direct_writes, pwrite = [], os.pwrite

    def counted(fd, data, at):
        if fd != plain:
            direct_writes.append((at, len(data)))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", counted)
    random = np.random.default_rng(0)
    plain = None

    def write(offset, shift, step=None):
        nonlocal plain
        memory = np.empty(SIZE + 2 * BLOCK, dtype=np.uint8)
        content = memory[-memory.ctypes.data % BLOCK + shift :][:SIZE]
        content[:] = random.integers(0, 256, SIZE, dtype=np.uint8)
        with open(tmp_path / "file", "w+b", buffering=0) as file:
            plain = file.fileno()
            os.ftruncate(plain, offset + SIZE + 77)
            target = DirectFile(plain)
            for begin in range(0, SIZE, step or SIZE):
                target.write(content[begin : begin + (step or SIZE)], offset + begin)
            target.close()
            os.fsync(plain)
        found = np.fromfile(tmp_path / "file", dtype=np.uint8)
        assert len(found) == offset + SIZE + 77
        assert np.array_equal(found[offset:][:SIZE], content)
        assert not found[:offset].any() and not found[offset + SIZE :].any()
        return direct_writes

    return write


def has_direct_io(folder):
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("offset", "shift", "step"), [(BLOCK, 0, None), (5, 64, None), (4100, 3, 1_747_627)])
def test_blocks_go_past_the_cache(written, tmp_path, offset, shift, step):
    if not has_direct_io(tmp_path):
        pytest.skip("needs a file system with direct I/O")
    blocks = written(offset, shift, step)
    pieces = -(-SIZE // (step or SIZE))
    assert sum(size for _, size in blocks) >= SIZE - 2 * BLOCK * pieces
    assert all(at % BLOCK == size % BLOCK == 0 for at, size in blocks)


def test_small_writes_go_through_the_cache(written):
    assert written(BLOCK, 0, step=64 << 10) == []


def test_a_file_system_without_direct_io(written, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no direct I/O")

    monkeypatch.setattr(writing, "direct_opener", refuse)
    assert written(5, 0) == []


def test_blocks_of_another_size(written, monkeypatch):
    """A write that the file system refuses for its alignment goes through the cache; any other error is one."""
    counted, code = os.pwrite, errno.EINVAL

    def refuse(fd, data, at):
        if len(data) >= BLOCK and at % BLOCK == 0 and not refused:
            refused.append(at)
            raise OSError(code, os.strerror(code))
        return counted(fd, data, at)

    monkeypatch.setattr(os, "pwrite", refuse)
    refused = []
    written(BLOCK, 0)
    assert refused == [BLOCK]
    refused, code = [], errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        written(BLOCK, 0)
    assert refused == [BLOCK]


def test_writes_that_take_less(written, monkeypatch):
    counted = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: counted(fd, data[: max(1, len(data) * 2 // 3)], at))
    written(100, 0)
