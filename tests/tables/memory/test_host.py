"""HostMapping: registration in chunks and its undoing, by a driver that keeps account; what is reported of it."""

import gc
import re
import resource
import types
import weakref

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.tables.memory import allocation as table_memory
from engram_kernels.tables.memory import host as host_memory
from engram_kernels.tables.memory import report as memory_report
from engram_kernels.tables.memory.host import HostMapping
from engram_kernels.tables.memory.pages import HUGE_PAGE
from engram_kernels.tables.memory.report import MemoryReport
from tests.support.gpu.drivers import Accountant, FakeDriver, mapped_ranges

MIB = 1 << 20


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(host_memory, "_CHUNK", 2 * MIB)


def test_torch_compile_reads_whether_memory_is_registered():
    """Dynamo guards on what it reads; a registry that changes by itself would fail the guard at once."""
    mapping = HostMapping(MIB, FakeDriver())

    @torch.compile(backend="eager", fullgraph=True)
    def function(x, mapping):
        return x + 1 if mapping.registered else x

    x = torch.ones(2)
    assert torch.equal(function(x, mapping), x + 1)
    others = [HostMapping(MIB, FakeDriver()) for _ in range(3)]
    assert torch.equal(function(x, mapping), x + 1)
    for each in (mapping, *others):
        each.close()
    assert torch.equal(function(x, mapping), x)


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


@pytest.mark.parametrize("refused", [0, 1, 3])
def test_a_refusal_undoes_every_earlier_chunk(small_chunks, monkeypatch, refused):
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: 12_345_678)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65_536, 65_536))
    driver = FakeDriver(refuse_at=refused)
    with pytest.raises(RuntimeError) as raised:
        HostMapping(9 * MIB, driver)
    message = str(raised.value)
    assert "cudaErrorMemoryAllocation (2): out of memory" in message
    assert f"after {refused * 2 * MIB:,} of {9 * MIB:,} bytes" in message
    assert "12,345,678 bytes are available" in message and "locked-memory limit is 65,536 bytes" in message
    assert "ulimit -l unlimited" in message and "placement 'staged'" in message
    assert driver.held == {} and driver.released == [address for address, _ in driver.registered]
    assert len(driver.registered) == refused
    # Unmapped at once, though the error still holds the frames it came through.
    assert not any(first in driver.released for first, _ in mapped_ranges())


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


def test_a_refusal_to_unregister_is_a_warning():
    driver = FakeDriver()
    mapping = HostMapping(MIB, driver)
    driver.unregister = lambda address: "cudaErrorUnknown (999): unknown error"
    with pytest.warns(RuntimeWarning, match=r"refused to unregister host memory \(cudaErrorUnknown \(999\)"):
        mapping.close()


@pytest.mark.parametrize("next_one", ["registration", "undoing"])
def test_a_refused_range_stays_mapped_and_is_tried_again(monkeypatch, next_one):
    """As one that is collected while a graph is captured: unmapping what the driver holds would be a fault later."""
    monkeypatch.setattr(host_memory, "_refused", [])
    other, driver = HostMapping(MIB, FakeDriver()), FakeDriver()
    mapping = HostMapping(MIB, driver)
    first = mapping.pages.address
    with monkeypatch.context() as refusing:
        refusing.setattr(driver, "unregister", lambda address: "a CUDA graph is being captured")
        with pytest.warns(RuntimeWarning, match="is being captured.; it stays pinned, and is tried again"):
            del mapping
            gc.collect()
        HostMapping(MIB, FakeDriver()).close()  # refused again
    assert any(range_[0] == first for range_ in mapped_ranges()) and driver.held
    other.close() if next_one == "undoing" else HostMapping(MIB, FakeDriver())
    assert driver.released == [first] and not driver.held
    assert not any(range_[0] == first for range_ in mapped_ranges())


