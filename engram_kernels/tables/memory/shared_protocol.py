"""The file that processes share a table through, ``engram-<name>``: its header, its locks, and who removes it.

The file appears under its name with its header complete and both locks held, so that its state can always be told:

    byte 0   locked by the writer: a file that is not complete and has no such lock is dead
    byte 1   locked, shared, by every process that maps it: the last one to let go removes the file

Locks belong to open files and go with the process, however it ends. What killed processes left behind is removed by
the next one that creates a table, of any name. A file that is kept stays once it is complete, until it is freed
(tables/memory/kept.py). It lies on hugetlbfs where the pool has room for all of it, else in /dev/shm.
"""

import fcntl
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .host import check_fits
from .pages import HUGE_PAGE, Pages
from .report import available_host_memory

_SHM = Path("/dev/shm")
_HUGETLB = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
#: Magic, version, state, writer, width, rows, bytes, scale, format, kept, digest (zero for none).
_HEADER = struct.Struct("<16sIIIIQQf16sI32s")
#: Another magic than version 1 had, which would remove kept files that nobody holds.
_MAGIC, _VERSION = b"engram_kernels\0\1", 2
_STATE_AT, _DIGEST_AT = 20, _HEADER.size - 32
_FILLING, _COMPLETE = 1, 2
_WRITER, _USERS = 0, 1  # bytes of the file that the locks are on
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ENLARGE = "enlarge it (mount -o remount,size=..., docker run --shm-size=...) or use a smaller table"

#: Where the table begins in the file; the header has a huge page to itself, so that the table's own lie whole.
DATA_OFFSET = HUGE_PAGE


@dataclass(frozen=True)
class Geometry:
    """What a reader must know of a table, and be right about; scale None and digest "" accept the writer's.

    digest: SHA-256, in hex, of what the rows were made from. kept: of a reader, whether the table has to be a kept one.
    """

    rows: int
    width: int
    format: str
    scale: float | None
    digest: str = ""
    kept: bool = False


class WriterDied(RuntimeError):
    """The process that was filling a table has ended, or has given up."""


def create(name: str, nbytes: int, geometry: Geometry) -> tuple[int, Path]:
    """(open file, path) of a new table that is being filled; FileExistsError where a living one has the name."""
    for leftover in paths():
        remove_unused(leftover)
    for taken in [folder / f"engram-{name}" for folder in _folders()]:
        if os.path.lexists(taken):
            raise FileExistsError(_taken(name, taken))
    total = DATA_OFFSET + -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    folder = next(folder for folder in _folders() if folder == _SHM or _free_huge_pages() >= total)
    try:
        if folder == _SHM:
            check_fits(total, _free(folder), str(folder), _ENLARGE)
            check_fits(total, available_host_memory(), "host memory", "free memory or use a smaller table")
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        raise RuntimeError(f"EngramTable: no shared memory can be made in {folder}: {error.strerror}") from None
    try:
        os.ftruncate(fd, total)
        reserve(fd, folder, DATA_OFFSET)
        header = (_MAGIC, _VERSION, _FILLING, os.getpid(), geometry.width, geometry.rows, nbytes)
        scale = 1.0 if geometry.scale is None else geometry.scale
        more = geometry.format.encode(), geometry.kept, bytes.fromhex(geometry.digest)
        _write(fd, 0, _HEADER.pack(*header, scale, *more))
        _lock(fd, _WRITER, fcntl.F_WRLCK)
        _lock(fd, _USERS, fcntl.F_RDLCK)
        return fd, _link(fd, folder, name)
    except BaseException:
        os.close(fd)
        raise


def reserve(fd: int, folder: Path, nbytes: int, begin: int = 0) -> None:
    """Give bytes of the file from ``begin`` on memory: a lack of it is an error here instead of a SIGBUS later."""
    try:
        os.posix_fallocate(fd, begin, nbytes)
    except OSError as error:
        raise RuntimeError(
            f"EngramTable: {nbytes:,} bytes do not fit in {folder} ({error.strerror}), {_free(folder):,} are free; "
            f"{_ENLARGE}"
        ) from None


def is_complete(fd: int) -> bool:
    return _read_header(fd)[2] == _COMPLETE


def complete(fd: int) -> None:
    """Let readers in."""
    _write(fd, _STATE_AT, struct.pack("<I", _COMPLETE))


