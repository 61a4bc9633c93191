"""Row-wise optimizers: references against scalar arithmetic, kernels against references, and torch's own tools."""

import copy
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, RowAdagrad, RowAdam, lookup
from engram_kernels.reference.training import update as reference
from engram_kernels.tables.gradient import row_gradient
from engram_kernels.testing import tolerances
from engram_kernels.testing.tables import place

ROWS, WIDTH, STEPS = 13, 8, 4
# An eps that shows where it is added.
OPTIONS = dict(lr=0.1, eps=1e-2, weight_decay=0.05)


def trainable(device, dtype=torch.float32, rows=ROWS, width=WIDTH, placement=None):
    return place(torch.randn(rows, width).to(dtype), None, device, placement).requires_row_grad_()


def gradients(count=STEPS, width=WIDTH, per_step=9):
    """Ids with duplicates and their gradients, for each step; some rows come once, some in every step."""
    return [(torch.randint(0, ROWS - 2, (per_step,)), torch.randn(per_step, width)) for _ in range(count)]


def run(kind, table, given, **options):
    """The optimizer after steps over ``given``."""
    optimizer = kind(table, **OPTIONS | options)
    for ids, grad in given:
        table.accumulate_row_grad(ids.to(table.anchor.device), grad.to(table.anchor.device))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def by_hand(kind, weight, given):
    """One row and one element after the other, in Python's floats: ``(rows, state as a dict by name)``."""
    rows = weight.double().tolist()
    width = len(rows[0])
    state = dict(sums=[0.0] * len(rows), steps=[0] * len(rows))
    state |= dict(first=np.zeros((len(rows), width)), second=np.zeros((len(rows), width)))
    lr, eps, decay = (OPTIONS[name] for name in ("lr", "eps", "weight_decay"))
    for ids, grad in given:
        for row in sorted(set(ids.tolist())):
            total = [sum(float(grad[j, i]) for j in range(len(ids)) if int(ids[j]) == row) for i in range(width)]
            state["sums"][row] += sum(g * g for g in total) / width
            state["steps"][row] += 1
            for i, g in enumerate(total):
                if kind is RowAdagrad:
                    move = g / (math.sqrt(state["sums"][row]) + eps)
                else:
                    first, second, t = state["first"][row], state["second"][row], state["steps"][row]
                    first[i] = 0.9 * first[i] + 0.1 * g
                    second[i] = 0.999 * second[i] + 0.001 * g * g
                    move = first[i] / (1 - 0.9**t) / (math.sqrt(second[i] / (1 - 0.999**t)) + eps)
                rows[row][i] = (1 - lr * decay) * rows[row][i] - lr * move
    return np.array(rows), state


@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_the_rule_by_hand(device, kind, dtype):
    table, given = trainable(device, dtype), gradients()
    before = table.weight.clone()
    given = [(ids, grad.to(dtype)) for ids, grad in given]
    optimizer = run(kind, table, given)
    rows, state = by_hand(kind, before, given)
    close = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.weight.numpy(), rows, **close)
    for name, value in optimizer.states().items():
        np.testing.assert_allclose(value.numpy(), np.array(state[name]), **close)
    assert torch.equal(table.weight[ROWS - 2 :], before[ROWS - 2 :]), "rows without a gradient do not decay"


def pair(kind, dtype, device, given, **options):
    """Kernel and reference over equal tables: two optimizers and two tables, the reference's on the CPU."""
    torch.manual_seed(3)
    ours = trainable(device, dtype, width=given[0][1].shape[1])
    theirs = EngramTable.from_tensors(ours.weight.cpu().clone(), placement="cpu").requires_row_grad_()
    optimizer = run(kind, ours, given, **options)
    state = [tensor.cpu().zero_() for tensor in copy.deepcopy(list(optimizer.states().values()))]
    rule = reference.row_adagrad if kind is RowAdagrad else reference.row_adam
    extra = dict(OPTIONS, seed=options.get("seed", 0)) | (dict(betas=(0.9, 0.999)) if kind is RowAdam else {})
    extra |= dict(seed=None) if not options.get("stochastic_rounding", True) else {}
    for step, (ids, grad) in enumerate(given, 1):
        gradient = row_gradient(ids.to(device), grad.to(device), ROWS)
        moved = type(gradient)(*(part.cpu() for part in list(vars(gradient).values())[:4]), ROWS)
        rule(theirs.weight, state, moved, factor=torch.ones(()), step=step, **extra)
    return optimizer, ours.weight.cpu(), dict(zip(optimizer.states(), state, strict=True)), theirs.weight


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 80), (torch.float16, 1024)])
def test_kernel_equals_reference(device, kind, dtype, width):
    """The same float32 operations but for contraction. In half types one step, which may round to the neighbour."""
    steps = STEPS if dtype == torch.float32 else 1
    optimizer, ours, state, theirs = pair(kind, dtype, device, gradients(steps, width))
    for name, value in optimizer.states().items():
        torch.testing.assert_close(value.cpu(), state[name], rtol=STEPS * 8 * tolerances.U32, atol=0)
    step = tolerances.UNIT[dtype] * 2 if dtype != torch.float32 else 0
    error = (ours.double() - theirs.double()).abs()
    bound = torch.maximum(ours.double().abs(), theirs.double().abs()) * (step + 1e-6) + 1e-6
    assert (error <= bound).all(), float((error - bound).max())
    assert (error > 0).double().mean() < (1 if dtype == torch.float32 else 0.02)


