"""EngramTable: every format and placement, sharing and copying, closing, a table of full size, and every refusal."""

import gc
import math

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, lookup, reference
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.tables.memory.access import HostAccess
from engram_kernels.tables.view import view_tables
from engram_kernels.testing.oracles import e4m3_value, ue8m0_value

NAMES, OWN = [*FORMATS], {"nvfp4": dict(own_scale=0.25)}
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about memory that no driver holds, wherever they run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def raw(tensor):
    return tensor.view(torch.uint8)


def tensors_of(name, rows=6, width=64):
    """A weight of random bits and a scale, as ``from_tensors`` takes them for the format called ``name``."""
    fmt = FORMATS[name]
    sizes = fmt.row_bytes(width), fmt.scale_bytes(width)
    bits, scales = (torch.randint(0, 256, (rows, size), dtype=torch.uint8) for size in sizes)
    return bits.view(fmt.dtype), scales if fmt.group else 0.25 if fmt.table_scale else None


def memory():
    """(virtual, resident) bytes of this process."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return tuple(int(fields[name].split()[0]) << 10 for name in ("VmSize", "VmRSS"))


@pytest.mark.parametrize("placement", ["cpu", "host"])
@pytest.mark.parametrize("name", NAMES)
def test_empty(name, placement):
    table = EngramTable.empty(5, 64, name, placement=placement, scale=0.5)
    assert (table.rows, table.width, table.format.name, table.placement) == (5, 64, name, placement)
    fmt = FORMATS[name]
    assert table.weight.shape == (5, 32 if "fp4" in name else 64) and table.weight.dtype == fmt.dtype
    assert table.weight.is_contiguous() and table.weight.device.type == "cpu" and not table.closed
    scale_bytes = {"e4m3_ue8m0": 2, "mxfp4": 2, "nvfp4": 4}.get(name, 0)
    if scale_bytes:
        assert table.scale.shape == (5, scale_bytes) and table.scale.dtype == torch.uint8
    elif name == "e4m3":
        assert table.scale.shape == () and table.scale.dtype == torch.float32 and float(table.scale) == 0.5
    else:
        assert table.scale is None
    assert table.own_scale == (0.5 if name in ("e4m3", "nvfp4") else None)
    assert table.nbytes == 5 * (table.weight[0].numel() * fmt.dtype.itemsize + scale_bytes)
    assert table.default_out_dtype == (torch.bfloat16 if "e4m3" in name or "fp4" in name else fmt.dtype)
    if placement == "host":
        assert table.weight.data_ptr() % (2 << 20) == 0
        assert not raw(table.weight).any() and (scale_bytes == 0 or not table.scale.any())


@pytest.mark.parametrize("name", NAMES)
def test_from_tensors_shares_on_the_cpu_and_copies_to_the_host(name):
    weight, scale = tensors_of(name)
    shared = EngramTable.from_tensors(weight, scale, placement="cpu", **OWN.get(name, {}))
    copied = EngramTable.from_tensors(weight, scale, placement="host", **OWN.get(name, {}))
    for table in (shared, copied):
        assert (table.rows, table.width, table.format.name) == (6, 64, name)
        assert torch.equal(raw(table.weight), raw(weight))
    assert shared.weight.data_ptr() == weight.data_ptr() != copied.weight.data_ptr()
    if FORMATS[name].group:
        assert shared.scale.data_ptr() == scale.data_ptr() != copied.scale.data_ptr()
        assert torch.equal(shared.scale, scale) and torch.equal(copied.scale, scale)
    before = raw(weight).clone()
    raw(weight).fill_(1)
    assert (raw(shared.weight) == 1).all() and torch.equal(raw(copied.weight), before)


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_scales_of_groups_come_as_either_byte_type(placement):
    weight, scale = tensors_of("e4m3_ue8m0")
    for given in (scale, scale.view(E8M0)):
        table = EngramTable.from_tensors(weight, given, placement=placement)
        assert table.format.name == "e4m3_ue8m0"
        assert table.scale.dtype == torch.uint8 and torch.equal(table.scale, scale)


@pytest.mark.parametrize("placement", ["cpu", "host"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape, dtype", [(None, None), ((), "float32"), ((1,), "float64"), ((1, 1), "bfloat16")])
def test_one_scale_for_a_table_comes_as_number_or_tensor(shape, dtype, rows, placement):
    weight, _ = tensors_of("e4m3", rows)
    scale = 3.5 if shape is None else torch.full(shape, 3.5, dtype=getattr(torch, dtype))
    table = EngramTable.from_tensors(weight, scale, placement=placement)
    assert table.format.name == "e4m3"
    assert table.scale.dtype == torch.float32 and table.scale.shape == () and float(table.scale) == 3.5
    if isinstance(scale, torch.Tensor):
        scale.fill_(9)
        assert float(table.scale) == 3.5  # fixed at construction


def test_one_row_of_one_group_keeps_its_scale_byte():
    """One byte for one row of 32: as many elements as a table's own scale has, and no such thing."""
    weight, scale = tensors_of("e4m3_ue8m0", 1, 32)
    for given in (scale, scale.view(E8M0)):
        table = EngramTable.from_tensors(weight, given, placement="cpu")
        assert table.format.name == "e4m3_ue8m0" and torch.equal(table.scale, scale)


