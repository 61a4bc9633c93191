"""A process whose memory, page cache included, is limited by a control group of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
#: Files of the kernel's versions 2 and 1: the limit, what is used, and the most that was.
VERSION_2 = ("memory.max", "memory.current", "memory.peak")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes")


class Group:
    """A control group for memory; :meth:`enter` is for the process that it is to hold."""

    def __init__(self, folder: Path):
        self.folder = folder

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, nbytes: int) -> None:
        """Take memory and pages of files from its processes before they have more. OSError where it is not allowed."""
        self._file(0).write_text(str(nbytes))

    def used(self) -> int:
        """Bytes: memory of its processes, and pages of files that they have read."""
        return int(self._file(1).read_text())

    def most(self) -> int | None:
        """The most bytes that were used so far; None where the kernel does not say."""
        path = self._file(2)
        return int(path.read_text()) if path.exists() else None

    def _file(self, number: int) -> Path:
        """One of those named above, by the version that the group is of."""
        version = VERSION_2 if (self.folder / VERSION_2[1]).exists() else VERSION_1
        return self.folder / version[number]


@contextmanager
def group(nbytes: int) -> Iterator[Group]:
    """A new group below this process's own. OSError where the machine does not allow it."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    of_memory = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    path = next(path for number, _, path in lines if number == "0") if of_memory is None else f"memory{of_memory}"
    found = Group(ROOT / path.lstrip("/") / f"engram-bench-{os.getpid()}")
    found.folder.mkdir()
    try:
        found.limit(nbytes)
        yield found
    finally:
        found.folder.rmdir()
