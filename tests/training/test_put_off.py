"""Moves that RowSinkhorn puts off: whatever reads rows reads them moved, and saving, freezing and closing keep them."""

import math

import pytest
import torch

from engram_kernels import Engram, EngramTable, HashPlan, RowAdagrad, RowSinkhorn, hash_lookup, lookup
from engram_kernels.reference.training import sinkhorn as reference
from tests.nn.test_engram import FORMS
from tests.support.checkpoints import raw

from .test_sinkhorn import OPTIONS, ROWS, WIDTH, gradients, train, trainable


def behind():
    """A table of which rows have moves to take, and what its rows are when they have."""
    table = trainable(dtype=torch.float32)
    optimizer = train(table, [(torch.arange(8), torch.randn(8, WIDTH)), (torch.arange(4), torch.randn(4, WIDTH))])
    with table.as_it_stands():
        old = table.weight.clone()
    other = EngramTable.from_tensors(old.clone(), placement="cpu")
    state = reference.SinkhornState(**{name: value.clone() for name, value in optimizer.states().items()})
    reference.take_moves(other.weight, state, torch.arange(ROWS), momentum=0.8, eps=1e-20, seed=None)
    assert (other.weight != old).any(1).nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    return table, optimizer, old, other.weight.clone()


def test_whatever_reads_rows_reads_them_moved(tmp_path):
    ids = torch.tensor([[5, 5, -1], [6, 2, ROWS + 3]])
    table, optimizer, old, new = behind()
    zero = torch.zeros(WIDTH)
    expected = torch.stack([new[i] if 0 <= i < ROWS else zero for i in ids.flatten().tolist()]).view(2, 3, WIDTH)
    version = table.version
    assert torch.equal(lookup(table, ids), expected) and table.version > version
    with table.as_it_stands():  # the others are still as they were
        assert torch.equal(table.weight[[4, 7]], old[[4, 7]]) and torch.equal(table.weight[[5, 6]], new[[5, 6]])
    assert torch.equal(table.weight, new) and torch.equal(table.weight, new)

    table, optimizer, old, new = behind()
    with torch.no_grad():
        inside = ((ids >= 0) & (ids < ROWS))[..., None]
        assert torch.equal(lookup(table, ids.int()), torch.where(inside, new[ids.clamp(0, ROWS - 1)], zero))
    table, optimizer, old, new = behind()
    torch.compiler.reset()
    compiled = torch.compile(lambda ids: lookup(table, ids) * 2, backend="aot_eager", fullgraph=True)
    expected = torch.where(inside, new[ids.clamp(0, ROWS - 1)], zero)
    assert torch.equal(compiled(ids), expected * 2) and compiled(ids).requires_grad
    with table.as_it_stands():
        assert torch.equal(table.weight[[4, 7]], old[[4, 7]]) and torch.equal(table.weight[[5, 6]], new[[5, 6]])
    table, optimizer, old, new = behind()
    table.save_safetensors(tmp_path / "table.safetensors")
    with EngramTable.from_safetensors(tmp_path / "table.safetensors", placement="cpu") as loaded:
        assert torch.equal(loaded.weight, new)

    table, optimizer, old, new = behind()
    optimizer.save_safetensors(tmp_path)  # states and rows belong together, whichever is saved first
    with table.as_it_stands():
        assert torch.equal(table.weight, new)


