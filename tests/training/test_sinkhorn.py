"""Balanced momentum: the dense rule by hand, row-sparse steps against it, kernels, and moves that are put off."""

import copy
import math

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, RowSinkhorn, lookup
from engram_kernels.reference.training import sinkhorn as reference
from engram_kernels.tables.gradient import RowGradient, row_gradient
from engram_kernels.testing import tolerances
from engram_kernels.testing.tables import place

ROWS, WIDTH = 23, 8
OPTIONS = dict(lr=0.1, momentum=0.8, update_rms=0.2, threshold=0.05, balancings=5, eps=1e-20)
DEFAULTS = dict(lr=0.1, momentum=0.95, update_rms=0.18, threshold=1e-3, balancings=11, eps=1e-20)


CPU = torch.device("cpu")


def trainable(device=CPU, dtype=torch.float64, rows=ROWS, width=WIDTH, placement=None):
    return place(torch.randn(rows, width).to(dtype), None, device, placement).requires_row_grad_()


def gradients(steps, rows=ROWS, width=WIDTH, per_step=9, dtype=torch.float64):
    """Ids with duplicates, of which low ones come often, and gradients whose columns differ in size."""
    sizes = torch.linspace(0.2, 3, width, dtype=dtype)
    return [
        ((torch.rand(per_step).square() * rows).long(), torch.randn(per_step, width, dtype=dtype) * sizes)
        for _ in range(steps)
    ]


def train(table, given, **options):
    """The optimizer after steps over ``given``."""
    optimizer = RowSinkhorn(table, **OPTIONS | options)
    for ids, grad in given:
        table.accumulate_row_grad(ids.to(table.anchor.device), grad.to(table.anchor.device))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def dense_gradient(ids, grad, rows):
    return grad.new_zeros(rows, grad.shape[1]).index_add_(0, ids, grad)


