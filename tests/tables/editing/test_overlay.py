"""Overlays: exact on every way to read a table, and what is refused."""

import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, Prefetcher, RowAdagrad, RowSinkhorn, hash_lookup, lookup
from engram_kernels.checkpoints.encoding import encode_rows
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.testing import tables
from tests.cache.test_lookup import Pair
from tests.ops.test_hashing import small_plan
from tests.serving.test_prefetch import setting
from tests.support.gpu.fake_streams import FakeStreams
from tests.support.gpu.ordering import ordered_by

ROWS, WIDTH = 40, 32
GUIDE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def table_of(form="e4m3_ue8m0", placement="cpu", rows=ROWS, width=WIDTH, **options):
    return tables.cpu_table(rows, width, form, placement=placement, **options)


def bits(table):
    """Copies of the bytes of all rows and scales of groups."""
    scales = table.scale.clone() if table.format.group else torch.zeros(0)
    return table.weight.view(torch.uint8).clone(), scales


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def edits(name="e4m3_ue8m0", count=5, width=WIDTH, rows=ROWS):
    """(ids, rows as stored, scales or None)."""
    weight, scale = tables.random_parts(count, width, name, seed=3)
    return torch.randperm(rows)[:count], weight, scale if isinstance(scale, torch.Tensor) else None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("placement", ["cpu", "host", "staged", "shared"])
def test_stored_rows_come_and_go_bit_for_bit(name, placement, shared_name):
    table = table_of(name, placement, **({"name": shared_name} if placement == "shared" else {}))
    before, (ids, rows, scales) = bits(table), edits(name)
    expected = [part.clone() for part in before]
    expected[0][ids] = rows.view(torch.uint8)
    if scales is not None:
        expected[1][ids] = scales
    version = table.version
    overlay = table.overlay(ids.int(), rows, scales)
    assert overlay.applied and table.overlays == [overlay] and table.version > version
    assert same(bits(table), expected)
    rows.view(torch.uint8).zero_()  # the caller's own since
    version = table.version
    overlay.remove()
    assert same(bits(table), before) and table.version > version and not table.overlays
    assert same(bits(table), before) and same(bits(overlay.apply().table), expected)
    overlay.remove()
    table.close()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_encoded_as_a_conversion_does(name, dtype):
    table, ids = table_of(name), torch.tensor([7, 0, 39])
    values = (torch.randn(3, WIDTH) * 20).to(dtype)
    if dtype == FORMATS[name].dtype:
        expected = values.view(torch.uint8), None
    else:
        expected = encode_rows(values.float(), FORMATS[name], "test", scale=table.own_scale)
    with table.overlay(ids, values.requires_grad_()):
        assert torch.equal(table.weight.view(torch.uint8)[ids], expected[0].view(torch.uint8))
        if expected[1] is not None:
            assert torch.equal(table.scale[ids], expected[1])
    assert same(bits(table), bits(table_of(name)))


@pytest.mark.parametrize(
    "name, most", [("e4m3", 448 * tables.TABLE_SCALE), ("nvfp4", 6 * 448 * tables.TABLE_SCALE), ("float16", 65504.0)]
)
def test_values_that_do_not_fit_are_refused(name, most):
    table = table_of(name)
    before, rows = bits(table), torch.zeros(2, WIDTH)
    rows[1, 3] = most
    table.overlay(torch.tensor([1, 2]), rows).remove()
    rows[1, 3] = most * 1.01
    with pytest.raises(ValueError, match=r"^EngramTable.overlay: rows must fit .*got 1 values beyond, the greatest"):
        table.overlay(torch.tensor([1, 2]), rows)
    for value, word in ((torch.inf, "infinity"), (torch.nan, "NaN")) if name != "float16" else ():
        rows[1, 3] = value
        if name == "nvfp4" or value == torch.inf:
            with pytest.raises(ValueError, match=f"has no {word}"):
                table.overlay(torch.tensor([1, 2]), rows)
    assert same(bits(table), before)


def test_rows_that_a_view_of_the_table_gives():
    table = table_of("float32")
    before = table.weight.clone()
    with table.overlay(torch.arange(3), table.weight[2:5]):
        assert torch.equal(table.weight[:5], before[[2, 3, 4, 3, 4]])
    assert torch.equal(table.weight, before)


