"""Several starts of a Prefetcher in flight: each has its own rows and projections, in every order of work."""

from types import SimpleNamespace

import pytest
import torch

from engram_kernels import Prefetcher, hash_lookup
from engram_kernels.serving import policy, prefetch
from tests.ops.test_registration import same
from tests.serving.test_prefetch import BLOCKS
from tests.support.gpu.prefetching import KINDS, ORDERS, SCHEDULES, batches, in_flight, replayed, setting


@pytest.fixture(params=[True, False], ids=["apart", "together"])
def apart(request, monkeypatch):
    monkeypatch.setattr(prefetch, "layers_apart", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reading", ["model", "main"])
def test_two_starts_in_flight(apart, kind, reading):
    for schedule in SCHEDULES:
        model, given = KINDS[kind](reading=reading, depth=2), batches(5)
        in_flight(model, given, ahead_by=1)
        assert model.right(given, schedule), schedule
        assert set(model.streams.kept) == {"main", "side", reading}, "freed memory waits for each"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", ORDERS.values(), ids=ORDERS)
def test_two_starts_in_flight_need_each_order(apart, kind, dropped):
    results = []
    for schedule in SCHEDULES:
        model, given = KINDS[kind](dropped, depth=2), batches(5)
        in_flight(model, given, ahead_by=1)
        results.append(model.right(given, schedule))
    assert not all(results)


@pytest.mark.parametrize("kind", KINDS)
def test_two_starts_in_flight_need_buffers_each(kind):
    results = []
    for schedule in SCHEDULES:
        model, given = KINDS[kind](depth=2), batches(5)
        first, second = model.prefetcher._taken
        for name in ("inputs", "rows", "kv"):
            setattr(second, name, getattr(first, name))
        in_flight(model, given, ahead_by=1)
        results.append(model.right(given, schedule))
    assert not all(results)


def in_one_capture(model, given, early):
    """Two steps in one graph, each started while the one before is read, across replays too; ``early``: a step is
    read before the next is started. On another stream than that of the starts."""
    other = torch.zeros(6, dtype=torch.int64)
    streams = model.streams
    first = waiting = model.start(given[0])
    with streams.capture("main") as replay:
        follow(streams, "model", "main")
        for ids in (model.ids, other):
            coming = None if early else model.prefetcher.start(ids)
            for layer in range(2):
                model.read(layer, started=waiting)
            with streams.stream("model"):
                waiting.release()
            waiting = model.prefetcher.start(ids) if coming is None else coming
        waiting.release()
        follow(streams, "main", "model")
    assert waiting._taken is first._taken
    for number in range(1, len(given) - 1, 2):
        for ids, batch in zip((model.ids, other), given[number:], strict=False):
            streams.run("main", lambda ids=ids, batch=batch: ids.copy_(batch))
        replay("main")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("dropped", [None, ("side", "model")])
def test_two_steps_of_one_capture_in_flight(kind, early, dropped):
    results = []
    for schedule in SCHEDULES:
        model, given = KINDS[kind](dropped, depth=2), batches(7)
        in_one_capture(model, given, early)
        results.append(model.right(given[:-1], schedule))
    assert all(results) == (dropped is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reading", ["model", "main"])
def test_graphs_in_turn(apart, kind, reading):
    """Each graph starts the next step and reads the one that the other graph has started."""
    for schedule in SCHEDULES:
        model, given = KINDS[kind](reading=reading, depth=2), batches(6)
        waiting, graphs = model.start(given[0]), []
        for _ in range(2):
            with model.streams.capture("main") as replay:
                follow(model.streams, "model", "main")
                coming = model.prefetcher.start(model.ids)
                for layer in range(2):
                    model.read(layer, started=waiting)
                with model.streams.stream(reading):
                    waiting.release()
                coming.release()
                follow(model.streams, "main", "model")
            graphs.append(replay)
            waiting = coming
        for number, batch in enumerate(given[1:]):
            model.streams.run("main", lambda model=model, batch=batch: model.ids.copy_(batch))
            graphs[number % 2]("main")
        assert model.right(given[:-1], schedule), schedule


@pytest.mark.parametrize("depth", [1, 2])
def test_a_capture_waits_for_none_of_another(depth):
    """A reader that release() ended in one capture reads in the next one too."""
    for schedule in SCHEDULES:
        model, given = KINDS["kv"](depth=depth), batches(3)
        for _ in range(1 + depth):
            with model.streams.capture("main") as replay:
                follow(model.streams, "model", "main")
                started = model.prefetcher.start(model.ids)
                model.read(0)
                model.read(1)
                with model.streams.stream("model"):
                    started.release()
                follow(model.streams, "main", "model")
        assert replayed(model, given, [(replay, "main")], schedule), schedule


def follow(streams, later, earlier):
    """Let one stream wait for what another one holds."""
    event = streams.event()
    streams.record(event, earlier)
    streams.wait(later, event)


def test_starts_of_both_kinds_in_turn(apart, monkeypatch):
    """A start waits for the last work of the one before, whether that projected or not."""
    for module in (policy, prefetch):
        monkeypatch.setattr(module, "AHEAD_TOKENS", 4)
    for schedule in SCHEDULES:
        model, given = KINDS["kv"](), [ids[: 4 + 2 * (number % 2)] for number, ids in enumerate(batches(6))]
        buffer = model.ids
        for batch in given:
            model.ids = buffer[: len(batch)]
            model.step(batch)
        assert model.right(given, schedule), schedule


@pytest.mark.parametrize("kind", KINDS)
def test_captured_apart(apart, kind):
    for schedule in SCHEDULES:
        model, given = KINDS[kind](reading="main"), batches(3)
        with model.streams.capture("main") as prefetching:
            model.prefetcher.start(model.ids)
            model.prefetcher.release()
        with model.streams.capture("main") as stepping:
            model.read(0)
            model.read(1)

        def prefetching_aside(_, replay=prefetching, streams=model.streams):
            ready = streams.event()
            streams.record(ready, "main")  # ids are there, and the last step's readers done
            streams.wait("model", ready)
            replay("model")

        assert replayed(model, given, [(prefetching_aside, None), (stepping, "main")], schedule), schedule


def test_the_example_of_the_guide():
    plan, placed = setting()
    given, seen = batches(4), []
    names = dict(Prefetcher=Prefetcher, plan=plan, tables=placed, max_tokens=8, config=SimpleNamespace(layers=(1, 14)))
    names |= dict(embed=lambda _: None, token_ids=None, torch=SimpleNamespace(randint=lambda *_: given))
    names |= dict(engrams=dict.fromkeys((1, 14), lambda hidden, rows: seen.append(rows.clone())))
    exec(next(block for block in BLOCKS if "depth=2" in block), names)
    for step, ids in enumerate(given[:3]):
        assert same(torch.stack(seen[2 * step : 2 * step + 2]), hash_lookup(ids, plan, placed))
    assert len(seen) == 6
    assert same(names["this"].rows(14), hash_lookup(given[3], plan, placed)[1])


def test_starts_beyond_depth():
    plan, placed = setting()
    prefetcher = Prefetcher(plan, placed, 8, depth=2)
    ids = batches(3)
    first, second = (prefetcher.start(each) for each in ids[:2])
    words = r"^Prefetcher.start: expected at most depth = 2 starts in flight, got one more; release\(\) the oldest"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            prefetcher.start(ids[2])
    second.release()
    with pytest.raises(ValueError, match=words):
        prefetcher.start(ids[2])
    expected = [hash_lookup(each, plan, placed) for each in ids]
    assert same(first.rows(1), expected[0][1]) and same(second.rows(0), expected[1][0])
    assert same(prefetcher.rows(0), expected[1][0]), "the prefetcher's own are of the last start"
    first.release()
    third = prefetcher.start(ids[2])
    assert same(third.rows(0), expected[2][0]) and same(second.rows(1), expected[1][1]), "which is still there"
    first.release()  # nothing: its buffers are the third's
    for call in (first.rows, first.kv):
        with pytest.raises(ValueError, match=f"^Started.{call.__name__}: expected buffers that hold this start"):
            call(0)
    with pytest.raises(ValueError, match="in flight"):
        (prefetcher.start(ids[0]), prefetcher.start(ids[0]))
