"""What writers of safetensors files share: headers, temporary files and their locks, free space, complete writes.

A file grows under a temporary name (``.<name>.partial``), goes to the disk (fsync), and is renamed when it is whole. It
is locked for as long as it is open. The lock goes with its process, so that what a killed one left is known by having
none, and the next writer of the same name removes it.
"""

import ctypes
import errno
import fcntl
import io
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .files import SUFFIX, Checkpoint
from .names import check_text
from .opening import CheckpointError, check_regular, naming, open_regular
from .parallel import BLOCK, CHUNK, LEAST_DIRECT, Buffers, direct_opener

Found = TypeVar("Found")

#: Data begins at a multiple of a page, so that a mapped table's rows start at multiples of 16 bytes.
_PAGE = 4096


class NewTensor(NamedTuple):
    """A tensor of a file to be written: name, dtype as the format calls it ("F32"), shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def header_of(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """A file's first bytes, and where in it each tensor begins; the last number is where the file ends."""
    entries: dict = {"__metadata__": {"format": "pt", **metadata}}
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.nbytes)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]


def file_path(path: str | os.PathLike, where: str, default: str) -> Path:
    """The file that is meant: of a folder, ``default`` in it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: path must be a file or a folder, got {type(path).__name__}")
    path = Path(path) / default if os.path.isdir(path) else Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{where}: path must end in {SUFFIX} or be a folder that exists, got {str(path)!r}")
    check_target(path, where)
    return path


def check_target(path: Path, where: str) -> None:
    """Raise an error unless ``path`` can be written: its folder is there, and it is a regular file if it is there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{where}: no such folder: {path.parent}")
    if os.path.lexists(path):
        check_regular(path, where)


def checked_metadata(metadata: Mapping[str, str] | None, where: str) -> dict[str, str]:
    """``metadata`` as a dictionary; TypeError unless it maps texts to texts."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"{where}: metadata must map texts to texts, got {type(metadata).__name__}")
    found = dict(metadata or {})
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TypeError(f"{where}: metadata must map texts to texts, got {found!r}"[:200])
    for text in itertools.chain(*found.items()):
        check_text(text, "metadata", where)
    return found


def read_existing(path: Path, where: str, read: Callable[[Checkpoint], Found]) -> Found | None:
    """What ``read`` finds in a file that is to be replaced, None where there is none; ValueError where it cannot."""
    if not os.path.lexists(path):
        return None
    try:
        with Checkpoint(path, where) as checkpoint:
            return read(checkpoint)
    except CheckpointError as error:
        raise ValueError(f"{where}: {path} is in the way and cannot be read; remove it first ({error})") from None


def check_disk(folder: Path, nbytes: int, where: str) -> None:
    """Raise OSError where the folder's file system has no ``nbytes`` free."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        text = f"{where}: {nbytes:,} bytes are to be written and there is room for {free:,}"
        raise OSError(errno.ENOSPC, text, str(folder))


@contextmanager
def new_file(path: Path, partial: Path) -> Iterator[int]:
    """An open file that is ``partial`` in the block, and ``path`` after it; where that fails, nothing is left.

    It has the permissions of the file that it replaces.
    """
    with naming(partial), locked_file(partial, mode_of(path)) as file:
        try:
            yield file.fileno()
            os.fsync(file)
            os.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def partial_path(path: Path, number: str = "") -> Path:
    """A new temporary name for ``path``, or for the file of this number (5 digits) where it is to be several."""
    return path.parent / f".{path.name.removesuffix(SUFFIX)}-{secrets.token_hex(4)}{number and '-' + number}.partial"


def mode_of(*paths: Path) -> int | None:
    """Permissions of the first of these files that is there."""
    return next((stat.S_IMODE(path.stat().st_mode) for path in paths if path.exists()), None)


