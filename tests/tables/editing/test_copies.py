"""A master table and its serving copy: changed rows pushed, by call and by file, equal a conversion of the whole."""

import re
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable, NgramCache, RowAdagrad, RowAdam, RowSinkhorn, hash_lookup
from engram_kernels.checkpoints.convert import convert_table
from engram_kernels.checkpoints.encoding import encode_rows
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.tables.editing import conversion
from engram_kernels.testing.tables import place
from tests.ops.test_hashing import small_plan

from .test_overlay import bits, same

ROWS, WIDTH, SCALE = 60, 32, 0.01
GUIDE = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
DENSE = (torch.float32, torch.bfloat16)
SERVING = ["e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4", "float16", "bfloat16", "float32"]


def trained(dtype=torch.float32, device="cpu", rows=ROWS):
    """A master table that notes its changes; some values are zero, tiny or large."""
    weight = torch.randn(rows, WIDTH) * torch.logspace(-12, 0, rows)[:, None]
    weight[3] = 0
    table = place(weight.to(dtype), None, torch.device(device)).requires_row_grad_()
    table.record_changes()
    return table


def copy_of(form, rows=ROWS, device="cpu"):
    placement = "cpu" if torch.device(device).type == "cpu" else "device"
    table = EngramTable.empty(rows, WIDTH, form, scale=SCALE, placement=placement)
    table.weight.view(torch.uint8).zero_()  # what rows are exchanged for is read, and is to be defined
    if table.format.group:
        table.scale.zero_()
    return table


def whole_conversion(master, form, folder):
    """What ``table convert`` makes of the saved master."""
    path = master.save_safetensors(folder / "master.safetensors")
    options = dict(scale=SCALE) if FORMATS[form].table_scale else {}
    convert_table(path, folder / "copy.safetensors", "test", format=form, **options)
    return EngramTable.from_safetensors(folder / "copy.safetensors", placement="cpu")


def equal(copy, master, form, folder):
    return same([part.cpu() for part in bits(copy)], bits(whole_conversion(master, form, folder)))


def steps(table, optimizer, count=3):
    device = table.anchor_device
    for _ in range(count):
        ids = torch.randint(0, table.rows, (7,), device=device)
        table.accumulate_row_grad(ids, torch.randn(7, WIDTH, device=device))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("form", SERVING)
@pytest.mark.parametrize("dtype", DENSE)
def test_pushes_equal_a_conversion_of_the_whole(tmp_path, form, dtype):
    """After N steps and pushes, of which each converts the rows that changed alone."""
    master, copy = trained(dtype), copy_of(form)
    optimizer, version = RowAdagrad(master, lr=0.1), copy.update_from(master)
    assert equal(copy, master, form, tmp_path)
    for _ in range(3):
        steps(master, optimizer)
        changed = master.changed_since(version)
        assert 0 < len(changed) < ROWS and not equal(copy, master, form, tmp_path)
        before = copy.version
        version = copy.update_from(master, version)
        assert equal(copy, master, form, tmp_path) and copy.version > before
    before = copy.version
    assert copy.update_from(master, version) == version and copy.version == before  # nothing to push


@pytest.mark.kernel
@pytest.mark.parametrize("form", SERVING)
def test_pushes_by_kernels(device, form):
    """Steps and writes of kernels, in GPU memory where there is one; against all rows encoded on the CPU."""
    master, copy = trained(torch.bfloat16, device), copy_of(form, device=device)
    optimizer, version = RowAdagrad(master, lr=0.1), copy.update_from(master)
    for _ in range(2):
        steps(master, optimizer)
        version = copy.update_from(master, version)
        rows, scales = encode_rows(master.weight.float().cpu(), FORMATS[form], "test", scale=SCALE)
        got = [part.cpu() for part in bits(copy)]
        assert torch.equal(got[0], rows.view(torch.uint8)) and (scales is None or torch.equal(got[1], scales))


@pytest.mark.parametrize("form", ["e4m3_ue8m0", "e4m3"])
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam, RowSinkhorn])
def test_every_optimizer(tmp_path, form, kind):
    master, copy = trained(), copy_of(form)
    optimizer, version = kind(master, lr=0.05), copy.update_from(master)
    for _ in range(3):
        steps(master, optimizer)
        version = copy.update_from(master, version)
        assert equal(copy, master, form, tmp_path)