def test_the_dense_rule_by_hand():
    """One element after the other, in Python's floats; one row is below the threshold and one column empty."""
    rows, width = 5, 3
    weight, momentum, grad = (torch.randn(rows, width, dtype=torch.float64) for _ in range(3))
    momentum[1], grad[1] = 1e-4, 1e-4
    momentum[:, 2] = grad[:, 2] = 0
    m, g = momentum.tolist(), grad.tolist()
    m = [[0.8 * m[i][j] + (1 - 0.8) * g[i][j] for j in range(width)] for i in range(rows)]
    u = [[0.8 * m[i][j] + (1 - 0.8) * g[i][j] for j in range(width)] for i in range(rows)]
    norms = [math.sqrt(sum(x * x for x in row)) for row in u]
    u = [row if norm > 0.05 * sum(norms) / rows else [0.0] * width for row, norm in zip(u, norms, strict=True)]
    assert u[1] == [0, 0, 0]
    for k in range(5):
        if k % 2 == 0:
            lengths = [[math.sqrt(sum(x * x for x in row)) + 1e-20] * width for row in u]
        else:
            sums = [math.sqrt(sum(u[i][j] ** 2 for i in range(rows))) + 1e-20 for j in range(width)]
            lengths = [sums] * rows
        u = [[x / length for x, length in zip(*pair, strict=True)] for pair in zip(u, lengths, strict=True)]
    expected = weight.numpy() - 0.1 * 0.2 * math.sqrt(width) * np.array(u)
    moved = weight.clone()
    reference.sinkhorn(moved, momentum, grad, **OPTIONS)
    np.testing.assert_allclose(moved.numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(momentum.numpy(), m, rtol=1e-13)
    # Each row that moves does so by lr gamma, root mean square.
    sizes = (moved - weight).square().mean(1).sqrt()
    torch.testing.assert_close(
        sizes, torch.tensor([0.02, 0, 0.02, 0.02, 0.02], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_balancing_balances():
    """After the default eleven, rows have norm 1 and columns the same norm, to the digits that eleven give."""
    update = torch.randn(2000, 16, dtype=torch.float64) * torch.logspace(-2, 2, 16) * torch.rand(2000, 1)
    out = reference.balanced(update, threshold=0, balancings=11, eps=1e-20)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2000).double(), rtol=1e-12, atol=0)
    assert (out.square().sum(0) / (2000 / 16) - 1).abs().max() < 0.02
    once = reference.balanced(update, threshold=0, balancings=1, eps=1e-20)
    assert (once.square().sum(0) / (2000 / 16) - 1).abs().max() > 5


def test_row_steps_equal_dense_ones_where_every_row_has_a_gradient():
    table = trainable()
    dense, momentum = table.weight.clone(), torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    given = [(torch.arange(ROWS), torch.randn(ROWS, WIDTH, dtype=torch.float64)) for _ in range(20)]
    train(table, given)
    for _, grad in given:
        reference.sinkhorn(dense, momentum, grad, **OPTIONS)
    torch.testing.assert_close(table.weight, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [OPTIONS, DEFAULTS], ids=["few steps kept", "defaults"])
def test_moves_put_off_are_those_of_each_step(options):
    """Exact but for the columns' scales: the dense loop, given each step's scales, moves every row in every step.

    Rows are read now and then, at most a few, so that others stay behind; in the end all are.
    """
    table = trainable()
    weight, momentum, given = table.weight.clone(), torch.zeros(ROWS, WIDTH, dtype=torch.float64), gradients(60)
    optimizer, beta = RowSinkhorn(table, **options), options["momentum"]
    kept = optimizer.states()["columns"]
    assert len(kept) == reference.steps_remembered(beta)
    still = 0
    for step, (ids, grad) in enumerate(given, 1):
        table.accumulate_row_grad(ids, grad)
        optimizer.step()
        optimizer.zero_grad()
        g = dense_gradient(ids, grad, ROWS)
        momentum = beta * momentum + (1 - beta) * g
        update = beta * momentum + (1 - beta) * g
        norms = update.norm(dim=1, keepdim=True)
        live = norms > options["threshold"] * norms.mean()
        still += int((~live & (norms > 0)).sum())
        turned = torch.where(live, update * kept[step % len(kept)], 0)
        size = options["lr"] * options["update_rms"] * math.sqrt(WIDTH)
        weight -= size * torch.where(live, turned / turned.norm(dim=1, keepdim=True), 0)
        if step % 7 == 0:
            some = torch.randint(0, ROWS, (4,))
            torch.testing.assert_close(lookup(table, some), weight[some], rtol=1e-9, atol=1e-9)
    behind = optimizer.states()["taken"]
    assert len(behind.unique()) > 5, "rows must be behind by different numbers of steps"
    assert options is DEFAULTS or still > 20, "thresholds must have kept rows from moving"
    torch.testing.assert_close(table.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(optimizer.states()["momentum"], momentum, rtol=1e-9, atol=1e-12)


def test_columns_from_rows_with_a_gradient_are_close_to_those_of_all():
    """What the sparse step approximates, bounded in each step and measured over many.

    Where the ratios of two sets of scales lie within [a, b], two unit vectors that they turn are at most
    arccos(2 sqrt(ab) / (a + b)) apart (Kantorovich), whatever the row.
    """
    rows, width, steps = 3000, 16, 120
    torch.manual_seed(1)
    table = trainable(rows=rows, width=width)
    before = table.weight.clone()
    dense, momentum = before.clone(), torch.zeros_like(before)
    optimizer = RowSinkhorn(table, **DEFAULTS)
    for ids, grad in gradients(steps, rows, width, per_step=600):
        table.accumulate_row_grad(ids, grad)
        optimizer.step()
        optimizer.zero_grad()
        old, g = dense.clone(), dense_gradient(ids, grad, rows)
        reference.sinkhorn(dense, momentum, g, **DEFAULTS)
    # The last step: what the dense scales turned each row to against what ours would have.
    update = 0.95 * momentum + 0.05 * g
    moved = (old - dense) / (0.1 * 0.18 * math.sqrt(width))
    live = moved.norm(dim=1) > 0.5
    theirs = moved[live] / update[live]
    theirs = (theirs / theirs[:, :1])[0]
    clock = int(optimizer.states()["clock"])
    columns = optimizer.states()["columns"]
    ours = columns[clock % len(columns)]
    ratio = ours / ours[0] / theirs
    a, b = float(ratio.min()), float(ratio.max())
    turned = torch.nn.functional.normalize(update[live] * ours, dim=1)
    cosine = (turned * moved[live]).sum(1)
    bound = 2 * math.sqrt(a * b) / (a + b)
    assert bound > 0.99 and float(cosine.min()) >= bound - 1e-12
    apart = float((table.weight - dense).norm() / (dense - before).norm())
    assert 1e-6 < apart < 0.05, apart


@pytest.mark.kernel
def test_rows_beyond_32_bits_move_alone(device):
    """A table of 2^36 bytes and as much momentum: steps and lookups commit the pages of the rows that they touch."""
    if device.type == "cuda":
        pytest.skip("registering commits every page")
    rows = 2**36 // 1024
    with EngramTable.empty(rows, 256, "float32", placement="host") as table:
        optimizer = RowSinkhorn(table.requires_row_grad_(), **DEFAULTS)
        ids = torch.tensor([0, rows // 2, rows - 1])
        for these in (ids, ids[1:], ids[:1]):
            optimizer.zero_grad()
            lookup(table, these).sum().backward()
            optimizer.step()
        moved = lookup(table, ids).detach()
        torch.testing.assert_close(moved, torch.full((3, 256), -3 * 0.1 * 0.18))
        assert optimizer.states()["taken"][ids].tolist() == [3, 3, 3]
        with open("/proc/self/smaps_rollup") as lines:
            resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        assert resident < 8 << 20, "kB"
        optimizer.close()


def pair(dtype, width, steps, device, small=1.0, **options):
    """Kernel and reference over equal tables: two optimizers' rows and states, the reference's on the CPU."""
    torch.manual_seed(3)
    ours = trainable(device, dtype, width=width)
    theirs = ours.weight.cpu().clone()
    given = gradients(steps, width=width, dtype=torch.float32)
    for ids, grad in given:
        grad[ids % 5 == 1] *= small
    optimizer = train(ours, given, **options)
    states = {name: tensor.cpu().zero_() for name, tensor in copy.deepcopy(optimizer.states()).items()}
    state, extra = reference.SinkhornState(**states), OPTIONS | dict(seed=0) | options
    for step, (ids, grad) in enumerate(given, 1):
        gradient = row_gradient(ids.to(device), grad.to(device), ROWS)
        moved = RowGradient(*(part.cpu() for part in list(vars(gradient).values())[:4]), ROWS)
        reference.row_sinkhorn(theirs, state, moved, factor=torch.ones(()), step=step, **extra)
    ours.take_moves()
    reference.take_moves(theirs, state, torch.arange(ROWS), momentum=extra["momentum"], eps=extra["eps"], seed=0)
    return optimizer, ours.weight.cpu(), states, theirs


@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 80), (torch.float16, 256)])
def test_kernel_equals_reference(device, dtype, width):
    """The same float32 operations but for the order of sums. In half types few rows round to the neighbour."""
    optimizer, ours, state, theirs = pair(dtype, width, 6 if dtype == torch.float32 else 2, device)
    # A norm is within (R + M) units; each of 6 steps has as many balancings again.
    close = dict(rtol=200 * tolerances.U32, atol=1e-6)
    for name, value in optimizer.states().items():
        torch.testing.assert_close(value.cpu(), state[name], **close)
    assert len(optimizer.states()["taken"].unique()) == 2, "0 and the clock, once all have taken their moves"
    step = tolerances.UNIT[dtype] * 2 if dtype != torch.float32 else 0
    error = (ours.double() - theirs.double()).abs()
    bound = torch.maximum(ours.double().abs(), theirs.double().abs()) * (step + 1e-6) + 1e-6
    assert (error <= bound).all(), float((error - bound).max())
    assert (error > 0).double().mean() < (1 if dtype == torch.float32 else 0.02)


@pytest.mark.kernel
def test_rows_below_the_threshold_rest(device):
    """A high one: rows with a gradient rest too, and rows without one stop as their momentum shrinks."""
    optimizer, ours, state, theirs = pair(torch.float32, 16, 8, device, small=1e-3, threshold=0.9)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(optimizer.states()["momentum"].cpu(), state["momentum"], rtol=1e-4, atol=1e-6)
    assert torch.equal(optimizer.states()["taken"].cpu(), state["taken"])
    assert optimizer.states()["thresholds"][1:9].gt(0).all()


@pytest.mark.kernel
def test_ids_that_are_no_row_move_none(device):
    """Nor do rows that never had a gradient."""
    table = trainable(device, torch.float32)
    optimizer = train(table, gradients(3, ROWS - 5, dtype=torch.float32))
    with table.as_it_stands():
        before = table.weight.clone()
    taken = optimizer.states()["taken"].tolist()
    behind = [row for row in range(ROWS) if 0 < taken[row] < 3]
    assert behind
    ids = torch.tensor([behind[0], -1, ROWS, behind[0], ROWS - 1, -1], device=device)
    found = lookup(table, ids).detach()
    with table.as_it_stands():
        after = table.weight.clone()
    assert (after != before).any(1).nonzero()[:, 0].tolist() == behind[:1]
    assert optimizer.states()["taken"][ROWS - 1] == 0
    assert torch.equal(found[[0, 3, 4]], after[[behind[0], behind[0], ROWS - 1]]) and not found[[1, 2, 5]].any()


@pytest.mark.kernel
def test_equal_seeds_give_equal_bits(device):
    first, again, other = (pair(torch.bfloat16, 16, 3, device, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.kernel
def test_a_bad_row_stays_as_it_was(device):
    """Nor does its gradient reach the scales of others."""
    tables = [trainable(device, torch.float32) for _ in range(2)]
    tables[1].weight.copy_(tables[0].weight)
    optimizers = [RowSinkhorn(table, **OPTIONS) for table in tables]
    ids, grad = torch.tensor([3, 5, 7, 9]), torch.randn(4, WIDTH)
    bad = grad.clone()
    bad[1, 2] = float("nan")
    before = tables[0].weight.clone()
    for table, optimizer, keep, given in zip(tables, optimizers, ([0, 1, 2, 3], [0, 2, 3]), (bad, grad), strict=True):
        table.accumulate_row_grad(ids[keep].to(device), given[keep].to(device))
        optimizer.step()
    assert torch.equal(tables[0].weight[5], before[5])
    # Sums of columns are added in another order, as rows lie elsewhere.
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-5, atol=1e-6)
    assert [optimizer.skipped for optimizer in optimizers] == [1, 0] and optimizers[0].states()["taken"][5] == 0


@pytest.mark.kernel
def test_no_row_with_news_leaves_no_trace_in_the_scales(device):
    """A step of zeros moves what momentum moves, by the scales before it."""
    table, given = trainable(device, torch.float32), gradients(3, ROWS - 1, dtype=torch.float32)
    optimizer = train(table, given)
    state = optimizer.states()
    columns, rows = state["columns"].clone(), table.weight.clone()
    table.accumulate_row_grad(torch.tensor([ROWS - 1], device=device), torch.zeros(1, WIDTH, device=device))
    optimizer.step()
    assert torch.equal(state["columns"][4], columns[3]) and int(state["clock"]) == 4
    assert not torch.equal(table.weight, rows) and torch.isfinite(table.weight).all()
