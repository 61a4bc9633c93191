"""scales="device": rows in host memory, their scales in GPU memory, equal bits.

Where there is no GPU a tensor of its own stands for GPU memory; what a kernel sees is another address either way.
"""

import pytest
import torch

from engram_kernels import EngramTable, hash_lookup, lookup
from engram_kernels.ops.row_kernels.output import make_view_out
from engram_kernels.tables.memory import allocation as table_memory
from engram_kernels.tables.memory import host
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of, wanted
from tests.ops.test_hashing import oracle, ragged, small_plan
from tests.ops.test_rows import ids_around
from tests.support.gpu.drivers import FakeDriver
from tests.support.launches import launch_lookup
from tests.support.processes.sharing import attach, made

ROWS = 301


@pytest.fixture
def stand_in(monkeypatch):
    """CPU memory for a GPU's, and a driver that keeps account."""
    driver = FakeDriver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    monkeypatch.setattr(table_memory, "_gpu", lambda: torch.device("cpu"))
    return driver


@pytest.mark.parametrize("name", ["e4m3_ue8m0", "nvfp4"])
def test_the_mapping_holds_rows_alone(stand_in, name):
    weight, scale = tables.random_parts(ROWS, 64, name)
    own = tables.own_scale_of(weight, scale)
    with EngramTable.from_tensors(weight, scale, placement="host", scales="device", **own) as table:
        assert [size for _, size in stand_in.registered] == [weight.nbytes]
        first, end = table.weight.data_ptr(), table.weight.data_ptr() + weight.nbytes
        assert not first <= table.scale.data_ptr() < end
        assert view_tables((table,), torch.device("cpu")).descriptors.tolist() == [
            [first, table.scale.data_ptr(), ROWS, table.descriptor.scale_bits]
        ]
        assert torch.equal(table.scale, scale) and "scales on the device" in repr(table)
        ids = ids_around(ROWS)
        expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.float32)
        assert tables.same_bits(lookup(table, ids, out_dtype=torch.float32), expected, truncated=False)
    assert not stand_in.held


def test_shared_scales_are_copied_when_all_are_there(stand_in, shared_name):
    """The file holds them for everyone; each process that asks has its own copy, the writer from publishing on."""
    with made(shared_name, scales="device") as table:
        shared = table.scale
        shared.copy_(torch.arange(6000).view(3000, 2) % 251)
        table.publish()
        assert table.scale.data_ptr() != shared.data_ptr() == table._mapping.bytes.data_ptr() + 192_512
        assert table.descriptor.scale_address == table.scale.data_ptr() and torch.equal(table.scale, shared)
        with attach(shared_name, scales="device") as reader, attach(shared_name) as plain:
            shared.zero_()
            assert reader.scale[-1].tolist() == [5998 % 251, 5999 % 251] and not plain.scale.any()


