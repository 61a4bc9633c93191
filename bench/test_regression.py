"""The cases of python -m bench under pytest-benchmark, with a threshold.

    pytest bench --benchmark-only --baseline bench/results/FILE.json    on a GPU: fails where a case got slower
    pytest bench --benchmark-disable                                    anywhere: runs and checks each body once

Without a GPU the references run, on tiny tables and few tokens, and no time is compared. Rounds of pytest-benchmark are
wall time with a synchronisation; ``extra_info`` has the device's own time, which is what the threshold is about.
"""

import itertools
import json
from dataclasses import dataclass

import pytest
import torch

from engram_kernels.tables.memory.report import available_host_memory

from .__main__ import GIB, table_limits
from .running.cases import Workbench, load_cases
from .running.suite import measure_calls
from .running.timing import CpuTimer, GpuTimer

pytest.importorskip("pytest_benchmark")

#: Times the baseline's median. Two runs of one build differ by less, events around a few microseconds included.
SLOWER = 1.15
CPU_TABLE_BYTES, CPU_TOKENS = 4 << 20, 8
ROUNDS = 10
ON_GPU = torch.cuda.is_available()
CASES = [case for case in load_cases() if ON_GPU or case.tokens <= CPU_TOKENS]


@dataclass(frozen=True)
class Machine:
    """Where the cases run, and what they are compared with: name -> seconds."""

    bench: Workbench
    timer: GpuTimer | CpuTimer
    baseline: dict[str, float]

    def wait(self) -> None:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)


@pytest.fixture(scope="module")
def machine(request):
    path = request.config.getoption("--baseline")
    if not ON_GPU:
        with Workbench(torch.device("cpu"), CPU_TABLE_BYTES, CPU_TABLE_BYTES, say=lambda line: None) as bench:
            yield Machine(bench, CpuTimer(samples=3), {})
        return
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    content = None if path is None else json.loads(path.read_text())
    wanted = table_sizes(content, properties.name)
    limits = table_limits(available_host_memory(), torch.cuda.mem_get_info(device)[0], *wanted)
    if content is not None and limits != wanted:
        pytest.fail(f"{path} was made with tables of {wanted} bytes, and there is room for {limits}")
    with Workbench(device, *limits, getattr(properties, "L2_cache_size", 0)) as bench:
        yield Machine(bench, GpuTimer(device), baseline_medians(content))


def table_sizes(content: dict | None, gpu: str) -> tuple[int, int]:
    """Host and device bytes of the tables: the baseline's, whose rates hold for its size and its GPU alone."""
    if content is None:
        return 16 * GIB, 8 * GIB
    environment = content["environment"]
    if environment["gpu"] != gpu:
        pytest.fail(f"the baseline was measured on {environment['gpu']}, and this is {gpu}")
    return environment["host_table_bytes"], environment["device_table_bytes"]


def baseline_medians(content: dict | None) -> dict[str, float]:
    """Case -> seconds, of the cases that have a time."""
    records = [] if content is None else content["cases"]
    return {record["name"]: record["median"] for record in records if record["status"] == "ok" and "median" in record}


def regression(name: str, median: float, baseline: dict[str, float]) -> str | None:
    """In words where a case is slower than the threshold allows; one without a baseline is not."""
    before = baseline.get(name)
    if before is None or median <= SLOWER * before:
        return None
    return f"{name} takes {median * 1e6:.2f} us, {median / before:.2f} times the baseline's {before * 1e6:.2f} us"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, machine, benchmark):
    prepared = case.prepare(machine.bench)
    benchmark.group = case.op
    turn = itertools.cycle(range(len(prepared.calls)))
    last = 0

    def body():
        nonlocal last
        last = next(turn)
        result = prepared.calls[last]()
        machine.wait()
        return result

    if not benchmark.enabled:
        problem = prepared.check(benchmark(body), last)
        assert problem is None, problem
        return
    problem = prepared.check(prepared.calls[0](), 0)
    assert problem is None, problem
    measured = measure_calls(prepared, machine.timer)
    counts = {name: measured.pop(name, getattr(prepared, name)) for name in ("nbytes", "link_bytes")}
    benchmark.extra_info.update(
        {f"{machine.timer.kind}_{field}": measured[field] for field in ("median", "low", "high", "samples")},
        **counts,
        baseline=machine.baseline.get(case.name),
    )
    benchmark.pedantic(body, rounds=ROUNDS, warmup_rounds=1)
    slower = regression(case.name, measured["median"], machine.baseline)
    assert slower is None, slower