def test_hash_lookup_and_the_module_read_rows_moved():
    config = FORMS["paper"]
    plan = HashPlan.build(config, torch.arange(40))
    tables = [EngramTable.from_tensors(torch.randn(rows, 8), placement="cpu") for rows in plan.rows_per_layer]
    optimizer = RowSinkhorn([table.requires_row_grad_() for table in tables], **OPTIONS)
    tokens = torch.randint(0, 40, (30,))
    for _ in range(3):
        hash_lookup(tokens, plan, tables).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens = torch.randint(0, 40, (30,))
    found = hash_lookup(tokens, plan, tables)
    stale = [table.weight for table in tables]  # all moves taken
    assert torch.equal(found, hash_lookup(tokens, plan, tables))
    copies = [EngramTable.from_tensors(weight.clone(), placement="cpu") for weight in stale]
    assert torch.equal(found, hash_lookup(tokens, plan, copies))
    module = Engram(config, 4, plan, tables[-1])
    assert torch.isfinite(module(torch.randn(30, 2, 24), tokens)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_resume_equals_no_stop(tmp_path, dtype):
    given = gradients(9, dtype=torch.float32)
    rows = torch.randn(ROWS, WIDTH).to(dtype)

    def run(optimizer, steps):
        for ids, grad in steps:
            optimizer.tables[0].accumulate_row_grad(ids, grad)
            optimizer.step()
            optimizer.zero_grad()

    def pieces():
        """A run that stops to save takes moves then, so the one that does not stop reads its rows there."""
        table = EngramTable.from_tensors(rows.clone(), placement="cpu").requires_row_grad_()
        optimizer = RowSinkhorn(table, **OPTIONS, seed=5)
        run(optimizer, given[:5])
        table.take_moves()
        return table, optimizer

    whole, optimizer = pieces()
    run(optimizer, given[5:])
    table, other = pieces()
    other.save_safetensors(tmp_path / "rows.safetensors")
    table.save_safetensors(tmp_path / "table.safetensors")
    loaded = EngramTable.from_safetensors(tmp_path / "table.safetensors", placement="cpu").requires_row_grad_()
    resumed = RowSinkhorn(loaded, momentum=0.8)
    resumed.load_safetensors(tmp_path / "rows.safetensors")
    assert resumed.param_groups[0]["lr"] == 0.1 and resumed.param_groups[0]["balancings"] == 5
    run(resumed, given[5:])
    assert torch.equal(raw(loaded.weight), raw(whole.weight))
    for name, value in optimizer.states().items():
        assert torch.equal(raw(value), raw(resumed.states()[name])), name
    with pytest.raises(ValueError, match=r"RowSinkhorn.load_safetensors: momentum must stay 0.95"):
        RowSinkhorn(trainable(dtype=dtype)).load_safetensors(tmp_path / "rows.safetensors")


def test_a_frozen_table_stands(tmp_path):
    table, optimizer, old, new = behind()
    table.requires_row_grad_(False)
    optimizer.step()
    assert int(optimizer.states()["clock"]) == 2 and torch.equal(table.weight, new)
    table.requires_row_grad_()
    lookup(table, torch.tensor([1])).sum().backward()
    optimizer.step()
    assert int(optimizer.states()["clock"]) == 3


def test_one_of_these_a_table():
    table = trainable()
    first = RowSinkhorn(table)
    with pytest.raises(ValueError, match=r"^RowSinkhorn: EngramTable\(.*\) has another RowSinkhorn; close that first"):
        RowSinkhorn(table)
    first.close()
    second = RowSinkhorn(table)
    first.close()  # which is not the table's any longer
    assert table.put_off is not None and second.states()["taken"].eq(0).all()
    del second  # an optimizer that is gone puts nothing off
    third = RowSinkhorn(table)
    third.close()
    assert table.put_off is None
    RowAdagrad(table)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(balancings=4), "balancings must be a positive odd int, got 4"),
        (dict(balancings=0), "balancings must be a positive odd int, got 0"),
        (dict(momentum=1.0), "momentum must be a finite number of at least 0 and below 1, got 1.0"),
        (dict(threshold=-1), "threshold must be a finite number of at least 0, got -1"),
        (dict(update_rms=float("nan")), "update_rms must be a finite number of at least 0, got nan"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=f"^RowSinkhorn: {words}"):
        RowSinkhorn(trainable(), **options)


def test_momentum_stays_and_rates_may_change():
    table = trainable()
    optimizer = train(table, gradients(2))
    optimizer.param_groups[0]["lr"] = 0.05
    table.accumulate_row_grad(torch.tensor([2]), torch.ones(1, WIDTH, dtype=torch.float64))
    optimizer.step()
    rates = optimizer.states()["rates"][[1, 2, 3]]
    torch.testing.assert_close(rates, 0.2 * math.sqrt(WIDTH) * torch.tensor([0.1, 0.1, 0.05]).double())
    optimizer.param_groups[0]["momentum"] = 0.9
    before = table.weight.clone()
    with pytest.raises(ValueError, match=r"^RowSinkhorn.step: momentum must stay 0.8.* got 0.9; give cycle_momentum=F"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_groups_and_tables_added_later():
    """Each table takes its moves with the options of its own group."""
    tables = [trainable() for _ in range(3)]
    optimizer = RowSinkhorn([dict(params=tables[:1], lr=0.5), dict(params=tables[1:2])], **OPTIONS)
    optimizer.add_param_group(dict(params=tables[2], lr=0.2))
    before = [table.weight.clone() for table in tables]
    for table in tables:
        table.accumulate_row_grad(torch.tensor([1, 2]), torch.randn(2, WIDTH, dtype=torch.float64))
    optimizer.step()
    for table, old, lr in zip(tables, before, (0.5, 0.1, 0.2), strict=True):
        moved = (table.weight - old)[1:3].square().mean(1).sqrt()
        torch.testing.assert_close(moved, torch.full((2,), lr * 0.2, dtype=torch.float64))
        assert table.put_off.due is False
    with pytest.raises(ValueError, match=r"^RowSinkhorn.add_param_group: momentum must stay 0.8"):
        optimizer.add_param_group(dict(params=trainable(), momentum=0.5))
