"""Step cost and matmuls beside a lookup: toy decoders on a CPU, streams and graphs of a GPU simulated."""

import gc
import weakref
from functools import partial

import pytest
import torch

from bench.running import report, suite, timing
from bench.running.cases import Workbench
from bench.serving import interference, step
from engram_kernels import ngram_hash, reference
from tests.support.gpu.simulation import Simulation

from .toys import CPU, FakeTimer, ample, toy

LIMIT = 1 << 22
TOY = step.Decoder(3, 64, 96, 48, 32, engram=(0, 1), paper=0.0192)


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


class Timer(FakeTimer):
    """Everything takes a millisecond; graphs are the steps themselves."""

    def record(self, call):
        return call

    def rounds(self, calls, count, before):
        for number, call in enumerate(calls):
            before(number)
            call()
        return [[1e-3 * (1 + index)] * count for index in range(len(calls))]

    def beside(self, call, other, side):
        call()
        other()
        return 1.5e-3, 1e-3


def finals(at, number):
    """Mode -> what the step makes of set ``number``; rows are poisoned before those that fetch."""
    found = {}
    for mode in (*step.FETCHING, "ready", "plain"):
        at.choose(number)
        if mode in step.FETCHING:
            step.poison(at.rows)
            step.poison(at.kv)
        at.run(mode)
        assert mode not in step.FETCHING or at.check(number) is None
        found[mode] = at.final.clone()
    return found


def check_modes(workbench, batch):
    at = step.StandIn(TOY, workbench).at(batch)
    found = finals(at, 3)
    assert all(torch.equal(found[mode], found["inline"]) for mode in (*step.FETCHING, "ready"))
    assert not torch.equal(found["plain"], found["ready"]), "the layers change the stream"
    return at, found


@pytest.mark.parametrize("batch", [1, 5])
def test_all_modes_make_the_same_step(bench, batch):
    at, found = check_modes(bench, batch)
    assert not torch.equal(finals(at, 4)["inline"], found["inline"]), "token ids change the stream"


@pytest.mark.kernel
def test_all_modes_make_the_same_step_in_kernels(device):
    with Workbench(device, LIMIT, LIMIT, say=lambda line: None) as workbench:
        check_modes(workbench, 2)


def test_a_step_is_the_matmuls_and_the_gated_rows(bench):
    at = step.StandIn(TOY, bench).at(4)
    at.choose(1)
    at.run("inline")
    plan, of = bench.plan("v41", "host"), at.of
    stream = at.hidden
    for layer in range(TOY.layers):
        if layer < 2:
            row_ids = reference.ngram_hash(at.ids, plan, cu_seqlens=at.cu_seqlens, history=at.history)[:, layer]
            kv = reference.lookup(of.table, row_ids).flatten(1) @ of.wkv[layer]
            key, value = kv[:, None, : TOY.hidden], kv[:, TOY.hidden :]
            stream = reference.gate_residual(stream[:, None], key, value, *of.norms, eps=1e-6)[:, 0]
        into_heads, out_of_heads, up, down = of.weights[layer]
        stream = stream + (stream @ into_heads)[:, :48] @ out_of_heads
        stream = stream + (stream @ up)[:, :96] @ down
    torch.testing.assert_close(at.final, stream, rtol=0.05, atol=0.05)


def test_windows_are_places_of_the_text(bench):
    windows = [bench.windows(6, 4, number) for number in range(3)]
    assert windows[0].shape == (6, 4) and windows[0].dtype == torch.int32
    assert len({tuple(row.tolist()) for window in windows for row in window}) == 18
    text = bench._text.tolist()
    assert windows[1][2].tolist() == text[8 * 104_729 % (len(text) - 4) :][:4]
    at = step.StandIn(TOY, bench).at(6)
    plan, window = bench.plan("v41", "host"), at.sets[1]
    whole = windows[1]
    assert torch.equal(window[0], whole[:, -1])
    decoded = ngram_hash(window[0], plan, cu_seqlens=at.cu_seqlens, history=window[1])
    assert torch.equal(decoded, ngram_hash(whole, plan)[:, -1]), "history is what came before, oldest first"


