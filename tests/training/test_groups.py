"""Parameter groups of tables, as torch's optimizers have them: options, schedulers, saving, and what is refused."""

import json

import pytest
import torch

from engram_kernels import EngramTable, RowAdagrad, RowAdam, lookup
from engram_kernels.testing.tables import place

ROWS, WIDTH = 11, 8
#: Of three tables, the last of which has the options of all.
OPTIONS = {
    RowAdagrad: (dict(lr=0.3, weight_decay=0.1), dict(lr=0.01, eps=0.5), {}),
    RowAdam: (dict(lr=0.3, betas=(0.5, 0.9)), dict(weight_decay=0.1, eps=0.5), {}),
}
COMMON = dict(lr=0.2, seed=5)


def tables(device="cpu", count=3, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(ROWS + i, WIDTH, generator=generator).to(dtype) for i in range(count)]
    return [place(weight, None, torch.device(device)).requires_row_grad_() for weight in weights]


def grouped(kind, given, **options):
    """The last table joins later."""
    groups = [dict(params=[given[0]], **OPTIONS[kind][0]), dict(params=given[1], **OPTIONS[kind][1])]
    made = kind(groups, **COMMON | options)
    made.add_param_group(dict(params=given[2:], **OPTIONS[kind][2]))
    return made


def backward(given, step):
    generator = torch.Generator().manual_seed(step)
    for table in given:
        ids, grad = torch.randint(0, ROWS, (9,), generator=generator), torch.randn(9, WIDTH, generator=generator)
        table.zero_row_grad()
        table.accumulate_row_grad(ids.to(table.anchor.device), grad.to(table.anchor.device))


def steps(optimizers, given, begin=0, end=3):
    for step in range(begin, end):
        backward(given, step)
        for optimizer in optimizers:
            optimizer.step()


def same(one, other):
    return all(torch.equal(a.weight, b.weight) for a, b in zip(one, other, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
def test_a_group_moves_as_by_an_optimizer_of_its_own(device, kind):
    """Bit for bit, whether its options came with the constructor, later, or from all groups."""
    together, alone = tables(device), tables(device)
    steps([grouped(kind, together)], together)
    steps([kind(t, **COMMON | each) for t, each in zip(alone, OPTIONS[kind], strict=True)], alone)
    assert same(together, alone)
    plain = tables(device)
    steps([kind(plain, **COMMON)], plain)
    assert [torch.equal(a.weight, b.weight) for a, b in zip(together, plain, strict=True)] == [False, False, True]


def test_what_a_group_holds():
    given = tables()
    made = grouped(RowAdam, given)
    assert [len(group["params"]) for group in made.param_groups] == [1, 1, 1] and made.tables == tuple(given)
    assert [group["lr"] for group in made.param_groups] == [0.3, 0.2, 0.2]
    assert [group["betas"] for group in made.param_groups] == [(0.5, 0.9), (0.9, 0.999), (0.9, 0.999)]
    assert made.states(2)["first"].shape == (ROWS + 2, WIDTH)
    assert made.state[given[1].anchor] is made.states(1)


def test_schedules_by_group():
    """Of lambdas, one for each group: a factor of 0 leaves its table at rest, and its state goes on."""
    given = tables()
    made = grouped(RowAdagrad, given)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, [lambda _: 0.0, lambda step: 0.5**step, lambda _: 1.0])
    before = given[0].weight.clone()
    for step in range(3):
        steps([made], given, step, step + 1)
        scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.01 / 8, 0.2]
    assert torch.equal(given[0].weight, before) and made.states(0)["sums"].any()
    assert not torch.equal(given[1].weight, tables()[1].weight)
    torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=4).step()


@pytest.mark.parametrize("kind", [RowAdagrad, RowAdam])
@pytest.mark.parametrize("way", ["file", "dict"])
def test_resuming_equals_no_stop(tmp_path, kind, way):
    """A rate that a scheduler has moved in one group, and states of all."""

    def run(begin, end, given, made):
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, [lambda step: 1 / (step + 1), lambda _: 1.0, lambda _: 1.0])
        for step in range(begin, end):
            steps([made], given, step, step + 1)
            if end - begin > 1:
                scheduler.step()
        return made

    whole, parts = tables(), tables()
    run(0, 3, whole, grouped(kind, whole))
    saved = run(0, 2, parts, grouped(kind, parts))
    path, content = saved.save_safetensors(tmp_path), saved.state_dict()
    resumed = grouped(kind, parts, seed=1, lr=9.0)
    resumed.load_safetensors(path) if way == "file" else resumed.load_state_dict(content)
    rates = [group["lr"] for group in resumed.param_groups]
    assert rates == [group["lr"] for group in saved.param_groups] and rates[0] == pytest.approx(0.1)
    assert [group["params"] for group in resumed.param_groups] == [[table.anchor] for table in parts]
    steps([resumed], parts, 2, 3)
    assert same(whole, parts)


