"""Prefetcher: its rows, its errors, and its order, on streams whose work runs as late or early as events let it."""

import re
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable, HashPlan, Prefetcher, hash_lookup
from engram_kernels.serving import prefetch
from tests.nn.test_engram import FORMS, built
from tests.ops.test_hashing import ragged
from tests.ops.test_registration import same
from tests.support.gpu.prefetching import ORDERS, SCHEDULES, Model, batches, replayed, setting

GUIDE = (Path(__file__).parents[2] / "docs" / "prefetch.md").read_text()
#: Those behind the one that makes what they use.
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.S)[1:]
GRAPHS = [block for block in BLOCKS if "torch.cuda.graph" in block]


@pytest.mark.kernel
@pytest.mark.parametrize("apart", [True, False])
def test_rows_are_those_of_hash_lookup(device, apart, monkeypatch):
    """Packed and batched tokens of either width, fewer and more than before, in one launch and in one a layer."""
    monkeypatch.setattr(prefetch, "layers_apart", lambda *_: apart)
    plan, placed = setting(device, "e4m3_ue8m0", 32)
    prefetcher = Prefetcher(plan, placed, 19, layers=(1, 14))
    ids, cu, history, dead = (x.to(device) for x in ragged())
    packed = dict(cu_seqlens=cu, history=history, dead=dead)
    for tokens, options in (
        (ids, packed),
        (ids[:5].int(), {}),
        (ids[:18].view(3, 6), dict(dead=dead[:18].view(3, 6))),
        (ids[:0], {}),
        (ids, packed),
    ):
        prefetcher.start(tokens, **options)
        expected = hash_lookup(tokens, plan, placed, **options)
        for index, layer in enumerate((1, 14)):
            assert same(prefetcher.rows(layer), expected[index])


@pytest.mark.parametrize("form", FORMS)
def test_a_module_takes_prefetched_rows(form):
    module, plan, placed = built(form)
    prefetcher = Prefetcher(plan, placed, 12, layers=module.config.layers)
    hidden, ids = torch.randn(2, 5, 2, 24), torch.randint(0, 40, (2, 5))
    prefetcher.start(ids)
    assert torch.equal(module(hidden, rows=prefetcher.rows(module.layer)), module(hidden, ids))


def test_the_example_of_the_guide():
    module, plan, placed = built("v41")
    given = dict(Prefetcher=Prefetcher, plan=plan, tables=placed, max_tokens=9, config=module.config)
    given |= dict(cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), history=torch.randint(0, 40, (2, 2)))
    hidden, ids = torch.randn(9, 2, 24), torch.randint(0, 40, (9,))
    given |= dict(token_ids=ids, embed=lambda ids: hidden, blocks=[torch.sin] * 6, engrams={module.layer: module})
    exec(BLOCKS[0], given)
    options = dict(cu_seqlens=given["cu_seqlens"], history=given["history"])
    expected = hidden.sin().sin().sin().sin()
    assert torch.equal(given["hidden"], module(expected, ids, **options).sin().sin())


def test_buffers_are_allocated_once_and_inputs_are_copied():
    plan, placed = setting()
    prefetcher = Prefetcher(plan, placed, 8, out_dtype=torch.float32)
    first, second = batches(2)
    prefetcher.start(first)
    rows = prefetcher.rows(1)
    assert rows.dtype == torch.float32 and rows.shape == (6, 4, 16)
    kept = rows.clone()
    first.zero_()
    assert torch.equal(prefetcher.rows(1), kept)
    prefetcher.start(second)
    assert prefetcher.rows(1).data_ptr() == rows.data_ptr() and not torch.equal(rows, kept)


def test_a_launch_a_layer_from_what_a_launch_takes():
    row_bytes = 24 * 264
    assert not prefetch.layers_apart(82 * row_bytes, "host") and prefetch.layers_apart(83 * row_bytes, "host")
    assert not prefetch.layers_apart(83 * row_bytes, "device") and prefetch.layers_apart(8192 * row_bytes, "device")


def both_launches(function):
    return pytest.mark.parametrize("apart", [True, False])(function)


@pytest.fixture
def choose_launches(monkeypatch):
    return lambda apart: monkeypatch.setattr(prefetch, "layers_apart", lambda *_: apart)


@both_launches
@pytest.mark.parametrize("reading", ["model", "main"])
def test_every_order_of_work_gives_the_rows(apart, reading, choose_launches):
    choose_launches(apart)
    for schedule in SCHEDULES:
        model, given = Model(reading=reading), batches(3)
        for batch in given:
            model.step(batch)
        assert model.right(given, schedule), schedule
    assert {"main", "side"} <= set(model.streams.kept)


