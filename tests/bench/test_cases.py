"""Every case of every benchmark on a few tokens of small tables: its check and baselines, bytes, and wrong results."""

import dataclasses
import importlib
import inspect
import sys
from functools import partial

import pytest
import torch

import bench as package
from bench.__main__ import table_limits, tell_small_tables
from bench.ops import baselines, bench_gate_backward, bench_read_order
from bench.running import suite, timing
from bench.running.cases import ALL_MODELS, ALL_TOKENS, MODELS, TOKENS, Workbench, load_cases, row_bytes
from bench.serving import bench_prefetch
from engram_kernels import ngram_hash, reference
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.traffic import layer_traffic, link_seconds
from engram_kernels.ops.row_kernels.order import ORDERS
from engram_kernels.testing import oracles

from .toys import CPU, LIMIT, Clock, FakeTimer

FEW = 4
OPS = ("ngram_hash", "lookup", "hash_lookup", "gate_residual", "gate_conv_residual")


def few(case):
    """The same case on few tokens, which are among the arguments of what prepares it."""
    names = list(inspect.signature(case.prepare.func).parameters)
    place = next(names.index(name) for name in ("tokens", "sequences") if name in names)
    arguments = [FEW if number == place else value for number, value in enumerate(case.prepare.args)]
    return dataclasses.replace(case, tokens=FEW, prepare=partial(case.prepare.func, *arguments))


# Cases of a full run, but for the cache, which has calls in turn, and a model like another one.
FULL = [case for case in load_cases(full=True) if case.op != "cache" and case.model != "40b"]
CASES = {small.name: small for small in map(few, FULL)}
ONE_OF_EACH = {(case.op, case.variant.split("/")[-1]): case for case in reversed(CASES.values())}.values()


@pytest.fixture(autouse=True)
def _small_projections(monkeypatch):
    monkeypatch.setattr(bench_prefetch, "HIDDEN", 64)


def run(case, bench, timer=None):
    budget = timing.Budget(suite.COMPILATION / 2, Clock())  # no time to compile anything
    return suite.run_case(case, bench, timer or FakeTimer(), budget, most_baselines=99)


@pytest.mark.parametrize("name", CASES)
def test_cases_pass_their_check_with_their_baselines(name, bench):
    record = run(CASES[name], bench)
    assert record["status"] == "ok", record
    measured = {name for name, entry in record["baselines"].items() if "failed" not in entry}
    assert measured == record["baselines"].keys() - {"compiled"}, record["baselines"]
    assert measured or record["op"] == "read_order" or record["variant"] == "backward"
    assert bool(record["link_bytes"]) == (record["roof"] == "zero_copy") == record["variant"].startswith("host")
    assert record["wire_bytes"] == 0 or record["wire_bytes"] > record["link_bytes"]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
@pytest.mark.parametrize("at", [0, -1])
def test_a_wrong_result_has_no_time(case, at, bench):
    """Wrong in the last byte of one of its tensors, for the first or for the last set of inputs."""
    whole = case.prepare(bench).calls[at]()
    for place in range(len(whole) if isinstance(whole, tuple) else 1):

        def prepare(bench, place=place):
            prepared = case.prepare(bench)
            correct = prepared.calls[at]

            def wrong():
                result = correct()
                parts = list(result) if isinstance(result, tuple) else [result]
                parts[place] = parts[place].clone(memory_format=torch.contiguous_format)
                parts[place].view(-1).view(torch.uint8)[-1] ^= 0x40
                return tuple(parts) if isinstance(result, tuple) else parts[0]

            prepared.calls[at] = wrong
            return prepared

        timer = FakeTimer()
        record = run(dataclasses.replace(case, prepare=prepare), bench, timer)
        assert record["status"] == "failed" and timer.calls == 0, place
        assert "Error" not in record["reason"], record["reason"]
        assert "median" not in record and not record["baselines"]


@pytest.mark.parametrize("op", [*OPS, "tensor_parallel", "read_order"])
def test_an_output_that_is_not_written_is_noticed(op, bench, monkeypatch):
    case = next(case for case in CASES.values() if case.op == op)
    module = importlib.import_module(case.prepare.func.__module__)
    name = op if op in OPS else "hash_lookup"
    monkeypatch.setattr(module, name, lambda *arguments, out, **options: out)
    assert run(case, bench)["status"] == "failed"


