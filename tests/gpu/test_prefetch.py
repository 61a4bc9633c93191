"""What only a GPU shows of read orders and of the Prefetcher: no waiting host, captures, and streams that really race.

Written to need nothing but torch, Triton, numpy and pytest.
"""

import pytest
import torch

from engram_kernels import Engram, EngramConfig, HashPlan, Prefetcher, hash_lookup, lookup, ngram_hash
from engram_kernels.launching.streams import CudaStreams
from engram_kernels.serving import prefetch
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import small_plan
from tests.ops.test_registration import same
from tests.serving.test_prefetch import GRAPHS
from tests.support.gpu.ordering import ordered_by

from .test_kernels import graph_of

pytestmark = pytest.mark.gpu

#: Clock cycles of a stream that sleeps: about 20 ms, far longer than the host takes to give work to the others.
LONG = 40_000_000
TOKENS = 300


def setting(device, placement="host", width=64, name="e4m3_ue8m0"):
    plan = small_plan()
    return plan.to(device), [tables.place(*part, device, placement) for part in parts_of(plan, width, name)]


def values(ids, plan, placed, **options) -> torch.Tensor:
    rows = hash_lookup(ids, plan, placed, **options)
    assert isinstance(rows, torch.Tensor)
    return rows


def batches(device, count, tokens=TOKENS):
    return [torch.randint(0, 40, (tokens,), device=device) for _ in range(count)]


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("tokens", [1, 37, 4096])
def test_orders_give_equal_bits(device, placement, tokens):
    plan, placed = setting(device, placement, 256)
    ids = torch.randint(0, 40, (tokens,), device=device)
    row_ids = ngram_hash(ids, plan)
    expected = hash_lookup(ids, plan, placed, order="direct")
    for order in ("head", "address"):
        assert same(hash_lookup(ids, plan, placed, order=order), expected), order
        assert same(lookup(placed[1], row_ids[:, 1], order=order), expected[1]), order
        stored = [hash_lookup(ids, plan, placed, order=each, out_format="storage") for each in (order, "direct")]
        assert same(*stored), order


@pytest.mark.parametrize("order", ["direct", "head", "address"])
def test_no_order_makes_the_host_wait(device, order):
    plan, placed = setting(device)
    (ids,) = batches(device, 1)

    def calls():
        lookup(placed[0], ngram_hash(ids, plan)[:, 0], order=order)
        return hash_lookup(ids, plan, placed, order=order)

    calls()  # of each form the first copies addresses of tables, which the host waits for
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(rows, hash_lookup(ids, plan, placed, order="direct"))


@pytest.mark.parametrize("order", ["head", "address"])
def test_orders_in_a_graph(device, order):
    """Ids and with them runs of duplicates change between replays."""
    plan, placed = setting(device)
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    graph, rows = graph_of(lambda: hash_lookup(ids, plan, placed, order=order))
    for high in (2, 40, 7):
        ids.copy_(torch.randint(0, high, (TOKENS,)))
        graph.replay()
        torch.cuda.synchronize()
        assert same(rows.clone(), hash_lookup(ids, plan, placed, order="direct"))


@pytest.mark.parametrize("order", ["head", "address"])
def test_compiled_orders(device, order):
    plan, placed = setting(device)
    run = torch.compile(lambda ids: values(ids, plan, placed, order=order) + 1, fullgraph=True, dynamic=True)
    for tokens in (5, 12, 300):
        (ids,) = batches(device, 1, tokens)
        torch.testing.assert_close(run(ids), values(ids, plan, placed) + 1, equal_nan=True)


class Dropping(CudaStreams):
    """Leaves out the waits of one stream for events recorded on another: (waiting, recording), by their roles."""

    def __init__(self, device, dropped, roles):
        super().__init__(device)
        self._dropped, self._roles, self._recorders = dropped, roles, {}

    def record(self, event, stream):
        self._recorders[id(event)] = stream
        super().record(event, stream)

    def wait(self, stream, event):
        recorder = self._recorders.get(id(event))
        pair = tuple("side" if each == self.side else self._roles.get(each) for each in (stream, recorder))
        if pair != self._dropped:
            super().wait(stream, event)


