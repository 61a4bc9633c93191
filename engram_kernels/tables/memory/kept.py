"""Shared tables of this user that have a name now: which there are, who holds them, and how a kept one is freed."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import shared_protocol
from .shared_protocol import Geometry, WriterDied

Table = TypeVar("Table")
#: At a name that is taken and gone by turns; a file that cannot be removed would be so for ever.
_ATTEMPTS = 100


@dataclass(frozen=True)
class SharedTable:
    """A table's file. state: "complete", "filling", or "dead", which the next table that is created removes.

    pids: processes that map it, as far as /proc shows them to this user. writer: the process that made it.
    """

    name: str
    path: Path
    nbytes: int
    geometry: Geometry
    state: str
    writer: int
    pids: tuple[int, ...]


def list_shared() -> list[SharedTable]:
    """Tables of this user, by name; locks and content stay as they are."""
    found = {path: state for path in shared_protocol.paths() if (state := shared_protocol.state_of(path)) is not None}
    pids = _who_maps({(stat.st_dev, stat.st_ino) for *_, stat in found.values()}) if found else {}
    tables = [
        SharedTable(_name_of(path), path, nbytes, geometry, state, writer, tuple(pids.get((at.st_dev, at.st_ino), ())))
        for path, (nbytes, geometry, writer, state, at) in found.items()
    ]
    return sorted(tables, key=lambda table: (table.name, table.path))


def free_shared(name: str, where: str) -> None:
    """Take a table's name away, and its memory as soon as no process maps it.

    FileNotFoundError where this user has none of that name; ValueError while a living process fills it.
    """
    shared_protocol.check_name(name, where)
    freed = False
    for path in shared_protocol.paths():
        if _name_of(path) != name or (state := shared_protocol.state_of(path)) is None:
            continue
        _, _, writer, state, found = state
        if state == "filling":
            raise ValueError(f"{where}: process {writer} is filling {path}; end it, which removes the file")
        with suppress(FileNotFoundError):
            if path.stat(follow_symlinks=False).st_ino == found.st_ino:  # else another table has the name by now
                path.unlink()
        freed = True
    if not freed:
        names = ", ".join(table.name for table in list_shared()) or "none"
        raise FileNotFoundError(f"{where}: this user has no shared table {name!r}; there is {names}")


def attach_or_load(attach: Callable[[], Table], load: Callable[[], Table]) -> Table:
    """What ``attach`` gives where there is a table or another process is filling it, else what ``load`` makes.

    Of several that come at once one loads, since a name is taken once; where it dies another of them does.
    """
    attempts = 0
    while True:
        try:
            return attach()
        except (FileNotFoundError, WriterDied):
            pass
        try:
            return load()
        except FileExistsError:
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
        time.sleep(0.01)


def _name_of(path: Path) -> str:
    return path.name.removeprefix("engram-")


def _who_maps(files: set[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Processes that map each of these files, (device, inode). Those of other users show nothing."""
    found: dict[tuple[int, int], set[int]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "maps").read_text(errors="replace").splitlines()
        except OSError:  # another user's, or gone
            continue
        for line in lines:
            _, _, _, device, inode, *_ = line.split(maxsplit=5)
            key = os.makedev(*(int(part, 16) for part in device.split(":"))), int(inode)
            if key in files:
                found.setdefault(key, set()).add(int(folder.name))
    return {key: sorted(pids) for key, pids in found.items()}
