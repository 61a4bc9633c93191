"""How a GPU reaches host memory: by drivers of the kinds there are, and what is made of it."""

import ctypes
import types

import pytest
import torch

from engram_kernels import EngramTable, Prefetcher
from engram_kernels.ops.row_kernels.arguments import is_staged
from engram_kernels.ops.row_kernels.copy import rows_config
from engram_kernels.ops.row_kernels.order import choose_order
from engram_kernels.serving import prefetch
from engram_kernels.tables import placed
from engram_kernels.tables.memory import access, allocation, host
from engram_kernels.tables.memory.access import HostAccess, host_access
from engram_kernels.tables.memory.pages import HUGE_PAGE
from engram_kernels.tables.view import TableView, view_tables
from tests.ops.test_hashing import small_plan
from tests.support.gpu.drivers import FakeDriver

CARD, COHERENT, UNIFIED = HostAccess(), HostAccess("coherent", True), HostAccess("unified", True)
CPU = torch.device("cpu")


class Library:
    """A driver's library with some attributes; the ordinal of a device is not its handle."""

    def __init__(self, kind, attributes, error=0):
        self._kind, self._attributes, self._error, self.asked = kind, attributes, error, []
        name = "cuDeviceGetAttribute" if kind == "cuda" else "hipDeviceGetAttribute"
        setattr(self, name, self._attribute)
        if kind == "cuda":
            self.cuDeviceGet = self._device

    def _device(self, handle, ordinal):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_int))[0] = 70 + ordinal
        return self._error

    def _attribute(self, value, number, handle):
        assert handle.value == (72 if self._kind == "cuda" else 2)
        self.asked.append(number)
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = self._attributes.get(number, 0)
        return self._error


@pytest.fixture
def machine(monkeypatch):
    """A machine of one kind of GPU, number 2."""

    def of(kind, attributes=(), unified=False, error=0, found=True):
        library = Library(kind, dict(attributes), error)

        def load(name):
            if not found or name != access._LIBRARIES[kind][-1]:
                raise OSError(name)
            return library

        monkeypatch.setattr(access.ctypes, "CDLL", load)
        monkeypatch.setattr(torch.version, "hip", "7.0" if kind == "hip" else None)
        properties = types.SimpleNamespace(is_integrated=int(unified))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {2: properties}[index])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        host_access.cache_clear()
        return library

    yield of
    host_access.cache_clear()


@pytest.mark.parametrize(
    ("kind", "attributes", "unified", "expected"),
    [
        ("cuda", {}, False, CARD),
        ("cuda", {88: 1}, False, CARD),  # HMM: pages that fault and migrate
        ("cuda", {88: 1, 100: 1}, False, COHERENT),
        ("cuda", {100: 1}, False, CARD),
        ("cuda", {88: 1, 100: 1}, True, UNIFIED),
        ("cuda", {}, True, HostAccess("unified", False)),
        ("hip", {65: 1}, False, CARD),
        ("hip", {65: 1, 66: 1}, True, UNIFIED),
        ("hip", {}, True, HostAccess("unified", False)),  # XNACK is off
        ("hip", {88: 1, 100: 1}, False, CARD),
    ],
)
def test_what_a_driver_says(machine, kind, attributes, unified, expected):
    library = machine(kind, attributes, unified)
    assert host_access(2) == expected and host.RuntimeDriver().access() == expected
    asked = len(library.asked)
    assert host_access(2) == expected and len(library.asked) == asked, "asked once"


@pytest.mark.parametrize("how", [dict(error=1), dict(found=False)])
def test_a_driver_that_does_not_say_is_a_cards(machine, how):
    machine("cuda", {88: 1, 100: 1}, **how)
    assert host_access(2) == CARD


def test_a_library_without_the_call(machine):
    library = machine("cuda", {88: 1, 100: 1})
    del library.cuDeviceGetAttribute
    assert host_access(2) == CARD


def table(monkeypatch, reached, placement="host", rows=64):
    driver = FakeDriver(access=reached)
    monkeypatch.setattr(allocation, "_driver", lambda: driver)
    name = dict(name=f"access-{reached.link}") if placement == "shared" else {}
    return EngramTable.empty(rows, 32, "float32", placement=placement, **name), driver


@pytest.mark.parametrize("placement", ["host", "shared"])
@pytest.mark.parametrize("reached", [CARD, COHERENT, UNIFIED, HostAccess("unified", False)])
def test_registration_only_where_a_gpu_needs_it(monkeypatch, reached, placement):
    made, driver = table(monkeypatch, reached, placement)
    gpu = torch.device("cuda", 0)
    if placement == "shared":
        with pytest.raises(ValueError, match="need a registered .published. shared table"):
            made.check_readable_on(gpu, "lookup")
        made.publish()
    made.check_readable_on(gpu, "lookup")
    assert bool(driver.registered) is not reached.pageable
    report = made.memory_report()
    assert (report.chunks, report.link) == (0 if reached.pageable else 1, reached.link)
    words = "not registered, as the GPU reads all host memory" if reached.pageable else "registered in 1 chunk"
    assert f"{words}, link {reached.link}" in str(report)
    made.close()
    assert driver.held == {}
    with pytest.raises(ValueError, match="closed"):
        made.check_readable_on(gpu, "lookup")