def locked_file(path: Path, mode: int | None = None) -> io.FileIO:
    """A new file, locked for as long as it is open, which tells remove_abandoned that somebody writes it.

    A FileIO rather than a number: an interrupt that comes before anybody holds it closes it. mode: its permissions;
    None is what the process gives to new files.
    """
    while True:
        file = open(path, "x+b", buffering=0, opener=_private if mode is not None else None)
        try:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            with suppress(OSError):  # a file system without locks (NFS and Lustre may be one), where nothing is swept
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BaseException:
            path.unlink(missing_ok=True)
            file.close()
            raise
        file.close()  # swept away between the two calls


def _private(path, flags: int) -> int:
    return os.open(path, flags, 0o600)


def remove_abandoned(path: Path, others: Iterable[str] = ()) -> None:
    """Remove what killed writers of ``path`` left: those of its temporary files, and of others, that nobody locks."""
    folder = path.parent
    partial = re.compile(rf"\.{re.escape(path.name.removesuffix(SUFFIX))}-[0-9a-f]{{8}}(-\d{{5}})?\.partial")
    for name in [*others, *filter(partial.fullmatch, os.listdir(folder))]:
        try:
            file = open_regular(folder / name, "remove_abandoned")
        except (OSError, CheckpointError):  # another save has swept it away, or it is nobody's file
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / name).unlink(missing_ok=True)
        except OSError:  # somebody holds it, or the file system has no locks and nobody can tell
            pass
        finally:
            file.close()


def allocate(fd: int, nbytes: int) -> None:
    """Give a new file its length, and its place on the disk where the file system can do so ahead of the writes.

    Direct writes to a file without one wait for each other on ext4, and a disk that is full is known at once. Not
    posix_fallocate: where the file system cannot, that writes to every block.
    """
    os.ftruncate(fd, nbytes)
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(fd, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_all(fd: int, content, offset: int) -> None:
    """Write all bytes of a buffer from byte ``offset`` of a file on. Any number of threads may do so."""
    view = memoryview(content).cast("B")
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def sync_folder(folder: Path) -> None:
    """Names are data of the folder, which has to reach the disk as well."""
    fd = None
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with naming(folder):
            os.fsync(fd)
    finally:
        if fd is not None:
            os.close(fd)


class DirectFile:
    """Writes to an open file by any number of threads: whole blocks by direct I/O where the file system has it.

    100 GB of a table gain nothing from the page cache, and push all else out of it. Through it, fsync waits in the end
    for what the kernel then begins to write; straight to the disk all threads write from the first chunk on.
    """

    def __init__(self, fd: int, buffers: Buffers | None = None):
        self._fd, self._buffers = fd, buffers or Buffers()
        self._direct: io.FileIO | None = None
        try:
            self._direct = open(f"/proc/self/fd/{fd}", "r+b", buffering=0, opener=direct_opener)
        except OSError:  # a file system without it, or no /proc
            pass

    def write(self, content: np.ndarray, offset: int) -> None:
        """Write uint8 ``[bytes]`` from byte ``offset`` of the file on; OSError where that fails."""
        begin, end = -(-offset // BLOCK) * BLOCK, (offset + len(content)) // BLOCK * BLOCK
        if self._direct is None or end - begin < LEAST_DIRECT:
            write_all(self._fd, content, offset)
            return
        write_all(self._fd, content[: begin - offset], offset)
        for at in range(begin, end, CHUNK):
            self._write_blocks(content[at - offset : min(at + CHUNK, end) - offset], at)
        write_all(self._fd, content[end - offset :], end)

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    def _write_blocks(self, content: np.ndarray, offset: int) -> None:
        if content.ctypes.data % BLOCK:  # by way of a buffer that begins at a page
            aligned = self._buffers.take(len(content))
            aligned[:] = content
            content = aligned
        done = 0
        try:
            while done < len(content) and done % BLOCK == 0:
                done += os.pwrite(self._direct.fileno(), memoryview(content)[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # blocks of another size: then as ever
                raise
        write_all(self._fd, content[done:], offset + done)
