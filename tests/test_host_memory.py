"""HostMapping: registration in chunks and its undoing, by a driver that keeps account; the mapping itself."""

import gc
import re
import resource
import weakref
from pathlib import Path

import pytest
import torch

from engram_kernels import host_memory
from engram_kernels.host_memory import HUGE_PAGE, HostMapping

MIB = 1 << 20


def mapped_ranges():
    """(first, end) of every mapping of this process."""
    with open("/proc/self/maps") as lines:
        return [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]


class FakeDriver:
    """Keeps account of registrations; refuses the one numbered ``refuse_at``, and whatever is not in order."""

    def __init__(self, refuse_at=None):
        self.refuse_at = refuse_at
        self.held = {}  # address -> bytes
        self.registered = []  # every registration ever, in order
        self.released = []

    def register(self, address, nbytes):
        if len(self.registered) == self.refuse_at:
            return "error 2: out of memory"
        assert nbytes > 0 and address not in self.held
        assert any(first <= address and address + nbytes <= end for first, end in mapped_ranges())
        self.held[address] = nbytes
        self.registered.append((address, nbytes))

    def unregister(self, address):
        # The driver must be told while the memory is still there.
        nbytes = self.held.pop(address)
        assert any(first <= address and address + nbytes <= end for first, end in mapped_ranges())
        self.released.append(address)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(host_memory, "_CHUNK", 2 * MIB)


