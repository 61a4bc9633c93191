"""``python -m bench sweep``: candidates are applied and taken back, wrong ones carry no time, cases exist."""

import dataclasses

import pytest
import torch

from bench.ops import sweep
from bench.running.cases import Prepared, load_cases
from bench.running.timing import Budget, Measurement
from engram_kernels.ops.conv_kernels import scale as gate_scale
from engram_kernels.ops.gate_kernels import residual as gate
from engram_kernels.ops.row_kernels import by_id as rows
from tests.reports.compile_cases import CASES
from tests.reports.offline import compiling_for

from .toys import Clock


class Timer:
    """Seconds by the configuration in force: the more warps, the slower."""

    def measure(self, calls):
        calls[0]()
        return Measurement.of([gate.gate_config(5120, 99, 4, 132).num_warps * 1e-6] * 5)


def test_cases_and_fields_exist():
    names = {case.name for case in load_cases()}
    for entry in sweep.SWEEPS.values():
        assert set(entry.cases) <= names
        function = getattr(entry.modules[0], entry.function)
        assert all(getattr(module, entry.function) is function for module in entry.modules)
        arguments = {
            "rows_config": (256, 1, 99, 132, "host"),
            "gate_backward_config": (4, 64, 99, 132),
            "conv_backward_config": (4, 64, 4, 99, 132),
            "conv_config": (4, 64, 4),
            "gate_config": (64, 99, 4, 132),
            "hash_config": (64, 8, 2),
        }.get(entry.function, (4, 64))
        for changes in entry.candidates:
            dataclasses.replace(function(*arguments), **changes)


def test_a_candidate_is_applied_and_taken_back():
    entry, before = sweep.SWEEPS["gate"], gate.gate_config
    with sweep.configured(entry, dict(num_warps=8)):
        shape = (5120, 99, 4, 132)
        assert gate.gate_config(*shape).num_warps == gate_scale.gate_config(*shape).num_warps == 8
        assert gate.gate_config(*shape).block_d == 1024
    with pytest.raises(KeyError), sweep.configured(entry, dict(block_d=512)):
        raise KeyError
    assert gate.gate_config is before is gate_scale.gate_config


def test_ranking_and_wrong_results():
    def prepare(bench):
        def check(result, index):
            return "1 of 9 elements differ" if gate.gate_config(5120, 99, 4, 132).num_warps == 2 else None

        return Prepared(calls=[lambda: torch.zeros(1)], check=check, nbytes=4)

    case = dataclasses.replace(next(c for c in load_cases() if c.name == "gate_residual/v41/T1"), prepare=prepare)
    entry = dataclasses.replace(sweep.SWEEPS["gate"], candidates=tuple(sweep.grid(num_warps=(1, 2, 8))))
    result = sweep.run_sweep(entry, case, None, Timer(), Budget(10, Clock()))
    assert [candidate["config"] for candidate in result["candidates"]] == [
        {"num_warps": 1},
        {},
        {"num_warps": 8},
        {"num_warps": 2},
    ]
    assert "median" not in result["candidates"][-1] and "differ" in result["candidates"][-1]["wrong"]
    assert result["in_force_us"] == pytest.approx(4) and result["left_out"] == 0
    none_left = sweep.run_sweep(entry, case, None, Timer(), Budget(0, Clock()))
    assert none_left["left_out"] == 3


def test_without_a_gpu(capsys):
    assert sweep.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.compile
@pytest.mark.parametrize("changes", [dict(block_rows=8, num_warps=1), dict(block_rows=32, num_warps=4)])
def test_candidates_reach_the_kernels(changes):
    with sweep.configured(sweep.SWEEPS["rows"], changes), compiling_for("sm_90") as compiled:
        CASES["lookup/v41"]()
        CASES["hash_lookup/v41"]()
    assert [(unit, warps) for _, unit, warps in compiled] == [(changes["block_rows"], changes["num_warps"])] * 2
    assert rows.rows_config(256, 1, 99, 132, "host").num_warps == 2
