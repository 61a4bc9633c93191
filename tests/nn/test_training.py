"""A whole training run saved and resumed, by as many ranks or another number: the bits of one that never stopped."""

import json
import os
import re

import pytest
import torch
from torch import nn

from engram_kernels import EngramTable, RowAdagrad, RowAdam, RowSinkhorn, load_training, lookup, save_training
from tests.support.documents import ROOT, Document
from tests.support.ranks import World
from tests.support.run_cases import Run, begin, resume


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {size: World(size, tmp_path_factory.mktemp("ranks")) for size in (2, 3)}
    yield made
    for world in made.values():
        world.close()


def on(worlds, size, case, *args, **kwargs):
    """Every rank's result, of one process where ``size`` is 1."""
    if size == 1:
        return [dict(begin=begin, resume=resume)[case](*args, **kwargs)]
    return worlds[size].run(f"run_cases.{case}", *args, **kwargs)


@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 3), (3, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind, format", [("sharded", "float32"), ("copies", "bfloat16")])
def test_resuming_equals_no_stop(worlds, tmp_path, before, after, kind, format):
    """Copies' rows of bfloat16 round stochastically, on any number of ranks as in one process."""
    straight = on(worlds, before, "begin", kind, str(tmp_path), format=format)
    for told, loaded, resumed in on(worlds, after, "resume", kind, str(tmp_path), format=format):
        assert told == (3, {"note": 3}) and loaded[1][:2] == (3, 7)
        assert resumed == straight[0] and resumed != loaded


def test_stochastic_rounding_of_parts_goes_on(worlds, tmp_path):
    """Over as many ranks: it counts rows within a part, so that another number of ranks rounds otherwise."""
    options = dict(format="bfloat16", optimizer="adagrad")
    straight = worlds[2].run("run_cases.begin", "sharded", str(tmp_path), **options)
    for _, _, resumed in worlds[2].run("run_cases.resume", "sharded", str(tmp_path), **options):
        assert resumed == straight[0]


def test_a_save_that_fails_on_one_rank_leaves_the_run(worlds, tmp_path):
    worlds[2].run("run_cases.begin", "sharded", str(tmp_path))
    before = (tmp_path / "training.json").read_bytes()
    errors = worlds[2].errors("run_cases.fail_on_one", str(tmp_path))
    assert all("No space left on device" in error for error in errors), errors
    assert (tmp_path / "training.json").read_bytes() == before
    assert worlds[2].run("run_cases.resume", "sharded", str(tmp_path))[0][0] == (3, {"note": 3})
    worlds[2].run("run_cases.begin", "sharded", str(tmp_path))
    assert len(os.listdir(tmp_path)) == 2


class Plain(nn.Module):
    """A module without Engram, whose tables are given by name."""

    def __init__(self, rows=20, width=8, kind=RowAdam, dtype=torch.float32):
        super().__init__()
        self.head = nn.Linear(width, 3)
        self.table = EngramTable.from_tensors(torch.randn(rows, width).to(dtype), placement="cpu").requires_row_grad_()
        self.rows = kind(self.table)

    def step(self):
        self.rows.zero_grad()
        self.head(lookup(self.table, torch.arange(9)[:, None]).float()).square().mean().backward()
        self.rows.step()

    def tables(self):
        return {"words": self.table}


def save(folder, one, **options):
    return save_training(folder, one, [one.rows], **dict(tables=one.tables()) | options)


def test_moves_put_off_are_taken(tmp_path):
    """RowSinkhorn's states besides those of rows come back, and rows are saved with the moves they have yet to take."""
    straight = Plain(kind=RowSinkhorn)
    for _ in range(3):
        straight.step()
    save(tmp_path, straight, step=3)
    other = Plain(kind=RowSinkhorn)
    other.step()
    assert load_training(tmp_path, other, [other.rows], tables=other.tables()) == (3, None)
    for _ in range(2):
        straight.step(), other.step()
    assert torch.equal(straight.table.weight, other.table.weight)
    assert all(torch.equal(value, other.rows.states()[name]) for name, value in straight.rows.states().items())


REFUSED = {
    "another table": (
        lambda one: dict(tables={"letters": one.table}),
        "tables must be those .*'words'.* got .*letters",
    ),
    "no table": (
        lambda one: dict(tables={}),
        "tables must have all that row_optimizers move, got .* without EngramTable",
    ),
    "rows": (lambda one: Plain(rows=21), "tables must be as they were saved, words with .*20.*, got EngramTable"),
    "format": (lambda one: Plain(dtype=torch.bfloat16), "tables must be as they were saved, words with .*float32"),
    "kind": (
        lambda one: Plain(kind=RowAdagrad),
        "expected a state of optimizer RowAdam, got RowAdagrad|missing|RowAdagrad",
    ),
    "none": (lambda one: dict(row_optimizers=[]), "row_optimizers must be those .*words.*, got"),
    "optimizers": (lambda one: dict(optimizers=[torch.optim.SGD(one.parameters())]), "optimizers must be 0, as many"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    one = Plain()
    save(tmp_path, one)
    changed = change(one)
    given = changed if isinstance(changed, nn.Module) else one
    weight = given.table.weight.clone()
    options = dict(row_optimizers=[given.rows], tables=given.tables()) | (changed if changed is not given else {})
    with pytest.raises(ValueError, match=f"(?s)load_training: .*({message})"):
        load_training(tmp_path, given, **options)
    assert torch.equal(given.table.weight, weight)


def test_folders_that_hold_no_run(tmp_path):
    one = Plain()
    with pytest.raises(FileNotFoundError, match="load_training: folder must hold a finished run, got .* without"):
        load_training(tmp_path, one, [one.rows], tables=one.tables())
    save(tmp_path, one)
    run = json.loads((tmp_path / "training.json").read_text())["folder"]
    (tmp_path / run / "rows-0-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="load_training: no such file"):
        load_training(tmp_path, one, [one.rows], tables=one.tables())
    (tmp_path / "training.json").write_text("{}")
    for call in (lambda: save(tmp_path, one), lambda: load_training(tmp_path, one, [], tables={})):
        with pytest.raises(ValueError, match="folder must hold a run of version 1, got .*training.json"):
            call()
    with pytest.raises(ValueError, match="save_training: extra must be what torch.load"):
        save(tmp_path / "new", one, extra=Plain)


def test_the_module_says_where_its_rows_are():
    run = Run("alone")
    assert not any("table" in name for name in run.model.state_dict())
    assert "layer=4" in repr(run.model) and "EngramTable(" in repr(run.model)


def test_the_block_of_the_document_runs():
    """After the page's first one, as they stand."""
    document, names = Document("docs/training.md"), {}
    first = re.search(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)[1]
    (block,) = document.blocks("A whole run in one folder")
    exec(first, names)
    exec(block, names)
    assert names["step"] == 3 and names["extra"] == {"tokens seen": 96}