def test_cases_of_a_run_and_of_a_full_one():
    assert set(ALL_MODELS.values()) == set(PRESETS) and (ALL_TOKENS[0], ALL_TOKENS[-1]) == (1, 16_384)
    for full, models, tokens in ((False, MODELS, TOKENS), (True, ALL_MODELS, ALL_TOKENS)):
        found = load_cases(full)
        assert len({case.name for case in found}) == len(found)
        wanted = {(op, model, count) for op in OPS for model in models for count in tokens}
        wanted -= {("gate_conv_residual", "v41", count) for count in tokens}  # V4.1 has no convolution
        lookups = ("lookup", "hash_lookup")
        wanted |= {(op, f"v41-{form}", count) for op in lookups for form in ("nvfp4", "mxfp4") for count in tokens}
        assert {(case.op, case.model, case.tokens) for case in found if case.op in OPS} == wanted
        number = {name: place for place, name in enumerate(ALL_MODELS)}
        order = [(number[case.model.partition("-")[0]] if full else 0, case.priority) for case in found]
        assert order == sorted(order), "a full run goes model by model, and each by priority"
        assert {case.variant.split("/")[2] for case in found if case.op == "read_order"} == set(ORDERS)
    first = load_cases()[0]
    assert (first.op, first.model, first.tokens) == ("gate_residual", "v41", 8192)
    assert {case.name for case in load_cases()} <= {case.name for case in load_cases(full=True)}