def digest_of(fd: int) -> str:
    """What the rows were made from, in hex; "" where nothing says so, or where they were written since."""
    digest = _read_header(fd)[10]
    return digest.hex() if any(digest) else ""


def void(fd: int) -> None:
    """Take the digest away: rows are about to be others."""
    _write(fd, _DIGEST_AT, bytes(32))


def find(name: str, nbytes: int, geometry: Geometry, where: str) -> tuple[int, Path, Geometry] | str | None:
    """(open file, path, geometry) of the complete table called ``name``; who is filling it, in words; or None."""
    for folder in _folders():
        path = folder / f"engram-{name}"
        try:
            fd = _open_own(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"{where}: {path} cannot be opened: {error.strerror}") from None
        if fd is None:
            raise ValueError(f"{where}: {path} is no table of engram_kernels, or another user's")
        found = None
        try:
            found = _examine(fd, path, nbytes, geometry, where)
            return (fd, path, found) if isinstance(found, Geometry) else found
        finally:
            if not isinstance(found, Geometry):
                os.close(fd)
    return None


def paths() -> list[Path]:
    """All files that may be tables, of any user."""
    return [path for folder in _folders() for path in folder.glob("engram-*")]


def state_of(path: Path) -> tuple[int, Geometry, int, str, os.stat_result] | None:
    """(bytes of rows and scales, geometry, writer, state, stat) of a table's file; None where it is none of ours.

    state: "complete", "filling", or "dead", which the next table that is created removes.
    """
    try:
        fd = _open_own(path)
    except OSError:
        return None
    if fd is None:
        return None
    try:
        magic, version, state, writer, width, rows, nbytes, scale, name, kept, _ = _read_header(fd)
        if magic != _MAGIC or version != _VERSION:
            return None
        used = _locked(fd, _USERS, fcntl.F_WRLCK) or (kept and state == _COMPLETE)
        words = "dead" if not used else "complete" if state == _COMPLETE else "filling"
        geometry = Geometry(rows, width, name.rstrip(b"\0").decode(errors="replace"), scale, digest_of(fd), bool(kept))
        return nbytes, geometry, writer, words, os.fstat(fd)
    finally:
        os.close(fd)