def test_several_overlays_are_apart_and_leave_in_any_order():
    for order in itertools.permutations(range(3)):
        table = table_of("float32")
        before = table.weight.clone()
        overlays = [table.overlay(torch.arange(at, at + 4), torch.full((4, WIDTH), at + 1.0)) for at in (0, 4, 8)]
        with pytest.raises(ValueError, match="no row of an overlay that is applied, got 7 and 1 more"):
            table.overlay(torch.tensor([20, 7, 8]), torch.zeros(3, WIDTH))
        for index in order:
            overlays[index].remove()
            at = 4 * index
            assert torch.equal(table.weight[at : at + 4], before[at : at + 4])
        assert torch.equal(table.weight, before)
        table.overlay(torch.tensor([7]), torch.zeros(1, WIDTH))
        with pytest.raises(ValueError, match="no row of an overlay that is applied, got 7"):
            overlays[1].apply()
        assert not overlays[1].applied


def test_no_rows_are_an_overlay_too():
    table = table_of()
    before = bits(table)
    with table.overlay(torch.arange(0), torch.zeros(0, WIDTH)):
        assert same(bits(table), before)


def test_rows_written_for_good():
    table = table_of("bfloat16").requires_row_grad_()
    version = table.version
    table.write_rows(torch.tensor([3, 1]), torch.ones(2, WIDTH))
    assert table.weight[[1, 3]].eq(1).all() and table.weight[2].ne(1).any() and table.version > version
    table.requires_row_grad_(False)
    with table.overlay(torch.tensor([5]), torch.zeros(1, WIDTH)):
        with pytest.raises(ValueError, match="^EngramTable.write_rows: ids must have no row of an overlay"):
            table.write_rows(torch.tensor([4, 5]), torch.ones(2, WIDTH))
        table.write_rows(torch.tensor([4]), torch.ones(1, WIDTH))
    assert table.weight[4].eq(1).all()


def test_a_training_table_and_an_overlay_exclude_each_other():
    table = table_of("float32").requires_row_grad_()
    optimizer = RowAdagrad(table)
    with pytest.raises(ValueError, match="is trainable, and steps that move rows under an overlay would be lost"):
        table.overlay(torch.tensor([1]), torch.zeros(1, WIDTH))
    with table.requires_row_grad_(False).overlay(torch.tensor([1]), torch.zeros(1, WIDTH)):
        with pytest.raises(ValueError, match="1 overlays are applied"):
            table.requires_row_grad_()
        optimizer.step()
    table.requires_row_grad_()
    assert table.requires_row_grad


def test_moves_that_momentum_still_owes():
    """A frozen table's rows take them before they are kept, so that what comes back is what a lookup reads."""
    rows = {}
    for edited in (False, True):
        torch.manual_seed(1)
        table = table_of("float32").requires_row_grad_()
        optimizer = RowSinkhorn(table, lr=0.1)
        for ids in ([1, 2], [2, 3], [9]):
            table.accumulate_row_grad(torch.tensor(ids), torch.randn(len(ids), WIDTH))
            optimizer.step()
            optimizer.zero_grad()
        table.requires_row_grad_(False)
        if edited:
            with table.overlay(torch.tensor([1, 9]), torch.ones(2, WIDTH)):
                assert lookup(table, torch.tensor([1, 9])).eq(1).all()
        rows[edited] = lookup(table, torch.arange(ROWS))
    assert torch.equal(rows[True], rows[False]) and not torch.equal(rows[True], table_of("float32").weight)