@pytest.mark.kernel
def test_long_runs_are_corrected_for_bias_too(device):
    """Steps number 1, 100, 10,000 and 1,000,000 of a row: both sides of where the power's series ends."""
    taken = torch.tensor([0, 99, 9_999, 999_999], dtype=torch.int32)
    table = place(torch.zeros(4, WIDTH), None, device).requires_row_grad_()
    optimizer = RowAdam(table, lr=1.0, eps=0.0)
    optimizer.states()["steps"].copy_(taken)
    grad = torch.rand(4, WIDTH) + 0.5
    table.accumulate_row_grad(torch.arange(4, device=device), grad.to(device))
    optimizer.step()
    t, g = taken.double()[:, None] + 1, grad.double()
    expected = -(0.1 * g / (1 - 0.9**t)) / (0.001 * g**2 / (1 - 0.999**t)).sqrt()
    torch.testing.assert_close(table.weight.double().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_stochastic_rounding_keeps_the_mean(device, kind):
    """A step of an eighth of bfloat16's spacing moves one element in eight; to nearest it would move none."""
    rows, width = 64, 64
    moved = {}
    for stochastic in (True, False):
        table = place(torch.ones(rows, width, dtype=torch.bfloat16), None, device).requires_row_grad_()
        optimizer = kind(table, lr=2.0**-10, eps=0.0, stochastic_rounding=stochastic, seed=5)
        grad = -torch.ones(rows, width, device=device)  # of mean square 1: each element grows by lr
        table.accumulate_row_grad(torch.arange(rows, device=device), grad)
        optimizer.step()
        values = table.weight.float().cpu()
        assert set(values.unique().tolist()) <= {1.0, 1.0 + 2.0**-7}
        moved[stochastic] = float((values > 1).double().mean())
    # Four standard deviations of 4,096 draws.
    assert moved[False] == 0 and abs(moved[True] - 0.125) < 4 * math.sqrt(0.125 * 0.875 / (rows * width))


@pytest.mark.kernel
def test_equal_seeds_give_equal_bits(device):
    given = gradients()
    first, again, other = (pair(RowAdam, torch.bfloat16, device, given, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_random_bits_are_splitmix64():
    """The generator's published first outputs for seed 1234567 (the reference code of its authors)."""
    got = reference.random_bits(1234567, torch.arange(3))
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(bits) % 2**64 for bits in got] == wanted


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_as_it_was(device, kind, bad):
    table = trainable(device)
    optimizer = kind(table, **OPTIONS)
    ids, grad = torch.tensor([3, 5, 7, 5]), torch.randn(4, WIDTH)
    grad[1, 2] = bad
    before = table.weight.clone()
    table.accumulate_row_grad(ids.to(device), grad.to(device))
    optimizer.step()
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 7] and optimizer.skipped == 1
    for value in optimizer.states().values():
        assert value[5].eq(0).all() and value[3].ne(0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_clipping_reaches_the_rows(device, kind):
    """clip_grad_norm_ over parameters and anchor scales both by one factor, as over a dense table."""
    table, parameter = trainable(device), torch.nn.Parameter(torch.randn(5, device=device))
    dense = torch.nn.Parameter(table.weight.clone())
    ids, factor = torch.randint(0, ROWS, (9,), device=device), torch.randn(9, WIDTH, device=device)
    ((lookup(table, ids) * factor).sum() + (parameter**2).sum()).backward()
    total = torch.nn.utils.clip_grad_norm_([parameter, table.anchor], 0.5)
    other = torch.nn.Parameter(parameter.detach().clone())
    ((dense[ids] * factor).sum() + (other**2).sum()).backward()
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_([other, dense], 0.5))
    torch.testing.assert_close(parameter.grad, other.grad)
    optimizer = kind(table, lr=0.1, eps=0.5)
    optimizer.step()
    g = dense.grad[ids.unique()]
    # The first step of Adam divides by the gradient's own magnitude.
    scale = g.square().mean(1, keepdim=True).sqrt() if kind is RowAdagrad else g.abs()
    torch.testing.assert_close(table.weight[ids.unique()], dense.detach()[ids.unique()] - 0.1 * g / (scale + 0.5))


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(device, overflow):
    """A scaled loss moves rows as an unscaled one; an infinite gradient skips the step and lowers the scale."""
    tables = [trainable(device) for _ in range(2)]
    tables[1].weight.copy_(tables[0].weight)
    before = tables[0].weight.clone()
    ids, factor = torch.randint(0, ROWS, (9,)), torch.randn(9, WIDTH)
    if overflow:
        factor[0, 0] = float("inf")
    optimizers = [RowAdagrad(table, lr=0.1) for table in tables]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((lookup(tables[0], ids) * factor).sum()).backward()
    scaler.step(optimizers[0])
    scaler.update()
    (lookup(tables[1], ids) * factor).sum().backward()
    optimizers[1].step()
    if overflow:
        assert torch.equal(tables[0].weight, before) and scaler.get_scale() == 512
        assert optimizers[1].skipped == 1 and not torch.equal(tables[1].weight, before)
    else:
        # 1024 is a power of two, so that only the norm is rounded otherwise.
        torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=1e-7)
        assert scaler.get_scale() == 1024