@both_launches
@pytest.mark.parametrize("dropped", ORDERS.values(), ids=ORDERS)
def test_without_one_of_the_orders_rows_are_wrong(apart, dropped, choose_launches):
    """Negative control: each of the four waits is needed."""
    choose_launches(apart)
    results = []
    for schedule in SCHEDULES:
        model, given = Model(dropped), batches(3)
        for batch in given:
            model.step(batch)
        results.append(model.right(given, schedule))
    assert not all(results)


def test_a_layer_waits_for_its_own_lookup_alone(choose_launches):
    """With a launch a layer, the first is read before the last is looked up."""
    choose_launches(True)
    model, ran = Model(), []
    model.step(batches(1)[0])
    for stream, queue in model.streams._queues.items():
        for index, (kind, *rest) in enumerate(queue):
            if kind == "run":
                work = rest[0]
                queue[index] = ("run", lambda work=work, stream=stream: (ran.append(stream), work()))
    model.streams.drain(["main", "model", "side"])
    assert [name for name in ran if name != "main"] == ["side", "model", "side", "model"]


def test_release_ends_the_reading(choose_launches):
    """A start() waits for what readers were given before release(), and not for what comes after it."""
    choose_launches(False)
    for released in (True, False):
        model, given, log = Model(), batches(2), []
        model.step(given[0])
        if released:
            with model.streams.stream("model"):
                model.prefetcher.release()
        model.streams.run("model", lambda log=log: log.append("later layers"))
        model.start(given[1])
        model.streams.run("side", lambda log=log: log.append("next rows"))
        model.read(0)
        model.read(1)
        assert model.right(given, ["side", "main", "model"])
        assert log == (["next rows", "later layers"] if released else ["later layers", "next rows"])


@both_launches
def test_a_capture_of_the_whole_step(apart, choose_launches):
    """start() and rows() in one capture: the side stream forks and joins, and replays follow each other."""
    choose_launches(apart)
    for schedule in SCHEDULES:
        model, given = Model(reading="main"), batches(3)
        model.step(given[0])  # eagerly, as a warm-up
        model.streams.drain(schedule)
        with model.streams.capture("main") as replay:
            model.prefetcher.start(model.ids)
            for layer in range(2):
                model.read(layer)
        assert replayed(model, given, [(replay, "main")], schedule), schedule
        model.seen.clear()
        for batch in given:  # and eagerly again
            model.step(batch)
        assert model.right(given, schedule)


@pytest.mark.parametrize("dropped", [("side", "main"), ("main", "side")])
def test_a_capture_needs_both_of_its_orders(dropped, choose_launches):
    choose_launches(True)
    results = []
    for schedule in SCHEDULES:
        model, given = Model(dropped, reading="main"), batches(3)
        try:
            with model.streams.capture("main") as replay:
                model.prefetcher.start(model.ids)
                for layer in range(2):
                    model.read(layer)
        except RuntimeError as error:
            results.append("joined" not in str(error))
        else:
            results.append(replayed(model, given, [(replay, "main")], schedule))
    assert not all(results)


@pytest.mark.parametrize("dropped", [None, ("side", "model")])
def test_two_steps_in_one_capture(dropped, choose_launches):
    """The second start() follows the readers of the first by an event within the capture, and of none before it."""
    choose_launches(True)
    results = []
    for schedule in SCHEDULES:
        model, given = Model(dropped), batches(2)
        other = torch.zeros(6, dtype=torch.int64)
        for _ in range(2):  # of two captures the second is replayed
            with model.streams.capture("main") as replay:
                for ids in (model.ids, other):
                    model.prefetcher.start(ids)
                    model.read(0)
                    model.read(1)
                ended = model.streams.event()
                model.streams.record(ended, "model")
                model.streams.wait("main", ended)
        model.ids.copy_(given[0])
        other.copy_(given[1])
        replay("main")
        results.append(model.right(given, schedule))
    assert all(results) == (dropped is None)


def test_a_capture_must_be_joined(choose_launches):
    choose_launches(True)
    model = Model()
    with pytest.raises(RuntimeError, match="before work of .'side'. has joined"), model.streams.capture("main"):
        model.prefetcher.start(model.ids)
        model.read(0, "main")
    model = Model()
    with model.streams.capture("main"):
        model.prefetcher.start(model.ids)
        model.prefetcher.release()


@both_launches
def test_captured_apart(apart, choose_launches):
    """start() in one graph and rows() in another: each layer's reader waits for its own lookup of the latest replay."""
    choose_launches(apart)
    for schedule in SCHEDULES:
        model, given = Model(reading="main"), batches(3)
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