@pytest.mark.parametrize("spoil", ["last element", "nothing read", "read early"])
def test_a_wrong_step_has_no_time(bench, monkeypatch, spoil):
    correct = step.hash_lookup

    def spoilt(*arguments, out, **options):
        if spoil != "nothing read":
            correct(*arguments, out=out, **options)
        if spoil == "last element":
            out[-1, -1, -1, -1] += 1
        return out

    monkeypatch.setattr(step, "hash_lookup", spoilt)
    if spoil == "read early":
        monkeypatch.setattr(step.StepAt, "_engram", lambda self, stream, *_: stream * float("nan"))
    record = step.Steps(bench, Timer(), {"toy": TOY}).measure("step/toy/B2")
    assert record["status"] == "failed" and "seconds" not in record
    assert {"read early": "not finite"}.get(spoil, "differ from the reference") in record["reason"]


def test_exposed_and_cost_are_paired_differences(bench):
    record = step.Steps(bench, Timer(), {"toy": TOY}, rounds=3).measure("step/toy/B2")
    assert record["status"] == "ok" and record["batch"] == 2 and record["distinct_layers"] == 3
    # Modes take 1 to 6 milliseconds in their order.
    assert record["exposed"] == pytest.approx(dict(inline=1e-3, side=2e-3, by_layer=3e-3, projected=4e-3))
    assert record["cost"] == pytest.approx(dict(ready=1 / 2, inline=2 / 3, side=3 / 4, by_layer=4 / 5, projected=5 / 6))
    assert record["seconds"]["plain"]["samples"] == 3
    assert record["weight_bytes"] == 3 * 2 * (64 * 80 + 48 * 64 + 64 * 192 + 96 * 64)


def test_decoders_are_those_of_4_and_8_billion():
    for name, billions, paper in (("4b", 3.6, 0.0192), ("8b", 6.9, 0.0278)):
        decoder = step.DECODERS[name]
        assert decoder.layer_bytes * decoder.layers / 2e9 == pytest.approx(billions, abs=0.1)
        assert decoder.paper == paper
    assert step.step_names(False)[:2] == ["step/4b/B1", "step/8b/B1"] and len(step.step_names(True)) == 20


def test_layers_share_weights_where_they_do_not_fit(bench):
    assert len(step.StandIn(TOY, bench, free_bytes=5 * TOY.layer_bytes).weights) == 2
    assert len(step.StandIn(TOY, bench, free_bytes=0).weights) == 1


def test_a_matmul_beside_a_lookup(bench, monkeypatch):
    monkeypatch.setattr(interference, "SAMPLES", 2)
    pair = interference.Interference(bench, Timer(), widths=(64, 96), tokens=9)
    record = pair.measure("interference/decode/programs8")
    # The chain alone is the first of one call in turn: a millisecond.
    assert record["slowdown"] == pytest.approx(0.5) and record["matmuls"] == 1 and record["programs"] == 8
    assert not record["covered"] and record["lookup_bytes"] == 2 * 9 * 24 * 264
    monkeypatch.setattr(interference, "hash_lookup", lambda *arguments, out, **options: out)
    wrong = pair.measure("interference/prefill/programs4")
    assert wrong["status"] == "failed" and "differ" in wrong["reason"]
    names = interference.interference_names()
    assert len(set(names)) == 12 and names[0] in (
        "interference/prefill/programs16",
        "interference/prefill/programs32",
    )


class Simulated(timing.GpuTimer):
    """A graph's replay is the step itself, so that its streams are seen at work."""

    def record(self, call):
        return call


@pytest.fixture
def simulation(monkeypatch):
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 64)
    return Simulation(monkeypatch)


def test_gpu_times(simulation):
    timer = timing.GpuTimer(CPU, samples=6)
    work = [partial(simulation.spend, 1e-3), partial(simulation.spend, 3e-3)]
    assert timer.measure(work).median == pytest.approx(2e-3) and timer.measure(work).samples == 6
    assert timer.graph(work) == pytest.approx(0.25 / timing.GRAPH_CALLS)
    first = simulation.log.index("main waits for side")
    assert simulation.log[first - 1] == "work on side", "warmed up on another stream"
    assert simulation.log[first + 1 : first + 3] == ["synchronize", "capture"]
    seen = []
    assert timer.rounds(work, 3, seen.append) == [pytest.approx([1e-3] * 3), pytest.approx([3e-3] * 3)]
    assert seen == [0, 1, 2, 3, 4, 5]
    assert timer.host(work) >= 0


