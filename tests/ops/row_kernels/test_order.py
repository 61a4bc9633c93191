"""Read orders: the choice, equal bits in every order and format, and how often a row is read from the table."""

import contextlib

import numpy as np
import pytest
import torch
import triton

from engram_kernels import EngramTable, HashPlan, hash_lookup, lookup, reference
from engram_kernels.launching import dependent
from engram_kernels.ops.hash_kernels import row_ids
from engram_kernels.ops.row_kernels import by_id
from engram_kernels.ops.row_kernels import copy as row_copy
from engram_kernels.ops.row_kernels import order as read_order_file
from engram_kernels.ops.row_kernels.order import (
    ORDERS,
    check_order,
    choose_order,
    copy_config,
    key_range,
    read_order,
    scale_words,
)
from engram_kernels.tables.memory.pages import HUGE_PAGE
from engram_kernels.tables.view import TableView, view_tables
from engram_kernels.testing import tables
from engram_kernels.testing.guards import Guarded
from tests.ops.test_hash_rows import parts_of, wanted
from tests.ops.test_hashing import oracle, ragged, small_plan
from tests.ops.test_rows import truncating
from tests.support.launches import launch_hash_lookup, launch_lookup

CPU = torch.device("cpu")
V41_LAYER = 384_006_168 * 264


@pytest.mark.parametrize(
    ("num_rows", "table_bytes", "page_bytes", "placement", "order"),
    [
        (48, V41_LAYER, HUGE_PAGE, "host", "direct"),
        (2048, V41_LAYER, HUGE_PAGE, "host", "direct"),
        (2049, V41_LAYER, HUGE_PAGE, "host", "head"),
        (16_383, V41_LAYER, HUGE_PAGE, "shared", "head"),
        (16_384, V41_LAYER, HUGE_PAGE, "shared", "address"),
        (393_216, V41_LAYER, HUGE_PAGE, "host", "address"),
        (2**31 - 1, V41_LAYER, HUGE_PAGE, "host", "address"),
        (2**31, V41_LAYER, HUGE_PAGE, "host", "head"),
        (393_216, 1 << 30, HUGE_PAGE, "host", "direct"),  # within reach of the translation caches
        (393_216, 1 << 30, 4096, "host", "address"),  # not in small pages
        (1638, V41_LAYER, 4096, "host", "address"),
        (1637, V41_LAYER, 4096, "host", "direct"),
        (393_216, V41_LAYER, HUGE_PAGE, "device", "direct"),
        (393_216, V41_LAYER, HUGE_PAGE, "staged", "direct"),
        (393_216, V41_LAYER, HUGE_PAGE, "cpu", "direct"),
    ],
)
def test_choice(num_rows, table_bytes, page_bytes, placement, order):
    assert read_order(num_rows, table_bytes, page_bytes, placement) == order


def test_choice_for_tables():
    """The largest table on the host decides, unless an order is asked for."""
    small = EngramTable.from_tensors(torch.zeros(64, 16), placement="cpu")
    with EngramTable.empty(1 << 25, 32, "e4m3_ue8m0", placement="host") as large:
        assert large.nbytes > 1 << 30
        both, one = view_tables((small, large), CPU), view_tables((small,), CPU)
        assert choose_order(None, both, 100_000) == "address"
        assert choose_order(None, one, 100_000) == "direct"
        assert choose_order("head", both, 1) == "head"


def test_more_rows_than_a_sort_takes():
    check_order("lookup", "address", 2**31 - 1)
    check_order("lookup", "head", 2**31)
    with pytest.raises(ValueError, match="lookup: order 'address' sorts fewer than 2.31 rows, got 2147483648"):
        check_order("lookup", "address", 2**31)


def test_keys():
    """Both layers of V4.1 fit into int32. The last row of a layer is below what is missing in the next."""
    assert key_range(2, 384_016_682) == (torch.int32, 384_016_683)
    assert key_range(1, 2**31 - 1)[0] == torch.int32
    assert key_range(1, 2**31)[0] == key_range(6, 384_016_682)[0] == torch.int64
    stride = key_range(2, 100)[1]
    assert 0 * stride + 99 < 1 * stride - 1 < 1 * stride + 0


def test_copy_config_holds_its_reason():
    assert copy_config(256, 2) == copy_config(256, 1) and copy_config(256, 2).block_rows == 16
    assert copy_config(1024, 4).block_rows * copy_config(1024, 4).chunk * 4 == 8192


def test_scales_as_words():
    for groups, dtype in ((8, torch.int64), (32, torch.int64), (4, torch.int32), (2, torch.int16), (9, torch.uint8)):
        scales = torch.arange(3 * groups, dtype=torch.uint8).view(3, groups)
        words = scale_words(scales)
        assert words.dtype == dtype and torch.equal(words.view(torch.uint8), scales)
    shifted = torch.zeros(32, dtype=torch.uint8)[4:28].view(3, 8)
    assert scale_words(shifted).dtype == torch.int32, "its address is no multiple of 8"


