"""The record of rows that changed: by steps, by lookups that take moves, and by writes that do not say which."""

import pytest
import torch

from engram_kernels import EngramTable, RowAdagrad, RowAdam, RowSinkhorn, lookup
from engram_kernels.testing.tables import place

ROWS, WIDTH = 23, 16


def recorded(device="cpu", dtype=torch.float32):
    table = place(torch.randn(ROWS, WIDTH).to(dtype), None, torch.device(device)).requires_row_grad_()
    table.record_changes()
    return table


def step(table, optimizer, ids):
    device = table.anchor_device
    table.accumulate_row_grad(torch.tensor(ids, device=device), torch.randn(len(ids), WIDTH, device=device))
    optimizer.step()
    optimizer.zero_grad()


def since(table, version):
    found = table.changed_since(version)
    return found if found is None else found.tolist()


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps(device, kind, dtype):
    """Each version has its own list; ids may repeat, and those outside the table are none."""
    table = recorded(device, dtype)
    optimizer, versions = kind(table), [table.version]
    for ids in ([3, 7, 3, 22], [0], [7, 9, -1, 40], []):
        step(table, optimizer, ids) if ids else None
        versions.append(table.version)
    assert [since(table, version) for version in versions] == [[0, 3, 7, 9, 22], [0, 7, 9], [7, 9], [], []]


@pytest.mark.kernel
def test_rows_that_are_not_noted_have_not_changed(device):
    table = recorded(device, torch.bfloat16)
    optimizer, before, version = RowAdagrad(table, lr=1.0), table.weight.clone(), table.version
    for _ in range(3):
        step(table, optimizer, torch.randint(0, ROWS, (4,)).tolist())
    changed = (table.weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == since(table, version) and 0 < len(changed) < ROWS


@pytest.mark.kernel
def test_moves_that_were_put_off(device):
    """Rows that momentum moves later change when they take their moves; all have, once the list is there."""
    check_moves(device)


def test_moves_that_were_put_off_on_a_cpu():
    """The same by torch's own writes, which do not count as those of somebody else."""
    check_moves("cpu")


def check_moves(device):
    table = recorded(device)
    optimizer = RowSinkhorn(table, lr=0.1)
    for ids in ([2, 5, 11], [5], [8]):
        step(table, optimizer, ids)
    version, before = table.version, table.weight.clone()
    assert since(table, version) is not None
    version = table.version
    step(table, optimizer, [8])
    lookup(table, torch.tensor([2], device=device))
    with table.as_it_stands():
        assert (table.weight[2] != before[2]).any() and torch.equal(table.weight[5], before[5])
        assert table.changes.since(version, table.version).tolist() == [2, 8]  # of 5 and 11 the moves are put off
    noted = since(table, version)
    changed = (table.weight != before).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= set(noted) < set(range(ROWS)) and {2, 5, 8} <= set(changed)
    assert torch.equal(before[0], table.weight[0])


def test_writes_that_do_not_say_which():
    """All rows may have changed then, until the version after them."""
    table = recorded()
    optimizer = RowAdagrad(table)
    for write in (
        lambda: table.weight[3].zero_(),
        table.rows_changed,
        lambda: table.weight.mul_(2),
    ):
        version = table.version
        step(table, optimizer, [4])
        write()
        assert since(table, version) is None
        version = table.version
        step(table, optimizer, [6])
        assert since(table, version) == [6]
        write()
        step(table, optimizer, [7])  # which finds that something was written before
        assert since(table, version) is None


def test_what_says_which():
    table = recorded().requires_row_grad_(False)
    version = table.version
    table.rows_changed(torch.tensor([[3], [5]], dtype=torch.int32))
    assert since(table, version) == [3, 5]
    version = table.version
    table.write_rows(torch.tensor([9]), torch.zeros(1, WIDTH))
    assert since(table, version) == [9]
    with table.overlay(torch.tensor([1, 2]), torch.zeros(2, WIDTH)):
        assert since(table, version) == [1, 2, 9]
        under = table.version
    assert since(table, under) == [1, 2]


def test_beginning_and_end_of_a_record():
    table = EngramTable.from_tensors(torch.zeros(ROWS, WIDTH), placement="cpu")
    with pytest.raises(ValueError, match=r"^EngramTable.changed_since: the table must note its changes"):
        table.changed_since(0)
    before = table.version
    table.rows_changed(torch.tensor([1]))
    table.record_changes()
    began = table.version
    assert since(table, began) == []
    assert since(table, before) is None
    with pytest.raises(ValueError, match=f"version must be at most the table's, {began}, got {began + 1}"):
        table.changed_since(began + 1)
    table.record_changes(False)
    with pytest.raises(ValueError, match="must note its changes"):
        table.changed_since(began)