@pytest.mark.parametrize("placement", ["cpu", "host"])
@pytest.mark.parametrize("name", NAMES)
def test_both_lookups_read_what_was_given(name, placement):
    weight, scale = tensors_of(name)
    table = EngramTable.from_tensors(weight, scale, placement=placement, **OWN.get(name, {}))
    ids = torch.tensor([[5, 0], [-1, 3]])
    for function in (lookup, reference.lookup):
        rows, _ = function(table, ids, out_format="storage")
        assert torch.equal(raw(rows)[0, 0], raw(weight)[5]) and torch.equal(raw(rows)[1, 1], raw(weight)[3])
        assert not raw(rows)[1, 0].any()


def from_tensors(weight, scale=None, **options):
    return EngramTable.from_tensors(weight, scale, **({"placement": "cpu"} | options))


WIDE, BYTES = torch.zeros(6, 64, dtype=E4M3), torch.zeros(6, 2, dtype=torch.uint8)
SCALE = r"scale of a float8_e4m3fn weight must be one float, or uint8 or float8_e8m0fnu \[6, 2\], contiguous, got"


@pytest.mark.parametrize(
    "error, expected, arguments",
    [
        (TypeError, "weight must be a tensor, got list", ([[1.0]],)),
        (ValueError, r"weight must be a contiguous .* got shape \[64\]", (torch.zeros(64),)),
        (ValueError, r"weight must be a contiguous .* got shape \[2, 3, 4\]", (torch.zeros(2, 3, 4),)),
        (ValueError, r"weight must be a contiguous .* got shape \[0, 64\]", (torch.zeros(0, 64),)),
        (ValueError, "weight must be a contiguous", (torch.zeros(64, 6).T,)),
        (ValueError, "weight must be a contiguous", (torch.zeros(6, 128)[:, :64],)),
        (TypeError, "weight must be float32, .* or float64, got torch.int8", (torch.zeros(6, 64).char(),)),
        (TypeError, "weight must be float32, .* got torch.float8_e5m2", (WIDE.view(torch.float8_e5m2),)),
        (ValueError, "row width must be between 1 and 1024 elements, got 0", (torch.zeros(6, 0),)),
        (ValueError, "bytes of a row must be a multiple of 16, got 6 x float32 = 24", (torch.zeros(6, 6),)),
        (ValueError, "row width must be between 1 and 1024", (torch.zeros(2, 1028),)),
        (ValueError, "a torch.float32 weight takes no scale, got one", (torch.zeros(6, 64), 1.0)),
        (ValueError, "a torch.bfloat16 weight takes no scale", (torch.zeros(6, 64).bfloat16(), BYTES)),
        (ValueError, f"{SCALE} None", (WIDE,)),
        (ValueError, "scale must be a finite number or a tensor or None, got '1'", (WIDE, "1")),
        (ValueError, rf"{SCALE} torch.uint8 \[6, 1\]", (WIDE, BYTES[:, :1])),
        (ValueError, rf"{SCALE} torch.uint8 \[5, 2\]", (WIDE, BYTES[:5])),
        (ValueError, rf"{SCALE} torch.uint8 \[2, 6\]", (WIDE, BYTES.view(2, 6))),
        (ValueError, rf"{SCALE} torch.uint8 \[6, 2\]", (WIDE, torch.zeros(2, 6, dtype=torch.uint8).T)),
        (ValueError, rf"{SCALE} torch.float32 \[6, 2\]", (WIDE, BYTES.float())),
        (ValueError, rf"{SCALE} torch.float32 \[6\]", (WIDE, torch.zeros(6))),
        # One byte is not one float: reading 127 as a scale of 127.0 would be silent.
        (ValueError, rf"{SCALE} torch.uint8 \[1, 1\]", (WIDE, BYTES[:1, :1])),
        (ValueError, rf"{SCALE} torch.float8_e8m0fnu \[1\]", (WIDE, BYTES[0, :1].view(E8M0))),
        (ValueError, "e4m3_ue8m0 needs a row width divisible by 32, got 48",
         (torch.zeros(6, 48, dtype=E4M3), BYTES[:, :1].clone())),
        (ValueError, "placement 'cpu' needs a weight on the CPU, got meta", (torch.zeros(6, 64, device="meta"),)),
    ],
)  # fmt: skip
def test_from_tensors_refuses(error, expected, arguments):
    with pytest.raises(error, match=f"^EngramTable.from_tensors: {expected}"):
        from_tensors(*arguments)


