"""Large reads and writes past the page cache: every byte in its place, wherever blocks begin, no block as ever."""

import errno
import os
from contextlib import closing

import numpy as np
import pytest

from engram_kernels.checkpoints import parallel, writing
from engram_kernels.checkpoints.parallel import BLOCK, Buffers, FileReads
from engram_kernels.checkpoints.writing import DirectFile

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


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``read(offset, shift, size)``: bytes of a file to an address ``shift`` bytes after a page; compared.

    Returns (offset, bytes) of the reads past the page cache.
    """
    content = np.random.default_rng(1).integers(0, 256, SIZE + 77, dtype=np.uint8)
    content.tofile(tmp_path / "file")
    preadv, seen = os.preadv, []

    def counted(fd, views, at):
        if fd != plain:
            seen.append((at, len(views[0])))
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", counted)
    plain = None

    def call(offset, shift, size):
        nonlocal plain
        memory = np.zeros(SIZE + 3 * BLOCK, dtype=np.uint8)
        target = memory[-memory.ctypes.data % BLOCK + shift :][: size + 1]
        with open(tmp_path / "file", "rb", buffering=0) as file:
            plain = file.fileno()
            with closing(FileReads(plain)) as reads:
                count = reads.fill(memoryview(target[:size]), offset)
        assert count == min(size, len(content) - offset)
        assert np.array_equal(target[:count], content[offset:][:count]) and not target[count:].any()
        return seen

    return call


#: The file's and the memory's place in a block: both at its beginning, the same, and different ones; up to its end.
PLACES = [(0, 0, SIZE), (BLOCK + 5, 5, SIZE // 2), (4099, 64, 4_111_111), (8, 8, SIZE + 69), (2 * BLOCK, 1, SIZE)]


@pytest.fixture
def cold(monkeypatch):
    """Files that the page cache does not hold, whatever it does."""
    monkeypatch.setattr(FileReads, "_cached", lambda *_: False)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_cached_is_read_past_the_cache(read, cold, tmp_path, place):
    if not has_direct_io(tmp_path):
        pytest.skip("needs a file system with direct I/O")
    past = read(*place)
    assert sum(size for _, size in past) >= min(place[2], SIZE - place[0])
    assert all(at % BLOCK == size % BLOCK == 0 for at, size in past)


def test_what_is_cached_is_read_from_there(read, tmp_path, monkeypatch):
    if not has_direct_io(tmp_path):
        pytest.skip("needs a file system with direct I/O")
    with open(tmp_path / "file", "rb") as file:
        os.fsync(file)
        file.read()
        assert read(0, 0, SIZE) == []
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert read(0, 0, SIZE)
    past = len(read(0, 0, SIZE))
    assert len(read(0, 0, 64 << 10)) == past  # a small read, which no direct one is faster for


def test_reads_where_there_is_no_direct_io(read, cold, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no direct I/O")

    monkeypatch.setattr(parallel, "direct_opener", refuse)
    assert read(5, 0, SIZE) == []


def test_reads_in_blocks_of_another_size(read, cold, monkeypatch):
    """A read that the file system refuses for its alignment goes through the cache; any other error is one."""
    counted, code, refused = os.preadv, errno.EINVAL, []

    def refuse(fd, views, at):
        if at % BLOCK == 0 and not refused:
            refused.append(at)
            raise OSError(code, os.strerror(code))
        return counted(fd, views, at)

    monkeypatch.setattr(os, "preadv", refuse)
    assert read(BLOCK, 0, SIZE // 2) == [] and refused == [BLOCK]
    code, refused = errno.EIO, []
    with pytest.raises(OSError, match="Input/output error"):
        read(BLOCK, 0, SIZE // 2)


@pytest.mark.parametrize("place", PLACES)
def test_reads_that_take_less(read, cold, monkeypatch, place):
    counted = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: counted(fd, [views[0][: max(7, len(views[0]) // 3)]], at))
    read(*place)


@pytest.mark.parametrize("nbytes", [1, BLOCK, (4 << 20) + 1])
def test_buffers_begin_at_a_page_and_stay(nbytes):
    buffers = Buffers()
    first = buffers.take(nbytes)
    first[:] = 7
    assert first.ctypes.data % BLOCK == 0 and len(first) == nbytes
    assert (buffers.take(nbytes) == 7).all()
    assert not np.shares_memory(first, buffers.take(nbytes, "another"))
