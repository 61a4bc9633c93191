"""What the kernel is asked of a mapping and what came: huge pages, faults, NUMA, guards, forks."""

import gc
import mmap
import os
import re

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.tables.memory import allocation as table_memory
from engram_kernels.tables.memory import host as host_memory
from engram_kernels.tables.memory import pages
from engram_kernels.tables.memory.host import HostMapping
from engram_kernels.tables.memory.pages import HUGE_PAGE, Pages
from tests.support.gpu.drivers import FakeDriver, mapped_ranges
from tests.support.processes.forks import in_a_fork

MIB = 1 << 20
THP = pages.huge_page_setting() in ("always", "madvise")


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


def flags_of(mapping):
    """Permissions of the range and the kernel's two-letter flags (man 5 proc): hg, nh huge pages, dc not in forks."""
    inside = permissions = None
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if edges := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
                inside = int(edges[1], 16) <= mapping.bytes.data_ptr() < int(edges[2], 16)
                permissions = edges[3]
            elif inside and line.startswith("VmFlags:"):
                return {permissions, *line.split()[1:]}


def test_a_registered_mapping_asks_for_huge_pages_and_stays_out_of_forks():
    flags = flags_of(HostMapping(4 * MIB, FakeDriver()))
    assert "dc" in flags and "nh" not in flags
    plain, huge = flags_of(HostMapping(4 * MIB)), flags_of(HostMapping(4 * MIB, huge=True))
    assert "dc" not in plain | huge and "hg" not in plain
    if THP:
        assert "hg" in flags and "hg" in huge and "nh" in plain


@pytest.mark.parametrize("nbytes", [4 * MIB, 3 * MIB + 5])
def test_a_mapping_is_exact_and_has_guards(nbytes):
    """Pages beyond the last one and before the first cannot be touched, and belong to nobody else."""
    mapping = HostMapping(nbytes)
    first, end = mapping.bytes.data_ptr(), mapping.bytes.data_ptr() + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    with open("/proc/self/maps") as lines:
        found = [(*line.split()[0].split("-"), line.split()[1]) for line in lines]
    around = [(kind, int(b, 16) - int(a, 16)) for a, b, kind in found if int(b, 16) >= first and int(a, 16) <= end]
    before, (kind, size), after = around
    assert (kind, size) == ("rw-p", end - first)
    assert before[0] == after[0] == "---p" and before[1] >= mmap.PAGESIZE <= after[1]


def test_all_pages_are_there_before_registration(monkeypatch):
    """Faulted in by threads, in pieces that progress reports; without a driver nothing is."""
    monkeypatch.setattr(pages, "_PIECE", 2 * MIB)
    seen, calls = [], []

    class Driver(FakeDriver):
        def register(self, address, nbytes):
            seen.append(calls[-1])
            return super().register(address, nbytes)

    mapping = HostMapping(7 * MIB, Driver(), progress=lambda *call: calls.append(call))
    assert seen == [(7 * MIB, 7 * MIB)] and len(calls) == 4
    assert calls == sorted(calls) and calls[0][0] in (MIB, 2 * MIB)
    usage = mapping.pages.usage()
    assert usage.resident == 7 * MIB
    if THP:
        assert usage.huge == 6 * MIB or mapping.notes  # what is left of a fragmented machine is said
    assert HostMapping(7 * MIB).pages.usage().resident == 0


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_progress_that_raises_undoes_everything(monkeypatch, error):
    monkeypatch.setattr(pages, "_PIECE", 2 * MIB)
    driver, before = FakeDriver(), len(mapped_ranges())

    def stop(done, total):
        raise error

    with pytest.raises(error):
        HostMapping(32 * MIB, driver, progress=stop)
    assert not driver.registered and len(mapped_ranges()) <= before + 4


def test_an_old_kernel_is_asked_by_writing(monkeypatch):
    """Before Linux 5.14 pages can only be written to, which shared memory must not be: a reader's would be lost."""
    original = pages._advise
    monkeypatch.setattr(
        pages, "_advise", lambda *call: "EINVAL" if call[2] == pages.POPULATE_WRITE else original(*call)
    )
    assert HostMapping(3 * MIB, FakeDriver()).pages.usage().resident == 3 * MIB
    fresh = Pages(3 * MIB)
    assert fresh.fault_in() == "EINVAL" and fresh.usage().resident == 0


def test_memory_that_the_kernel_refuses_is_an_error(monkeypatch):
    original, driver = pages._advise, FakeDriver()
    monkeypatch.setattr(
        pages, "_advise", lambda *call: "ENOMEM" if call[2] == pages.POPULATE_WRITE else original(*call)
    )
    with pytest.raises(RuntimeError, match=r"the kernel gave no memory for 3,145,728 bytes \(ENOMEM\); [\d,]+ bytes"):
        HostMapping(3 * MIB, driver)
    assert not driver.registered