@pytest.mark.parametrize(
    "expected, changes",
    [
        ("format must be one of .float32., .* got 'int8'", {"format": "int8"}),
        ("rows must be a positive int, got 0", {"rows": 0}),
        ("rows must be a positive int, got -1", {"rows": -1}),
        ("bytes of a row must be a multiple of 16, got 10 x bfloat16 = 20", {"width": 10}),
        ("e4m3_ue8m0 needs a row width divisible by 32, got 16", {"width": 16, "format": "e4m3_ue8m0"}),
        ("width must be a positive int of at most 1024, got 0", {"width": 0}),
    ],
)
def test_empty_refuses(expected, changes):
    with pytest.raises(ValueError, match=f"^EngramTable.empty: {expected}"):
        EngramTable.empty(**({"rows": 6, "width": 64, "format": "bfloat16", "placement": "cpu"} | changes))


@pytest.mark.parametrize(
    "make", [lambda **o: EngramTable.empty(6, 64, "bfloat16", **o), lambda **o: from_tensors(torch.zeros(6, 64), **o)]
)
def test_placements_are_checked(make):
    with pytest.raises(ValueError, match="placement must be one of .device., .host., .*, .cpu., got 'pinned'"):
        make(placement="pinned")
    with pytest.raises(ValueError, match="placement 'device' needs a GPU, and torch finds none"):
        make(placement="device")
    for placement in ("cpu", "host"):
        with pytest.raises(ValueError, match=f"device is for placement 'device', got cuda:0 with '{placement}'"):
            make(placement=placement, device="cuda:0")


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_a_closed_table_refuses_every_use(placement):
    table = EngramTable.empty(6, 64, "e4m3_ue8m0", placement=placement)
    ids = torch.tensor([0])
    table.close()
    assert table.closed
    table.close()
    uses = [
        lambda: table.weight,
        lambda: table.scale,
        lambda: lookup(table, ids),
        lambda: reference.lookup(table, ids),
        lambda: table.discard(),
        lambda: table.check_readable_on(torch.device("cpu"), "op"),
        lambda: table.check_readable_on(torch.device("cuda", 0), "op"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="the table is closed"):
            use()
    assert repr(table) == f"EngramTable(6 x 64 e4m3_ue8m0, {placement}, closed)"


def test_a_table_closes_at_the_end_of_its_context():
    with EngramTable.empty(6, 64, "float32", placement="host") as table:
        assert not table.closed
    assert table.closed
    with pytest.raises(KeyError), EngramTable.empty(6, 64, "float32", placement="host") as table:
        raise KeyError
    assert table.closed


def test_closing_leaves_tensors_that_were_shared():
    weight, _ = tensors_of("float32")
    kept = weight.clone()
    EngramTable.from_tensors(weight, placement="cpu").close()
    assert torch.equal(raw(weight), raw(kept))


V41 = (384_006_168, 256, "e4m3_ue8m0")


def test_a_full_size_host_table_costs_only_what_is_written():
    gc.collect()
    virtual, resident = memory()
    table = EngramTable.empty(*V41, placement="host")
    assert repr(table) == "EngramTable(384,006,168 x 256 e4m3_ue8m0, host, 94.42 GiB)"
    size, used = memory()
    # Exact: a power of two would be 128 GiB for the rows and 4 GiB for the scales.
    assert 0 <= size - virtual - table.nbytes < 64 << 20
    assert used - resident < 8 << 20

    last = table.rows - 1
    assert last * 256 > 2**36
    pattern = torch.arange(256, dtype=torch.uint8)
    scales = torch.tensor([0, 1, 120, 127, 128, 134, 254, 255], dtype=torch.uint8)
    raw(table.weight)[last], table.scale[last] = pattern, scales
    # Where a 32-bit product of row and width, or of row and 8, would have ended up.
    for alias in (last * 256 % 2**31 // 256, last * 256 % 2**32 // 256, last * 8 % 2**31 // 8):
        assert alias != last and not raw(table.weight)[alias].any()
    assert memory()[1] - used < 8 << 20

    expected = np.array([e4m3_value(b) * ue8m0_value(int(scales[b // 32])) for b in range(256)])
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)  # each product is exact in float64
    ids = torch.tensor([last, last - 1, last + 1], dtype=torch.int32)
    for function in (lookup, reference.lookup):
        values = function(table, ids, out_dtype=torch.float32).numpy()
        np.testing.assert_array_equal(values[0], expected)
        assert not values[1:].any()
        stored, stored_scales = function(table, ids, out_format="storage")
        assert torch.equal(raw(stored)[0], pattern) and torch.equal(stored_scales[0], scales)
    table.close()
    gc.collect()
    assert abs(memory()[0] - virtual) < 64 << 20


def test_discard_gives_pages_back_and_rows_read_zero():
    table = EngramTable.empty(1 << 18, 64, "e4m3_ue8m0", placement="host")
    resident = memory()[1]
    raw(table.weight).fill_(0x38)  # 16 MiB
    table.scale.fill_(127)
    assert torch.equal(lookup(table, torch.tensor([7]), out_dtype=torch.float32), torch.ones(1, 64))
    written = memory()[1]
    assert written - resident > 15 << 20
    table.discard()
    assert written - memory()[1] > 15 << 20
    assert not lookup(table, torch.tensor([7, table.rows - 1]), out_dtype=torch.float32).any()
    raw(table.weight)[3] = 0x38  # the table is as good as new
    table.scale[3] = 128
    assert torch.equal(lookup(table, torch.tensor([3]), out_dtype=torch.float32), torch.full((1, 64), 2.0))


def test_discard_is_for_host_tables():
    with pytest.raises(ValueError, match="EngramTable.discard: only placement 'host' can give pages back, got 'cpu'"):
        from_tensors(torch.zeros(6, 64)).discard()


class Driver:
    held = set()

    def register(self, address, nbytes):
        self.held.add(address)

    def unregister(self, address):
        self.held.remove(address)

    numa_node = staticmethod(lambda: None)
    access = staticmethod(HostAccess)


def test_a_gpu_reads_only_registered_host_tables(monkeypatch):
    gpu = torch.device("cuda", 0)
    host, cpu = EngramTable.empty(6, 64, "e4m3_ue8m0", placement="host"), from_tensors(torch.zeros(6, 64))
    for table in (host, cpu):
        table.check_readable_on(torch.device("cpu"), "op")
    with pytest.raises(ValueError, match=r"^op: tensors on cuda:0 need a registered host table, got .*host.* on cpu$"):
        host.check_readable_on(gpu, "op")
    with pytest.raises(
        ValueError, match="^op: tensors on cuda:0 need a table on cuda:0 or a registered host table, got"
    ):
        cpu.check_readable_on(gpu, "op")
    monkeypatch.setattr("engram_kernels.tables.memory.allocation.RuntimeDriver", Driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with EngramTable.empty(6, 64, "e4m3_ue8m0", placement="host") as registered:
        registered.check_readable_on(gpu, "op")
        registered.check_readable_on(torch.device("cuda", 1), "op")  # portable: any GPU of the process
        registered.check_readable_on(torch.device("cpu"), "op")
        with pytest.raises(ValueError, match="the driver holds the pages"):
            registered.discard()
        assert len(Driver.held) == 1  # rows and scales in one range
        kept = registered.weight
    assert not Driver.held  # though a view of the rows is still there
    assert not raw(kept).any()


@pytest.mark.parametrize(
    "table, expected",
    [
        (lambda: EngramTable.empty(1234, 64, "float32", placement="cpu"), "1,234 x 64 float32, cpu, 315,904 bytes"),
        (lambda: EngramTable.empty(2**23, 64, "bfloat16", placement="host"), "8,388,608 x 64 bfloat16, host, 1.00 GiB"),
        (lambda: from_tensors(*tensors_of("e4m3")), "6 x 64 e4m3, cpu, 384 bytes"),
    ],
)  # fmt: skip
def test_repr(table, expected):
    assert repr(table()) == f"EngramTable({expected})"


def test_descriptors_hold_addresses_rows_and_scale_bits():
    tables = [from_tensors(*tensors_of("e4m3")), from_tensors(tensors_of("e4m3")[0], math.pi)]
    lines = view_tables(tables, torch.device("cpu")).descriptors
    assert lines.dtype == torch.int64
    for line, table, scale in zip(lines.tolist(), tables, (0.25, math.pi), strict=True):
        assert line == [table.weight.data_ptr(), 0, 6, int(np.float32(scale).view(np.int32))]
    group = from_tensors(*tensors_of("e4m3_ue8m0"))
    (line,) = view_tables([group], torch.device("cpu")).descriptors.tolist()
    assert line == [group.weight.data_ptr(), group.scale.data_ptr(), 6, 0]
    # Kept for the same tables, by value: a table closed and made anew elsewhere is another one.
    assert view_tables(tables, torch.device("cpu")).descriptors is lines
    assert view_tables([tables[0], group], torch.device("cpu")).descriptors is not lines


BAD_SCALES = {0.0: "0.0", -1.0: "-1.0", float("nan"): "nan", float("inf"): "inf"}
BAD_SCALES |= {1e300: "1e[+]300, which is inf in float32", 1e-300: "1e-300, which is 0.0 in float32"}


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_a_scale_that_no_file_could_hold_is_refused_where_it_comes_in(scale):
    weight, _ = tensors_of("e4m3")
    expected = f"(the table's scale must be a positive|scale must be a finite) number.*, got {BAD_SCALES[scale]}$"
    with pytest.raises(ValueError, match="^EngramTable.from_tensors: scale (of a float8_e4m3fn weight )?must be"):
        EngramTable.from_tensors(weight, True, placement="cpu")
    for given in (scale, torch.tensor([scale], dtype=torch.float64)):
        with pytest.raises(ValueError, match=f"^EngramTable.from_tensors: {expected}"):
            EngramTable.from_tensors(weight, given, placement="cpu")
    with pytest.raises(ValueError, match=f"^EngramTable.empty: {expected}"):
        EngramTable.empty(4, 64, "e4m3", placement="cpu", scale=scale)
    with pytest.raises(ValueError, match=f"^EngramTable.attach: {expected}"):
        EngramTable.attach("nobody", 4, 64, "e4m3", scale=scale)
    if math.isfinite(scale):  # where none is used
        assert EngramTable.empty(4, 64, "bfloat16", placement="cpu", scale=scale).scale is None


def test_tensors_on_the_meta_device_are_refused():
    weight, scale = tensors_of("e4m3_ue8m0")
    expected = "must hold numbers, and a tensor on the meta device has none$"
    with pytest.raises(ValueError, match=f"^EngramTable.from_tensors: weight {expected}"):
        EngramTable.from_tensors(weight.to("meta"), scale, placement="host")
    for placement in ("cpu", "host"):
        with pytest.raises(ValueError, match=f"^EngramTable.from_tensors: scale {expected}"):
            EngramTable.from_tensors(weight, scale.to("meta"), placement=placement)


def test_a_table_scale_is_on_the_cpu_whatever_the_default_device():
    weight, _ = tensors_of("e4m3")
    with torch.device("meta"):
        for placement in ("cpu", "host", "staged"):
            assert EngramTable.from_tensors(weight, 0.5, placement=placement).scale.item() == 0.5
            assert EngramTable.empty(4, 64, "e4m3", placement=placement, scale=0.5).scale.item() == 0.5
