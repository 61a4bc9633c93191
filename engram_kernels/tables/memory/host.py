"""Host memory of exact size that a GPU can read in place (UVA).

The framework's pinned allocator rounds a request up to a power of two, 128 GiB for a table of 94. This maps what is
asked for, at a 2 MiB boundary, asks for huge pages on the GPU's NUMA node, faults them in by several threads, and
registers them with the driver. A step that comes out as less warns once, with the reason; only a refused registration,
or memory that is not there, is an error.
"""

import os
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import torch

from .access import HostAccess, host_access
from .pages import (
    DONTFORK,
    DONTNEED,
    HUGEPAGE,
    NOHUGEPAGE,
    Pages,
    Progress,
    huge_page_setting,
    online_nodes,
    whole_huge_pages,
)
from .report import available_host_memory, limit, locked_limit

_CHUNK = 64 << 30  # bytes per registration: larger ones fail on some drivers
_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped, the same numbers in HIP
_PCI = Path("/sys/bus/pci/devices")
_ENOUGH_HUGE = 0.9  # share of huge pages below which a mapping is collapsed, and a warning is due after that
# Torch gives an error's number and sentence, not its name. Numbers are the same in HIP.
_ERRORS = {
    1: "ErrorInvalidValue",
    2: "ErrorMemoryAllocation",
    100: "ErrorNoDevice",
    304: "ErrorOperatingSystem",
    712: "ErrorHostMemoryAlreadyRegistered",
    801: "ErrorNotSupported",
    999: "ErrorUnknown",
}


class RuntimeDriver:
    """Registration of host memory through torch's CUDA (or ROCm) runtime; tests inject one of their own."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Register a range; the driver's error where it refuses, else None."""
        error = _described(torch.cuda.cudart().cudaHostRegister(address, nbytes, _REGISTER_FLAGS))
        if error is not None:
            # A refusal stays the runtime's last error, which the next launch of a kernel reports as its own.
            try:
                torch.ones(1, device="cuda")
            except RuntimeError:
                pass
        return error

    def unregister(self, address: int) -> str | None:
        """Undo a registration; the driver's error where it refuses, else None."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Asked now the driver would refuse, and the capture would not survive it.
            return "a CUDA graph is being captured"
        return _described(torch.cuda.cudart().cudaHostUnregister(address))

    def access(self) -> HostAccess:
        """How the current GPU reaches the host's memory."""
        return host_access(torch.cuda.current_device())

    def numa_node(self) -> int | None:
        """The NUMA node that the current GPU hangs on, where the system says."""
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        try:
            bus = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
            node = int((_PCI / bus / "numa_node").read_text())
        except (AttributeError, OSError, ValueError):  # a build of torch without these fields, or a kernel
            return None
        return node if node >= 0 else None


def _described(error) -> str | None:
    code = int(error)
    if code == 0:
        return None
    name = f"hip{_ERRORS.get(code, 'Error')}" if torch.version.hip else f"cuda{_ERRORS.get(code, 'Error')}"
    return f"{name} ({code}): {torch.cuda.cudart().cudaGetErrorString(error)}"


class Registration:
    """A range that a driver holds, in chunks of at most 64 GiB; undone by close, by collection, or all at once where
    a chunk is refused.
    """

    def __init__(self, pages: Pages, driver: RuntimeDriver):
        _try_again()
        address, nbytes = pages.address, pages.nbytes
        self.addresses: list[int] = []
        self.alive = True  # a plain bool: torch.compile guards on what finalize.alive reads, which changes by itself
        self._undo = weakref.finalize(self, _unregister, self.addresses, driver, os.getpid(), pages)
        try:
            for start in range(0, nbytes, _CHUNK):
                error = driver.register(address + start, min(_CHUNK, nbytes - start))
                if error is not None:
                    raise RuntimeError(
                        f"EngramTable: the driver refused to register host memory ({error}) after {start:,} of "
                        f"{nbytes:,} bytes; {available_host_memory():,} bytes are available, the locked-memory limit "
                        f"is {limit(locked_limit())}. Free memory, raise the limit (ulimit -l unlimited), use a "
                        "smaller table, or placement 'staged', which registers nothing"
                    )
                self.addresses.append(address + start)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.alive = False
        self._undo()