def test_orders_on_the_cpu():
    weight, scale = tables.random_parts(23, 64, "e4m3_ue8m0")
    table, ids = tables.place(weight, scale, CPU), torch.randint(-1, 23, (5, 4))
    results = [lookup(table, ids, order=order, out_dtype=torch.float32) for order in (None, *ORDERS)]
    assert all(tables.same_bits(result, results[0], truncated=False) for result in results)


def test_sorting_waits_for_nothing(monkeypatch):
    """On tensors without values, of which nothing can read one: sizes and launches follow from shapes alone."""
    launched = []

    class Kernel:
        def __init__(self, name, kernel):
            self.name, self.arg_names = name, kernel.arg_names

        def run(self, *_, grid, **__):
            launched.append((self.name, grid))

        def __getitem__(self, grid):
            return lambda *_, **__: self.run(grid=grid)

    for module in (row_ids, by_id, read_order_file):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name, getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(by_id, "processors", lambda _: 100)
    monkeypatch.setattr(dependent, "chosen", False)  # or a GPU would be asked
    monkeypatch.setattr(row_copy, "converts_e4m3", lambda storage: True)
    plan = small_plan()
    ids = torch.empty(50, dtype=torch.int64, device="meta")
    view = TableView(torch.empty(2, 4, dtype=torch.int64, device="meta"), "e4m3_ue8m0", 256, "host")
    out = torch.empty(2, 50, 4, 256, dtype=torch.bfloat16, device="meta")
    launch_hash_lookup(ids, plan.to("meta"), view, None, None, None, out, False, None, "address")
    # 200 rows a layer in 13 steps of 16, and 400 entries in 25.
    lookups = [("lookup_kernel", (13,))] * 2
    assert launched == [("ngram_hash_kernel", (4, 1)), *lookups, ("copy_duplicates_kernel", (25,))]


def repeated_ids(rows, shape=(19, 4), dtype=torch.int64):
    """Runs of one entry, of several, of more than two steps, of missing rows, and ids outside the table."""
    ids = torch.randint(0, rows, shape, dtype=dtype)
    flat = ids.view(-1)
    flat[5:40] = 7
    flat[40:52] = -1
    flat[52:56] = torch.tensor([rows, rows + 5, rows, -9], dtype=dtype)
    return ids[torch.randperm(shape[0])]


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["head", "address"])
@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [
        ("e4m3_ue8m0", 256, torch.bfloat16),
        ("e4m3_ue8m0", 288, torch.float32),
        ("e4m3", 16, torch.float16),
        ("bfloat16", 80, torch.bfloat16),
        ("float32", 4, torch.float32),
    ],
)
def test_kernel(device, order, name, width, dtype):
    weight, scale = tables.random_parts(23, width, name)
    table, ids = tables.place(weight, scale, device), repeated_ids(23)
    expected = tables.rounded(tables.expected_values(weight, scale, ids), dtype)
    for programs in (None, 3):
        out = Guarded((*ids.shape, width), dtype, device)
        lookup(table, ids.to(device), out=out.tensor, out_dtype=dtype, programs=programs, order=order)
        assert tables.same_bits(out.check(), expected, truncated=truncating(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["head", "address"])
@pytest.mark.parametrize(("name", "width"), [("e4m3_ue8m0", 256), ("e4m3_ue8m0", 160), ("e4m3", 32), ("nvfp4", 160)])
def test_kernel_storage(device, order, name, width):
    weight, scale = tables.random_parts(23, width, name)
    table, ids = tables.place(weight, scale, device), repeated_ids(23, dtype=torch.int32)
    fmt = table.format
    rows = Guarded((*ids.shape, fmt.row_bytes(width)), torch.uint8, device)
    scales = Guarded((*ids.shape, fmt.scale_bytes(width)), torch.uint8, device) if fmt.group else None
    pair = rows.tensor.view(fmt.dtype), None if scales is None else scales.tensor
    lookup(table, ids.to(device), out=pair, out_format="storage", order=order)
    wanted_rows, wanted_scales = reference.lookup(tables.place(weight, scale, CPU), ids, out_format="storage")
    assert torch.equal(rows.check().cpu(), wanted_rows.view(torch.uint8))
    assert scales is None or torch.equal(scales.check().cpu(), wanted_scales)


@pytest.mark.kernel
def test_kernel_strided_ids_and_lengths(device):
    """Views of ids, one column, one token, and numbers of entries around a step."""
    weight, _ = tables.random_parts(23, 8, "float32")
    table, ids = tables.place(weight, None, device), torch.randint(0, 23, (17, 3, 5))
    views = [ids[:, 1], ids[:, :, 2], ids.view(-1)[1::2], ids[:1, 0], ids[:0], ids]
    views += [torch.zeros(count, dtype=torch.int64) for count in (1, 15, 16, 17, 32)]
    for view in views:
        for order in ("head", "address"):
            values = lookup(table, view.to(device), order=order)
            assert torch.equal(values.cpu(), weight[view]), (view.shape, order)
    assert torch.equal(lookup(table, ids.to(device)[:, 1], order="address").cpu(), weight[ids[:, 1]])


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["head", "address"])
@pytest.mark.parametrize(
    ("name", "width", "dialect"), [("e4m3_ue8m0", 96, "map"), ("bfloat16", 80, "eos"), ("nvfp4", 96, "map")]
)
def test_kernel_hash_lookup(device, order, name, width, dialect):
    plan = small_plan(dialect=dialect)
    parts = parts_of(plan, width, name)
    placed = [tables.place(*part, device) for part in parts]
    ids, cu, history, dead = ragged(invalid=True)
    expected_ids = oracle(ids, plan, cu, history, dead)
    moved = [x.to(device) for x in (ids, cu, history, dead)]
    for programs in (None, 1):
        out = Guarded((2, 19, 4, width), torch.float32, device)
        view = view_tables(placed, device)
        launch_hash_lookup(moved[0], plan.to(device), view, *moved[1:], out.tensor, False, programs, order)
        assert tables.same_bits(out.check(), wanted(parts, expected_ids, torch.float32), truncated=False)


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["head", "address"])
def test_kernel_hash_lookup_storage_and_batch(device, order):
    """Three layers that hash alike, so that equal rows of different layers must be told apart; ids [B, S]."""
    plan = HashPlan.from_parts(torch.tensor([[3, 5]] * 3), torch.tensor([[11, 7]] * 3), pad=0, vocab_size=40)
    parts = parts_of(plan, 64, "e4m3_ue8m0")
    placed = [tables.place(*part, device) for part in parts]
    ids = torch.randint(0, 40, (3, 7))
    rows, scales = hash_lookup(ids.to(device), plan.to(device), placed, out_format="storage", order=order)
    cpu = [tables.place(*part, CPU) for part in parts]
    wanted_rows, wanted_scales = reference.hash_lookup(ids, plan, cpu, out_format="storage")
    assert torch.equal(rows.cpu().view(torch.uint8), wanted_rows.view(torch.uint8))
    assert torch.equal(scales.cpu(), wanted_scales)


