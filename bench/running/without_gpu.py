"""What can be said without a GPU: counted traffic, what the kernels compile to, CPU times of the references."""

import json
import platform
from collections.abc import Sequence

import numpy as np
import torch

from bench.ops.host_cost import print_host_costs
from engram_kernels.commands.console import print_sections
from engram_kernels.commands.size import size_sections
from engram_kernels.testing.implementations import Implementation

from .cases import MODELS, Case, Workbench, load_cases
from .environment import ROOT, cpu_name
from .report import baseline_text, print_table
from .suite import run_case
from .timing import Budget, CpuTimer

COMPILE_REPORT = ROOT / "tests" / "data" / "compile_report.json"
EXECUTED_REPORT = ROOT / "tests" / "data" / "executed_report.json"
TARGET = "sm_90"
TOKENS = (1, 128)
#: Variants of cases that are alike on a CPU to all the others of their op.
PLAIN = ("", "uniform", "host/uniform")
#: Of cases that are asked for by name: what a reference does in a moment.
MOST_TOKENS = 128
#: Tables small enough to be filled at once. CPU times are no statement about large ones.
TABLE_BYTES = 64 << 20
SECONDS = 10.0


def print_without_gpu(seconds: float = SECONDS) -> None:
    """Four parts, each of which says what kind of number it holds."""
    print("No GPU: nothing below was measured on one.\n")
    print("1. Traffic model: counted, not measured.")
    for name in MODELS.values():
        print_sections(size_sections(name))
    print("\n2. What the kernels compile to and execute, counted, without a GPU.")
    print_compile_summary()
    print_executed_summary()
    print("\n3. Host time of calls beside bare Triton launches of the same kernels, up to the driver's own.")
    print_host_costs()
    print("\n4. CPU times of the references.")
    print_cpu_times(seconds, [case for case in load_cases() if case.tokens in TOKENS and case.variant in PLAIN])


def print_compile_summary() -> None:
    """Registers and instructions by kernel and case, from the committed compile report."""
    if not COMPILE_REPORT.exists():
        print(f"{COMPILE_REPORT} is not there.")
        return
    version, report = _newest(COMPILE_REPORT)
    rows = [
        (case, code["kernel"], code["registers"], code["instructions"], code["spills"])
        for case, kernels in report[TARGET].items()
        for code in kernels
    ]
    print(f"Triton {version}, {TARGET}; all versions and targets are in docs/compile_report.md.")
    print_table(("case", "kernel", "registers", "instructions", "spilled bytes"), rows)


def print_executed_summary() -> None:
    """Warp instructions, sectors and round trips of jobs, from the committed report."""
    if not EXECUTED_REPORT.exists():
        print(f"{EXECUTED_REPORT} is not there.")
        return
    _, jobs = _newest(EXECUTED_REPORT)
    rows = []
    for name, entry in jobs.items():
        trips = " + ".join(f"{launch['waits']}/{launch['all_waits']}" for launch in entry["launches"])
        rows.append((name, entry["unit"], f"{entry['instructions']:,}", f"{entry['sectors']['load']:,}", trips))
    print("Trips are round trips to memory before a launch's first store / in all.")
    print_table(("job", "for each", "warp instructions", "sectors loaded", "trips"), rows)


def _newest(path) -> tuple[str, dict]:
    """The newest Triton in a report, and its part."""
    report = json.loads(path.read_text())
    version = max(report, key=lambda text: [int(part) for part in text.split(".")])
    return version, report[version]


def print_cpu_times(
    seconds: float,
    cases: Sequence[Case],
    text: np.ndarray | None = None,
    implementations: Sequence[Implementation] = (),
) -> list[dict]:
    """Times of the references, which is what a CPU tensor runs, on small tables; the records. text: the user's ids.

    implementations: timed beside them once their results are checked, and torch's own ways too.
    """
    print(f"On {cpu_name()}, {torch.get_num_threads()} threads, {platform.machine()}, with tables of", end=" ")
    print(f"{TABLE_BYTES >> 20} MiB: nothing here ran on a GPU, and the times say nothing about the kernels.")
    budget, timer, rows, records, left_out = Budget(seconds), CpuTimer(), [], [], 0
    device, given = torch.device("cpu"), dict(text=text, implementations=implementations)
    with Workbench(device, TABLE_BYTES, TABLE_BYTES, say=lambda line: None, **given) as bench:
        for case in cases:
            if budget.left() < 0:
                left_out += 1
                continue
            record = run_case(case, bench, timer, budget, most_baselines=2 if implementations else 0)
            records.append(record)
            if record["status"] == "ok":
                beside = (baseline_text(name, entry, record) for name, entry in record["baselines"].items())
                rows.append((case.name, "CPU", f"{record['median'] * 1e6:,.0f}", record["samples"], "; ".join(beside)))
            else:
                rows.append((case.name, "CPU", f"FAILED: {record['reason']}", "", ""))
    columns = ("reference of", "on", "median us", "samples", "times as long")
    shown = len(columns) if implementations else len(columns) - 1
    print_table(columns[:shown], [row[:shown] for row in sorted(rows)])
    if left_out:
        print(f"{left_out} cases left out for time.")
    return records