def test_the_flush_only_reads(simulation):
    """What it wrote would be written back within the timed call."""
    timer, found = timing.GpuTimer(CPU), []
    before = {name: value.clone() for name, value in vars(timer).items() if getattr(value, "ndim", 0)}
    assert before and all(len(value.unique()) > 10 for value in before.values())
    timer.measure([lambda: found.append(all(torch.equal(value, vars(timer)[name]) for name, value in before.items()))])
    assert all(found) and timer._sum == pytest.approx(float(next(iter(before.values())).sum()), rel=1e-4)


def test_baselines_of_few_tokens_are_timed_in_a_graph_too(simulation, bench):
    """Their many launches outlast the flush; what works on the CPU cannot be captured."""
    baselines = dict.fromkeys(("eager", "demo"), lambda: lambda index: simulation.spend(4e-3) or torch.ones(3))
    record = suite.run_case(toy(baselines=baselines), bench, timing.GpuTimer(CPU, samples=6), ample())
    assert record["baselines"]["eager"]["graph"] == record["graph"] == 0.25 / timing.GRAPH_CALLS
    assert "graph" not in record["baselines"]["demo"]
    assert report.baseline_text("eager", dict(median=4.0, graph=3.0), dict(median=2.0, graph=1.0)) == (
        "eager 2x (3x in a graph)"
    )


def test_garbage_goes_before_a_capture(simulation):
    """Within it, memory of a table would be unregistered, which the driver refuses and the capture does not survive."""

    class Cycle:
        def __init__(self):
            self.own = self
            weakref.finalize(self, simulation.log.append, "collected")

    gc.disable()
    try:
        timing.GpuTimer(CPU).record(Cycle)
    finally:
        gc.enable()
    assert simulation.log.index("collected") < simulation.log.index("capture")


def test_work_beside_work_starts_with_it(simulation):
    timer, side = timing.GpuTimer(CPU), timing.SideStream(torch.device("cuda"))
    simulation.spend(5.0)
    taken = timer.beside(partial(simulation.spend, 2e-3), partial(simulation.spend, 7e-3), side)
    assert taken == pytest.approx((2e-3, 7e-3))
    assert simulation.current.now == pytest.approx(5.007), "the stream goes on when both are done"


@pytest.mark.parametrize("lookup, exposed", [(1e-3, (2e-3, 1e-3, 0, 4e-3)), (9e-3, (18e-3, 17e-3, 16e-3, 20e-3))])
def test_a_lookup_is_exposed_where_other_work_does_not_hide_it(simulation, bench, monkeypatch, lookup, exposed):
    # Layers of a millisecond: the first Engram layer comes after one of them, the second after two.
    decoder = step.Decoder(4, 64, 96, 48, 32, engram=(1, 2))
    original = step.StepAt._layer

    def layer(self, stream, number):
        simulation.spend(1e-3, "layer")
        return original(self, stream, number)

    def look_up(ids, plan, tables, *, out, **options):
        simulation.spend(lookup * len(tables), "lookup")
        return reference.hash_lookup(
            ids, plan, tables, out=out, cu_seqlens=options["cu_seqlens"], history=options["history"]
        )

    def project(self, index):  # which costs nothing where the layer does it
        simulation.spend(2e-3, "projection")
        projecting(self, index)

    projecting = step.StepAt._project
    monkeypatch.setattr(step.StepAt, "_project", project)
    monkeypatch.setattr(step.StepAt, "_layer", layer)
    monkeypatch.setattr(step, "hash_lookup", look_up)
    monkeypatch.setattr(step, "SideStream", lambda device: timing.SideStream(torch.device("cuda")))
    record = step.Steps(bench, Simulated(CPU), {"toy": decoder}, rounds=2).measure("step/toy/B2")
    assert record["status"] == "ok", record
    assert record["seconds"]["plain"]["median"] == pytest.approx(4e-3)
    assert [record["exposed"][mode] for mode in step.FETCHING] == pytest.approx(exposed, abs=1e-9)
