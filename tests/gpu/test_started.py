"""What only a GPU shows of projections ahead and of several starts in flight: streams that really race, and graphs."""

import pytest
import torch

from engram_kernels import Prefetcher
from engram_kernels.serving import prefetch
from tests.ops.test_registration import same
from tests.serving.test_prefetch import GRAPHS
from tests.support.gpu.ordering import ordered_by

from .test_kernels import graph_of
from .test_prefetch import LONG, ORDERS, TOKENS, Dropping, batches, setting, values

pytestmark = pytest.mark.gpu


PROJECTING = ORDERS | {"all, projections late": (None, "projection")}


def projecting(placed, device, width=48, late=False):
    """Arguments of a Prefetcher that projects, each after a while where ``late``, and each layer's weight."""
    weights = [torch.randn(4 * table.width, width, dtype=torch.bfloat16, device=device) for table in placed]

    def projection(weight):
        def project(rows, out):
            if late:
                torch.cuda._sleep(LONG)
            torch.mm(rows.flatten(-2), weight, out=out)

        return project

    return dict(projections=[projection(weight) for weight in weights], kv_width=width, ahead=True), weights


def projected(ids, plan, placed, weights):
    return [rows.flatten(-2) @ weight for rows, weight in zip(values(ids, plan, placed), weights, strict=True)]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("dropped", "sleeper"), PROJECTING.values(), ids=PROJECTING)
def test_each_order_is_needed_by_projections_in_flight(device, apart, dropped, sleeper, monkeypatch):
    """Six steps, each started before the one before it is read: two sets of buffers, three times each."""
    monkeypatch.setattr(prefetch, "layers_apart", lambda *_: apart)
    plan, placed = setting(device)
    options, weights = projecting(placed, device, late=sleeper == "projection")
    given = batches(device, 6)
    expected = [projected(ids, plan, placed, weights) for ids in given]
    caller, model = torch.cuda.Stream(), torch.cuda.Stream()
    streams = Dropping(device, dropped, {caller: "caller", model: "model"})
    with ordered_by(streams):
        prefetcher = Prefetcher(plan, placed, TOKENS, depth=2, **options)
    for ids in given[:2]:  # compiled, and every buffer filled with what a later step does not want
        prefetcher.start(ids.flip(0)).release()
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    seen = torch.empty(len(given), 2, TOKENS, 48, dtype=torch.bfloat16, device=device)
    torch.cuda.synchronize()
    started = []
    for step in range(len(given) + 1):
        if step < len(given):
            with torch.cuda.stream(caller):
                if sleeper == "caller":
                    torch.cuda._sleep(LONG)
                ids.copy_(given[step])
                if sleeper == "side":
                    streams.run(streams.side, lambda: torch.cuda._sleep(LONG))
                started.append(prefetcher.start(ids))
        if step:
            with torch.cuda.stream(model):
                for layer in range(2):
                    kv = started[step - 1].kv(layer)
                    if sleeper == "model":
                        torch.cuda._sleep(LONG)
                    seen[step - 1, layer].copy_(kv)
                started[step - 1].release()
    torch.cuda.synchronize()
    right = all(same(seen[step, layer], kv) for step, pair in enumerate(expected) for layer, kv in enumerate(pair))
    assert right == (dropped is None)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_whole_step_with_projections_in_a_graph(device, ahead):
    """Where the reader's stream projects, a replay's result is memory of the graph's."""
    plan, placed = setting(device)
    options, weights = projecting(placed, device)
    prefetcher = Prefetcher(plan, placed, TOKENS, **options | dict(ahead=ahead))
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)

    def step():
        prefetcher.start(ids)
        return [prefetcher.kv(layer) * 2 for layer in range(2)]

    graph, results = graph_of(step)
    for batch in batches(device, 3):
        ids.copy_(batch)
        graph.replay()
        torch.cuda.synchronize()
        expected = projected(batch, plan, placed, weights)
        assert all(same(result, kv * 2) for result, kv in zip(results, expected, strict=True))


def test_graphs_in_turn(device):
    """The guide's: each starts the next step and reads the one that the other has started."""
    plan, placed = setting(device)
    options, weights = projecting(placed, device)
    prefetcher = Prefetcher(plan, placed, TOKENS, depth=2, **options)
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    given = batches(device, 6)
    for _ in range(2):  # compiled
        started = prefetcher.start(ids)
        started.release()
    torch.cuda.synchronize()
    graphs, results = [torch.cuda.CUDAGraph() for _ in range(2)], []

    def model(_, started):
        results.append([started.kv(layer) * 2 for layer in range(2)])

    names: dict = dict(torch=torch, prefetcher=prefetcher, ids=given[0], next_ids=ids, graphs=graphs, model=model)
    exec(GRAPHS[2], names)
    for number, batch in enumerate(given[1:]):
        ids.copy_(batch)
        graphs[number % 2].replay()
        expected = projected(given[number], plan, placed, weights)
        found = results[number % 2]
        assert all(same(result.clone(), kv * 2) for result, kv in zip(found, expected, strict=True))