#: Each order, which wait makes it, and which stream sleeps so that its absence shows.
ORDERS = {
    "all": (None, None),
    "all, ids late": (None, "caller"),
    "all, lookups late": (None, "side"),
    "all, readers late": (None, "model"),
    "a lookup after the copy of its ids": (("side", "caller"), "caller"),
    "a copy after the lookups that read the ids before": (("caller", "side"), "side"),
    "a reader after its layer's lookup": (("model", "side"), "side"),
    "a lookup after the readers of the rows before": (("side", "model"), "model"),
}


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("dropped", "sleeper"), ORDERS.values(), ids=ORDERS)
def test_each_order_is_needed(device, apart, dropped, sleeper, monkeypatch):
    """Three steps that prefetch on one stream and read on another. Without one of the waits rows are wrong."""
    monkeypatch.setattr(prefetch, "layers_apart", lambda *_: apart)
    plan, placed = setting(device)
    given = batches(device, 3)
    expected = [values(ids, plan, placed, out_dtype=torch.float32) for ids in given]
    caller, model = torch.cuda.Stream(), torch.cuda.Stream()
    streams = Dropping(device, dropped, {caller: "caller", model: "model"})
    with ordered_by(streams):
        prefetcher = Prefetcher(plan, placed, TOKENS, out_dtype=torch.float32)
    for ids in given:  # compiled, and every buffer filled with what a later step does not want
        prefetcher.start(ids.flip(0))
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    seen = torch.empty(3, *expected[0].shape, device=device)
    torch.cuda.synchronize()
    for step, batch in enumerate(given):
        with torch.cuda.stream(caller):
            if sleeper == "caller":
                torch.cuda._sleep(LONG)
            ids.copy_(batch)
            if sleeper == "side":
                streams.run(streams.side, lambda: torch.cuda._sleep(LONG))
            prefetcher.start(ids)
        with torch.cuda.stream(model):
            for layer in range(2):
                rows = prefetcher.rows(layer)
                if sleeper == "model":
                    torch.cuda._sleep(LONG)
                seen[step, layer].copy_(rows)
    torch.cuda.synchronize()
    right = all(same(seen[step], rows) for step, rows in enumerate(expected))
    assert right == (dropped is None)


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("order", ["direct", "address"])
def test_a_whole_step_in_a_graph(device, tokens, order):
    """start() and rows() in one capture: the side stream forks from it and joins it."""
    plan, placed = setting(device)
    prefetcher = Prefetcher(plan, placed, TOKENS, order=order)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)

    def step():
        prefetcher.start(ids)
        return [prefetcher.rows(layer) * 2 for layer in range(2)]

    graph, results = graph_of(step)
    for batch in batches(device, 3, tokens):
        ids.copy_(batch)
        graph.replay()
        torch.cuda.synchronize()
        expected = values(batch, plan, placed) * 2
        assert all(same(result, expected[layer]) for layer, result in enumerate(results))
    prefetcher.start(ids)
    assert same(prefetcher.rows(1) * 2, results[1]), "and eagerly again"


