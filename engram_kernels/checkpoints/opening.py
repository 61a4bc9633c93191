"""What is asked of a file before a byte of it is believed, since checkpoints come from strangers.

Only regular files are opened: a FIFO waits for a writer, and a device does something. An index names files of its own
folder. JSON of any depth, length or numbers is read, or refused, in bounded time and memory.
"""

import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

JSON_LIMIT = 100_000_000  # bytes, what the safetensors library allows a header
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class CheckpointError(ValueError):
    """Files are not what they should be: truncated, foreign, incomplete, of another type or shape."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in the block say which file they are of."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def open_regular(path: Path, where: str) -> io.FileIO:
    """``path`` to read, a regular file or a link to one; CheckpointError where it is anything else.

    A FileIO rather than a descriptor: where an interrupt comes before anybody holds it, it is closed.
    """
    check_regular(path, where)
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)
    except OSError as error:
        raise unreadable(path, where, error) from None
    try:
        with naming(path):
            _check_kind(os.fstat(file.fileno()), path, where)  # it may have been replaced since
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def check_regular(path: Path, where: str) -> None:
    """Raise CheckpointError where ``path`` is there and no regular file or link to one, FileNotFoundError for none."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise unreadable(path, where, error) from None
    _check_kind(found, path, where)


def unreadable(path: Path, where: str, error: OSError) -> OSError:
    """``error`` with the caller and the file in its text."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: no such file: {path}")
    return type(error)(error.errno, f"{where}: cannot be read: {error.strerror}", str(path))


def _check_kind(found: os.stat_result, path: Path, where: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise CheckpointError(f"{where}: {path} must be a regular file, got {kind}")


def parse_json(content: bytes, path: Path, where: str) -> Any:
    """What ``content``, of ``path``, says."""
    try:
        return json.loads(content)
    except RecursionError:
        raise CheckpointError(f"{where}: {path} is no JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {path} is no JSON that can be read ({error})"[:500]) from None


def read_json(path: Path, where: str) -> Any:
    """What the JSON file ``path`` says."""
    with open_regular(path, where) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        if size > JSON_LIMIT:
            raise CheckpointError(f"{where}: {path} must be at most {JSON_LIMIT:,} bytes of JSON, got {size:,}")
        return parse_json(file.readall(), path, where)


def file_of_index(index: Path, name: str, where: str) -> Path:
    """The file that an index calls ``name``; CheckpointError unless it lies in the index's own folder.

    A link of the Hugging Face cache, from a snapshot to the blobs beside it, may leave the folder, and no other.
    """
    parts = PurePosixPath(name).parts
    path = index.parent.joinpath(*parts)
    if not parts or "\0" in name or PurePosixPath(name).is_absolute() or ".." in parts:
        raise CheckpointError(f"{where}: {index} must name files of its own folder, got {name!r}"[:500])
    real, folder = path.resolve(), index.parent.resolve()
    if not real.is_relative_to(folder):
        cached = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
        if not cached:
            raise CheckpointError(
                f"{where}: {index} must name files of its own folder, and {name!r} is a link out of it, to {real}"
            )
    return path
