"""Anonymous host memory of exact size that a GPU can read in place (UVA).

The framework's pinned allocator rounds a request up to a power of two, 128 GiB for a table of 94. This maps what is
asked for, at a 2 MiB boundary, and registers it with the driver. Nothing is committed before it is written or
registered.
"""

import mmap
import resource
import weakref
from dataclasses import dataclass

import torch

HUGE_PAGE = 2 << 20
_CHUNK = 64 << 30  # bytes per registration: larger ones fail on some drivers
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12
_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped, the same numbers in HIP


class RuntimeDriver:
    """Registration of host memory through torch's CUDA (or ROCm) runtime; tests inject one of their own."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Register a range; the driver's error where it refuses, else None."""
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(address, nbytes, _REGISTER_FLAGS)
        return None if int(error) == 0 else f"error {int(error)}: {runtime.cudaGetErrorString(error)}"

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


@dataclass
class HostMapping:
    """A mapping of ``nbytes`` bytes; ``bytes`` is a uint8 tensor over it that keeps it alive.

    With a ``driver`` the pages are huge where the kernel grants it, committed, registered, and left out of forks.
    Without one (no GPU) they are small, so that a table of any size costs only the pages that are written.
    """

    nbytes: int
    driver: RuntimeDriver | None = None

    def __post_init__(self):
        self._mmap = mmap.mmap(
            -1, self.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        base = torch.frombuffer(self._mmap, dtype=torch.uint8, count=1).data_ptr()
        self._offset = -base % HUGE_PAGE
        self.bytes = torch.frombuffer(self._mmap, dtype=torch.uint8, count=self.nbytes, offset=self._offset)
        self._advise("MADV_HUGEPAGE" if self.driver else "MADV_NOHUGEPAGE")
        self._unregister = None
        if self.driver is not None:
            registered = _register(self.bytes.data_ptr(), self.nbytes, self.driver)
            self._unregister = weakref.finalize(self, _unregister, registered, self.driver)
            self._advise("MADV_DONTFORK")

    @property
    def registered(self) -> bool:
        """Whether a GPU can read it."""
        return self._unregister is not None and self._unregister.alive

    def discard(self) -> None:
        """Give all pages back; they read as zero afterwards. Only for memory that is not registered."""
        if self.registered:
            raise ValueError("HostMapping.discard: the driver holds the pages of a registered mapping")
        self._advise("MADV_DONTNEED")

    def close(self) -> None:
        """Unregister. The memory itself goes with the last tensor that views it."""
        if self._unregister is not None:
            self._unregister()
        self.bytes = None

    def _advise(self, advice: str) -> None:
        # The kernel may be built without huge pages; the mapping works all the same.
        try:
            self._mmap.madvise(getattr(mmap, advice), self._offset, self.nbytes)
        except OSError:
            if advice == "MADV_DONTNEED":
                raise


def _register(address: int, nbytes: int, driver: RuntimeDriver) -> list[int]:
    """Register a range in chunks; undo all of it where one is refused."""
    registered: list[int] = []
    for start in range(0, nbytes, _CHUNK):
        error = driver.register(address + start, min(_CHUNK, nbytes - start))
        if error is not None:
            _unregister(registered, driver)
            raise RuntimeError(
                f"EngramTable: the driver refused to register host memory ({error}) after {start:,} of {nbytes:,} "
                f"bytes; {_available():,} bytes are available, the locked-memory limit is {_memlock()}. "
                "Free memory, raise the limit (ulimit -l unlimited), or use a smaller table"
            )
        registered.append(address + start)
    return registered


def _unregister(addresses: list[int], driver: RuntimeDriver) -> None:
    for address in addresses:
        driver.unregister(address)


def _available() -> int:
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) << 10


def _memlock() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} bytes"