def test_a_capture_is_left_in_peace(monkeypatch):
    """Asked to unregister, a driver would refuse and break it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("the driver was asked"))
    assert host_memory.RuntimeDriver().unregister(4096) == "a CUDA graph is being captured"


def test_memory_outlives_close_while_a_tensor_views_it():
    mapping = HostMapping(MIB, FakeDriver())
    first = mapping.bytes.data_ptr()
    view = mapping.bytes[10:20]
    view.fill_(3)
    mapping.close()
    del mapping
    gc.collect()
    assert view.tolist() == [3] * 10
    del view
    assert not any(range_[0] == first for range_ in mapped_ranges())


def test_many_tables_leak_nothing(small_chunks, monkeypatch):
    """200 tables closed, collected or refused half-way: as many registrations as their undoing, and no mapping left."""
    good, bad = Accountant(), Accountant()
    monkeypatch.setattr(table_memory, "_driver", lambda: drivers[0])
    monkeypatch.setattr(host_memory, "ensure_huge", lambda *_: None)  # reads smaps, 10 ms each time

    def make():
        return EngramTable.empty(18_000, 256, "e4m3_ue8m0", placement="host")  # 4.5 MiB, three chunks

    drivers = [good]
    make().close()
    gc.collect()
    before, good.registered, good.released = len(mapped_ranges()), [], []
    for round in range(200):
        drivers = [good]
        table = make()
        if round % 2:
            table.close()
        del table
        drivers, bad.refuse_at = [bad], len(bad.registered) + 1
        with pytest.raises(RuntimeError):
            make()
        drivers = [None]
        make()
    gc.collect()
    assert good.held == {} == bad.held
    assert len(good.registered) == len(good.released) == 600
    assert len(bad.registered) == len(bad.released) == 200
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
    calls, cleared = [], []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            calls.append((address, nbytes, flags))
            return 2 if nbytes > 100 else 0

        def cudaGetErrorString(self, error):
            return "out of memory"

        def cudaHostUnregister(self, address):
            calls.append(address)
            return 999 if address == 0 else 0

    def launch(*size, device):
        cleared.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", launch)
    driver = host_memory.RuntimeDriver()
    assert driver.register(4096, 100) is None and not cleared
    # The refusal is fetched from the runtime, so that no later launch stumbles over it.
    assert driver.register(4096, 101) == "cudaErrorMemoryAllocation (2): out of memory" and cleared == ["cuda"]
    assert driver.unregister(4096) is None
    assert driver.unregister(0) == "cudaErrorUnknown (999): out of memory"
    assert calls == [(4096, 100, 3), (4096, 101, 3), 4096, 0]  # 3: portable and mapped


@pytest.mark.parametrize(("content", "expected"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_runtime_driver_finds_the_gpus_node(monkeypatch, tmp_path, content, expected):
    monkeypatch.setattr(host_memory, "_PCI", tmp_path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    gpu = types.SimpleNamespace(pci_domain_id=1, pci_bus_id=0xAB, pci_device_id=0x1F)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {3: gpu}[index])
    if content is not None:
        (tmp_path / "0001:ab:1f.0").mkdir()
        (tmp_path / "0001:ab:1f.0" / "numa_node").write_text(content)
    assert host_memory.RuntimeDriver().numa_node() == expected
    del gpu.pci_bus_id
    assert host_memory.RuntimeDriver().numa_node() is None


def test_memory_report(small_chunks, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65_536, 65_536))
    driver = FakeDriver()
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    table = EngramTable.empty(18_000, 256, "e4m3_ue8m0", placement="host")
    report = table.memory_report()
    assert (report.placement, report.bytes, report.device, report.chunks) == ("host", 18_000 * 264, 0, 3)
    assert report.bytes <= report.resident <= report.bytes + 2 * 4096 and report.locked_limit == 65_536
    assert report.huge % HUGE_PAGE == 0 and report.huge_share == report.huge / report.resident
    monkeypatch.setattr(table_memory, "_driver", lambda: None)
    plain = EngramTable.empty(18_000, 256, "e4m3_ue8m0", placement="host").memory_report()
    assert (plain.resident, plain.huge, plain.huge_share, plain.chunks) == (0, 0, None, 0)
    shared = EngramTable.from_tensors(torch.zeros(6, 64), placement="cpu").memory_report()
    assert (shared.resident, shared.bytes) == (None, 6 * 256)


def test_a_report_in_words():
    full = MemoryReport("host", 100 << 30, 3 << 30, 97 << 30, 97 << 29, 2, 1, 0.75, None, ("something came out less",))
    assert str(full) == (
        "host: 100.00 GiB; 3.00 GiB of it on the GPU; 97.00 GiB resident, 50.0% of that in huge pages; registered in "
        "2 chunks; NUMA node 1 preferred, which holds 75.0%; locked-memory limit unlimited\n"
        "warning: something came out less"
    )
    short = MemoryReport("cpu", 384, locked_limit=8)
    assert str(short) == "cpu: 384 bytes; not registered; locked-memory limit 8 bytes"


@pytest.mark.parametrize(
    ("most", "stat", "content"),
    [
        ("memory.max", "memory.stat", "anon 3000\nfile 70000\nshmem 500\n"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "rss 1\ntotal_rss 3000\ntotal_shmem 500\n"),
    ],
)
def test_a_container_has_no_more_than_its_limit(tmp_path, monkeypatch, most, stat, content):
    """What the page cache has of it is given up for others."""
    monkeypatch.setattr(memory_report, "_CGROUP", tmp_path)
    everything = memory_report.available_host_memory()
    (tmp_path / "memory").mkdir()
    (tmp_path / stat).write_text(content)
    (tmp_path / most).write_text("10000\n")
    assert memory_report.available_host_memory() == 6500 < everything
    (tmp_path / most).write_text("2000\n")
    assert memory_report.available_host_memory() == 0
    (tmp_path / most).write_text("max\n")
    assert memory_report.available_host_memory() > 6500