@pytest.mark.parametrize("scales", [None, "device"])
def test_no_copy_crosses_two_registrations(stand_in, monkeypatch, shared_name, scales):
    """One that does is an invalid value to the driver: rows in, scales in, scales to the GPU of writer and reader."""
    chunk, original, crossing = 40_960, torch.Tensor.copy_, []
    monkeypatch.setattr(host, "_CHUNK", chunk)
    weight, scale = tables.random_parts(3000, 64, "e4m3_ue8m0")

    def copy(target, source, *args, **options):
        for tensor in (target, source):
            for first, size in stand_in.held.items():
                begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
                if begin < first + size < end and first <= begin:
                    crossing.append((begin - first, end - first))
        return original(target, source, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with EngramTable.from_tensors(weight, scale, placement="host", scales=scales) as table:
        assert same_parts(table, weight, scale) and len(stand_in.held) > 4
    with EngramTable.from_tensors(weight, scale, placement="shared", name=shared_name, scales=scales) as table:
        assert same_parts(table, weight, scale)
        with attach(shared_name, scales=scales) as reader:
            assert same_parts(reader, weight, scale)
    assert not crossing


def same_parts(table, weight, scale):
    return torch.equal(table.weight.view(torch.uint8), weight.view(torch.uint8)) and torch.equal(table.scale, scale)


def test_out_of_device_memory_undoes_the_mapping(stand_in, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(table_memory, "_gpu", full)
    with pytest.raises(torch.OutOfMemoryError):
        EngramTable.empty(ROWS, 64, "e4m3_ue8m0", placement="host", scales="device")
    assert stand_in.registered and not stand_in.held


def test_where_it_makes_sense(monkeypatch):
    def make(name="e4m3_ue8m0", **options):
        return EngramTable.empty(ROWS, 64, name, **({"placement": "host", "scales": "device"} | options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^EngramTable.empty: scales='device' needs a GPU, and torch finds none"):
        make()
    with pytest.raises(ValueError, match=r"scales must be one of 'device' or None, got 'gpu'"):
        make(scales="gpu")
    for options, got in (
        ({"placement": "cpu"}, "e4m3_ue8m0 in 'cpu'"),
        ({"placement": "staged"}, "e4m3_ue8m0 in 'staged'"),
        ({"placement": "device"}, "e4m3_ue8m0 in 'device'"),
        ({"name": "e4m3"}, "e4m3 in 'host'"),
        ({"name": "bfloat16"}, "bfloat16 in 'host'"),
    ):
        with pytest.raises(
            ValueError, match=f"for formats with scales of groups .* in placement 'host' or 'shared', got {got}"
        ):
            make(**options)
    with pytest.raises(ValueError, match="^EngramTable.attach: scales='device' needs a GPU"):
        attach("x", scales="device")


def test_scales_elsewhere_decide_who_can_read():
    """Scales that lie on another device than the op's tensors (a meta tensor stands for one)."""
    table = EngramTable.empty(ROWS, 64, "e4m3_ue8m0", placement="host")
    moved = EngramTable(table.weight, table.scale.to("meta"), table.format, "host", table._mapping, "device")
    with pytest.raises(ValueError, match="^op: tensors on cpu need a table in CPU memory, with its scales, got"):
        moved.check_readable_on(torch.device("cpu"), "op")
    table._mapping.registration = type("Held", (), {"alive": True, "addresses": [], "close": lambda self: None})()
    with pytest.raises(
        ValueError, match="^op: tensors on cuda:0 need a table with its scales on cuda:0 or on the host"
    ):
        moved.check_readable_on(torch.device("cuda", 0), "op")
    table.check_readable_on(torch.device("cuda", 0), "op")


def apart(weight, scale, device):
    """A host table whose scales are on the device, or merely elsewhere where that is the CPU."""
    if device.type == "cuda":
        return EngramTable.from_tensors(weight, scale, placement="host", scales="device")
    table = EngramTable.from_tensors(weight, scale, placement="host")
    return EngramTable(table.weight, scale.clone(), table.format, "host", table._mapping, "device")


@pytest.mark.kernel
@pytest.mark.parametrize("width", [64, 256, 288])
def test_kernel_equal_bits(device, width):
    """Against the table with scales beside its rows: values and stored bytes."""
    weight, scale = tables.random_parts(ROWS, width, "e4m3_ue8m0")
    ids = ids_around(ROWS).to(device)
    plain, moved = tables.place(weight, scale, device, "host"), apart(weight, scale, device)
    results = []
    for table in (plain, moved):
        view = view_tables((table,), device)
        outs = [make_view_out(view, ids.shape, device, torch.float32, storage) for storage in (False, True)]
        for storage, out in enumerate(outs):
            launch_lookup(ids, view, out, bool(storage), None)
        results.append((outs[0], outs[1][0].view(torch.uint8), outs[1][1]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) and a.any()


@pytest.mark.kernel
def test_kernel_hash_lookup_of_both_kinds(device):
    plan = small_plan()
    parts = parts_of(plan, 64, "e4m3_ue8m0")
    placed = [apart(*parts[0], device), tables.place(*parts[1], device, "host")]
    ids, cu, history, dead = ragged()
    options = dict(cu_seqlens=cu.to(device), history=history.to(device), dead=dead.to(device))
    rows = hash_lookup(ids.to(device), plan.to(device), placed, out_dtype=torch.float32, **options)
    assert tables.same_bits(rows, wanted(parts, oracle(ids, plan, cu, history, dead), torch.float32), truncated=False)