#: Ranges that their drivers would not let go (address, driver, process, memory): they stay mapped. State, because
#: nobody else is left who knows of them.
_refused: list[tuple[int, RuntimeDriver, int, object]] = []


def _unregister(addresses: list[int], driver: RuntimeDriver, owner: int, pages: Pages) -> None:
    # A forked child inherits this call, but neither the registration nor a driver that it may talk to.
    if os.getpid() != owner:
        return
    _try_again()
    errors = {address: error for address in addresses if (error := driver.unregister(address)) is not None}
    _refused.extend((address, driver, owner, pages.buffer) for address in errors)
    for error in list(errors.values())[:1]:
        degrade([], f"the driver refused to unregister host memory ({error}); it stays pinned, and is tried again")


def _try_again() -> None:
    """Unregister what was refused, as while a graph is captured; ahead of the next registration or its undoing."""
    waiting, _refused[:] = _refused[:], []
    for address, driver, owner, memory in waiting:
        if os.getpid() == owner and driver.unregister(address) is not None:
            _refused.append((address, driver, owner, memory))


class Mapping:
    """Memory that this process maps and a driver may hold; ``bytes`` is a uint8 tensor over it that keeps it mapped.

    notes: every step that came out as less. node: the NUMA node that its pages were asked from, if any.
    """

    def __init__(self, pages: Pages, driver: RuntimeDriver | None):
        self.nbytes, self.driver = pages.nbytes, driver
        self.notes: list[str] = []
        self.node: int | None = None
        self.access = HostAccess() if driver is None else driver.access()
        self.registration: Registration | None = None
        #: A GPU reads it though no driver holds it, by the host's page tables.
        self.unregistered = False
        self.pages = pages  # behind the registration: attributes are collected in this order, and it has to go first

    @property
    def bytes(self) -> torch.Tensor | None:
        return self.pages.bytes

    @property
    def registered(self) -> bool:
        """Whether a driver holds it."""
        return self.registration is not None and self.registration.alive

    @property
    def readable(self) -> bool:
        """Whether a GPU can read it."""
        return self.unregistered or self.registered

    def register(self) -> None:
        """Let a GPU read it, where there is one: the driver holds it then, unless the GPU reads any memory."""
        if self.driver is None or self.readable:
            return
        if self.access.pageable:
            self.unregistered = True
        else:
            self.registration = Registration(self.pages, self.driver)

    def rows_written(self) -> None:
        """Hear that this process is about to write rows."""

    def prefer_node(self) -> None:
        """Take pages from the GPU's NUMA node where there are several and the system tells which."""
        node = self.driver.numa_node() if self.driver is not None and online_nodes() > 1 else None
        if node is None:
            return
        error = self.pages.prefer_node(node)
        if error is None:
            self.node = node
        else:
            text = f"pages may lie on any NUMA node: the kernel refused to prefer the GPU's, {node} ({error})"
            degrade(self.notes, text)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target.copy_(source)`` of one dtype, one of them in this memory, in parts that the driver can copy.

        It takes no copy that crosses from one registration into the next.
        """
        offsets = (tensor.data_ptr() - self.pages.address for tensor in (target, source))
        first = next((offset for offset in offsets if 0 <= offset < self.nbytes), 0)
        edges = [0, *range(_CHUNK - first % _CHUNK, target.nbytes, _CHUNK), target.nbytes]
        into, out_of = (tensor.reshape(-1).view(torch.uint8) for tensor in (target, source))
        for begin, end in pairwise(edges):
            into[begin:end].copy_(out_of[begin:end])

    def close(self) -> None:
        """Unregister. The memory itself goes with the last tensor that views it."""
        self.unregistered = False
        if self.registration is not None:
            self.registration.close()
        self.pages.release()


class HostMapping(Mapping):
    """``nbytes`` bytes of this process alone.

    With a ``driver`` its pages are committed, huge where the kernel grants it, registered where the GPU does not read
    all memory by itself (access.py), and left out of forks, whose
    copies a GPU would not see. Without one (no GPU) nothing is committed before it is written, in small pages, so that
    a table of any size costs only the pages written; forks share them as they do all memory.
    huge: ask for huge pages without a driver too. progress: called with (bytes done, all) while pages are faulted in.
    """

    def __init__(
        self,
        nbytes: int,
        driver: RuntimeDriver | None = None,
        *,
        huge: bool = False,
        progress: Progress | None = None,
    ):
        if driver is not None:
            check_fits(nbytes, available_host_memory(), "host memory", "use a smaller table or free memory")
        super().__init__(Pages(nbytes), driver)
        self._owner = os.getpid()
        try:
            if driver is None:
                self.pages.advise(HUGEPAGE if huge else NOHUGEPAGE)
                return
            self.pages.advise(HUGEPAGE)
            self.pages.advise(DONTFORK)
            self.prefer_node()
            error = self.pages.fault_in(progress, touch=True)
            if error is not None:
                raise RuntimeError(
                    f"EngramTable: the kernel gave no memory for {nbytes:,} bytes ({error}); "
                    f"{available_host_memory():,} bytes are available"
                )
            ensure_huge(self.pages, self.notes)
            self.register()
        except BaseException:
            self.close()
            raise

    def check(self, where: str) -> None:
        """Raise ValueError where this process cannot read the memory: a fork of the one that registered it."""
        if self.driver is not None and os.getpid() != self._owner:
            raise ValueError(
                f"{where}: process {os.getpid()} is a fork of {self._owner}, and host memory that a GPU reads is left "
                "out of forks; start processes with spawn, or use placement 'shared'"
            )

    def discard(self) -> None:
        """Give all pages back; they read as zero afterwards. Only for memory that is not registered."""
        if self.registered:
            raise ValueError("HostMapping.discard: the driver holds the pages of a registered mapping")
        error = self.pages.advise(DONTNEED)
        if error is not None:
            raise RuntimeError(f"HostMapping.discard: the kernel refused ({error})")


def check_fits(nbytes: int, free: int, what: str, remedy: str) -> None:
    """Raise RuntimeError unless ``nbytes`` fit: committing more would end this process, or another one."""
    if nbytes > free:
        raise RuntimeError(f"EngramTable: {nbytes:,} bytes do not fit in {what}, {free:,} are free; {remedy}")


def degrade(notes: list[str], text: str) -> None:
    """Keep and warn of a step that came out as less than asked."""
    notes.append(text)
    warnings.warn(f"EngramTable: {text}", RuntimeWarning, stacklevel=2)


def ensure_huge(pages: Pages, notes: list[str], progress: Progress | None = None) -> None:
    """Collapse small pages where too few came huge; warn once where too few are after that."""
    possible = whole_huge_pages(pages.address, pages.nbytes)
    if possible == 0 or pages.usage().huge >= _ENOUGH_HUGE * possible:
        return
    error = pages.collapse(progress)
    huge = pages.usage().huge
    if huge < _ENOUGH_HUGE * possible:
        reason = {
            "absent": "this kernel has none",
            "never": "/sys/kernel/mm/transparent_hugepage/enabled says never",
        }.get(huge_page_setting(), "memory is fragmented")
        collapsed = "collapsing them changed nothing" if error is None else f"collapsing them failed ({error})"
        degrade(
            notes,
            f"{huge:,} of {pages.nbytes:,} bytes came in huge pages ({reason}; {collapsed}): a GPU reads large tables "
            "slowly through small ones",
        )