def test_a_benchmark_is_added_by_adding_a_file(tmp_path, monkeypatch):
    (tmp_path / "bench_new.py").write_text(
        "from bench.running.cases import Case\n"
        "def cases(full=False):\n"
        "    yield Case('new', 'v41', 'full' if full else '', 1, 0, lambda bench: None)\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    found = {case.name for case in load_cases()} | {case.name for case in load_cases(full=True)}
    del sys.modules["bench.bench_new"]
    assert {"new/v41/T1", "new/v41/full/T1"} <= found


@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_tensors(model, bench):
    config, prepared = bench.config(model), lambda name: CASES[f"{name}/T{FEW}"].prepare(bench)
    traffic, layers = layer_traffic(config, FEW), len(config.layers)
    ids = 4 * FEW
    lookup = prepared(f"lookup/{model}/host/uniform")
    table = bench.table(model, "host")
    assert lookup.link_bytes == traffic.gather_bytes == row_bytes(table, FEW * config.columns)
    assert lookup.nbytes == traffic.gather_bytes + traffic.out_bytes + ids * config.columns
    whole = prepared(f"hash_lookup/{model}/host/text")
    assert (whole.link_bytes, whole.wire_bytes) == (layers * traffic.gather_bytes, layers * traffic.wire_bytes)
    assert whole.nbytes == layers * (traffic.gather_bytes + traffic.out_bytes) + ids
    assert whole.calls[0]().nbytes == layers * traffic.out_bytes
    branches, width = config.branches, config.hidden_size
    row, norm, scalar = FEW * width * 2, branches * width * 2, FEW * branches * 4
    assert prepared(f"gate_residual/{model}").nbytes == (3 * branches + 1) * row + 2 * norm
    for variant, rows, norms, scalars in (("backward", 0, 0, 0), ("both", 3 * branches + 1, 2, 3)):
        expected = (5 * branches + 2 + rows) * row + (4 + norms) * norm + (3 + scalars) * scalar
        assert prepared(f"gate_residual_backward/{model}/{variant}").nbytes == expected
    if config.conv_kernel:
        weights = 3 + config.conv_kernel
        assert prepared(f"gate_conv_residual/{model}").nbytes == traffic.gate_bytes + weights * norm
        for variant, rows, times in (("backward", 31, 2), ("both", 31 + 18, 3)):  # of four branches
            expected = rows * row + times * weights * norm + 10 * (times - 1) * scalar
            assert prepared(f"gate_conv_residual_backward/{model}/{variant}").nbytes == expected


def test_bytes_over_the_link_and_of_states(bench):
    assert layer_traffic(bench.config("v41"), 8).wire_bytes == 8 * 24 * (256 + 32 + 3 * 20)
    assert link_seconds(148, 50) == pytest.approx(128 / 50e9)
    state = CASES[f"state/v41/history/T{FEW}"].prepare(bench)
    assert state.nbytes == FEW * (2 * 4 + 4 * 3 * 8 + 2 * 4 + 8), (
        "slots twice; old and new of 3 ids twice each; ids twice and a copy"
    )
    plan, tokens = bench.plan("v41", "host"), 64
    rows = 2 * tokens * 24
    for order, scales in (("direct", "host"), ("head", "host"), ("address", "device"), ("address", "host")):
        read = bench_read_order.prepare("text", order, scales, None, tokens, bench)
        distinct = []
        for index in range(read.facts["sets"]):
            row_ids = reference.ngram_hash(bench.token_ids("text", "v41", tokens, index), plan)
            distinct.append(sum(len(set(row_ids[:, layer].flatten().tolist())) for layer in range(2)))
        expected = sum(distinct) / len(distinct) if order == "address" else rows
        assert max(distinct) < rows, "some come again"
        assert (read.facts["rows_asked_for"], read.facts["rows_read"]) == (rows, int(expected))
        assert read.link_bytes == int(expected * (256 if scales == "device" else 264))


def test_distinct_rows_are_counted_by_layer(monkeypatch):
    row_ids = torch.tensor([[[1, 2], [1, 2]], [[1, 3], [4, 4]]])
    monkeypatch.setattr("engram_kernels.reference.ngram_hash", lambda *_: row_ids)
    assert bench_read_order._distinct_rows(torch.zeros(2), None) == 3 + 3


def test_a_few_jumps_of_the_slope_are_no_error():
    exact = torch.ones(1, 9000, 4)
    found = exact.clone()
    found[0, :2] = 7
    assert bench_gate_backward.disagreement([found], [exact]) is None
    found[0, 2] = float("nan")
    assert "off the reference in 3 of 9000 rows" in bench_gate_backward.disagreement([found], [exact])


def test_tables_are_scaled_to_the_limit(bench):
    for model in MODELS:
        table, plan = bench.table(model, "host"), bench.plan(model, "host")
        assert 0.9 * LIMIT < table.nbytes <= LIMIT
        assert table.rows >= max(plan.rows_per_layer)
        rows = ngram_hash(bench.token_ids("uniform", model, 2000, 0), plan)[:, 0]
        assert int(rows.min()) >= 0 and table.rows * 0.8 < int(rows.max()) < table.rows
        values = table.weight[:500].to(torch.float32)
        assert not values.isnan().any() and float(values.std()) > 0
    assert Workbench(CPU, 1 << 60, 1 << 60).config("v41").rows_per_layer == (384_006_168, 384_016_682)
    assert table_limits(100 << 30, 130 << 30, 64 << 30, 8 << 30) == (64 << 30, 8 << 30)
    assert table_limits(50 << 30, 16 << 30, 64 << 30, 8 << 30) == (32 << 30, 4 << 30)


def test_tables_that_come_out_smaller_say_so(capsys):
    """And what was seen: a machine may have less memory at the start than it grows to."""
    tell_small_tables((2 << 30, 70 << 30), (16 << 30, 8 << 30), (1 << 30, 8 << 30))
    told = capsys.readouterr().err.splitlines()
    assert told == ["WARNING: the host table has 1.0 GiB, not 16.0: of host memory 2.0 GiB are free now"]


def test_older_tables_make_room():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None, room={"host": 5 * LIMIT // 2}) as bench:
        first, device = bench.table("v41", "host"), bench.table("27b", "device")
        second = bench.table("27b", "host")
        assert not first.closed and bench.table("v41", "host") is first
        bench.table("demo", "host")
        assert first.closed and not second.closed and not device.closed
        assert bench.table("v41", "host") is not first and second.closed


def test_inputs_change_and_outgrow_the_cache(bench):
    with Workbench(CPU, LIMIT, LIMIT, cache_bytes=50 << 20) as cached:
        assert (cached.sets(1), cached.sets(20 << 20), cached.sets(1 << 30)) == (32, 5, 2)
    for kind in ("uniform", "text"):
        sets = [bench.token_ids(kind, "v41", 64, index) for index in range(8)]
        assert len({tuple(ids.tolist()) for ids in sets}) == 8
        assert torch.equal(sets[1], bench.token_ids(kind, "v41", 64, 1))


def test_baselines_that_only_a_gpu_compiles_or_copies(bench):
    plan, ids = bench.plan("v41", "host"), bench.token_ids("text", "v41", 40, 3)
    found = baselines.numpy_hash(plan)(ids.numpy())
    options = dict(pad=plan.pad, token_map=plan.token_map.tolist())
    assert found.tolist() == oracles.hash_rows(ids.tolist(), plan.multipliers.tolist(), plan.primes.tolist(), **options)
    for model in MODELS:
        table = bench.table(model, "device")
        row_ids = torch.randint(0, table.rows, (7, 5), dtype=torch.int32)
        assert torch.equal(baselines.plain_lookup(table)(row_ids), reference.lookup(table, row_ids))