def rewritten(path, change):
    """The file with another header of the optimizer."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["row_optimizer"])
    change(facts)
    save_file(load_file(path), path, metadata | {"row_optimizer": json.dumps(facts)})
    return path


def test_files_from_before_there_were_groups(tmp_path):
    given = tables()
    made = RowAdam(given, **COMMON, betas=(0.5, 0.75))
    steps([made], given)

    def old(facts):
        (group,) = facts.pop("groups")
        assert group.pop("params") == [0, 1, 2]
        facts["group"] = group

    other = RowAdam(given)
    other.load_safetensors(rewritten(made.save_safetensors(tmp_path), old))
    assert other.facts() == made.facts() and other.param_groups[0] == made.param_groups[0]
    assert all(torch.equal(other.states(2)[name], value) for name, value in made.states(2).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups.pop(), "expected 3 parameter groups, got 2"),
        (lambda groups: groups[0].update(params=[1]), r"expected a parameter group of tables \[0\], got \[1\]"),
        (lambda groups: groups[2].pop("params"), r"expected parameter groups of .*params, got none of \['params'\]"),
        (lambda groups: groups[1].pop("betas"), r"got none of \['betas'\]"),
        (lambda groups: groups[2].update(lr=-1), "lr must be a finite number of at least 0"),
        (lambda groups: groups[2].update(betas=5), "betas must be a pair"),
        (lambda groups: groups.__setitem__(0, None), r"got none of \['lr', 'betas'|param_groups'\]\[0\] must be"),
    ],
)
def test_groups_that_do_not_fit_change_nothing(tmp_path, change, message):
    given = tables()
    made = grouped(RowAdam, given)
    steps([made], given)
    before, group = made.facts(), dict(made.param_groups[0])
    path = rewritten(grouped(RowAdam, tables()).save_safetensors(tmp_path), lambda facts: change(facts["groups"]))
    content = grouped(RowAdam, tables()).state_dict()
    change(content["param_groups"])
    for load in (lambda: made.load_safetensors(path), lambda: made.load_state_dict(content)):
        with pytest.raises((ValueError, TypeError), match=f"^RowAdam.load_.*: .*{message}"):
            load()
    assert made.facts() == before and made.param_groups[0] == group and made.states(1)["first"].any()


def test_groups_that_are_refused():
    given = tables(count=2)
    made = RowAdam(given[:1])
    frozen, spare = tables(count=2)
    frozen.requires_row_grad_(False)
    fp8 = EngramTable.empty(3, 32, "e4m3_ue8m0", placement="cpu")
    for group, error, message in (
        ({}, TypeError, r"param_group\['params'\] must be a sequence, got NoneType"),
        (dict(params=[spare.anchor]), TypeError, r"param_group\['params'\] must be EngramTable objects, got Tensor"),
        (dict(params=[]), ValueError, "must be one or more different tables"),
        (dict(params=[given[0]]), ValueError, "must be one or more different tables"),
        (dict(params=[spare, spare]), ValueError, "must be one or more different tables"),
        (dict(params=frozen), ValueError, r"is not trainable; call requires_row_grad_\(\) on it first"),
        (dict(params=fp8), ValueError, "is not trainable"),
        (dict(params=spare, lr=-1), ValueError, "lr must be a finite number of at least 0, got -1"),
        (dict(params=spare, betas=(1, 0)), ValueError, "betas must be a pair"),
    ):
        with pytest.raises(error, match=f"^RowAdam.add_param_group: .*{message}"):
            made.add_param_group(group)
        constructor = message.replace(r"param_group\['params'\]", "tables")
        with pytest.raises(error, match=f"^RowAdam: .*{constructor}"):
            RowAdam([dict(params=given[0]), group])
    with pytest.raises(TypeError, match="^RowAdam: tables must be EngramTable objects, got dict"):
        RowAdam([spare, dict(params=given[0])])
    assert len(made.param_groups) == 1 and made.tables == (given[0],)
    steps([made], given[:1])
    made.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="^RowAdam.step: lr must be a finite number"):
        steps([made], given[:1])
    made.close()
    with pytest.raises(ValueError, match="^RowAdam.add_param_group: the optimizer is closed"):
        made.add_param_group(dict(params=spare))


def test_a_bad_rate_of_one_group_moves_none():
    given = tables()
    made = grouped(RowAdagrad, given)
    made.param_groups[2]["eps"] = -1.0
    with pytest.raises(ValueError, match="^RowAdagrad.step: eps must be a finite number of at least 0, got -1.0"):
        steps([made], given)
    assert same(given, tables()) and made.steps == 0


def test_frozen_tables_of_a_group():
    """One is passed over while it is frozen, others of its group and of other groups move on; and it goes on after."""
    given, alone = tables(), tables()
    made, other = grouped(RowAdam, given), RowAdam(alone[1], **COMMON | OPTIONS[RowAdam][1])
    anchor = given[1].anchor
    steps([made], given, 0, 1)
    given[1].requires_row_grad_(False)
    before = given[1].weight.clone()
    steps([made], [given[0], given[2]], 1, 2)
    with torch.no_grad():
        assert not lookup(given[1], torch.tensor([1])).requires_grad
    assert torch.equal(given[1].weight, before) and given[1].requires_row_grad_().anchor is anchor
    backward(given, 0)
    backward(alone, 0)
    for _ in range(2):  # by equal gradients, but at steps whose rounding differs
        other.step()
    assert made.states(1)["steps"].any()
    made.step()
    assert torch.equal(made.states(1)["steps"], other.states()["steps"])
    torch.testing.assert_close(made.states(1)["first"], other.states()["first"])


def test_a_scaler_and_clipping_reach_every_group():
    """As over the same tables in one group; an infinite gradient in one of them skips the step."""
    runs = []
    for make in (grouped, lambda kind, given: kind(given, lr=0.2)):
        given = tables(dtype=torch.float32)
        made, scaler = make(RowAdagrad, given), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for step in range(2):
            backward(given, step)
            if step:
                given[2].accumulate_row_grad(torch.tensor([1]), torch.full((1, WIDTH), float("inf")))
            scaler.unscale_(made)
            norms = [float(t.anchor.grad) for t in given]
            torch.nn.utils.clip_grad_norm_([t.anchor for t in given], 0.5)
            scaler.step(made)
            scaler.update()
        assert made.steps == 1 and scaler.get_scale() == 4.0
        runs.append((norms[:2], given[2].weight))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
