"""The benchmarks of the gates' gradients on a CPU: what they count and check, on a few tokens."""

import pytest
import torch

from bench import suite
from bench.cases import Case, Workbench, load_cases
from bench.ops import bench_gate_backward, bench_gate_conv_backward

from .test_bench import CPU, LIMIT, FakeTimer, ample

MODULES = {"gate_residual": bench_gate_backward, "gate_conv_residual": bench_gate_conv_backward}
TOKENS = 3


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


def case_of(op, variant):
    def prepare(bench):
        return MODULES[op].prepare("27b", variant, TOKENS, False, bench)

    return Case(f"{op}_backward", "27b", variant, TOKENS, 0, prepare)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("variant", bench_gate_backward.VARIANTS)
def test_cases_pass_their_check_with_their_baselines(op, variant, bench):
    record = suite.run_case(case_of(op, variant), bench, FakeTimer(), ample())
    assert record["status"] == "ok", record
    assert list(record["baselines"]) == (["eager"] if variant == "both" else [])
    assert not any("failed" in entry for entry in record["baselines"].values())


def test_cases_are_found():
    found = {(case.op, case.model, case.variant) for case in load_cases() if case.op.endswith("_backward")}
    wanted = {("gate_residual", "v41"), ("gate_residual", "27b"), ("gate_conv_residual", "27b")}
    assert found == {(f"{op}_backward", model, variant) for op, model in wanted for variant in ("backward", "both")}
    first = next(case for case in load_cases() if case.op.endswith("_backward"))
    assert (first.model, first.variant, first.tokens) == ("v41", "backward", 8192)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("place", [0, 1, 2, -1])
def test_a_wrong_gradient_prints_no_time(op, place, bench, monkeypatch):
    name = "gradients_alone"
    correct = getattr(MODULES[op], name)

    def spoilt(*arguments):
        call = correct(*arguments)

        def wrong(index):
            found = list(call(index))
            found[place] = found[place].clone()
            found[place].view(-1)[-1] += 50
            return found

        return wrong

    monkeypatch.setattr(MODULES[op], name, spoilt)
    timer = FakeTimer()
    record = suite.run_case(case_of(op, "backward"), bench, timer, ample())
    assert record["status"] == "failed" and "off the reference" in record["reason"] and timer.calls == 0


def test_bytes_are_those_of_tensors(bench):
    """At H = 4: 22 D elements a token backward, 13 forward; with the convolution 31 and 18."""
    width, branches = 2560, 4
    row, norm, scalar = TOKENS * width * 2, branches * width * 2, TOKENS * branches * 4
    prepared = bench_gate_backward.prepare("27b", "backward", TOKENS, False, bench)
    assert prepared.nbytes == 22 * row + 4 * norm + 3 * scalar
    prepared = bench_gate_backward.prepare("27b", "both", TOKENS, False, bench)
    assert prepared.nbytes == (22 + 13) * row + 6 * norm + 6 * scalar
    weights = 3 + 4
    prepared = bench_gate_conv_backward.prepare("27b", "backward", TOKENS, False, bench)
    assert prepared.nbytes == 31 * row + 2 * weights * norm + 10 * scalar
    prepared = bench_gate_conv_backward.prepare("27b", "both", TOKENS, False, bench)
    assert prepared.nbytes == (31 + 18) * row + 3 * weights * norm + 20 * scalar


def test_a_few_jumps_of_the_slope_are_no_error():
    exact = torch.ones(1, 9000, 4)
    found = exact.clone()
    found[0, :2] = 7
    assert bench_gate_backward.disagreement([found], [exact]) is None
    found[0, 2] = float("nan")
    assert "off the reference in 3 of 9000 rows" in bench_gate_backward.disagreement([found], [exact])