def test_no_memory_of_a_gpu_reaches_a_fork(monkeypatch):
    made, _ = table(monkeypatch, COHERENT)
    monkeypatch.setattr(host.os, "getpid", lambda: -1)
    with pytest.raises(ValueError, match="is a fork of .* left out of forks"):
        made._mapping.check("lookup")
    monkeypatch.undo()
    made.close()


@pytest.mark.parametrize("reached, memory", [(CARD, "host"), (COHERENT, "coherent"), (UNIFIED, "device")])
def test_a_view_knows_the_link(monkeypatch, reached, memory):
    made, _ = table(monkeypatch, reached)
    view = view_tables((made,), CPU)
    assert (view.link, view.memory) == (reached.link, memory)
    on_cpu = EngramTable.empty(64, 32, "float32", placement="cpu")
    assert view_tables((on_cpu,), CPU).memory == "host"
    assert view_tables((on_cpu, made), CPU).link == reached.link
    made.close()


def view_of(link, page_bytes=HUGE_PAGE, table_bytes=94 << 30, placement="host"):
    return TableView(torch.zeros(2, 4, dtype=torch.int64), "e4m3_ue8m0", 256, placement, table_bytes, page_bytes, link)


@pytest.mark.parametrize(
    ("link", "page_bytes", "num_rows", "order"),
    [
        ("pcie", HUGE_PAGE, 16_384, "address"),
        ("coherent", HUGE_PAGE, 1 << 24, "head"),  # never sorted
        ("coherent", 65_536, 1 << 24, "head"),
        ("coherent", 4096, 36_863, "head"),
        ("coherent", 4096, 36_864, "address"),
        ("coherent", 4096, 2**31, "head"),
        ("coherent", HUGE_PAGE, 2048, "direct"),
        ("unified", 4096, 1 << 24, "direct"),
    ],
)
def test_the_order_goes_by_the_link(link, page_bytes, num_rows, order):
    assert choose_order(None, view_of(link, page_bytes), num_rows) == order
    assert choose_order(None, view_of(link, page_bytes, table_bytes=1 << 20), num_rows) == "direct"


def test_programs_go_by_the_link():
    """Bytes in flight: 4 KiB a program, on the multiprocessors of a GH200."""
    programs = {memory: rows_config(256, 1, 1 << 20, 132, memory).programs for memory in ("host", "coherent", "device")}
    assert programs == dict(host=132, coherent=264, device=1056)
    assert programs["host"] * 4096 > 72 << 10 and programs["coherent"] * 4096 // 2 > 490 << 10
    assert rows_config(256, 1, 40, 132, "coherent").programs == 3, "no more than there are steps"


@pytest.mark.parametrize("reached, programs", [(CARD, 66), (COHERENT, 120), (UNIFIED, 66)])
def test_a_prefetcher_leaves_the_others_to_the_model(monkeypatch, reached, programs):
    plan = small_plan(layers=1)
    made, _ = table(monkeypatch, reached, rows=plan.rows_per_layer[0])
    monkeypatch.setattr(prefetch, "processors", lambda device: 132)
    assert Prefetcher(plan, [made], 8)._options["programs"] == programs
    monkeypatch.setattr(prefetch, "processors", lambda device: 50)
    assert Prefetcher(plan, [made], 8)._options["programs"] == (50 if reached is COHERENT else 25)
    made.close()


def test_layers_go_apart_where_a_launch_costs_less_than_their_rows():
    assert [prefetch.layers_apart(1 << 20, memory) for memory in ("host", "coherent", "device")] == [True, False, False]
    assert prefetch.layers_apart(4 << 20, "coherent") and not prefetch.layers_apart(4 << 20, "device")


def test_mapped_rows_are_read_in_place_where_a_gpu_reads_all_memory(monkeypatch, tmp_path):
    """By the host's page tables, through small pages; rows that no kernel can load from where they lie are gathered."""
    with EngramTable.empty(64, 32, "e4m3_ue8m0", placement="cpu") as whole:
        whole.save_safetensors(tmp_path / "table.safetensors")
    gpu, cpu = torch.device("cuda", 2), torch.device("cpu")
    options = dict(placement="staged", mapped=True)
    with (
        EngramTable.from_safetensors(tmp_path / "table.safetensors", **options) as made,
        EngramTable.from_safetensors(tmp_path / "table.safetensors", memory_bytes=1 << 27, **options) as direct,
        EngramTable.from_tensors(torch.zeros(65 * 32 + 1, dtype=torch.uint8)[1:2049].view(64, 32).view(
            torch.float8_e4m3fn), 1.0, placement="staged") as crooked,
        EngramTable.empty(64, 32, "e4m3_ue8m0", placement="cpu") as other,
    ):  # fmt: skip
        for reached in (CARD, HostAccess("unified", False), COHERENT, UNIFIED):
            monkeypatch.setattr(placed, "host_access", {2: reached}.__getitem__)
            assert is_staged(made, gpu) is not reached.pageable and not is_staged(made, cpu)
            assert made.over_link(gpu) == ((made.nbytes, 4096, reached.link) if reached.pageable else (0, 0, "pcie"))
            assert is_staged(direct, gpu) and is_staged(crooked, gpu) and not is_staged(other, gpu)
            made.check_readable_on(gpu, "lookup")