def remove_unused(path: Path) -> bool:
    """Remove a table's file that no process holds; False where one does, where it is kept, or not one of ours.

    Any user may put any file here under any name: what is not this user's own is none of ours, and no error.
    """
    try:
        fd = _open_own(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if fd is None:
        return False
    try:
        # Asked again under the lock: its writer may have published it, and ended, in between.
        if not _removable(fd) or not _lock(fd, _USERS, fcntl.F_WRLCK) or not _removable(fd):
            return False
        if os.fstat(fd).st_nlink:
            os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _removable(fd: int) -> bool:
    """Whether a file that nobody holds is to go; one of a later version is left to that."""
    magic, version, state, *_, kept, _ = _read_header(fd)
    return magic == _MAGIC and version <= _VERSION and not (kept and state == _COMPLETE)


def _open_own(path: Path) -> int | None:
    """``path`` open for reading and writing; None where it is no regular file of this user's own."""
    if _is_own(os.lstat(path)):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if _is_own(os.fstat(fd)):
            return fd
        os.close(fd)  # replaced in between
    return None


def _is_own(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def release(fd: int, path: Path) -> None:
    """Close the file, and with it the locks unless a fork has it open too; remove it where nobody holds it."""
    os.close(fd)
    remove_unused(path)


def check_name(name, where: str) -> None:
    """Raise ValueError unless ``name`` can be part of a file's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: placement 'shared' needs a name of 1 to 128 letters, digits or any of _.-, got {name!r}"
        )


def _folders() -> Iterator[Path]:
    """Where tables may lie: hugetlbfs mounts of 2 MiB pages that this process can write to, then /dev/shm."""
    with open("/proc/mounts") as lines:
        for line in lines:
            _, folder, kind, options, *_ = line.split()
            if kind == "hugetlbfs" and "pagesize=2M" in options.split(",") and os.access(folder, os.W_OK):
                yield Path(folder)
    yield _SHM


def _free_huge_pages() -> int:
    """Bytes of the hugetlb pool that nobody holds or has reserved."""
    try:
        free, reserved = (int((_HUGETLB / f"{name}_hugepages").read_text()) for name in ("free", "resv"))
    except (OSError, ValueError):
        return 0
    return (free - reserved) * HUGE_PAGE


def _free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else sys.maxsize  # tmpfs without a limit has no blocks


def _write(fd: int, at: int, data: bytes) -> None:
    header = Pages(DATA_OFFSET, fd, 0)  # hugetlbfs has no write()
    header.buffer[at : at + len(data)] = list(data)


def _read_header(fd: int) -> tuple:
    raw = os.pread(fd, _HEADER.size, 0)
    return _HEADER.unpack(raw) if len(raw) == _HEADER.size else (b"",) * 11


def _link(fd: int, folder: Path, name: str) -> Path:
    """Give the file its name; FileExistsError where a living table has it."""
    path = folder / f"engram-{name}"
    while True:
        try:
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        except FileExistsError:
            if not remove_unused(path):
                raise FileExistsError(_taken(name, path)) from None
            continue
        # Two processes may have chosen different folders at once: the one in the later folder gives way.
        for other in _folders():
            if other == folder:
                return path
            if os.path.lexists(other / path.name):
                os.unlink(path)
                raise FileExistsError(_taken(name, other / path.name))


def _taken(name: str, path: Path) -> str:
    return (
        f"EngramTable.empty: {path} exists, and is a shared table in use or none of this package's; attach to it "
        f"(EngramTable.attach({name!r}, ...)) or choose another name"
    )


def _examine(fd: int, path: Path, nbytes: int, wanted: Geometry, where: str) -> Geometry | str | None:
    """The geometry of the table in ``fd``, now locked as in use; who is filling it; None where it is going away."""
    magic, version, state, writer, width, rows, stored, scale, name, kept, _ = _read_header(fd)
    if magic != _MAGIC:
        raise ValueError(f"{where}: {path} is no table of engram_kernels, or another user's")
    if wanted.kept and remove_unused(path):  # who wants a kept table makes it where a dead process left another
        return None
    if version != _VERSION:
        raise ValueError(f"{where}: {path} has version {version} of the layout, this package reads {_VERSION}")
    found = Geometry(rows, width, name.rstrip(b"\0").decode(errors="replace"), scale, digest_of(fd), bool(kept))
    if wanted.kept and not found.kept:
        raise FileExistsError(
            f"{where}: {path} is a shared table that is not kept: it goes with the last process that has it. End "
            "these, or choose another name"
        )
    if wanted.digest and wanted.digest != found.digest:
        is_of = f"a table of digest {found.digest}"
        if not found.digest:
            is_of = "a table without a digest: its rows were written since it was published, or not made from files"
        raise ValueError(
            f"{where}: expected digest {wanted.digest}, and {path} is {is_of}. Free it (python -m engram_kernels table "
            f"shared --free {path.name.removeprefix('engram-')}), or give each version a name of its own, as a rolling "
            "upgrade needs, which has both for a time"
        )
    for field in ("rows", "width", "format", "scale"):
        expected, got = getattr(wanted, field), getattr(found, field)
        if field == "scale" and expected is not None:
            (expected,) = struct.unpack("<f", struct.pack("<f", expected))
        if expected is not None and expected != got:
            raise ValueError(f"{where}: {path} must have {field} {expected}, got {got}")
    if stored != nbytes or os.fstat(fd).st_size < DATA_OFFSET + nbytes:
        raise ValueError(f"{where}: {path} is truncated: {os.fstat(fd).st_size:,} bytes, expected {nbytes:,} and more")
    if state == _COMPLETE:
        # Refused while another process looks whether the file is unused, and it may have been removed just now.
        return found if _lock(fd, _USERS, fcntl.F_RDLCK) and os.fstat(fd).st_nlink else None
    # State and lock change in this order: a writer that published in between has set the state.
    if _locked(fd, _WRITER) or _read_header(fd)[2] == _COMPLETE:
        return f"process {writer} had not published the table in {path}"
    remove_unused(path)
    raise WriterDied(f"{where}: process {writer}, which was filling {path}, died or gave up; the file is removed")


def _lock(fd: int, byte: int, kind: int) -> bool:
    """Lock one byte for this open file; False where another holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _locked(fd: int, byte: int, kind: int = fcntl.F_RDLCK) -> bool:
    """Whether another open file holds a lock on the byte that excludes one of this kind."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK
