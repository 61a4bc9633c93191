"""States of row optimizers saved and loaded: resuming equals never having stopped, bit for bit, and files are whole."""

import copy
import json
import os
import pickle

import pytest
import torch

from engram_kernels import Engram, EngramTable, HashPlan, RowAdagrad, RowAdam, lookup
from engram_kernels.checkpoints import reading
from engram_kernels.checkpoints.writing import locked_file
from engram_kernels.training import saving as optimizer_saving
from tests.nn.test_engram import FORMS
from tests.support.checkpoints import raw

ROWS, WIDTH = 37, 8
# Of every option another value than a constructor's own.
OPTIONS = dict(lr=0.1, eps=1e-3, weight_decay=0.05)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks for each state."""
    monkeypatch.setattr(optimizer_saving, "CHUNK", 200)
    monkeypatch.setattr(reading, "CHUNK", 200)


class Run:
    """A module of the paper's form, its table and both optimizers, made anew or from what was saved in ``folder``."""

    def __init__(self, kind, dtype, folder=None, way="file"):
        config = FORMS["paper"]
        plan = HashPlan.build(config, torch.arange(40))
        generator = torch.Generator().manual_seed(7)
        weight = torch.randn(plan.rows_per_layer[-1], 8, generator=generator).to(dtype)
        self.table = EngramTable.from_tensors(weight, placement="cpu")
        torch.manual_seed(8)
        self.module = Engram(config, 4, plan, self.table)
        torch.nn.init.normal_(self.module.conv_weight)
        if folder is not None:
            self.table = self.module.table = EngramTable.from_safetensors(
                folder / "table.safetensors", placement="host"
            )
        options = OPTIONS | dict(seed=3) if folder is None else {}  # what was saved tells
        self.rows = kind(self.table.requires_row_grad_(), **options)
        self.dense = torch.optim.Adam(self.module.parameters(), lr=1e-2)
        if folder is not None:
            saved = torch.load(folder / "model.pt", weights_only=True)
            self.module.load_state_dict(saved["module"])
            self.dense.load_state_dict(saved["dense"])
            self.rows.load_state_dict(saved["rows"]) if way == "dict" else self.rows.load_safetensors(folder)

    def save(self, folder):
        self.table.save_safetensors(folder / "table.safetensors")
        names = ("module", "dense", "rows")
        torch.save({name: getattr(self, name).state_dict() for name in names}, folder / "model.pt")
        assert self.rows.save_safetensors(folder) == folder / "optimizer.safetensors"

    def steps(self, begin, end):
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            hidden, ids = torch.randn(12, 2, 24, generator=generator), torch.randint(0, 40, (12,), generator=generator)
            self.rows.zero_grad()
            self.dense.zero_grad()
            self.module(hidden, ids).square().mean().backward()
            if step == 1:  # a row that does not move, and is counted
                self.table.accumulate_row_grad(torch.tensor([5]), torch.full((1, 8), float("nan")))
            self.rows.step()
            self.dense.step()
        return self

    def bits(self):
        found = dict(table=self.table.weight, **self.rows.states(), **self.module.state_dict())
        found |= {
            f"dense {i}": value for i, state in self.dense.state_dict()["state"].items() for value in state.values()
        }
        counters = dict(self.rows.facts(), group=self.rows.state_dict()["param_groups"])
        return {name: raw(value) for name, value in found.items()}, counters


@pytest.mark.parametrize(
    ("kind", "dtype", "way"),
    [
        (RowAdagrad, torch.bfloat16, "file"),
        (RowAdam, torch.bfloat16, "file"),
        (RowAdam, torch.bfloat16, "dict"),
        (RowAdagrad, torch.float32, "file"),
    ],
)
def test_save_and_resume_equals_no_stop(tmp_path, kind, dtype, way):
    """Model, table and both optimizers, from files alone; rows of bfloat16 round stochastically."""
    whole, counters = Run(kind, dtype).steps(0, 5).bits()
    assert counters["steps"] == 5 and counters["skipped"] == 1 and counters["seed"] == 3
    Run(kind, dtype).steps(0, 3).save(tmp_path)
    resumed, also = Run(kind, dtype, tmp_path, way).steps(3, 5).bits()
    assert also == counters and resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_what_is_not_restored_shows():
    """Negative control: without the step's number the rounding is another, without states the steps are."""
    whole, _ = Run(RowAdam, torch.bfloat16).steps(0, 4).bits()

    def changed(change):
        run = Run(RowAdam, torch.bfloat16).steps(0, 2)
        change(run.rows)
        return [name for name, bits in run.steps(2, 4).bits()[0].items() if not torch.equal(bits, whole[name])]

    assert changed(lambda rows: None) == []
    assert "table" in changed(lambda rows: setattr(rows, "steps", 0))
    assert "table" in changed(lambda rows: setattr(rows, "_seed", 4))
    for name in ("first", "second", "steps"):
        assert "table" in changed(lambda rows, name=name: rows.states()[name].zero_())


def optimizer(kind=RowAdam, rows=ROWS, dtype=torch.float32, count=2, **options):
    """Over ``count`` tables, after one step."""
    tables = [EngramTable.from_tensors(torch.randn(rows + i, WIDTH).to(dtype), placement="cpu") for i in range(count)]
    made = kind([table.requires_row_grad_() for table in tables], **options)
    for table in tables:
        table.accumulate_row_grad(torch.randint(0, rows, (9,)), torch.randn(9, WIDTH))
    made.step()
    made.zero_grad()
    return made


def states(made):
    return [{name: value.clone() for name, value in made.states(i).items()} for i in range(len(made.tables))]


def same(one, other):
    return all(torch.equal(x[name], y[name]) for x, y in zip(one, other, strict=True) for name in x)


def test_files_are_what_other_readers_expect(tmp_path):
    from safetensors import safe_open

    made, calls = optimizer(RowAdagrad), []
    path = made.save_safetensors(tmp_path / "a.safetensors", metadata={"run": "7"}, progress=lambda *x: calls.append(x))
    assert calls[0] == (0, (2 * ROWS + 1) * 4) and calls[-1] == (calls[0][1],) * 2
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"0.sums", "1.sums"}
        assert torch.equal(file.get_tensor("1.sums"), made.states(1)["sums"])
        metadata = file.metadata()
    assert metadata["run"] == "7" and json.loads(metadata["row_optimizer"])["tables"][1]["rows"] == ROWS + 1
    other = optimizer(RowAdagrad)
    other.load_safetensors(path, threads=2, progress=lambda *x: calls.append(x))
    assert calls[-1] == calls[0][1:] * 2 and same(states(other), states(made)) and other.facts() == made.facts()


def test_options_and_schedulers_come_back(tmp_path):
    """A rate that a scheduler has moved, and what it notes in the group; a learning rate that is a tensor."""
    made = optimizer(betas=(0.8, 0.99), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.5)
    made.step()
    scheduler.step()
    made.param_groups[0]["eps"] = torch.tensor(0.25)
    path, other = made.save_safetensors(tmp_path), optimizer()
    for load in (lambda: other.load_safetensors(path), lambda: other.load_state_dict(made.state_dict())):
        load()
        group = {name: value for name, value in other.param_groups[0].items() if name != "params"}
        assert group == dict(lr=0.05, initial_lr=0.1, betas=(0.8, 0.99), eps=0.25, weight_decay=0.05)
        assert [id(x) for x in other.param_groups[0]["params"]] == [id(table.anchor) for table in other.tables]


class Stop(Exception):
    pass


def stop_half_way(done, total):
    if done > total / 2:
        raise Stop


def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    made, later = optimizer(), optimizer()
    path = made.save_safetensors(tmp_path / "o.safetensors")
    before, descriptors = path.read_bytes(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(Stop):
        later.save_safetensors(path, progress=stop_half_way)
    for name in ("pwrite", "ftruncate", "fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                later.save_safetensors(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["o.safetensors"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    later.save_safetensors(path)
    assert path.read_bytes() != before


def test_what_killed_saves_left_is_removed(tmp_path):
    """A file without a lock is nobody's; one that is locked is being written, and other names are not ours."""
    (tmp_path / ".o-0123abcd.partial").write_text("half a state")
    (tmp_path / ".p-0123abcd.partial").write_text("another's")
    held = locked_file(tmp_path / ".o-89abcdef.partial")
    optimizer().save_safetensors(tmp_path / "o.safetensors")
    assert sorted(os.listdir(tmp_path)) == [".o-89abcdef.partial", ".p-0123abcd.partial", "o.safetensors"]
    held.close()


def test_a_load_that_fails_half_way_closes(tmp_path):
    """No step may follow on states of which some are the file's."""
    path, other = optimizer().save_safetensors(tmp_path), optimizer()
    with pytest.raises(Stop):
        other.load_safetensors(path, progress=stop_half_way)
    for use in (other.step, other.state_dict, lambda: other.load_safetensors(path), lambda: other.load_state_dict({})):
        other.tables[0].accumulate_row_grad(torch.tensor([1]), torch.randn(1, WIDTH))
        with pytest.raises(ValueError, match="the optimizer is closed"):
            use()


def changed(content, **facts):
    return content | {"row_optimizer": content["row_optimizer"] | facts}


def without(content, name):
    group = {key: value for key, value in content["param_groups"][0].items() if key != name}
    return content | {"param_groups": [group]}


BAD = {
    "a state_dict of another": (lambda x: {"state": {}, "param_groups": [{}]}, "expected what RowAdam saved"),
    "version": (lambda x: changed(x, version=2), "expected a state of version 1, got 2"),
    "kind": (lambda x: optimizer(RowAdagrad).state_dict(), "expected a state of optimizer RowAdam, got RowAdagrad"),
    "rows": (
        lambda x: optimizer(rows=ROWS + 1).state_dict(),
        "expected states of tables 37 x 8 float32, 38 x 8 float32, got 38 x 8 float32, 39 x 8 float32",
    ),
    "format": (lambda x: optimizer(dtype=torch.bfloat16).state_dict(), "got 37 x 8 bfloat16, 38 x 8 bfloat16"),
    "tables": (lambda x: optimizer(count=1).state_dict(), "got 37 x 8 float32$"),
    "no tables": (lambda x: changed(x, tables=[{"rows": 3}, None]), "expected rows, width and format of tables, got"),
    "steps": (lambda x: changed(x, steps=-1), "steps must be a whole number, got -1"),
    "seed": (lambda x: changed(x, seed=0.5), "seed must be a whole number, got 0.5"),
    "an option": (lambda x: without(x, "betas"), r"expected parameter groups of lr, betas, .*got none of \['betas'\]"),
    "range": (lambda x: x | {"param_groups": [x["param_groups"][0] | {"lr": -1.0}]}, "lr must be a finite"),
    "type": (lambda x: x | {"param_groups": [x["param_groups"][0] | {"lr": "1"}]}, "lr must be a finite .* '1'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_states_that_do_not_fit_change_nothing(tmp_path, change, message, monkeypatch):
    """As dictionaries, and as files with such a header."""
    made = optimizer()
    content, before = change(optimizer().state_dict()), (states(made), made.facts(), dict(made.param_groups[0]))
    with pytest.raises((ValueError, TypeError), match=f"^RowAdam.load_state_dict: .*{message}"):
        made.load_state_dict(content)
    other = optimizer()
    monkeypatch.setattr(other, "state_dict", lambda: {"row_optimizer": {}} | content)
    with pytest.raises((ValueError, TypeError), match=f"^RowAdam.load_safetensors: .*{message}"):
        made.load_safetensors(other.save_safetensors(tmp_path))
    assert same(states(made), before[0]) and made.facts() == before[1] and made.param_groups[0] == before[2]


def test_states_of_rows_that_another_token_map_chose(tmp_path):
    """A tokenizer of another revision gives as many ids, and other rows for them."""
    config, maps = FORMS["v41"], (torch.arange(40), torch.arange(40).flip(0))
    runs = []
    for token_map in (maps[0], maps[0], maps[1]):
        plan = HashPlan.build(config, token_map)
        table = EngramTable.from_tensors(torch.zeros(plan.rows_per_layer[0], 8), placement="cpu").requires_row_grad_()
        Engram(config, 1, plan, table)
        runs.append((plan.token_map_digest, table, RowAdam(table)))
    (digest, table, saved), (_, _, same_map), (other_digest, _, other_map) = runs
    path, content = saved.save_safetensors(tmp_path), saved.state_dict()
    same_map.load_safetensors(path)
    same_map.load_state_dict(content)
    expected = f"expected states of rows chosen by token map {other_digest[:12]}, got {digest[:12]}: is the tokenizer"
    for load in (lambda: other_map.load_safetensors(path), lambda: other_map.load_state_dict(content)):
        with pytest.raises(ValueError, match=f"^RowAdam.load_.*: {expected}"):
            load()
    # A table that no module has taken yet learns it here, and the module that takes it finds out.
    untaken = EngramTable.from_tensors(torch.zeros(table.rows, 8), placement="cpu").requires_row_grad_()
    RowAdam(untaken).load_safetensors(path)
    with pytest.raises(ValueError, match=f"^Engram: table was made with token map {digest[:12]}, and the plan has"):
        Engram(config, 1, HashPlan.build(config, maps[1]), untaken)
    # What was saved before files told it is taken as it is.
    (old,) = content["row_optimizer"]["tables"]
    old = {name: value for name, value in old.items() if name != "token_map"}
    other_map.load_state_dict(changed(content, tables=[old]))
    assert other_map.tables[0].token_map == other_digest


def test_states_of_another_kind_of_optimizer():
    """Whose values need not be tensors."""
    content = {"state": {0: {"step": 3, "momentum_buffer": None}}, "param_groups": [{"lr": 0.1}]}
    with pytest.raises(ValueError, match="^RowAdam.load_state_dict: expected what RowAdam saved, with .*, got None"):
        optimizer().load_state_dict(content)


def test_tensors_that_do_not_fit():
    made = optimizer()
    content = made.state_dict()
    for state, message in (
        ({0: content["state"][0]}, r"missing are \['1.first', '1.second', '1.steps'\], and foreign \[\]"),
        (content["state"] | {1: content["state"][0]}, r"1.first must be F32 \[38, 8\], got F32 \(37, 8\)"),
        (
            content["state"] | {1: content["state"][1] | {"steps": torch.zeros(ROWS + 1)}},
            r"1.steps must be I32 \[38\], got F32",
        ),
    ):
        with pytest.raises(ValueError, match=f"^RowAdam.load_state_dict: .*{message}"):
            made.load_state_dict(content | {"state": state})


def test_files_in_the_way_and_files_that_are_none(tmp_path):
    made = optimizer()
    table = made.tables[0].save_safetensors(tmp_path / "t.safetensors")
    (tmp_path / "n.safetensors").write_text("my notes")
    for path, error, message in (
        (table, ValueError, "t.safetensors holds no optimizer state, and is not replaced"),
        (tmp_path / "n.safetensors", ValueError, "is in the way and cannot be read"),
        (tmp_path / "o.bin", ValueError, "path must end in .safetensors or be a folder that exists"),
        (tmp_path / "no" / "o.safetensors", FileNotFoundError, "no such folder"),
        (7, TypeError, "path must be a file or a folder, got"),
    ):
        with pytest.raises(error, match=f"^RowAdam.save_safetensors: .*{message}"):
            made.save_safetensors(path)
    with pytest.raises(ValueError, match=r"load_safetensors: .*t.safetensors holds no optimizer state"):
        made.load_safetensors(table)
    with pytest.raises(FileNotFoundError, match="no such file: .*optimizer.safetensors"):
        made.load_safetensors(tmp_path)
    path = made.save_safetensors(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"load_safetensors: .* is truncated"):
        made.load_safetensors(path)
    made.param_groups[0]["note"] = object()
    with pytest.raises(TypeError, match="entries of the parameter group must be numbers or texts, got note of object"):
        made.save_safetensors(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="metadata must map texts to texts"):
        made.save_safetensors(tmp_path / "other.safetensors", metadata={"run": 7})
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "other"))]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_is_copied_silently(make):
    """A copy of a table would have kernels read the original's addresses, one of an optimizer lose its tables."""
    made = optimizer()
    with pytest.raises(TypeError, match="neither copied nor pickled; use state_dict"):
        make(made)
    with pytest.raises(
        TypeError, match=r"a table is not copied or pickled. .*copy.deepcopy\(model, \{id\(table\): table"
    ):
        make(made.tables[0])


def test_a_copied_model_reads_the_same_table():
    run = Run(RowAdam, torch.float32)
    other = copy.deepcopy(run.module, {id(run.table): run.table})
    assert other.table is run.table and other.wkv.weight is not run.module.wkv.weight
    hidden, ids = torch.randn(4, 2, 24), torch.randint(0, 40, (4,))
    assert torch.equal(other(hidden, ids), run.module(hidden, ids))


@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_a_table_frozen_for_a_while(kind):
    """It stays as it is meanwhile, and goes on with its anchor and state as if those steps had not been."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 32, generator=generator) for _ in range(2)]

    def tables():
        made = [EngramTable.from_tensors(weight.clone(), placement="cpu").requires_row_grad_() for weight in weights]
        return made, kind(made, lr=0.1)

    def step(tables, optimizer):
        optimizer.zero_grad()
        sum(lookup(table, torch.arange(4)[:, None]).square().sum() for table in tables).backward()
        optimizer.step()

    (first, second), optimizer = tables()
    anchor = first.anchor
    step((first, second), optimizer)
    first.requires_row_grad_(False)
    assert first.anchor is None and not first.requires_row_grad
    frozen, moved = first.weight.clone(), second.weight.clone()
    step((first, second), optimizer)
    assert torch.equal(first.weight, frozen) and not torch.equal(second.weight, moved)
    assert first.requires_row_grad_().anchor is anchor and first.row_grad is None
    step((first, second), optimizer)
    (alone, _), other = tables()
    for _ in range(2):
        step((alone,), other)
    assert torch.equal(first.weight, alone.weight) and not torch.equal(first.weight, frozen)
