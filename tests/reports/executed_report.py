"""What our kernels execute on sm_90, by the jobs of ``tests/reports/executed_jobs.py``: counted, with every result
checked.

``python -m tests.reports.executed_report`` counts under the Triton at hand and writes its part of
``tests/data/executed_report.json``; ``make compile-report`` runs it under the oldest and the newest Triton, and puts it
into ``docs/compile_report.md``. With families of jobs (``hash gate``) or another ``--target`` it prints a table and
writes nothing.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import triton

from tests.machine.counting.launches import CountingMachine, LaunchCounts, total
from tests.machine.gpu import TARGETS, standing_in
from tests.machine.parsing.sass import KINDS

from .executed_jobs import FAMILIES, PROCESSORS, Job, jobs

TARGET = "sm_90"
JSON = Path(__file__).parents[1] / "data" / "executed_report.json"
TITLES = dict(integer="int", routine="division", convert="convert", shuffle="shuffle") | {
    kind: kind for kind in ("float", "global", "shared", "barrier", "control")
}
HEAD = f"""What a job executes on {TARGET}: its kernels run instruction by instruction on a CPU, with real tensors,
and every result is compared with the reference. Nothing here is a time. The geometry is DeepSeek-V4.1's where nothing
else is said (2 layers, N = 4, 8 heads; rows of 256 e4m3 bytes and 8 scale bytes to bfloat16; D = 5120, 4 branches, all
bfloat16); 27b and gate_conv have Engram-27B's, qwen has Qwen's. Grids are those of {PROCESSORS} multiprocessors;
"4 programs" makes each of them take several steps, which shows the steady state.

- **Instructions**: warp instructions of the machine code for each unit (a token, a row), all launches together.
  **By kind**: {", ".join(TITLES[kind] for kind in KINDS)}. "Division" is all that runs
  in called routines of 64-bit division; moves and bit operations are with "int". Predicated-off instructions count,
  since they are issued.
- **Loads** and **stores**, of global memory: requests (instructions of a warp with a lane enabled) / sectors (pieces of
  32 bytes, in each request) / different sectors of the launch. **Bytes**: asked for by lanes / different ones of each
  request / these as a share of the sectors.
- **Shared**: requests / wavefronts, and conflicts where there are any.
- **Chain**: the longest chain of dependent global loads ahead of a thread's first store. **Trips**: the round trips
  that the order of instructions makes of it, of a warp, before its first store / in all. Launches are joined by +.
- **Programs** x warps of each. **In flight**: programs that registers, warps and shared memory leave room for on a
  multiprocessor.
"""


@contextlib.contextmanager
def counting_machine(target: str = TARGET) -> Iterator[CountingMachine]:
    """Launches run and are counted within the context, on as many multiprocessors as an H100 has."""
    with standing_in(target, CountingMachine) as machine, contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("engram_kernels") and hasattr(module, "processors"):
                stack.enter_context(mock.patch.object(module, "processors", lambda device: PROCESSORS))
        yield machine


def count(machine: CountingMachine, job: Job, call: Callable[[], object]) -> dict:
    """Run a call of a job, check its result, and sum up what its launches did."""
    machine.clear()
    verdict = job.verdict(call())
    if not machine.counts:
        raise RuntimeError(f"{job.name} launched no kernel")
    return summary(job, machine.counts) | dict(result=verdict)


def summary(job: Job, counts: list[LaunchCounts]) -> dict:
    """Sums for each unit over a job's launches, and by launch what has no sum."""
    sums = {name: total(counts, name) for name in ("requests", "sectors", "distinct_sectors", "asked", "distinct")}

    def each(number):
        return round(number / job.units, 2)

    return dict(
        unit=job.unit,
        instructions=each(sum(launch.instructions for launch in counts)),
        kinds={kind: each(times) for kind, times in total(counts, "executed").items()},
        shared={name: each(times) for name, times in total(counts, "shared").items()},
        **{name: {kind: each(times) for kind, times in found.items()} for name, found in sums.items()},
        launches=[
            {name: getattr(launch, name) for name in (*_OF_LAUNCH, "doubts")} | dict(instructions=launch.instructions)
            for launch in counts
        ],
    )


_OF_LAUNCH = ("kernel", "programs", "warps", "registers", "shared_bytes", "in_flight", "chain", "waits", "all_waits")


def rows(entries: dict[str, dict]) -> list[str]:
    """A Markdown table of name -> summary."""
    titles = "unit", "instructions", "by kind", "loads", "bytes", "stores", "shared"
    titles += "chain", "trips", "registers", "programs", "in flight", "result"
    lines = ["| job | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, entry in entries.items():
        lines.append(f"| {name} | " + " | ".join(_cells(entry)) + " |")
    return lines


def number(value: float) -> str:
    """Four digits are enough: 16,416, 96.5, 0.04."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def _cells(entry: dict) -> Iterator[str]:
    launches = entry["launches"]
    sectors, distinct = entry["sectors"]["load"], entry["distinct"]["load"]
    yield entry["unit"]
    yield f"**{number(entry['instructions'])}**"
    yield " ".join(number(entry["kinds"][kind]) for kind in KINDS)
    yield " / ".join(number(entry[name]["load"]) for name in ("requests", "sectors", "distinct_sectors"))
    used = f"{distinct / sectors / 32:.0%}" if sectors else "-"
    yield f"{number(entry['asked']['load'])} / {number(distinct)} / {used}"
    yield " / ".join(number(entry[name]["store"]) for name in ("requests", "sectors"))
    shared = entry["shared"]
    conflicts = f", {number(shared['conflicts'])} conflicts" if shared["conflicts"] else ""
    yield f"{number(shared['requests'])} / {number(shared['wavefronts'])}{conflicts}"
    yield " + ".join(str(launch["chain"]) for launch in launches)
    yield " + ".join(f"{launch['waits']}/{launch['all_waits']}" for launch in launches)
    yield ", ".join(str(launch["registers"]) for launch in launches)
    yield ", ".join(f"{launch['programs']} x {launch['warps']}" for launch in launches)
    yield ", ".join(str(launch["in_flight"]) for launch in launches)
    doubts = sorted({doubt for launch in launches for doubt in launch["doubts"]})
    yield "; ".join([entry["result"], *doubts])


def load(path: Path = JSON) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, report: dict) -> None:
    """Triton version -> job -> what is known of it, a job a line."""
    versions = []
    for version, entries in sorted(report.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in entries.items()]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def newest_first(report: dict) -> list[str]:
    """Its Triton versions."""
    return sorted(report, key=lambda version: [int(part) for part in version.split("+")[0].split(".")], reverse=True)


def measure(families: Iterable[str] | None = None, target: str = TARGET, say: Callable[[str], object] = print) -> dict:
    """Job -> what it executes under the Triton at hand."""
    found = {}
    with counting_machine(target) as machine:
        for job in jobs(families=families):
            found[job.name] = count(machine, job, job.ours)
            doubts = sorted({doubt for launch in found[job.name]["launches"] for doubt in launch["doubts"]})
            say(" ".join([f"{job.name}: {number(found[job.name]['instructions'])} a {job.unit}", *doubts]))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="of jobs; none: all of them")
    parser.add_argument("--target", default=TARGET, choices=TARGETS)
    chosen = parser.parse_args(arguments)
    if chosen.families or chosen.target != TARGET:
        print("\n".join(rows(measure(chosen.families or None, chosen.target))))
        return
    report = load()
    report[triton.__version__] = measure()
    save(JSON, report)
    print(f"wrote {JSON} for Triton {triton.__version__}")


if __name__ == "__main__":
    main()
