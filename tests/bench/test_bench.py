"""The benchmarks on a CPU: their cases with small tables, what they count and check, the budget, the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import baselines, plots, report, suite, text, timing, without_gpu
from bench.cases import MODELS, TOKENS, Case, Prepared, Workbench, load_cases, row_bytes
from engram_kernels import ngram_hash, reference
from engram_kernels.commands.size import layer_traffic
from tests.support import oracles

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LIMIT = 1 << 25
OPS = {"ngram_hash": "hashing", "lookup": "rows", "hash_lookup": "hash_rows"}
OPS |= {"gate_residual": "gate", "gate_conv_residual": "gate_conv"}
SMALL = [case for case in load_cases() if case.tokens == 8]
ROOFS = dict(device_copy=4e12, zero_copy=50e9, copy_engine=52e9, empty=3e-6, round_trip=1e-6, host_bytes=LIMIT)
ROOFS |= dict(
    sweep=[dict(programs=8, width=16, tile=8192, rate=40e9), dict(programs=32, width=16, tile=8192, rate=5e10)]
)
MACHINE = dict(
    gpu="NVIDIA Test",
    date="2026-01-12 10:00 UTC",
    text="data/austen_ids.npz",
    host_table_bytes=LIMIT,
    device_table_bytes=LIMIT,
    l2_bytes=0,
)


class FakeTimer:
    """Calls everything once and says that it took a millisecond; ``clock`` moves on by ``seconds`` a measurement."""

    kind = "fake"

    def __init__(self, clock=None, seconds=0.0):
        self.calls, self._clock, self._seconds = 0, clock, seconds

    def measure(self, calls):
        self.calls += 1
        calls[0]()
        if self._clock is not None:
            self._clock.now += self._seconds
        return timing.Measurement.of([1e-3] * 20)

    def once(self, calls):
        self.calls += 1
        for call in calls:
            call()
        return timing.Measurement.of([1e-3] * len(calls))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


def ample():
    return timing.Budget(1e9)


def toy(name="toy", prepare=None, **changes):
    """A case that adds one to three numbers."""

    def three(bench):
        check = lambda result, index: None if torch.equal(result, torch.ones(3)) else "not one"  # noqa: E731
        return Prepared([lambda: torch.zeros(3) + 1] * 2, check, nbytes=24, **changes)

    return Case(op=name, model="v41", variant="", tokens=1, priority=0, prepare=prepare or three)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_pass_their_check_with_their_baselines(case, bench):
    record = suite.run_case(case, bench, FakeTimer(), ample())
    assert record["status"] == "ok", record
    measured = {name: entry for name, entry in record["baselines"].items() if "failed" not in entry}
    assert measured == record["baselines"] and 1 <= len(measured) <= 3


def test_every_op_model_and_token_count_is_there():
    found = {(case.op, case.model, case.tokens) for case in load_cases()}
    wanted = {(op, model, tokens) for op in OPS for model in MODELS for tokens in TOKENS}
    assert wanted - found == {("gate_conv_residual", "v41", tokens) for tokens in TOKENS}, "V4.1 has no convolution"
    names = [case.name for case in load_cases()]
    assert len(set(names)) == len(names)
    rows = [case for case in load_cases() if case.op in ("lookup", "hash_lookup")]
    assert {case.variant for case in rows} == {"host/uniform", "host/text", "device/uniform", "device/text"}
    assert all((case.roof == "zero_copy") == case.variant.startswith("host") for case in load_cases())


def test_one_file_per_op_and_priority_order():
    for op, file in OPS.items():
        files = (f"bench/ops/bench_{file}.py", f"engram_kernels/ops/{file}.py")
        assert all((ROOT / path).exists() for path in files), op
    order = load_cases()
    assert [case.priority for case in order] == sorted(case.priority for case in order)
    assert {case.op for case in order[:3]} == {"gate_residual", "gate_conv_residual", "hash_lookup"}
    assert order[0].tokens == 8192 and order[0].model != "27b"


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_prints_no_time(op, bench, monkeypatch):
    module = __import__(f"bench.ops.bench_{OPS[op]}", fromlist=["bench"])
    correct = getattr(module, op)

    def spoilt(*arguments, **options):
        out = correct(*arguments, **options)
        flat = out.view(-1)
        flat[-1] = flat[-1] + 3
        return out

    monkeypatch.setattr(module, op, spoilt)
    case = next(case for case in SMALL if case.op == op)
    timer = FakeTimer()
    record = suite.run_case(case, bench, timer, ample())
    assert record["status"] == "failed" and "reference" in record["reason"] and timer.calls == 0
    assert "median" not in record and not record["baselines"]
    line = report.cells(record, ROOFS)
    assert line[1].startswith("FAILED") and not any(line[2:])


@pytest.mark.parametrize("op", OPS)
def test_an_output_that_is_not_written_is_noticed(op, bench, monkeypatch):
    module = __import__(f"bench.ops.bench_{OPS[op]}", fromlist=["bench"])
    monkeypatch.setattr(module, op, lambda *arguments, out, **options: out)
    case = next(case for case in SMALL if case.op == op)
    assert suite.run_case(case, bench, FakeTimer(), ample())["status"] == "failed"


def test_failures_cost_their_own_case_only(bench):
    def broken(bench):
        raise RuntimeError("no\nsuch memory")

    record = suite.run_case(toy(prepare=broken), bench, FakeTimer(), ample())
    assert record["reason"] == "RuntimeError: no such memory" and record["status"] == "failed"
    wrong = {
        "wrong": lambda: lambda index: torch.zeros(3),
        "broken": lambda: broken(bench),
        "third": None,
        "fourth": None,
    }
    record = suite.run_case(toy(baselines=wrong), bench, FakeTimer(), ample(), most_baselines=2)
    assert record["status"] == "ok"
    assert record["baselines"] == {"wrong": {"failed": "not one"}, "broken": {"failed": "RuntimeError: no such memory"}}


def test_bytes_are_those_of_tensors(bench):
    tokens = 8
    for model in MODELS:
        config = bench.config(model)
        traffic = layer_traffic(config, tokens)
        by_name = {case.name.removesuffix(f"/T={tokens}"): case for case in SMALL}
        prepared = by_name[f"lookup/{model}/host/uniform"].prepare(bench)
        table = bench.table(model, "host")
        assert prepared.link_bytes == traffic.gather_bytes == row_bytes(table, tokens * config.columns)
        assert prepared.nbytes == traffic.gather_bytes + traffic.out_bytes + 4 * tokens * config.columns
        prepared = by_name[f"hash_lookup/{model}/host/text"].prepare(bench)
        layers = len(config.layers)
        assert prepared.link_bytes == layers * traffic.gather_bytes
        assert prepared.nbytes == layers * (traffic.gather_bytes + traffic.out_bytes) + 4 * tokens
        assert by_name[f"hash_lookup/{model}/device/text"].prepare(bench).link_bytes == 0
        assert prepared.calls[0]().nbytes == layers * traffic.out_bytes
        norm = config.branches * config.hidden_size * 2
        prepared = by_name[f"gate_residual/{model}"].prepare(bench)
        elements = (3 * config.branches + 1) * config.hidden_size
        assert prepared.nbytes == tokens * elements * 2 + 2 * norm
    prepared = by_name["gate_conv_residual/27b"].prepare(bench)
    assert prepared.nbytes == traffic.gate_bytes + (3 + config.conv_kernel) * norm


def test_tables_are_scaled_to_the_limit(bench):
    for model in MODELS:
        table, plan = bench.table(model, "host"), bench.plan(model, "host")
        assert 0.9 * LIMIT < table.nbytes <= LIMIT
        assert table.rows >= max(plan.rows_per_layer)
        ids = bench.token_ids("uniform", model, 2000, 0)
        rows = ngram_hash(ids, plan)[:, 0]
        assert int(rows.min()) >= 0 and table.rows * 0.8 < int(rows.max()) < table.rows
        values = table.weight[:500].to(torch.float32)
        assert not values.isnan().any() and float(values.std()) > 0
    whole = Workbench(CPU, 1 << 60, 1 << 60).config("v41")
    assert whole.rows_per_layer == (384_006_168, 384_016_682)
    assert command.table_limits(100 << 30, 130 << 30, 64 << 30, 8 << 30) == (64 << 30, 8 << 30)
    assert command.table_limits(50 << 30, 16 << 30, 64 << 30, 8 << 30) == (32 << 30, 4 << 30)


def test_inputs_change_and_outgrow_the_cache(bench):
    with Workbench(CPU, LIMIT, LIMIT, cache_bytes=50 << 20, say=print) as cached:
        assert (cached.sets(1), cached.sets(20 << 20), cached.sets(1 << 30)) == (32, 5, 2)
    for kind in ("uniform", "text"):
        sets = [bench.token_ids(kind, "v41", 64, index) for index in range(8)]
        assert len({tuple(ids.tolist()) for ids in sets}) == 8
        assert torch.equal(sets[1], bench.token_ids(kind, "v41", 64, 1))


def run_toys(tmp_path, bench, count, seconds, each, results=None, names="abcdefghij"):
    clock = Clock()
    results = results or suite.ResultFile(tmp_path / "r.json", dict(MACHINE))
    timer = FakeTimer(clock, each)
    suite.run_cases([toy(name) for name in names[:count]], bench, timer, timing.Budget(seconds, clock), results)
    return results, timer, clock


def test_the_run_ends_within_its_time(tmp_path, bench):
    results, _, clock = run_toys(tmp_path, bench, 6, 19.0, 7.0)
    # Each took 7 of 19 seconds. The first case of an op is expected to take 6, and 5 are left.
    assert [record["op"] for record in results.content["cases"]] == ["a", "b"]
    assert clock.now <= 19.0
    assert results.content["left_out"] == [f"{op}/v41/T=1" for op in "cdef"]
    assert json.loads(results.path.read_text())["left_out"] == results.content["left_out"]


def test_every_case_is_kept_as_it_ends(tmp_path, bench):
    seen = []

    def watched(bench):
        seen.append(len(json.loads((tmp_path / "r.json").read_text())["cases"]) if seen else 0)
        return toy().prepare(bench)

    results = suite.ResultFile(tmp_path / "r.json", dict(MACHINE))
    cases = [toy(name, watched) for name in "abc"]
    suite.run_cases(cases, bench, FakeTimer(), ample(), results)
    assert seen == [0, 1, 2]


def test_resume_measures_what_is_missing(tmp_path, bench):
    first, *_ = run_toys(tmp_path, bench, 5, 19.0, 7.0)
    first.content["cases"][1]["status"] = "failed"
    first.save()
    again = suite.ResultFile.resume(first.path, dict(MACHINE, date="later"))
    assert again.content["environment"]["date"] == MACHINE["date"]
    again, timer, _ = run_toys(tmp_path, bench, 5, 1e9, 7.0, again)
    assert timer.calls == 4, "all but the first, the failed one among them"
    assert sorted(record["op"] for record in again.content["cases"]) == list("abcde") and not again.content["left_out"]
    with pytest.raises(suite.UsageError, match="its gpu is NVIDIA Test, and here it is Other"):
        suite.ResultFile.resume(first.path, dict(MACHINE, gpu="Other"))


def test_no_compilation_at_the_end(bench):
    compiled = {"compiled": lambda: lambda index: torch.ones(3)}
    budget = timing.Budget(10.0, Clock())
    record = suite.run_case(toy(baselines=compiled), bench, FakeTimer(), budget)
    assert record["baselines"] == {"compiled": {"failed": "no time left"}}


def test_a_whole_run_on_small_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "all_roofs", lambda *arguments: ROOFS)
    chosen = command.parse(["--only", "27b*T=8", "--out", str(tmp_path)])
    with pytest.raises(suite.UsageError, match="no case matches"):
        command.measure(command.parse(["--only", "99b"]), ample(), CPU, dict(MACHINE), FakeTimer())
    chosen.only = "*27b*T=8"
    assert command.measure(chosen, ample(), CPU, dict(MACHINE), FakeTimer()) == 0
    out = capsys.readouterr()
    content = json.loads((tmp_path / "nvidia-test-2026-01-12.json").read_text())
    assert {record["op"] for record in content["cases"]} == set(OPS) and content["finished"]
    assert "[1/11] gate_conv_residual/27b/T=8: median us 1,000" in out.err
    assert "two_launches 1x" in out.out and "zero_copy" in out.out
    assert (tmp_path / "nvidia-test-2026-01-12.md").exists()
    assert command.open_results(chosen, MACHINE).path.name == "nvidia-test-2026-01-12-2.json"
    again = command.parse(["--resume", "--out", str(tmp_path)])
    assert command.open_results(again, MACHINE).path.name == "nvidia-test-2026-01-12.json"


def record_of(name, **changes):
    op, model, *_ = name.split("/")
    record = dict(name=name, op=op, model=model, variant="host/uniform", tokens=int(name.split("=")[1]), status="ok")
    record |= dict(
        roof="zero_copy",
        nbytes=20_000_000,
        link_bytes=10_000_000,
        wire_bytes=11_562_500,
        facts={},
        host=2e-5,
        graph=None,
    )
    record |= dict(median=2.5e-4, low=2.4e-4, high=2.6e-4, samples=30, baselines={"eager": dict(median=5e-4)})
    record["kernels"] = [dict(kernel="k", registers=64, spills=0, programs=132)]
    return record | changes


def content_of(*cases, **roofs_changed):
    return dict(environment=dict(MACHINE), roofs=ROOFS | roofs_changed, cases=list(cases), left_out=["z/v41/T=1"])


def test_columns():
    cells = report.cells(record_of("lookup/v41/T=8192"), ROOFS)
    assert cells == "lookup/v41/T=8192|250.00|8%|20|40|0.800|1.25x|||20.00|64|132|eager 2x".split("|")
    waiting = record_of("lookup/v41/T=1", median=6e-6, link_bytes=6336)
    assert report.cells(waiting, ROOFS)[7] == "3.0", "round trips over an empty kernel"
    device = record_of("lookup/v41/T=1", roof="device_copy", link_bytes=0)
    assert report.fraction(device, ROOFS) == pytest.approx(20_000_000 / 2.5e-4 / 4e12)
    assert report.over_floor(device | dict(wire_bytes=0.0), ROOFS) == pytest.approx(2.5e-4 / (20_000_000 / 4e12))


def test_flags_until_the_notes_explain_them():
    fast = record_of("lookup/v41/T=8192", median=1.9e-4)
    content = content_of(fast, record_of("lookup/27b/T=8192"), zero_copy=5e10, copy_engine=5.2e10)
    assert report.flags(content, "") == ["lookup/v41/T=8192 is at 1.053 of its roof, above 1.02"]
    assert report.flags(content, "`lookup/v41/T=8192`: read twice")[0].endswith("(explained in NOTES.md)")
    slow = report.flags(content_of(zero_copy=3e10), "")
    assert slow == ["the zero-copy roof is 0.58 of the copy engine, below 0.6"]
    assert report.flags(content_of(dict(name="a", status="failed", reason="why")), "") == ["a failed: why"]


def test_failed_baselines_are_flagged_too():
    failed = dict(embedding=dict(failed="why"), compiled=dict(failed=report.NO_TIME))
    case = record_of("lookup/v41/T=8192", baselines=failed)
    assert report.flags(content_of(case), "") == ["baseline embedding of lookup/v41/T=8192 failed: why"]
    assert report.cells(case, ROOFS)[-1] == "embedding failed (why); compiled failed (no time left)"


def test_report_from_json_alone(tmp_path):
    cases = [record_of(f"{op}/v41/T={tokens}") for op in OPS for tokens in (1, 8192)]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content_of(*cases, dict(name="bad", status="failed", reason="why"))))
    assert command.main(["--report", str(path)]) == 0
    words = path.with_suffix(".md").read_text()
    for fact in (
        "# Benchmarks on NVIDIA Test",
        "| zero_copy | 50.0 GB/s, best at 32 programs",
        "| lookup/v41/T=8192 | 250",
    ):
        assert fact in words, fact
    assert "| bad | FAILED: why |" in words and "- z/v41/T=1" in words
    pytest.importorskip("matplotlib")
    pictures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert pictures == ["gpu-gate.png", "gpu-gather.png", "gpu-latency.png"]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in pictures)
    assert plots.write_plots(content_of(), tmp_path / "empty") == []


def test_mistakes_take_one_line(tmp_path, capsys):
    for content in (None, "{", "[]"):
        path = tmp_path / "x.json"
        if content is not None:
            path.write_text(content)
        assert command.main(["--report", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench: ") and error.count("\n") == 1


def test_plain_table_without_rich(monkeypatch, capsys):
    monkeypatch.setattr("engram_kernels.commands.console.has_rich", lambda: False)
    report.print_table(("case", "us"), [("a", "1.00"), ("longer", "2.00")])
    assert capsys.readouterr().out == "case    us\na       1.00\nlonger  2.00\n"


def test_without_a_gpu_everything_is_labelled(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "print_without_gpu", lambda: without_gpu.print_without_gpu(seconds=1.0))
    monkeypatch.setattr(command, "load_token_ids", lambda: text.load_token_ids()[:40_000])
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    model, compiled, times = (printed.index(f"\n{number}. ") for number in (1, 2, 3))
    cache = printed.index("\n4. A hot n-gram cache: simulated, not measured.")
    assert "40,000 tokens" in printed[cache:] and "1,048,576" in printed[cache:]
    assert printed.startswith("No GPU: nothing below was measured on one.")
    assert "counted, not measured" in printed[model:compiled]
    assert "execute, counted" in (part := printed[compiled:times]) and "gate, 64 tokens" in part
    assert "hash_lookup_kernel" in part
    assert "CPU times of the references" in printed[times:] and "FAILED" not in printed
    lines = [line for line in printed[times:cache].splitlines() if "/T=" in line]
    assert len(lines) >= 3 and all(" CPU " in line for line in lines)


def test_the_demo_hash_is_the_hash(bench):
    plan = bench.plan("v41", "host")
    ids = bench.token_ids("text", "v41", 40, 3)
    found = baselines.numpy_hash(plan)(ids.numpy())
    options = dict(pad=plan.pad, token_map=plan.token_map.tolist())
    assert found.tolist() == oracles.hash_rows(ids.tolist(), plan.multipliers.tolist(), plan.primes.tolist(), **options)


@pytest.mark.parametrize("model", MODELS)
def test_the_compiled_lookup_is_the_lookup(model, bench):
    table = bench.table(model, "device")
    ids = torch.randint(0, table.rows, (7, 5), dtype=torch.int32)
    assert torch.equal(baselines.plain_lookup(table)(ids), reference.lookup(table, ids))


def test_text_and_its_statistics():
    ids = text.load_token_ids()
    assert (len(ids), int(ids.max()), ids.dtype) == (845_122, 127_998, np.int32)
    assert text.statistics_table() in (ROOT / "bench" / "data" / "README.md").read_text()
    assert text.distinct_share(np.array([1, 2, 1, 2, 1, 2, 3, 4]), 4, 2) == pytest.approx((2 / 3 + 3 / 3) / 2)