def test_bad_arguments():
    table = table_of()
    ids, rows, scales = edits()
    before = bits(table)
    for match, arguments in (
        ("ids must be distinct, got 3 more than once", (torch.tensor([3, 1, 3]), rows[:3], scales[:3])),
        (r"0 <= id < 40, got 40", (torch.tensor([3, 40]), rows[:2], scales[:2])),
        (r"0 <= id < 40, got -1", (torch.tensor([3, -1]), rows[:2], scales[:2])),
        (r"ids must have shape \[n\]", (ids[None], rows, scales)),
        (r"rows must have shape \[5, 32\], dense, got \[4, 32\]", (ids, rows[:4], scales)),
        (r"rows must have shape \[5, 32\]", (ids, rows[:, :16], scales)),
        ("scales must come with float8_e4m3fn rows", (ids, rows)),
        ("scales must be None", (ids, rows.float(), scales)),
        (r"scales must have shape \[5, 1\]", (ids, rows, scales[:4])),
        ("rows must be float32, bfloat16 or float16 values", (ids, rows.double())),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^EngramTable.overlay: .*{match}"):
            table.overlay(*arguments)
    assert same(bits(table), before) and not table.overlays
    overlay = table.overlay(ids, rows, scales)
    with pytest.raises(ValueError, match="^RowOverlay.apply: the overlay is applied"):
        overlay.apply()
    overlay.remove()
    with pytest.raises(ValueError, match="^RowOverlay.remove: the overlay is not applied"):
        overlay.remove()


def test_a_closed_table_keeps_what_is_over_it():
    """Its memory is no longer the table's: what outlives it has the rows that lookups read last."""
    weight = torch.zeros(4, 8)
    table = EngramTable.from_tensors(weight, placement="cpu")
    with table.overlay(torch.tensor([2]), torch.ones(1, 8)) as overlay:
        table.close()
    assert weight[2].eq(1).all() and weight[3].eq(0).all()
    with pytest.raises(ValueError, match="^RowOverlay.remove: the table is closed"):
        overlay.remove()


def test_an_attached_table_is_its_writers(shared_name):
    table = table_of("float32", "shared", name=shared_name)
    reader = EngramTable.attach(shared_name, ROWS, WIDTH, "float32")
    for write in (reader.overlay, reader.write_rows):
        with pytest.raises(ValueError, match="only the process that published it may write rows"):
            write(torch.tensor([1]), torch.zeros(1, WIDTH))
    with table.overlay(torch.tensor([1]), torch.zeros(1, WIDTH)):
        assert not reader.weight[1].any()
    assert reader.weight[1].any()
    reader.close()
    table.close()


def test_scales_that_other_processes_keep_are_refused(shared_name, monkeypatch):
    table = table_of("e4m3_ue8m0", "shared", name=shared_name)
    monkeypatch.setattr(table, "_scales", "device")
    with pytest.raises(ValueError, match="every process has a copy of its own"):
        table.overlay(*edits())
    table.close()


def test_a_mapped_checkpoint_is_changed_in_this_process_alone(tmp_path):
    path = tmp_path / "table.safetensors"
    table_of("float32").save_safetensors(path)
    content = path.read_bytes()
    table = EngramTable.from_safetensors(path, placement="cpu", mapped=True)
    with table.overlay(torch.tensor([1]), torch.zeros(1, WIDTH)):
        assert not lookup(table, torch.tensor([1])).any()
        assert path.read_bytes() == content
    assert torch.equal(table.weight, table_of("float32").weight)


@pytest.mark.parametrize(
    "mode, gone, match",
    [
        ("r", False, "rows is mapped for reading alone"),
        ("r", True, "is mapped for reading alone"),
        ("r+", False, "a write would change .*rows"),
    ],
)
def test_other_mapped_files_are_refused(tmp_path, mode, gone, match):
    """Where a write would end the process, and where it would change the file."""
    path = tmp_path / "rows"
    path.write_bytes(torch.ones(4, 8).numpy().tobytes())
    with warnings.catch_warnings():  # of torch's, once, that the array is for reading
        warnings.simplefilter("ignore")
        weight = torch.from_numpy(np.memmap(path, dtype=np.float32, mode=mode, shape=(4, 8)))
    if gone:
        path.unlink()
    table = EngramTable.from_tensors(weight, placement="cpu")
    with pytest.raises(ValueError, match=f"^EngramTable.overlay: .* in memory of this process, got others: .*{match}"):
        table.overlay(torch.tensor([1]), torch.zeros(1, 8))


@pytest.mark.parametrize("name", ["e4m3_ue8m0", "bfloat16"])
def test_saving_writes_what_lookups_read(tmp_path, name):
    table = table_of(name)
    with table.overlay(*edits(name)):
        table.save_safetensors(tmp_path / "edited.safetensors")
        edited = bits(table)
    table.save_safetensors(tmp_path / "plain.safetensors")
    assert not same(edited, bits(table))
    for file, expected in (("edited", edited), ("plain", bits(table))):
        assert same(bits(EngramTable.from_safetensors(tmp_path / f"{file}.safetensors", placement="cpu")), expected)


def test_the_cpu_waits_for_rows_that_a_gpu_writes(tmp_path, monkeypatch):
    """Where rows of a registered table are written over UVA: before it saves them, or some of them."""
    table, waited = table_of("float32", "host"), []
    overlay = table.overlay(*edits("float32"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(EngramTable, "writing_device", gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    table.save_safetensors(tmp_path / "table.safetensors")
    assert waited == [gpu]
    overlay.save_safetensors(tmp_path / "overlay.safetensors")
    assert waited == [gpu, gpu]


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["e4m3_ue8m0", "bfloat16"])
def test_a_cache_in_front_forgets(device, name):
    """A lookup through it has the rows of one without: under an overlay, after it, and after rows written for good."""
    pair = Pair(device, small_plan(), 32, name)
    table, ids = pair.tables[1], torch.arange(9, device=device)
    all_rows = torch.arange(table.rows)

    def check():
        rows = hash_lookup(ids, pair.moved, pair.tables, cache=pair.cache)
        expected = hash_lookup(ids, pair.moved, pair.tables)
        assert torch.equal(rows.view(torch.int16), expected.view(torch.int16))
        return rows.view(torch.int16)

    values = torch.randn(table.rows, 32)
    check()
    hits = pair.cache.stats().hits
    plain = check()
    assert pair.cache.stats().hits != hits
    with table.overlay(all_rows, values):
        edited = check()
        assert not torch.equal(edited[1], plain[1]) and torch.equal(edited[0], plain[0])
    assert torch.equal(check(), plain)
    table.write_rows(all_rows, values)
    assert torch.equal(check(), edited)


SCHEDULES = [list(names) for names in itertools.permutations(("main", "side"))]
ORDERS = {
    "all": None,
    "a lookup after the overlay before": ("side", "main"),
    "an overlay after the lookups before": ("main", "side"),
}


@pytest.mark.parametrize("dropped", ORDERS.values(), ids=ORDERS)
def test_prefetched_lookups_have_all_old_rows_or_all_new_ones(dropped):
    """On streams whose work runs as early or late as events let it: in every order, or without a wait wrong in one."""
    results = []
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        plan, placed = setting("cpu", "float32")
        ids = torch.randint(0, 40, (6,))
        values = [torch.randn(table.rows, table.width) for table in placed]
        plain = hash_lookup(ids, plan, placed, out_dtype=torch.float32)
        streams, seen, applied = FakeStreams(), [], []
        with ordered_by(streams):
            prefetcher = Prefetcher(plan, placed, len(ids), out_dtype=torch.float32)
        prefetcher.start(ids)
        streams.drain(schedule)
        streams._dropped = dropped

        def switch(applied=applied, placed=placed, values=values):
            if applied:
                while applied:
                    applied.pop().remove()
                return
            for table, rows in zip(placed, values, strict=True):
                applied.append(table.overlay(torch.arange(table.rows), rows))

        for _ in range(4):
            prefetcher.start(ids)
            rows = [prefetcher.rows(layer) for layer in range(2)]
            streams.run("main", lambda rows=rows, seen=seen: seen.append(torch.stack([each.clone() for each in rows])))
            streams.run("main", switch)
        streams.drain(schedule)
        switch()
        edited = hash_lookup(ids, plan, placed, out_dtype=torch.float32)
        assert not torch.equal(plain, edited)
        wanted = [plain, edited, plain, edited]
        results.append(all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)))
    assert all(results) == (dropped is None)


@pytest.mark.kernel
@pytest.mark.parametrize("placement", [None, "host"])
def test_ops_read_edited_rows(device, placement):
    """lookup by the kernel, which knows the table by address: launches that were kept read the new rows too."""
    table = tables.place(*tables.random_parts(ROWS, WIDTH, "bfloat16"), device, placement)
    ids = torch.arange(ROWS, device=device)
    plain = lookup(table, ids)
    with table.overlay(torch.tensor([3, 9]), torch.ones(2, WIDTH)):
        edited = lookup(table, ids)
        assert edited[[3, 9]].eq(1).all() and torch.equal(edited[10:], plain[10:])
    assert torch.equal(lookup(table, ids), plain)


def test_the_guide(tmp_path):
    """The block of docs/serving.md, run as it stands."""
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if ".overlay(" in each]
    table, ids = table_of("bfloat16"), torch.tensor([4, 2])
    rows, before = torch.randn(2, WIDTH).bfloat16(), bits(table)
    given = dict(table=table, ids=ids, rows=rows, folder=tmp_path, lookup=lookup)
    lasting = block.index("table.write_rows")
    exec(block[:lasting], given)
    assert torch.equal(given["edited"], rows) and same(bits(table), before)
    exec(block[lasting:], given)
    assert torch.equal(table.weight[ids], rows)