@both_launches
def test_an_eager_start_before_a_captured_step(apart, choose_launches):
    choose_launches(apart)
    for schedule in SCHEDULES:
        model, given = Model(reading="main"), batches(3)
        model.step(given[0])
        model.streams.drain(schedule)
        with model.streams.capture("main") as stepping:
            model.read(0)
            model.read(1)
        model.seen.clear()
        for batch in given:
            model.start(batch)
            stepping("main")
        assert model.right(given, schedule), schedule


def test_a_captured_start_before_an_eager_step(choose_launches):
    choose_launches(True)
    for schedule in SCHEDULES:
        model, given = Model(reading="main"), batches(3)
        with model.streams.capture("main") as prefetching:
            model.prefetcher.start(model.ids)
            model.prefetcher.release()
        for batch in given:
            model.streams.run("main", lambda batch=batch, model=model: model.ids.copy_(batch))
            prefetching("main")
            model.read(0)
            model.read(1)
        assert model.right(given, schedule), schedule


def test_errors():
    plan, placed = setting()
    prefetcher = Prefetcher(plan, placed, 8, max_sequences=2)
    ids, names = torch.arange(9), "layers must be 2 different names, one per layer, got"
    for error, words, call in (
        (ValueError, r"^Prefetcher.rows: no start\(\) came before rows\(0\)", lambda: prefetcher.rows(0)),
        (ValueError, r"^Prefetcher.rows: layer must be one of \[0, 1\], got 14", lambda: prefetcher.rows(14)),
        (ValueError, "start: token_ids must be at most max_tokens = 8 tokens, got 9", lambda: prefetcher.start(ids)),
        (
            ValueError,
            "start: token_ids must be at most max_sequences = 2 sequences, got 3",
            lambda: prefetcher.start(ids[:4], cu_seqlens=torch.tensor([0, 1, 2, 4], dtype=torch.int32)),
        ),
        (
            ValueError,
            "start: token_ids must be at most max_sequences = 2 sequences, got 4",
            lambda: prefetcher.start(ids[:8].view(4, 2), history=torch.zeros(4, 2, dtype=torch.int64)),
        ),
        (
            ValueError,
            "start: token_ids must be valid ids, 0 <= id < 40, got 40",
            lambda: prefetcher.start(ids[1:] + 32),
        ),
        (TypeError, "start: token_ids must be a tensor of int32 or int64", lambda: prefetcher.start([1, 2])),
        (ValueError, "start: dead must have shape", lambda: prefetcher.start(ids[:4], dead=torch.zeros(3).bool())),
        (TypeError, "^Prefetcher: plan must be a HashPlan, got int", lambda: Prefetcher(3, placed, 8)),
        (ValueError, "^Prefetcher: tables must be one per layer", lambda: Prefetcher(plan, placed[:1], 8)),
        (ValueError, "max_tokens must be a positive int, got 0", lambda: Prefetcher(plan, placed, 0)),
        (ValueError, "max_tokens must be a positive int, got 8.0", lambda: Prefetcher(plan, placed, 8.0)),
        (ValueError, r"max_tokens \* C must be below 2\^31", lambda: Prefetcher(plan, placed, 2**29)),
        (ValueError, "max_sequences must be a positive int", lambda: Prefetcher(plan, placed, 8, max_sequences=True)),
        (ValueError, "programs must be a positive int", lambda: Prefetcher(plan, placed, 8, programs=0)),
        (ValueError, "order must be one of", lambda: Prefetcher(plan, placed, 8, order="up")),
        (TypeError, "out_dtype must be", lambda: Prefetcher(plan, placed, 8, out_dtype=torch.int8)),
        (ValueError, rf"{names} \[1, 1\]", lambda: Prefetcher(plan, placed, 8, layers=(1, 1))),
        (ValueError, rf"{names} \[1\]", lambda: Prefetcher(plan, placed, 8, layers=[1])),
    ):
        with pytest.raises(error, match=words):
            call()
    prefetcher.start(ids[:3])
    assert prefetcher.rows(0).shape == (3, 4, 16), "no failed call left anything behind"
    prefetcher.release()


def test_one_layer_and_float64():
    plan = HashPlan.from_parts(torch.tensor([[3, 5]]), torch.tensor([[7, 11]]), pad=0, vocab_size=40)
    table = EngramTable.from_tensors(torch.randn(18, 4, dtype=torch.float64), placement="cpu")
    prefetcher = Prefetcher(plan, [table], 4)
    prefetcher.start(torch.tensor([1, 2, 3]))
    assert torch.equal(prefetcher.rows(0), hash_lookup(torch.tensor([1, 2, 3]), plan, [table])[0])
