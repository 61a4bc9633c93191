"""Drivers that keep account of registrations, in place of the one of a GPU's runtime."""

from engram_kernels.tables.memory.access import HostAccess


def mapped_ranges():
    """(first, end) of every mapping of this process."""
    with open("/proc/self/maps") as lines:
        return [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]


class FakeDriver:
    """Keeps account of registrations; refuses the one numbered ``refuse_at``, and whatever is not in order."""

    def __init__(self, refuse_at=None, node=None, access=None):
        self.refuse_at, self.node, self._access = refuse_at, node, access or HostAccess()
        self.held = {}  # address -> bytes
        self.registered = []  # every registration ever, in order
        self.released = []

    def register(self, address, nbytes):
        if len(self.registered) == self.refuse_at:
            return "cudaErrorMemoryAllocation (2): out of memory"
        assert nbytes > 0 and address not in self.held
        assert any(first <= address and address + nbytes <= end for first, end in mapped_ranges())
        self.held[address] = nbytes
        self.registered.append((address, nbytes))

    def unregister(self, address):
        # The driver must be told while the memory is still there.
        nbytes = self.held.pop(address)
        assert any(first <= address and address + nbytes <= end for first, end in mapped_ranges())
        self.released.append(address)

    def access(self):
        return self._access

    def numa_node(self):
        return self.node


class Accountant(FakeDriver):
    """Does not look at the mappings each time."""

    def register(self, address, nbytes):
        if len(self.registered) == self.refuse_at:
            return "cudaErrorMemoryAllocation (2): out of memory"
        self.held[address] = nbytes
        self.registered.append((address, nbytes))

    def unregister(self, address):
        del self.held[address]
        self.released.append(address)