def test_only_rows_that_changed_are_converted(monkeypatch):
    master, copy = trained(), copy_of("e4m3_ue8m0")
    version, converted = copy.update_from(master), []
    original = conversion.convert_rows
    monkeypatch.setattr(
        conversion,
        "convert_rows",
        lambda m, c, ids, *rest: converted.append(ids.tolist()) or original(m, c, ids, *rest),
    )
    master.write_rows(torch.tensor([8, 5]), torch.ones(2, WIDTH))
    version = copy.update_from(master, version)
    assert converted == [[5, 8]]
    master.weight[7] = 1  # torch says that something was written, not what
    copy.update_from(master, version)
    assert converted[1:] == [list(range(ROWS))]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("fault", ["infinity", "scale"])
def test_an_interrupted_push_changes_nothing(tmp_path, monkeypatch, blocks, fault):
    """Whatever the size of a push; the next one, from the same version, has its rows too."""
    if blocks:
        monkeypatch.setattr(conversion, "BLOCK", 4 * WIDTH)
    master, copy = trained(), copy_of("e4m3")
    optimizer, version = RowAdagrad(master, lr=0.1), copy.update_from(master)
    steps(master, optimizer)
    before, kept = bits(copy), master.weight[59].clone()
    bad = torch.full((1, WIDTH), torch.inf if fault == "infinity" else 448 * SCALE * 1.01)
    master.write_rows(torch.tensor([59]), bad)
    match = "has no infinity" if fault == "infinity" else "at most 448 times the table's scale, 4.48, got 32 values"
    with pytest.raises(ValueError, match=f"^EngramTable.update_from: .*{match}"):
        copy.update_from(master, version)
    assert same(bits(copy), before) and not copy.overlays
    master.write_rows(torch.tensor([59]), kept[None])
    steps(master, optimizer)
    copy.update_from(master, version)
    assert equal(copy, master, "e4m3", tmp_path)


def test_a_scale_that_no_longer_fits(tmp_path):
    """Refused; clipped, as a conversion with that scale clips; or a new copy with another scale, whole."""
    master, copy = trained(), copy_of("e4m3")
    version = copy.update_from(master)
    master.write_rows(torch.tensor([8]), torch.linspace(-20, 20, WIDTH)[None])
    with pytest.raises(ValueError, match="values beyond, the greatest 20$"):
        copy.update_from(master, version)
    copy.update_from(master, version, clip=True)
    assert equal(copy, master, "e4m3", tmp_path)
    assert copy.weight[8].float().abs().max() == 448
    again = EngramTable.empty(ROWS, WIDTH, "e4m3", scale=2 * 20 / 448, placement="cpu")
    again.update_from(master)
    assert (again.weight[8].float() * again.own_scale - master.weight[8]).abs().max() < 20 / 2**4


def test_what_does_not_go_together():
    master = trained()
    master.token_map = "0" * 64
    other = copy_of("e4m3")
    other.token_map = "1" * 64
    for match, copy, options in (
        ("master must be another table", master, {}),
        ("master must have 61 x 32 elements, as its copy, got 60 x 32", copy_of("e4m3", 61), {}),
        ("master must have rows chosen by token map 111111111111, got 000000000000", other, {}),
        ("version must be at most the table's", copy_of("e4m3"), dict(since=10**6)),
    ):
        with pytest.raises(ValueError, match=match):
            copy.update_from(master, **options)
    copy = copy_of("e4m3")
    version = copy.update_from(master)
    overlay = copy.overlay(torch.tensor([4]), torch.zeros(1, WIDTH))
    master.write_rows(torch.tensor([4, 5]), torch.ones(2, WIDTH))
    for since in (None, version):
        with pytest.raises(ValueError, match="ids must have no row of an overlay that is applied, got 4"):
            copy.update_from(master, since)
    overlay.remove()
    copy.update_from(master, version)
    with overlay.apply():
        assert not copy.weight[4].float().any()
    assert copy.weight[4].float().all()


def test_a_cache_in_front_reads_pushed_rows(tmp_path):
    plan = small_plan(layers=1)
    master = trained(rows=plan.rows_per_layer[0])
    copy = copy_of("e4m3_ue8m0", rows=master.rows)
    version, ids = copy.update_from(master), torch.arange(9)
    cache = NgramCache(plan, [copy], entries=64, min_tokens=0)
    before = hash_lookup(ids, plan, [copy], cache=cache)
    master.write_rows(torch.arange(master.rows), torch.randn(master.rows, WIDTH))
    copy.update_from(master, version)
    after = hash_lookup(ids, plan, [copy], cache=cache)
    assert torch.equal(after, hash_lookup(ids, plan, [copy])) and not torch.equal(after, before)