@pytest.mark.kernel
def test_kernel_keys_beyond_2_31(device):
    """Two layers of 2^31 - 100 rows: keys of the second do not fit into int32, and rows do not wrap."""
    if device.type != "cpu":
        pytest.skip("needs 69 GB of registered memory")
    plan = HashPlan.from_parts(
        torch.tensor([[3, 2**40 + 1]] * 2), torch.tensor([[2**30 - 35, 2**30 - 65]] * 2), pad=0, vocab_size=50
    )
    assert plan.index_dtype == torch.int32 and key_range(2, max(plan.rows_per_layer))[0] == torch.int64
    ids = torch.randint(0, 50, (5,))
    row_ids = reference.ngram_hash(ids, plan)
    assert int(row_ids.max()) > 2**30
    with contextlib.ExitStack() as stack:
        placed = [
            stack.enter_context(EngramTable.empty(rows, 4, "float32", placement="host")) for rows in plan.rows_per_layer
        ]
        for layer, table in enumerate(placed):
            table.weight[row_ids[:, layer].flatten().long()] = torch.randn(10, 4)
        expected = reference.hash_lookup(ids, plan, placed)
        assert expected.ne(0).all()
        assert torch.equal(hash_lookup(ids, plan, placed, order="address"), expected)


@contextlib.contextmanager
def counted_bytes(tensor):
    """In the interpreter: how often each byte of ``tensor`` is read by kernels within the context."""
    from triton.runtime.interpreter import InterpreterBuilder

    original, begin = InterpreterBuilder.create_masked_load, tensor.data_ptr()
    counts = np.zeros(tensor.numel() * tensor.element_size(), dtype=np.int64)

    def create_masked_load(self, ptrs, mask, *rest, **options):
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        first = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.int64) - begin
        for at in first[(first >= 0) & (first < len(counts))]:
            counts[at : at + size] += 1
        return original(self, ptrs, mask, *rest, **options)

    InterpreterBuilder.create_masked_load = create_masked_load
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = original


@pytest.mark.kernel
def test_kernel_reads_each_distinct_row_once(device):
    """Rows and scales, byte for byte: once in address order, as often as asked for in the others."""
    if device.type != "cpu" or not triton.knobs.runtime.interpret:
        pytest.skip("reads are counted in the interpreter")
    weight, scale = tables.random_parts(23, 64, "e4m3_ue8m0")
    table, ids = tables.place(weight, scale, device), repeated_ids(23)
    asked = torch.bincount(ids[(ids >= 0) & (ids < 23)], minlength=23).numpy()
    assert asked.max() > 32 and (asked == 1).any()
    for order, times in (("direct", asked), ("head", asked), ("address", np.minimum(asked, 1))):
        with counted_bytes(table.weight) as rows, counted_bytes(table.scale) as scales:
            out = torch.empty(*ids.shape, 64)
            launch_lookup(ids, view_tables((table,), device), out, False, 2, order)
        assert np.array_equal(rows, times.repeat(64)), order
        # One word holds both scale bytes of a row.
        assert np.array_equal(scales, times.repeat(2)), order