def test_schedulers_groups_and_closures(device):
    tables = [trainable(device) for _ in range(2)]
    optimizer = RowAdagrad(tables, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.5
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = sum(lookup(table, torch.tensor([1])).sum() for table in tables)
        loss.backward()
        return loss

    before = [table.weight.clone() for table in tables]
    assert optimizer.step(closure).requires_grad and optimizer.steps == 1
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for table, old in zip(tables, before, strict=True):
        torch.testing.assert_close(old[1] - table.weight[1], torch.full((WIDTH,), 0.5))
    optimizer.zero_grad()
    again = [table.weight.clone() for table in tables]
    optimizer.step()
    assert all(torch.equal(table.weight, old) for table, old in zip(tables, again, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_a_step_touches_its_own_rows_alone(device, kind):
    """A table of 2^36 bytes and up to twice as much state, of which a step commits the pages that it writes."""
    if device.type == "cuda":
        pytest.skip("registering commits every page")
    rows = 2**36 // 1024
    with EngramTable.empty(rows, 256, "float32", placement="host") as table:
        table.requires_row_grad_()
        optimizer = kind(table)
        ids = torch.tensor([0, rows // 2, rows - 1])
        lookup(table, ids).sum().backward()
        optimizer.step()
        assert (table.weight[ids] < 0).all() and all(value[ids].ne(0).all() for value in optimizer.states().values())
        with open("/proc/self/smaps_rollup") as lines:
            resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        assert resident < 8 << 20, "kB"
        optimizer.close()
        with pytest.raises(ValueError, match=f"{kind.__name__}.step: the optimizer is closed"):
            optimizer.step()
        optimizer.close()


@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_shared_tables(kind):
    """The writer's steps are what another process's attached table reads; the states are the writer's own."""
    before = torch.randn(ROWS, WIDTH)
    name = f"rows-{os.getpid()}-{kind.__name__}"
    with EngramTable.from_tensors(before, placement="shared", name=name) as table:
        optimizer = kind(table.requires_row_grad_())
        lookup(table, torch.tensor([3, 5])).sum().backward()
        optimizer.step()
        with EngramTable.attach(name, ROWS, WIDTH, "float32", timeout=1800) as other:
            assert (other.weight != before).any(1).nonzero().flatten().tolist() == [3, 5]
            with pytest.raises(ValueError, match="was attached, and only the process that published it may move rows"):
                kind(other.requires_row_grad_())
        optimizer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=-1.0), "RowAdam: lr must be a finite number of at least 0, got -1.0"),
        (dict(eps=float("nan")), "RowAdam: eps must be a finite number"),
        (dict(weight_decay=float("inf")), "RowAdam: weight_decay must be a finite number"),
        (dict(betas=(0.9, 1.0)), "RowAdam: betas must be a pair of numbers within 0 <= beta < 1"),
        *[
            (dict(betas=x), "RowAdam: betas must be a pair")
            for x in ((0.9,), 0.9, None, (0.9, 0.9, 0.9), "ab", (0.1, "0"))
        ],
        *[(dict(seed=x), "RowAdam: seed must be an int, got") for x in (0.5, None, "7", 2**63, True)],
        *[(dict(lr=x), "RowAdam: lr must be a finite number of at least 0") for x in ("1", None, 10**400, [0.1], True)],
        (
            dict(state_placement="disk"),
            "RowAdam: state_placement must be one of .* or None, got 'disk'",
        ),
    ],
)
def test_bad_options(device, options, message):
    with pytest.raises(ValueError, match=message):
        RowAdam(trainable(device), **options)


def closed(table, optimizer):
    table.close()


def freed(table, optimizer):
    table.weight.untyped_storage().resize_(0)


def freed_state(table, optimizer):
    optimizer.states(1)["first"].untyped_storage().resize_(0)


def bad_rate(table, optimizer):
    optimizer.param_groups[0]["lr"] = float("nan")


def bad_betas(table, optimizer):
    optimizer.param_groups[0]["betas"] = (0.9,)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (closed, "the table is closed"),
        (freed, "rows or scales was moved or freed"),
        (freed_state, "the memory of first was moved or freed"),
        (bad_rate, "lr must be a finite number"),
        (bad_betas, "betas must be a pair"),
    ],
)
def test_a_step_that_fails_moves_nothing(spoil, message):
    """Over two tables of which the second cannot be moved."""
    first, second = (trainable(torch.device("cpu")) for _ in range(2))
    optimizer = RowAdam([first, second], **OPTIONS)
    for table in (first, second):
        table.accumulate_row_grad(torch.tensor([1, 3]), torch.ones(2, WIDTH))
    before = first.weight.clone(), {name: x.clone() for name, x in optimizer.states(0).items()}
    version = first.version
    spoil(second, optimizer)
    with pytest.raises(ValueError, match=f"^RowAdam.step: .*{message}"):
        optimizer.step()
    assert torch.equal(first.weight, before[0]) and optimizer.steps == 0 and first.version == version
    assert all(torch.equal(x, before[1][name]) for name, x in optimizer.states(0).items())