@pytest.mark.parametrize("nbytes", [1, 4095, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 7 * MIB + 16])
def test_chunks_cover_the_bytes_exactly_once(small_chunks, nbytes):
    driver = FakeDriver()
    mapping = HostMapping(nbytes, driver)
    assert mapping.registered and len(mapping.bytes) == nbytes
    expected = mapping.bytes.data_ptr()
    for address, size in driver.registered:
        assert address == expected and size <= 2 * MIB
        expected += size
    assert expected == mapping.bytes.data_ptr() + nbytes
    assert len(driver.registered) == -(-nbytes // (2 * MIB))
    mapping.close()
    assert driver.held == {}


def test_a_small_mapping_is_one_registration():
    driver = FakeDriver()
    HostMapping(9 * MIB, driver).close()
    assert [size for _, size in driver.registered] == [9 * MIB]


@pytest.mark.parametrize("nbytes", [1, 100, 3 * MIB])
@pytest.mark.parametrize("registered", [False, True])
def test_memory_starts_at_a_huge_page_zero_and_writable(nbytes, registered):
    mapping = HostMapping(nbytes, FakeDriver() if registered else None)
    assert mapping.bytes.data_ptr() % HUGE_PAGE == 0 and HUGE_PAGE == 2 * MIB
    assert mapping.bytes.dtype == torch.uint8 and mapping.bytes.shape == (nbytes,)
    assert not mapping.bytes.any()
    mapping.bytes.fill_(7)
    assert (mapping.bytes == 7).all()
    assert mapping.registered is registered


def advice_of(mapping):
    """The kernel's two-letter flags of the range (man 5 proc): hg and nh for huge pages, dc for not in forks."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            edges = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if edges:
                inside = int(edges[1], 16) <= mapping.bytes.data_ptr() < int(edges[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])


def test_a_registered_mapping_asks_for_huge_pages_and_stays_out_of_forks():
    flags = advice_of(HostMapping(4 * MIB, FakeDriver()))
    assert "dc" in flags and "nh" not in flags
    plain = advice_of(HostMapping(4 * MIB))
    assert "dc" not in plain and "hg" not in plain
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags and "nh" in plain


@pytest.mark.parametrize("refused", [0, 1, 3])
def test_a_refusal_undoes_every_earlier_chunk(small_chunks, monkeypatch, refused):
    monkeypatch.setattr(host_memory, "_available", lambda: 12_345_678)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65_536, 65_536))
    driver = FakeDriver(refuse_at=refused)
    with pytest.raises(RuntimeError) as raised:
        HostMapping(9 * MIB, driver)
    message = str(raised.value)
    assert "error 2: out of memory" in message
    assert f"after {refused * 2 * MIB:,} of {9 * MIB:,} bytes" in message
    assert "12,345,678 bytes are available" in message and "locked-memory limit is 65,536 bytes" in message
    assert "ulimit -l unlimited" in message
    assert driver.held == {} and driver.released == [address for address, _ in driver.registered]
    assert len(driver.registered) == refused


def test_a_refusal_reports_what_the_machine_says(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match="the locked-memory limit is unlimited") as raised:
        HostMapping(MIB, FakeDriver(refuse_at=0))
    available = int(re.search(r"([\d,]+) bytes are available", str(raised.value))[1].replace(",", ""))
    with open("/proc/meminfo") as lines:
        total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal"))
    assert 64 * MIB < available <= total


def test_the_limit_on_locked_memory_is_reported_not_enforced(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    assert HostMapping(MIB, FakeDriver()).registered


def test_close_unregisters_once(small_chunks):
    driver = FakeDriver()
    mapping = HostMapping(5 * MIB, driver)
    mapping.close()
    assert driver.held == {} and len(driver.released) == 3 and not mapping.registered and mapping.bytes is None
    mapping.close()
    del mapping
    gc.collect()
    assert len(driver.released) == 3


def test_collection_unregisters_once(small_chunks):
    driver = FakeDriver()
    mapping = HostMapping(5 * MIB, driver)
    gone = weakref.ref(mapping)
    del mapping
    gc.collect()
    assert gone() is None and driver.held == {} and len(driver.released) == 3


def test_memory_outlives_close_while_a_tensor_views_it():
    mapping = HostMapping(MIB, FakeDriver())
    view = mapping.bytes[10:20]
    view.fill_(3)
    mapping.close()
    del mapping
    gc.collect()
    assert view.tolist() == [3] * 10


def test_many_mappings_leak_nothing(small_chunks):
    HostMapping(5 * MIB, FakeDriver()).close()
    gc.collect()
    before = len(mapped_ranges())
    good, bad = FakeDriver(), FakeDriver()
    for round in range(200):
        mapping = HostMapping(5 * MIB, good)
        if round % 2:
            mapping.close()
        del mapping
        bad.refuse_at = len(bad.registered) + 1
        with pytest.raises(RuntimeError):
            HostMapping(5 * MIB, bad)
        HostMapping(5 * MIB)
    gc.collect()
    assert good.held == {} == bad.held
    assert len(good.released) == 600 and len(bad.released) == 200
    assert len(mapped_ranges()) <= before + 8  # the interpreter's own arenas move a little


def test_discard_gives_the_pages_back_unless_registered():
    mapping = HostMapping(3 * MIB)
    mapping.bytes.fill_(9)
    mapping.discard()
    assert not mapping.bytes.any()
    driver = FakeDriver()
    held = HostMapping(3 * MIB, driver)
    held.bytes.fill_(9)
    with pytest.raises(ValueError, match="HostMapping.discard: the driver holds the pages of a registered mapping"):
        held.discard()
    assert (held.bytes == 9).all()
    view = held.bytes
    held.close()
    assert (view == 9).all()


def test_the_runtime_driver_reports_the_runtimes_own_error(monkeypatch):
    class Runtime:
        calls = []

        def cudaHostRegister(self, address, nbytes, flags):
            self.calls.append((address, nbytes, flags))
            return 2 if nbytes > 100 else 0

        def cudaGetErrorString(self, error):
            return "out of memory"

        def cudaHostUnregister(self, address):
            self.calls.append(address)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    driver = host_memory.RuntimeDriver()
    assert driver.register(4096, 100) is None
    assert driver.register(4096, 101) == "error 2: out of memory"
    driver.unregister(4096)
    assert Runtime.calls == [(4096, 100, 3), (4096, 101, 3), 4096]  # 3: portable and mapped