def test_captured_apart(device):
    """start() in one graph, rows() in another, which waits for the first one's latest replay, a layer at a time."""
    plan, placed = setting(device)
    prefetcher = Prefetcher(plan, placed, TOKENS)
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)

    def start():
        torch.cuda._sleep(LONG // 4)
        prefetcher.start(ids)
        prefetcher.release()

    starting, _ = graph_of(start)
    reading, results = graph_of(lambda: [prefetcher.rows(layer) * 2 for layer in range(2)])
    aside = torch.cuda.Stream()
    for batch in batches(device, 3):
        ids.copy_(batch)
        aside.wait_stream(torch.cuda.current_stream())  # ids are there, and the last step's readers done
        with torch.cuda.stream(aside):
            starting.replay()
        reading.replay()
        seen = [result.clone() for result in results]
        torch.cuda.current_stream().wait_stream(aside)
        expected = values(batch, plan, placed) * 2
        assert all(same(result, expected[layer]) for layer, result in enumerate(seen))


def test_an_eager_start_before_a_captured_step(device):
    plan, placed = setting(device)
    prefetcher = Prefetcher(plan, placed, TOKENS)
    given = batches(device, 3)
    prefetcher.start(given[0])
    reading, results = graph_of(lambda: [prefetcher.rows(layer) * 2 for layer in range(2)])
    for batch in given:
        prefetcher._streams.run(prefetcher._streams.side, lambda: torch.cuda._sleep(LONG))
        prefetcher.start(batch)
        reading.replay()
        expected = values(batch, plan, placed) * 2
        assert all(same(result.clone(), expected[layer]) for layer, result in enumerate(results))


@pytest.mark.parametrize("recipe", GRAPHS[:2], ids=["whole step", "captured apart"])
def test_the_recipes_of_the_guide(device, recipe):
    plan, placed = setting(device)
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    given: dict = dict(torch=torch, ids=ids, prefetcher=Prefetcher(plan, placed, TOKENS), aside=torch.cuda.Stream())
    given |= {name: torch.cuda.CUDAGraph() for name in ("graph", "lookups", "step")}
    given |= dict(model=lambda ids, prefetcher: torch.stack([prefetcher.rows(layer) for layer in range(2)]) * 2)
    (given["next_ids"],) = batches(device, 1)
    given["prefetcher"].start(ids)
    given["model"](ids, given["prefetcher"])
    torch.cuda.synchronize()
    exec(recipe, given)
    assert same(given["out"], values(given["next_ids"], plan, placed) * 2)


def test_lookups_overlap_with_the_callers_work(device):
    """While lookups run on the side stream, the caller's stream finishes other work."""
    plan, placed = setting(device)
    prefetcher = Prefetcher(plan, placed, TOKENS)
    (ids,) = batches(device, 1)
    prefetcher.start(ids)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    prefetcher._streams.run(prefetcher._streams.side, lambda: torch.cuda._sleep(4 * LONG))
    prefetcher.start(ids)
    torch.ones(8, device=device).mul_(2)
    done.record()
    done.synchronize()
    assert not prefetcher._taken[0].ready[0]._external.query(), "the caller's stream waited for the side stream"
    assert same(prefetcher.rows(0), hash_lookup(ids, plan, placed)[0])


@pytest.mark.parametrize("sleeping", ["side", "reader"])
def test_buffers_freed_while_streams_use_them(device, sleeping):
    """A Prefetcher that goes while its lookups, or another stream's reads, still wait: its memory is not given out."""
    plan, placed = setting(device)
    (ids,) = batches(device, 1)
    expected = values(ids, plan, placed)
    prefetcher, reader = Prefetcher(plan, placed, TOKENS), torch.cuda.Stream()
    prefetcher.start(ids)
    size = prefetcher._taken[0].rows.numel()
    torch.cuda.synchronize()
    asleep = prefetcher._streams.side if sleeping == "side" else reader
    with torch.cuda.stream(asleep):
        torch.cuda._sleep(LONG)
    prefetcher.start(ids)
    with torch.cuda.stream(reader):
        read = prefetcher.rows(1).clone() if sleeping == "reader" else None
    del prefetcher
    others = [torch.full((size,), 7, dtype=expected.dtype, device=device) for _ in range(64)]
    torch.cuda.synchronize()
    assert all(other.eq(7).all() for other in others), "lookups wrote to memory that had been given out"
    assert read is None or same(read, expected[1])


def test_buffers_are_not_allocated_again(device):
    plan, placed = setting(device)
    prefetcher = Prefetcher(plan, placed, TOKENS, order="direct")
    (ids,) = batches(device, 1)
    prefetcher.start(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    prefetcher.start(ids)
    prefetcher.rows(0)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_module_with_prefetched_rows(device):
    config = EngramConfig(
        layers=(1, 4),
        max_ngram=3,
        heads=2,
        row_width=64,
        table_sizes=(300, 500),
        hidden_size=128,
        branches=4,
        raw_vocab_size=40,
        vocab_size=40,
        format="bfloat16",
        eps=1e-6,
    )
    plan = HashPlan.build(config, torch.arange(40))
    parts = [tables.random_parts(rows, 64, "bfloat16") for rows in plan.rows_per_layer]
    placed = [tables.place(*part, device, "host") for part in parts]
    modules = [
        Engram(config, layer, plan, table, device=device, dtype=torch.bfloat16)
        for layer, table in zip(config.layers, placed, strict=True)
    ]
    given = dict(projections=[module.project for module in modules], kv_width=modules[0].wkv.out_features, ahead=True)
    prefetcher = Prefetcher(plan.to(device), placed, TOKENS, layers=config.layers, **given)
    hidden = torch.randn(TOKENS, 4, 128, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        for ids in batches(device, 3):
            prefetcher.start(ids)
            for module in modules:
                assert same(module(hidden, rows=prefetcher.rows(module.layer)), module(hidden, ids))
                assert same(module(hidden, kv=prefetcher.kv(module.layer)), module(hidden, ids))
