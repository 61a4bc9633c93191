"""Benchmarks on this machine's GPU; without one the traffic model, what kernels compile to, and CPU times."""

import argparse
import fnmatch
import json
import sys
from pathlib import Path

import torch

from .cases import Case, Workbench, load_cases
from .environment import clocks, describe_gpu, describe_software, huge_share, slug
from .peers import Peers
from .plots import write_plots
from .report import COLUMNS, cells, markdown, print_report
from .roofs import measure_roofs
from .suite import ResultFile, UsageError, run_cases
from .timing import Budget, GpuTimer
from .without_gpu import print_without_gpu

RESULTS = Path(__file__).parent / "results"
#: Seconds kept for starting up, giving memory back, tables, Markdown and plots.
REPORTING = 18.0
GIB = 1 << 30


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--seconds", type=float, help="end within this time; default 270, with --full no limit")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name has it, or matches it where it has a *")
    parser.add_argument(
        "--full", action="store_true", help="every baseline and roof, a large host table, no time limit"
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on with a run's JSON; default: this GPU's newest"
    )
    parser.add_argument("--host-gib", type=int, metavar="N", help="size of the host table; default 16, with --full 64")
    parser.add_argument("--device-gib", type=int, metavar="N", help="size of the device table; default 8")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="vLLM's and SGLang's kernels; see CONTRIBUTING.md")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where results go")
    parser.add_argument("--report", type=Path, metavar="FILE", help="make tables and plots from a run's JSON, and end")
    chosen = parser.parse_args(arguments)
    if chosen.seconds is None:
        chosen.seconds = float("inf") if chosen.full else 270.0
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        if chosen.report is not None:
            report_again(chosen.report)
            return 0
        if not torch.cuda.is_available():
            print_without_gpu()
            return 0
        return run(chosen, Budget(chosen.seconds - REPORTING))
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def run(chosen: argparse.Namespace, budget: Budget) -> int:
    """Roofs, then cases, on the current GPU. Exit code 1 where a case failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    environment = {**describe_gpu(device), **describe_software()}
    host, on_device = table_limits(
        environment["host_bytes_available"],
        torch.cuda.mem_get_info(device)[0],
        (chosen.host_gib or (64 if chosen.full else 16)) * GIB,
        (chosen.device_gib or 8) * GIB,
    )
    environment.update(host_table_bytes=host, device_table_bytes=on_device)
    return measure(chosen, budget, device, environment, GpuTimer(device))


def measure(chosen: argparse.Namespace, budget: Budget, device: torch.device, environment: dict, timer) -> int:
    """What :func:`run` does once machine and timer are known."""
    host, on_device = environment["host_table_bytes"], environment["device_table_bytes"]
    say(f"{environment['gpu']}: host table of at most {host / GIB:.1f} GiB, device table {on_device / GIB:.1f} GiB")
    cases = select(load_cases(chosen.full), chosen.only)
    results = open_results(chosen, environment)
    content = results.content
    peers = None if chosen.peers is None else Peers(chosen.peers, say)
    content["environment"]["peers"] = None if peers is None else peers.describe()
    with Workbench(device, host, on_device, environment["l2_bytes"] or 0, say, peers) as bench:
        table = bench.table("v41", "host").weight.view(torch.uint8).view(-1)
        content["environment"]["huge_page_share"] = huge_share(table.data_ptr())
        if content["roofs"] is None:
            say("roofs")
            content["roofs"] = measure_roofs(timer, device, table, chosen.full)
            content["environment"]["under_load"] = clocks(device)
            results.save()
        run_cases(cases, bench, timer, budget, results, 99 if chosen.full else 3, tell_progress(results))
        content["environment"]["at_the_end"] = clocks(device)
        results.save()
    report_again(results.path)
    return 1 if any(record["status"] != "ok" for record in content["cases"]) else 0


def table_limits(host_free: int, device_free: int, host_wanted: int, device_wanted: int) -> tuple[int, int]:
    """Bytes of a host and of a device table: what is wanted, but at most 0.64 and 0.25 of what is free.

    On a host with 100 GiB free that admits 64. A second host table may stand beside the first (5.4 GiB for 27B), and
    pinned memory of baselines. A device holds two tables, and inputs and references of up to 10 GiB.
    """
    limits = min(host_wanted, host_free * 16 // 25), min(device_wanted, device_free // 4)
    # Whole GiB, so that a run that goes on later finds the same.
    return tuple(limit // GIB * GIB or limit for limit in limits)


def select(cases: list[Case], pattern: str | None) -> list[Case]:
    """Cases whose name contains ``pattern``, or matches it where it holds a wildcard; UsageError where none does."""
    if not pattern:
        return cases
    wild = any(character in pattern for character in "*?[")
    kept = [case for case in cases if (fnmatch.fnmatch(case.name, pattern) if wild else pattern in case.name)]
    if not kept:
        raise UsageError(f"no case matches --only {pattern!r}; names are like {cases[0].name}")
    return kept


def open_results(chosen: argparse.Namespace, environment: dict) -> ResultFile:
    """A new result file ``<gpu>-<date>.json`` (with a number where that exists), or the one to go on with."""
    gpu = slug(environment["gpu"])
    if chosen.resume is not None:
        path = Path(chosen.resume) if chosen.resume else newest(chosen.out, gpu)
        return ResultFile.resume(path, environment)
    stem = f"{gpu}-{environment['date'][:10]}"
    path, number = chosen.out / f"{stem}.json", 2
    while path.exists():
        path, number = chosen.out / f"{stem}-{number}.json", number + 1
    return ResultFile(path, environment)


def newest(folder: Path, gpu: str) -> Path:
    """The result of this GPU that was written last."""
    found = sorted(folder.glob(f"{gpu}-*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"nothing to resume: {folder} holds no result of {gpu}")
    return found[-1]


def report_again(path: Path) -> None:
    """Tables on the terminal, Markdown and plots beside the JSON, from the JSON alone."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or "cases" not in content:
        raise UsageError(f"{path} is no result of this command")
    print_report(content)
    base = path.with_suffix("")
    base.with_suffix(".md").write_text(markdown(content))
    written = [path, base.with_suffix(".md"), *write_plots(content, base)]
    print("Wrote " + ", ".join(str(file) for file in written))


def tell_progress(results: ResultFile):
    """One line per case as it ends."""

    def tell(record: dict, done: int, total: int) -> None:
        line = cells(record, results.content["roofs"])
        facts = [f"{name} {text}" for name, text in zip(COLUMNS[1:6], line[1:6], strict=True) if text]
        say(f"[{done}/{total}] {line[0]}: {line[1] if record['status'] != 'ok' else ', '.join(facts)}")

    return tell


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