def test_bad_calls(device):
    optimizer = RowAdam(trainable(device))
    for error, words, call in (
        (TypeError, "step: closure must be a function or None, got int 5", lambda: optimizer.step(5)),
        (TypeError, "lr must be .*, got float32", lambda: RowAdam(trainable(device), lr=torch.ones(2))),
        (ValueError, "states: index must be an int of at least 0, got -1", lambda: optimizer.states(-1)),
        (ValueError, r"states: index must be within 0\.\.0, got 1", lambda: optimizer.states(1)),
        (ValueError, "step: the optimizer is closed", lambda: (optimizer.close(), optimizer.step())),
    ):
        with pytest.raises(error, match=f"^RowAdam(\\.|: ){words}"):
            call()


def test_bad_tables(device):
    table = trainable(device)
    with pytest.raises(TypeError, match="RowAdagrad: tables must be EngramTable objects, got Tensor"):
        RowAdagrad([table.weight])
    with pytest.raises(ValueError, match="is not trainable; call requires_row_grad_"):
        RowAdagrad(place(torch.randn(3, 8), None, device))
    for tables in ([], [table, table]):
        with pytest.raises(ValueError, match="tables must be one or more different tables"):
            RowAdagrad(tables)


def test_the_guides_code_runs():
    """The page's blocks as they stand, one after the other, up to those that need a model and a prefetcher of yours."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    training, beginning, run, files, *_ = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(training, names)
    assert names["rows"].steps == 3 and names["rows"].skipped == 0 and int(names["table"].row_grad.count) > 20
    before = names["rows"]
    for block in (beginning, run, files):
        exec(block, names)
    assert names["rows"].facts() == before.facts() and names["rows"] is not before and names["step"] == 3
    assert torch.equal(names["table"].weight, before.tables[0].weight)
