"""A step of a row optimizer against prefetched lookups: what orders them, and that without it rows are wrong."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from engram_kernels import Prefetcher, RowAdagrad, hash_lookup, ngram_hash
from tests.gpu.test_prefetch import LONG, TOKENS, Dropping
from tests.gpu.test_prefetch import setting as setting_on_gpu
from tests.nn.test_engram import built
from tests.serving.test_prefetch import setting
from tests.support.gpu.fake_streams import FakeStreams
from tests.support.gpu.ordering import ordered_by

GUIDE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
SCHEDULES = [list(names) for names in itertools.permutations(("main", "side"))]
STEPS = 3


def trainable(device, placement=None, tokens=6):
    plan, placed = setting(device, "float32") if placement is None else setting_on_gpu(device, placement, 16, "float32")
    for table in placed:
        table.requires_row_grad_()
    ids = torch.randint(0, 40, (tokens,), device=device)
    return plan, placed, RowAdagrad(placed, lr=0.5), ids


def update(plan, placed, optimizer, ids):
    """Move every row that ``ids`` read, by a gradient of ones."""
    optimizer.zero_grad()
    row_ids = ngram_hash(ids, plan)
    for layer, table in enumerate(placed):
        grad = torch.ones(*row_ids[:, layer].shape, table.width, device=ids.device)
        table.accumulate_row_grad(row_ids[:, layer], grad)
    optimizer.step()


def train(setup, streams, sleep=lambda stream: None):
    """STEPS times the same ids: prefetch, read, update. Rows read, by step and layer.

    ``streams`` runs the work: on FakeStreams it has run after drain(). ``sleep``: what stands before each part.
    """
    plan, placed, optimizer, ids = setup
    with ordered_by(streams):
        prefetcher = Prefetcher(plan, placed, len(ids), out_dtype=torch.float32)
    prefetcher.start(ids)  # every buffer is filled, so that what may be wrong are the rows alone
    yield
    seen = []
    for _ in range(STEPS):
        sleep("side")
        prefetcher.start(ids)
        rows = [prefetcher.rows(layer) for layer in range(2)]
        streams.run(streams.current(), lambda rows=rows: seen.append([each.clone() for each in rows]))
        sleep("main")
        streams.run(streams.current(), lambda: update(plan, placed, optimizer, ids))
    yield seen


def expected_rows(plan, placed, optimizer, ids):
    found = []
    for _ in range(STEPS):
        found.append(hash_lookup(ids, plan, placed, out_dtype=torch.float32))
        update(plan, placed, optimizer, ids)
    return found


def agrees(seen, expected):
    return all(torch.equal(torch.stack(rows), wanted) for rows, wanted in zip(seen, expected, strict=True))


ORDERS = {
    "all": None,
    "a lookup after the step before": ("side", "main"),
    "a step after the lookups before": ("main", "side"),
}


@pytest.mark.parametrize("dropped", ORDERS.values(), ids=ORDERS)
def test_steps_and_prefetched_lookups(dropped):
    """On streams whose work runs as early or late as events let it: right in every order, or wrong in one."""
    results = []
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        expected = expected_rows(*trainable("cpu"))
        torch.manual_seed(0)
        streams = FakeStreams()
        run = train(trainable("cpu"), streams)
        next(run)
        streams.drain(schedule)
        streams._dropped = dropped
        seen = next(run)
        streams.drain(schedule)
        results.append(agrees(seen, expected))
    assert all(results) == (dropped is None)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize(
    ("dropped", "sleeper"),
    [(None, None), (None, "main"), (None, "side"), (("side", "main"), "main"), (("main", "side"), "side")],
)
def test_steps_and_prefetched_lookups_on_a_gpu(device, placement, dropped, sleeper):
    """Streams that really race: whichever sleeps, rows are those after the step before; without a wait they are not."""
    torch.manual_seed(0)
    expected = expected_rows(*trainable(device, placement, TOKENS))
    torch.manual_seed(0)
    current = torch.cuda.current_stream()
    streams = Dropping(device, None, {current: "main"})

    def sleep(stream):
        if stream == sleeper:
            streams.run(streams.side if stream == "side" else current, lambda: torch.cuda._sleep(LONG))

    run = train(trainable(device, placement, TOKENS), streams, sleep)
    next(run)
    torch.cuda.synchronize()
    streams._dropped = dropped
    seen = next(run)
    torch.cuda.synchronize()
    assert agrees(seen, expected) == (dropped is None)


def test_the_guide_trains_on_prefetched_rows():
    """Its recipe leaves the row gradient and the loss of a step that looks rows up itself."""
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if "prefetcher.start" in each]
    module, plan, placed = built("v41")
    table = placed[module.config.layers.index(module.layer)].requires_row_grad_()
    hidden, ids = torch.randn(9, 2, 24), torch.randint(0, 40, (9,))
    expected = module(hidden, ids).square().mean()
    expected.backward()
    wanted = table.row_grad.to_sparse_coo().to_dense()
    module.zero_grad()
    table.zero_row_grad()
    before = table.weight.clone()
    given = dict(torch=torch, ngram_hash=ngram_hash, plan=plan, table=table, engram=module, layer=module.layer)
    given |= dict(token_ids=ids, hidden=hidden, index=module.config.layers.index(module.layer))
    given |= dict(prefetcher=Prefetcher(plan, placed, 9, layers=module.config.layers))
    given |= dict(rows_optimizer=RowAdagrad(table), loss_of=lambda out: out.square().mean())
    exec(block, given)
    assert torch.equal(given["loss"], expected)
    torch.testing.assert_close(table.row_grad.to_sparse_coo().to_dense(), wanted)
    assert not torch.equal(table.weight, before)