@pytest.mark.parametrize("form", SERVING)
def test_files_equal_a_conversion_of_the_whole(tmp_path, form):
    """Written by the trainer, taken in order by a copy that was loaded from the converted checkpoint."""
    master, options = trained(), dict(format=form) | (dict(scale=SCALE) if FORMATS[form].table_scale else {})
    optimizer = RowAdam(master, lr=0.05)
    served = at = master.version
    copy = whole_conversion(master, form, tmp_path)
    for number in range(3):
        steps(master, optimizer)
        at = master.save_changes(tmp_path / f"{number}.safetensors", at, **options)
    for number in range(3):
        assert not equal(copy, master, form, tmp_path)
        served = copy.load_changes(tmp_path / f"{number}.safetensors", served)
    assert served == at and equal(copy, master, form, tmp_path)
    # One file of all changes does as well, and so does one that begins earlier.
    again = copy_of(form)
    again.update_from(master)
    assert same(bits(again), bits(copy))
    again.load_changes(tmp_path / "2.safetensors", at)
    assert master.save_changes(tmp_path / "3.safetensors", at, **options) == at
    assert copy.load_changes(tmp_path / "3.safetensors", served) == at


def test_files_out_of_order_are_refused(tmp_path):
    master, options = trained(), dict(format="e4m3_ue8m0")
    optimizer, start = RowAdagrad(master), master.version
    copy = copy_of("e4m3_ue8m0")
    copy.update_from(master)
    at, files = start, []
    for number in range(3):
        steps(master, optimizer)
        files.append(tmp_path / f"{number}.safetensors")
        at = master.save_changes(files[-1], at, **options)
    before = bits(copy)
    with pytest.raises(ValueError, match=f"^EngramTable.load_changes: path must have what changed since {start}, got"):
        copy.load_changes(files[1], start)
    assert same(bits(copy), before)
    served = copy.load_changes(files[1], copy.load_changes(files[0], start))
    with pytest.raises(ValueError, match=f"path must have what changed since {served}, got"):
        copy.load_changes(files[0], served)
    master.record_changes()  # as a trainer that was started again
    steps(master, optimizer)
    master.save_changes(tmp_path / "new.safetensors", at, **options)
    with pytest.raises(ValueError, match="path must be of the record"):
        copy.load_changes(tmp_path / "new.safetensors", at)
    overlay = copy.overlay(torch.tensor([1]), torch.zeros(1, WIDTH))
    overlay.save_safetensors(tmp_path / "overlay.safetensors")
    overlay.remove()
    with pytest.raises(ValueError, match="path must be a file of save_changes, got one without a version"):
        copy.load_changes(tmp_path / "overlay.safetensors", served)
    master.rows_changed()
    with pytest.raises(ValueError, match="without saying which"):
        master.save_changes(tmp_path / "none.safetensors", at, **options)
    assert not (tmp_path / "none.safetensors").exists()


def test_the_guide(tmp_path):
    """The blocks of docs/training.md, run as they stand."""
    blocks = [
        each
        for each in re.findall(r"```python\n(.*?)```", GUIDE, re.S)
        if "serving.update" in each or "_changes" in each
    ]
    assert len(blocks) == 2
    master, serving = trained(), copy_of("e4m3_ue8m0")
    optimizer = RowAdagrad(master)
    given = dict(master=master, serving=serving, batches=range(3), folder=tmp_path)
    given |= dict(train=lambda batch: steps(master, optimizer))
    exec(blocks[0], given)
    assert equal(serving, master, "e4m3_ue8m0", tmp_path)
    served = master.version
    exec(blocks[1], given)
    assert serving.load_changes(tmp_path / "0001.safetensors", served) == given["at"] > served
    assert equal(serving, master, "e4m3_ue8m0", tmp_path)


def test_options_of_files(tmp_path):
    master = trained()
    for match, options in (
        ("scale must be a number for formats 'e4m3' and 'nvfp4'", dict(format="e4m3")),
        ("scale must be a number for formats 'e4m3' and 'nvfp4'", dict(format="bfloat16", scale=0.5)),
        ("the table's scale must be a positive number|a scale is a positive number", dict(format="e4m3", scale=0)),
    ):
        with pytest.raises(ValueError, match=f"^EngramTable.save_changes: .*({match})"):
            master.save_changes(tmp_path, master.version, **options)
    assert not list(tmp_path.iterdir()) and set(SERVING) < set(FORMATS)
