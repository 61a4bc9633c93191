"""Disks that are full, by the system's own limits: an error names the file, the old one is as it was, nothing left."""

import errno
import gc
import os
import shutil
from types import SimpleNamespace

import pytest

from .limits import file_size, in_child, mount_disk, small_disks  # noqa: F401
from .saved import KINDS
from .system import descriptors

SIZES = [1, 4096, 8193]  # bytes, within headers and within data


def contents(folder):
    """The files below a folder, with their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempt(saved, limit):
    """What became of a save under a limit: the error's number, file and text, and what the folder holds then."""
    made, before, error = saved.made(2), descriptors(), None
    files = contents(saved.folder)
    try:
        with limit():
            saved.write(made)
    except OSError as raised:
        error = raised.errno, str(raised.filename), str(raised)
    gc.collect()
    after = contents(saved.folder)
    return error, saved.value(), after == files, descriptors() == before


@pytest.mark.parametrize("limit", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_may_not_grow(tmp_path, kind, limit):
    folder = tmp_path / "folder"
    folder.mkdir()
    saved = KINDS[kind](folder)
    saved.save(1)
    largest = max(map(len, contents(folder).values()))
    error, value, same, closed = attempt(saved, lambda: file_size(limit))
    if limit >= largest:
        assert error is None and value == 2
        return
    assert error[0] == errno.EFBIG and str(folder) in error[1] and error[1] in error[2], error
    assert value == 1 and same and closed


class Filled:
    """A disk on which another process leaves ``room`` bytes, after the save has asked how many there are."""

    def __init__(self, folder, room):
        self.folder, self.room = folder, room

    def __enter__(self):
        self.usage, shutil.disk_usage = shutil.disk_usage, lambda path: SimpleNamespace(free=2**40)
        self.other = self.folder.parent / "other"
        with open(self.other, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.usage(self.folder).free - self.room)

    def __exit__(self, *_):
        shutil.disk_usage = self.usage
        self.other.unlink()


def on_a_small_disk(root, kind, room):
    mount_disk(root, 1 << 20)
    folder = root / "folder"
    folder.mkdir()
    saved = KINDS[kind](folder)
    if hasattr(saved, "files"):
        saved.files = root
    saved.save(1)
    return attempt(saved, lambda: Filled(folder, room))


@pytest.mark.parametrize("room", [0, 4096, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_disks_that_another_fills(tmp_path, small_disks, kind, room):  # noqa: F811
    error, value, same, closed = in_child(on_a_small_disk, tmp_path, kind, room)
    if error is None:  # a small file, which fits
        assert room and value == 2
        return
    assert error[0] == errno.ENOSPC and str(tmp_path) in error[1] and error[1] in error[2], error
    assert value == 1 and same and closed


def told_beforehand(root, kind):
    mount_disk(root, 1 << 20)
    folder = root / "folder"
    folder.mkdir()
    saved = KINDS[kind](folder)
    saved.save(1)

    class Full(Filled):
        def __enter__(self):
            super().__enter__()
            shutil.disk_usage = self.usage

    return attempt(saved, lambda: Full(folder, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_disks_that_are_full(tmp_path, small_disks, kind):  # noqa: F811
    """Known before anything is written: how much there is to write, and how much room."""
    error, value, same, closed = in_child(told_beforehand, tmp_path, kind)
    assert error[0] == errno.ENOSPC and error[1].startswith(str(tmp_path / "folder")), error
    assert "bytes are to be written and there is room for 0" in error[2]
    assert value == 1 and same and closed
