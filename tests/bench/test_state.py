"""The benchmarks of the state by slot on a CPU: what is compared and counted, and that a wrong result has no time."""

import pytest

from bench import suite
from bench.cases import Case, Workbench, load_cases
from bench.serving import bench_state

from .test_bench import CPU, LIMIT, FakeTimer, ample

SEQUENCES = 8


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


def run(bench, prepare):
    case = Case("it", "27b", "", SEQUENCES, 0, lambda bench: prepare(SEQUENCES, bench))
    return suite.run_case(case, bench, FakeTimer(), ample())


def test_cases():
    names = [case.name for case in load_cases() if case.op == "state"]
    assert names == [f"state/{case}/T={count}" for count in (256, 64) for case in ("v41/history", "27b/conv")]


@pytest.mark.parametrize(("prepare", "baselines"), [("history", {"eager"}), ("conv", {"dense", "given"})])
def test_with_their_baselines(bench, prepare, baselines):
    record = run(bench, getattr(bench_state, f"prepare_{prepare}"))
    assert record["status"] == "ok", record
    assert set(record["baselines"]) == baselines
    assert not any("failed" in entry for entry in record["baselines"].values())
    if prepare == "history":  # slots twice; old and new of 3 ids twice each; ids
        assert record["nbytes"] == SEQUENCES * (2 * 4 + 4 * 3 * 8 + 4)


def test_a_wrong_result_has_no_time(bench, monkeypatch):
    correct = bench_state.gate_conv_residual
    dense = lambda *tensors, conv_state, **options: correct(  # noqa: E731
        *tensors, **options, conv_state=conv_state._replace(slots=conv_state.slots.flip(0))
    )
    monkeypatch.setattr(bench_state, "gate_conv_residual", dense)
    record = run(bench, bench_state.prepare_conv)
    assert record["status"] == "failed" and "reference" in record["reason"] and "median" not in record
