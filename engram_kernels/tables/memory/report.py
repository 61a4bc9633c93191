"""What became of a table's memory, and what the machine has: the words of warnings, errors and ``memory_report()``."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
#: Of a container, by versions 2 and 1 of the kernel's control groups: its limit, and what counts towards that and is
#: not given up for others, as the page cache is.
_LIMITS = (
    ("memory.max", "memory.stat", ("anon", "shmem")),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", ("total_rss", "total_shmem")),
)


@dataclass(frozen=True)
class MemoryReport:
    """Where a table's bytes are. None stands for what the kernel does not say, or memory that is not the table's own.

    bytes: rows and scales. device: those in GPU memory. resident: host bytes that have pages. huge: those in huge
    pages. chunks: ranges registered with the driver. numa_node: the one preferred; numa_share: resident bytes on it.
    locked_limit: RLIMIT_MEMLOCK in bytes, None where there is none. warnings: every step that came out as less. link:
    over which a GPU reads them (access.py), None where none does.
    """

    placement: str
    bytes: int
    device: int = 0
    resident: int | None = None
    huge: int | None = None
    chunks: int = 0
    numa_node: int | None = None
    numa_share: float | None = None
    locked_limit: int | None = None
    warnings: tuple[str, ...] = ()
    link: str | None = None

    @property
    def huge_share(self) -> float | None:
        """Share of the resident bytes that lies in huge pages."""
        return self.huge / self.resident if self.huge is not None and self.resident else None

    def __str__(self) -> str:
        parts = [f"{self.placement}: {size(self.bytes)}"]
        if self.device:
            parts.append(f"{size(self.device)} of it on the GPU")
        if self.resident is not None:
            share = "" if self.huge_share is None else f", {self.huge_share:.1%} of that in huge pages"
            parts.append(f"{size(self.resident)} resident{share}")
        chunks = f"registered in {self.chunks} chunk{'s' * (self.chunks != 1)}" if self.chunks else "not registered"
        if self.link is not None and not self.chunks:
            chunks += ", as the GPU reads all host memory"
        parts.append(chunks if self.link is None else f"{chunks}, link {self.link}")
        if self.numa_node is not None:
            share = "" if self.numa_share is None else f", which holds {self.numa_share:.1%}"
            parts.append(f"NUMA node {self.numa_node} preferred{share}")
        parts.append(f"locked-memory limit {limit(self.locked_limit)}")
        return "\n".join(["; ".join(parts), *(f"warning: {text}" for text in self.warnings)])


def size(nbytes: int) -> str:
    """Bytes in words: exact below 1 GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes:,} bytes"


def limit(nbytes: int | None) -> str:
    return "unlimited" if nbytes is None else f"{nbytes:,} bytes"


def locked_limit() -> int | None:
    """RLIMIT_MEMLOCK in bytes; None where there is none. Whether it binds a registration is the driver's choice."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def available_host_memory() -> int:
    """Bytes that can be committed: what the kernel calls available, or less where a container has a limit."""
    with open("/proc/meminfo") as lines:
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    for most, stat, counted in _LIMITS:
        try:
            fields = dict(line.split() for line in (_CGROUP / stat).read_text().splitlines())
            used = sum(int(fields[name]) for name in counted)
            available = min(available, max(0, int((_CGROUP / most).read_text()) - used))
        except (OSError, KeyError, ValueError):  # no such file, or "max": no limit
            pass
    return available


def total_host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
