"""lookup: the reference against a scalar decoder, the kernel against both, in every format."""

import numpy as np
import pytest
import torch
import triton

from engram_kernels import EngramTable, lookup, reference
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.ops.row_kernels.copy import rows_config
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.inputs import ROW_CASES as CASES
from engram_kernels.testing.inputs import ROWS, ids_around
from engram_kernels.testing.oracles import e2m1_value, e4m3_value, ue8m0_value
from tests.conftest import recent
from tests.support.launches import launch_lookup


def truncating(dtype):
    return dtype == torch.bfloat16 and triton.knobs.runtime.interpret


@pytest.mark.parametrize(("name", "width"), CASES)
def test_reference_equals_oracle(name, width):
    weight, scale = tables.random_parts(ROWS, width, name)
    table, ids = tables.place(weight, scale, torch.device("cpu")), ids_around(ROWS)
    expected = tables.expected_values(weight, scale, ids)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = reference.lookup(table, ids, out_dtype=dtype)
        assert tables.same_bits(values, tables.rounded(expected, dtype), truncated=False)


@pytest.mark.parametrize(("name", "width"), CASES)
def test_reference_storage(name, width):
    weight, scale = tables.random_parts(ROWS, width, name)
    table, ids = tables.place(weight, scale, torch.device("cpu")), ids_around(ROWS)
    rows, scales = reference.lookup(table, ids, out_format="storage")
    assert rows.dtype == weight.dtype
    for place in np.ndindex(tuple(ids.shape)):
        row = int(ids[place])
        stored = weight.view(torch.uint8)[row] if 0 <= row < ROWS else torch.zeros_like(weight.view(torch.uint8)[0])
        assert torch.equal(rows.view(torch.uint8)[place], stored)
        if FORMATS[name].group:
            assert torch.equal(scales[place], scale[row] if 0 <= row < ROWS else torch.zeros_like(scale[0]))
    if name == "e4m3":
        assert scales.item() == pytest.approx(tables.TABLE_SCALE)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_are_read(name):
    """As of a step without tokens."""
    table = EngramTable.empty(ROWS, 32, name, placement="cpu")
    for shape in ((0,), (0, 4), (2, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        assert lookup(table, ids).shape == (*shape, 32)
        assert lookup(table, ids, out_format="storage")[0].shape == (*shape, table.format.row_items(32))


def test_every_e4m3_byte_and_every_scale():
    """All 256 x 256 products, float32 exact: 2^-136 is subnormal, 448 * 2^127 infinite, 255 and 0x7F are NaN."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    table = EngramTable.from_tensors(weight, scale, placement="cpu")
    ids = torch.arange(256)
    expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.float32)
    assert tables.same_bits(reference.lookup(table, ids, out_dtype=torch.float32), expected, truncated=False)


@pytest.mark.parametrize("name", ["bfloat16", "e4m3_ue8m0"])
def test_no_ids_give_no_rows(name):
    table, none = tables.cpu_table(ROWS, 64, name), torch.empty(0, 3, dtype=torch.int64)
    assert lookup(table, none).shape == (0, 3, 64)
    assert lookup(table, none, out_format="storage")[0].shape == (0, 3, 64)


def test_missing_row_is_zero_where_others_overflow():
    table = EngramTable.from_tensors(torch.full((2, 16), 448.0).to(torch.float8_e4m3fn), 3e38, placement="cpu")
    values = reference.lookup(table, torch.tensor([-1, 1]))
    assert values[0].eq(0).all() and values[1].isinf().all()


def test_float64_rows_are_read_by_the_reference():
    weight = torch.randn(5, 4, dtype=torch.float64)
    values = lookup(EngramTable.from_tensors(weight, placement="cpu"), torch.tensor([4, 0]))
    assert torch.equal(values, weight[[4, 0]])


def test_reference_is_differentiable_in_dense_rows():
    table = EngramTable.from_tensors(torch.randn(5, 4), placement="cpu")
    assert lookup(table, torch.tensor([[1, 2]]), out_dtype=torch.float16).dtype == torch.float16


def test_cpu_out_and_storage_out():
    weight, scale = tables.random_parts(ROWS, 64, "e4m3_ue8m0")
    table, ids = tables.place(weight, scale, torch.device("cpu")), ids_around(ROWS)
    out = torch.empty(5, 7, 64)
    assert lookup(table, ids, out=out, out_dtype=torch.float32) is out
    assert tables.same_bits(out, reference.lookup(table, ids, out_dtype=torch.float32), truncated=False)
    pair = torch.empty(5, 7, 64, dtype=torch.float8_e4m3fn), torch.empty(5, 7, 2, dtype=torch.uint8)
    assert lookup(table, ids, out=pair, out_format="storage") is pair
    assert torch.equal(pair[1], reference.lookup(table, ids, out_format="storage")[1])


@pytest.mark.kernel
@pytest.mark.parametrize(("name", "width"), CASES)
def test_kernel(device, name, width):
    weight, scale = tables.random_parts(ROWS, width, name)
    table, ids = tables.place(weight, scale, device), ids_around(ROWS)
    expected = tables.expected_values(weight, scale, ids)
    for dtype, programs in ((torch.float32, None), (torch.bfloat16, 1), (torch.float16, 3)):
        out = Guarded((*ids.shape, width), dtype, device)
        lookup(table, ids.to(device), out=out.tensor, out_dtype=dtype, programs=programs)
        assert tables.same_bits(out.check(), tables.rounded(expected, dtype), truncated=truncating(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize(("name", "width"), CASES)
def test_kernel_storage(device, name, width):
    weight, scale = tables.random_parts(ROWS, width, name)
    table, ids = tables.place(weight, scale, device), ids_around(ROWS, dtype=torch.int32)
    rows, scales = lookup(table, ids.to(device), out_format="storage")
    wanted_rows, wanted_scales = reference.lookup(
        tables.place(weight, scale, torch.device("cpu")), ids, out_format="storage"
    )
    assert torch.equal(rows.cpu().view(torch.uint8), wanted_rows.view(torch.uint8))
    assert (scales is None) == (wanted_scales is None)
    assert scales is None or torch.equal(scales.cpu(), wanted_scales)


@pytest.mark.kernel
def test_kernel_every_e4m3_byte_and_scale(device):
    """All 256 x 256 products, whether the target converts e4m3 or they are decoded from bits, rounded once."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    ids = torch.arange(256)
    exact, table = tables.expected_values(weight, scale, ids), tables.place(weight, scale, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = lookup(table, ids.to(device), out_dtype=dtype)
        assert tables.same_bits(values, tables.rounded(exact, dtype), truncated=truncating(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_kernel_every_e2m1_code_and_scale(device, name):
    """All 16 x 256 products at every place of a word and in every lane, signs of zeros included, rounded once."""
    fmt, places = FORMATS[name], torch.arange(256)
    codes = (places[None, :] + places[:, None]) % 16  # row s, whose scales are s; a group has each code
    weight = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scale = places.to(torch.uint8)[:, None].repeat(1, fmt.scale_bytes(256))
    value = [ue8m0_value, e4m3_value][fmt.group_scale == "e4m3"]
    factors = np.array([e2m1_value(code) for code in range(16)])[codes] * np.array([[value(s)] for s in range(256)])
    for own_scale in (0.37, 1e-40, 3e38) if fmt.table_scale else (None,):
        placement = "cpu" if device.type == "cpu" else "device"
        parts = weight.to(device), scale.to(device)
        table = EngramTable.from_tensors(*parts, own_scale=own_scale, placement=placement)
        exact = factors if own_scale is None else factors * float(np.float32(own_scale))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = lookup(table, places.to(device), out_dtype=dtype)
            expected = tables.rounded(exact, dtype)
            assert tables.same_bits(values, expected, truncated=truncating(dtype))
            assert tables.same_bits(
                reference.lookup(table, places.to(device), out_dtype=dtype), expected, truncated=False
            )
            zero = expected == 0
            assert torch.equal(torch.signbit(values.cpu())[zero], torch.signbit(expected)[zero])


@pytest.mark.kernel
def test_kernel_missing_row_is_zero_where_others_overflow(device):
    table = tables.place(torch.full((2, 16), 448.0).to(torch.float8_e4m3fn), 3e38, device)
    values = lookup(table, torch.tensor([-1, 1, 2], device=device))
    assert values[[0, 2]].eq(0).all() and values[1].isinf().all()


@pytest.mark.kernel
def test_kernel_strided_ids(device):
    """One layer of [T, L, C] ids, and every other id of a vector: views, read in place."""
    weight, scale = tables.random_parts(ROWS, 64, "bfloat16")
    table = tables.place(weight, scale, device)
    ids = torch.randint(0, ROWS, (9, 3, 5))
    assert torch.equal(lookup(table, ids.to(device)[:, 1]).cpu(), weight[ids[:, 1]])
    line = ids.view(-1)
    assert torch.equal(lookup(table, line.to(device)[1::2]).cpu(), weight[line[1::2]])


@pytest.mark.kernel
def test_kernel_programs_change_no_bit(device):
    weight, scale = tables.random_parts(ROWS, 256, "e4m3_ue8m0")
    table, ids = tables.place(weight, scale, device), ids_around(ROWS, (40, 3)).to(device)
    first = lookup(table, ids, out_dtype=torch.float32)
    for programs in (1, 2, 5, 1000):
        again = lookup(table, ids, out_dtype=torch.float32, programs=programs)
        assert tables.same_bits(again, first, truncated=False)
    alone = lookup(table, ids[17:18], out_dtype=torch.float32)
    assert tables.same_bits(alone, first[17:18], truncated=False)


@pytest.mark.kernel
def test_kernel_programs_is_the_size_of_the_grid(device):
    """No more than there are steps, of 32 rows here."""
    table = tables.place(*tables.random_parts(ROWS, 16, "bfloat16"), device)
    ids = torch.zeros(100, dtype=torch.int64, device=device)
    for programs, grid in ((1, 1), (3, 3), (50, 4), (None, 2 if device.type == "cpu" else 4)):
        lookup(table, ids, programs=programs)
        assert recent["lookup_kernel"]["grid"] == (grid,)


@pytest.mark.kernel
def test_kernel_row_beyond_2_36_bytes(device):
    """The last of 384,006,168 rows of 256 bytes: 32-bit arithmetic on ids, rows or bytes would read another one."""
    if device.type != "cpu":
        pytest.skip("needs 98 GB of registered memory; the benchmarks read such a table")
    rows = 384_006_168
    with EngramTable.empty(rows, 256, "e4m3_ue8m0", placement="host") as table:
        wanted = torch.arange(256, dtype=torch.uint8) % 120 + 1
        for row in (rows - 1, 2**31 // 256, 2**32 // 256, 1):
            table.weight[row] = (wanted + row % 5).view(torch.float8_e4m3fn)
            table.scale[row] = 127 + row % 3
        ids = torch.tensor([rows - 1, 2**31 // 256, 2**32 // 256, 1, 0, rows])
        out = torch.empty(6, 256, dtype=torch.float32)
        launch_lookup(ids[:, None], view_tables((table,), device), out, False, None)
        assert torch.equal(out, reference.lookup(table, ids, out_dtype=torch.float32))
        assert out[:4].ne(0).all() and out[4:].eq(0).all()


def test_rows_config_holds_its_reason():
    """A step of V4.1 is 16 rows of 256 B; no step is wider than 256 elements; a few rows start few programs."""
    config = rows_config(256, 1, 8192 * 24, 132, "host")
    assert (config.block_rows, config.chunk, config.programs) == (16, 256, 132)
    assert rows_config(256, 1, 8192 * 24, 132, "device").programs == 8 * 132
    assert rows_config(256, 1, 48, 132, "host").programs == 3
    for width in (4, 80, 160, 1024):
        config = rows_config(width, 2, 1000, 132, "device")
        assert config.chunk <= 256 and config.block_rows >= 4
