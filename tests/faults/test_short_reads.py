"""Reads that give fewer bytes than were asked for, as the system may: the same content, or an error naming the file."""

import os

import pytest

from engram_kernels.checkpoints import parallel
from engram_kernels.checkpoints.opening import CheckpointError

from .saved import KINDS


@pytest.fixture(autouse=True, params=["through the cache", "past the cache"])
def way(request, monkeypatch):
    """Files are small, and were just written: past the cache go large reads of what it does not hold."""
    if request.param == "past the cache":
        monkeypatch.setattr(parallel, "LEAST_DIRECT", 1)
        monkeypatch.setattr(parallel.FileReads, "_cached", lambda *_: False)


@pytest.fixture
def short(monkeypatch):
    """Every read of a file gives at most 7 bytes, or a third of what is asked for where that is more."""
    pread, preadv, seen = os.pread, os.preadv, []

    def some(count):
        seen.append(count)
        return max(7, count // 3)

    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, some(count)), offset))

    def few(fd, views, offset):
        (view,) = views
        return preadv(fd, [view[: some(len(view))]], offset)

    monkeypatch.setattr(os, "preadv", few)
    return seen


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cache"])  # which NumPy reads
def test_what_is_read_in_pieces_is_the_same(tmp_path, short, kind):
    saved = KINDS[kind](tmp_path / "folder")
    saved.folder.mkdir()
    saved.save(3)
    short.clear()
    assert saved.value() == 3
    assert len(short) > 10


def test_a_file_that_ends_while_it_is_read(tmp_path, monkeypatch):
    """As one does that another process truncates after its header was checked."""
    saved = KINDS["one file"](tmp_path)
    saved.save(3)
    preadv = os.preadv

    def truncated(fd, views, offset):
        os.truncate(f"/proc/self/fd/{fd}", 4000)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", truncated)
    with pytest.raises(CheckpointError, match=r"model.safetensors ended at byte 4,000 while it was read"):
        saved.value()


def test_a_sector_that_cannot_be_read(tmp_path, monkeypatch):
    saved = KINDS["one file"](tmp_path)
    saved.save(3)

    def broken(fd, views, offset):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match=r"EngramTable.from_safetensors: cannot be read: Input/output error") as raised:
        saved.value()
    assert raised.value.filename.endswith("model.safetensors")