def test_more_than_there_is_is_refused_before_anything_is_committed(monkeypatch):
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: 9 * MIB - 1)
    driver = FakeDriver()
    with pytest.raises(RuntimeError, match="9,437,184 bytes do not fit in host memory, 9,437,183 are free; use a sma"):
        HostMapping(9 * MIB, driver)
    HostMapping(9 * MIB)  # address space is free
    assert not driver.registered


@pytest.mark.skipif(not THP, reason="this kernel grants no huge pages")
def test_small_pages_are_collapsed():
    """Written small, then copied together: what a fragmented machine needs, and shared memory always."""
    memory = Pages(6 * MIB)
    memory.advise(pages.NOHUGEPAGE)
    memory.bytes.copy_(torch.arange(6 * MIB) % 251)
    assert memory.usage().huge == 0
    memory.advise(pages.HUGEPAGE)
    notes = []
    host_memory.ensure_huge(memory, notes)
    assert memory.usage().huge == 6 * MIB or notes
    assert torch.equal(memory.bytes, (torch.arange(6 * MIB) % 251).to(torch.uint8))


def test_a_lack_of_huge_pages_warns_once_with_its_reason(monkeypatch):
    monkeypatch.setattr(host_memory, "HUGEPAGE", pages.NOHUGEPAGE)  # the kernel then refuses to collapse as well
    monkeypatch.setattr(host_memory, "huge_page_setting", lambda: "never")
    with pytest.warns(RuntimeWarning, match="^EngramTable: 0 of 5,242,880 bytes came in huge pages") as caught:
        mapping = HostMapping(5 * MIB, FakeDriver())
    assert len(caught) == 1 and len(mapping.notes) == 1
    assert "transparent_hugepage/enabled says never" in mapping.notes[0] and "failed (EINVAL)" in mapping.notes[0]
    assert mapping.registered
    HostMapping(MIB, FakeDriver())  # not a huge page in it: nothing was missed


def test_pages_are_preferred_on_the_gpus_node(monkeypatch):
    """The one node of a small machine stands for the GPU's; a node that does not exist is a warning."""
    asked = HostMapping(5 * MIB, FakeDriver(node=0))
    assert (asked.node is None) == (pages.online_nodes() == 1)
    monkeypatch.setattr(host_memory, "online_nodes", lambda: 2)
    mapping = HostMapping(5 * MIB, FakeDriver(node=0))
    if mapping.node is None:  # a container may forbid it
        assert "refused to prefer the GPU's, 0 (EPERM)" in mapping.notes[0]
    else:
        assert mapping.node == 0 and mapping.pages.nodes()[0] == 5 * MIB
        with open("/proc/self/numa_maps") as lines:
            assert any(line.startswith(f"{mapping.bytes.data_ptr():x} prefer") for line in lines)
    with pytest.warns(RuntimeWarning, match="may lie on any NUMA node: the kernel refused to prefer") as caught:
        other = HostMapping(MIB, FakeDriver(node=1000))
    assert len(caught) == len(other.notes) == 1 and other.node is None and other.registered
    assert HostMapping(MIB, FakeDriver(node=None)).notes == []


def test_a_fork_keeps_memory_that_no_driver_holds():
    """Copied on write, as all memory: neither process sees what the other writes."""
    table = EngramTable.empty(1000, 64, "float32", placement="host")
    table.weight[7] = 1.0

    def child():
        read = float(table.weight[7].sum())
        table.weight[7] = 2.0
        table.close()
        return read, table.closed

    assert in_a_fork(child) == (64.0, True)
    assert float(table.weight[7].sum()) == 64.0


def test_a_fork_after_registration_is_refused_and_breaks_nothing(monkeypatch):
    """The range is not in the child. Using the table there is an error; closing it neither calls the driver nor unmaps
    what the child has mapped in that place since.
    """
    driver = FakeDriver()
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    table = EngramTable.empty(40_000, 64, "float32", placement="host")
    address, parent = table.weight.data_ptr(), os.getpid()

    def check(table):
        table.check_readable_on(torch.device("cpu"), "op")

    def child():
        nonlocal table
        assert not any(first <= address < end for first, end in mapped_ranges())
        refused = []
        for use in (EngramTable.weight.fget, EngramTable.memory_report, check):
            try:
                use(table)
            except ValueError as error:
                refused.append(str(error))
        pages._map(address, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10, -1, 0)
        table.close()
        del table
        gc.collect()
        return refused, driver.released, any(first <= address < end for first, end in mapped_ranges())

    refused, released, kept = in_a_fork(child)
    assert len(refused) == 3 and all(
        f"is a fork of {parent}, and host memory that a GPU reads is left out" in text for text in refused
    )
    assert "placement 'shared'" in refused[0] and released == [] and kept
    assert driver.held and not table.weight.any()
    table.close()
    assert not driver.held


@pytest.mark.parametrize(("text", "expected"), [("0\n", 1), ("0-3\n", 4), ("0-1,4,6-7\n", 5), (None, 1)])
def test_online_nodes(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(pages, "_NODES", tmp_path / "online")
    if text is not None:
        (tmp_path / "online").write_text(text)
    assert pages.online_nodes() == expected
