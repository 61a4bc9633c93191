"""Benchmarks on this machine's GPU; without one the traffic model, what kernels compile to, and CPU times."""

import argparse
import fnmatch
import hashlib
import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench.cache.prediction import print_prediction
from bench.peers.adapters import Peers
from bench.peers.implementations import cases_of, faults
from bench.serving.interference import FIRST_PAIR, Interference, interference_names
from bench.serving.step import FIRST_STEP, Steps, step_names
from bench.serving.step_report import record_text
from engram_kernels.tables.memory.report import available_host_memory
from engram_kernels.testing.implementations import find_implementations

from .running.cases import Case, Workbench, load_cases
from .running.environment import clocks, clocks_under, describe_gpu, describe_software, huge_share, slug
from .running.footprints import SLOWEST_MAPPING, all_roofs, wide_footprints
from .running.plots import write_plots
from .running.report import COLUMNS, NO_TIME, cells, markdown, print_report
from .running.suite import ResultFile, UsageError, read_result, run_cases, run_each
from .running.text import load_token_ids, statistics_line, tokenize
from .running.timing import Budget, GpuTimer
from .running.without_gpu import MOST_TOKENS, PLAIN, SECONDS, print_cpu_times, print_without_gpu

RESULTS = Path(__file__).parent / "results"
#: Seconds kept for starting up, giving memory back, tables, Markdown and plots.
REPORTING = 18.0
#: Seconds that roofs may take before footprints are left out, and what cases leave to steps and to matmuls beside a
#: lookup: with tables and REPORTING less than a third of the default.
ROOFS, STEPS, PAIRS = 30.0, 20.0, 8.0
GIB = 1 << 30
#: First argument -> the module that takes the others: measurements that are no cases.
COMMANDS = {
    "train": "bench.training.train",
    "optimizers": "bench.training.optimizers",
    "updates": "bench.training.updates",
    "formats": "bench.training.formats",
    "cache": "bench.cache.prediction",
    "files": "bench.serving.files",
    "loading": "bench.serving.loading",
    "layouts": "bench.cache.layouts",
    "step_model": "bench.serving.step_model",
    "sweep": "bench.ops.sweep",
}
#: Options that only a run on a GPU can follow.
ON_GPU = ("full", "resume", "host_gib", "device_gib", "peers", "out")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--seconds", type=float, help="end within this time; default 270, with --full no limit")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name has it, or matches it where it has a *")
    parser.add_argument(
        "--full",
        action="store_true",
        help="all models, 1 to 16,384 tokens, every baseline and roof, a large host table, no time limit",
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on with a run's JSON; default: this GPU's newest"
    )
    parser.add_argument("--host-gib", type=int, metavar="N", help="size of the host table; default 16, with --full 64")
    parser.add_argument("--device-gib", type=int, metavar="N", help="size of the device table; default 8")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="vLLM's and SGLang's kernels; see CONTRIBUTING.md")
    parser.add_argument(
        "--implementation",
        action="append",
        metavar="[OP=]MODULE[:NAME]",
        help="time a function of yours beside an op, in the op's cases; may be repeated; docs/testing_your_kernel.md",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text in place of the novels in bench/data")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where results go")
    parser.add_argument("--report", type=Path, metavar="FILE", help="make tables and plots from a run's JSON, and end")
    chosen = parser.parse_args(arguments)
    chosen.on_gpu = [
        f"--{name.replace('_', '-')}" for name in ON_GPU if getattr(chosen, name) != parser.get_default(name)
    ]
    if chosen.seconds is None:
        chosen.seconds = float("inf") if chosen.full else 270.0
    try:
        chosen.implementations = find_implementations(chosen.implementation or ())
    except ValueError as error:
        raise UsageError(str(error)) from None
    return chosen


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    try:
        if arguments and not arguments[0].startswith("-"):
            raise UsageError(
                f"{arguments[0]!r} is none of {', '.join(COMMANDS)}; without a name the cases are measured"
            )
        chosen = parse(arguments)
        if chosen.report is not None and chosen.implementations:
            raise UsageError("--report makes tables from a run's JSON, and runs no --implementation")
        if chosen.report is not None:
            report_again(chosen.report)
            return 0
        if not torch.cuda.is_available():
            return run_without_gpu(chosen)
        return run(chosen, Budget(chosen.seconds - REPORTING))
    except UsageError as error:
        say(f"bench: {error}")
        return 2


def run_without_gpu(chosen: argparse.Namespace) -> int:
    """What can be said without one; of chosen cases the times of their references. UsageError for what needs a GPU.

    Exit code 1 where an implementation that was named is wrong.
    """
    refused = [option for option in chosen.on_gpu if option != "--out" or not chosen.implementations]
    if refused:
        options = ", ".join(refused)
        raise UsageError(
            f"{options}: only on a GPU, and torch finds none; here are --only, --seconds, --text, "
            "--implementation, --report"
        )
    found: dict = {}
    ids = read_text(chosen.text, 1, found)
    if chosen.only or chosen.implementations:
        cases, *_ = chosen_cases(chosen)
        few = [case for case in cases if case.tokens <= MOST_TOKENS and (chosen.only or case.variant in PLAIN)]
        if not few:
            raise UsageError(f"--only {chosen.only!r}: only on a GPU; a CPU has cases of at most {MOST_TOKENS} tokens")
        records = print_cpu_times(chosen.seconds, few, ids, chosen.implementations)
        if "--out" in chosen.on_gpu:
            environment = describe_software() | found | dict(gpu="no GPU", implementations=asked_for(chosen))
            results = open_results(chosen, environment)
            results.content.update(cases=records, finished=True)
            results.save()
            print(f"Wrote {results.path}")
        return 1 if tell_faults(records, chosen) else 0
    print_without_gpu(min(SECONDS, chosen.seconds))
    print("\n5. A hot n-gram cache: simulated, not measured.")
    print_prediction(load_token_ids() if ids is None else ids, found["text"])
    if ids is not None:
        print(f"\n6. Text: {found['text']}. Distinct n-grams: {found['text_distinct']}.")
    return 0


def run(chosen: argparse.Namespace, budget: Budget) -> int:
    """Roofs, then cases, on the current GPU. Exit code 1 where a case failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    environment = {**describe_gpu(device), **describe_software()}
    free = environment["host_bytes_available"], torch.cuda.mem_get_info(device)[0]
    wanted = (chosen.host_gib or (64 if chosen.full else 16)) * GIB, (chosen.device_gib or 8) * GIB
    host, on_device = table_limits(*free, *wanted)
    tell_small_tables(free, wanted, (host, on_device))
    environment.update(host_table_wanted=wanted[0], device_table_wanted=wanted[1])
    environment.update(host_table_bytes=host, device_table_bytes=on_device)
    return measure(chosen, budget, device, environment, GpuTimer(device))


def measure(chosen: argparse.Namespace, budget: Budget, device: torch.device, environment: dict, timer) -> int:
    """What :func:`run` does once machine and timer are known."""
    host, on_device = environment["host_table_bytes"], environment["device_table_bytes"]
    cases, steps, pairs = chosen_cases(chosen)
    environment["implementations"] = asked_for(chosen)
    text = read_text(chosen.text, max((case.tokens for case in cases), default=1), environment)
    results = open_results(chosen, environment)
    content = results.content
    say(f"{environment['gpu']}: host table of at most {host / GIB:.1f} GiB, device table {on_device / GIB:.1f} GiB")
    peers = None if chosen.peers is None else Peers(chosen.peers, say)
    content["environment"]["peers"] = None if peers is None else peers.describe()
    # Only a full run, which goes model by model, can close a table without needing it again soon.
    room = {"host": 5 * host_free(environment) // 6, "device": 4 * on_device} if chosen.full else None
    wide = []
    if chosen.full and content["roofs"] is None:
        wide = wide_footprints(timer, device, wide_bytes(environment, budget), say)
    cache_bytes, given = environment["l2_bytes"] or 0, chosen.implementations
    with Workbench(device, host, on_device, cache_bytes, say, peers, text, room, given) as bench:
        measure_table(bench, timer, chosen.full, wide, budget.part(ROOFS), results)
        for_pairs = PAIRS if pairs else 0
        for_cases, for_steps = budget.but(for_pairs + (STEPS if steps else 0)), budget.but(for_pairs)
        most = 99 if chosen.full else 3
        run_cases(cases, bench, timer, for_cases, results, most, tell_case(results))
        # Made when the first is measured: what they cannot allocate is then a failure of that one alone.
        step, pair = cache(lambda: Steps(bench, timer)), cache(lambda: Interference(bench, timer))
        run_each("steps", steps, lambda name: step().measure(name), for_steps, results, FIRST_STEP, device, tell_record)
        run_each(
            "interference", pairs, lambda name: pair().measure(name), budget, results, FIRST_PAIR, device, tell_record
        )
        content["environment"]["at_the_end"] = clocks(device) | {"host_bytes_available": available_host_memory()}
        content["finished"] = True
        results.save()
    report_again(results.path)
    return 1 if tell_faults(content["cases"], chosen) or results.failed else 0


def measure_table(bench: Workbench, timer, full: bool, wide: list[dict], budget: Budget, results: ResultFile) -> None:
    """The host table's pages, and the roofs over it where ``results`` has none yet."""
    table = bench.table("v41", "host").weight.view(torch.uint8).view(-1)
    environment = results.content["environment"]
    environment["huge_page_share"] = huge_share(table.data_ptr())
    if results.content["roofs"] is None:
        say("roofs")
        results.content["roofs"] = all_roofs(timer, bench.device, table, full, wide, budget, say)
        environment["under_load"] = clocks_under(copying(bench.device), bench.device)
        results.save()


def asked_for(chosen: argparse.Namespace) -> list[str] | None:
    """Implementations by op and name, for a result's environment."""
    return [f"{each.op}={each.name}" for each in chosen.implementations] or None


def tell_faults(records: list[dict], chosen: argparse.Namespace) -> list[str]:
    """What is wrong with implementations, a line each."""
    found = faults(records, chosen.implementations, NO_TIME)
    for fault in found:
        say(f"FAILED: {fault}")
    return found


def copying(device: torch.device) -> Callable[[], None]:
    """Work of about 30 ms for a GPU: copies within its memory."""
    source = torch.randint(0, 256, (256 << 20 if device.type == "cuda" else 256,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(200):
            target.copy_(source)

    return copy


def table_limits(host_free: int, device_free: int, host_wanted: int, device_wanted: int) -> tuple[int, int]:
    """Bytes of a host and of a device table: what is wanted, but at most 0.64 and 0.25 of what is free.

    On a host with 100 GiB free that admits 64. A second host table may stand beside the first (5.4 GiB for 27B), and
    pinned memory of baselines. A device holds two tables, and inputs and references of up to 10 GiB.
    """
    host, device = min(host_wanted, host_free * 16 // 25), min(device_wanted, device_free // 4)
    # Whole GiB, so that a run that goes on later finds the same.
    return host // GIB * GIB or host, device // GIB * GIB or device


def tell_small_tables(free: tuple[int, int], wanted: tuple[int, int], given: tuple[int, int]) -> None:
    """Where tables come out smaller than wanted, what was seen; memory may be less at the start than it is later."""
    for name, seen, most, nbytes in zip(("host", "device"), free, wanted, given, strict=True):
        if nbytes < most:
            say(
                f"WARNING: the {name} table has {nbytes / GIB:.1f} GiB, not {most / GIB:.1f}: of {name} memory "
                f"{seen / GIB:.1f} GiB are free now"
            )


def chosen_cases(chosen: argparse.Namespace) -> tuple[list[Case], list[str], list[str]]:
    """Cases, steps and matmuls beside a lookup that were chosen; with implementations the cases of their ops alone."""
    given = chosen.implementations
    if not given:
        return select(load_cases(chosen.full), step_names(chosen.full), interference_names(), chosen.only)
    return select(cases_of(given, load_cases(chosen.full)), [], [], chosen.only)


def select(
    cases: list[Case], steps: list[str], pairs: list[str], pattern: str | None
) -> tuple[list[Case], list[str], list[str]]:
    """What contains ``pattern`` in its name, or matches it where it holds a wildcard; UsageError where nothing does."""
    if not pattern:
        return cases, steps, pairs
    wild = any(character in pattern for character in "*?[")

    def fits(name: str) -> bool:
        return fnmatch.fnmatch(name, pattern) if wild else pattern in name

    kept = [case for case in cases if fits(case.name)], list(filter(fits, steps)), list(filter(fits, pairs))
    if not any(kept):
        ops = ", ".join(dict.fromkeys(case.op for case in cases))
        ops = f"{ops}, step and interference" if steps else ops
        like = ", ".join((cases[0].name, *steps[:1], *pairs[:1]))
        raise UsageError(f"no case matches --only {pattern!r}; there are {ops}, as in {like}")
    return kept


def read_text(path: Path | None, tokens: int, environment: dict) -> np.ndarray | None:
    """Token ids of a text of the user's, noted in ``environment``; None for the text that is there."""
    environment["text"] = "data/austen_ids.npz"
    if path is None:
        return None
    try:
        content = path.read_text(encoding="utf-8")
        ids = tokenize(content)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--text {path}: {error}") from None
    if len(ids) <= tokens:
        raise UsageError(f"--text {path} has {len(ids):,} tokens, and a case of this run reads {tokens:,} at a time")
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    environment["text"] = f"{path.name}, {len(ids):,} ids, sha256 {digest}"
    environment["text_distinct"] = statistics_line(ids)
    return ids.astype(np.int32)


def host_free(environment: dict) -> int:
    return environment.get("host_bytes_available") or 2 * environment["host_table_bytes"]


def wide_bytes(environment: dict, budget: Budget) -> int:
    """Host memory that the widest footprints read: 0.85 of what is free, or what there is time to map twice."""
    in_time = min(max(0.0, budget.left()) / 4 / (2 * SLOWEST_MAPPING), 1 << 20)
    return int(min(0.85 * host_free(environment), in_time * GIB)) // GIB * GIB or GIB


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
    content = read_result(path)
    print_report(content)
    base = path.with_suffix("")
    base.with_suffix(".md").write_text(markdown(content))
    written = [path, base.with_suffix(".md"), *write_plots(content, base)]
    print("Wrote " + ", ".join(str(file) for file in written))


def tell_case(results: ResultFile):
    """One line per case as it ends."""

    def tell(record: dict, done: int, total: int) -> None:
        line = cells(record, results.content["roofs"])
        facts = [f"{name} {text}" for name, text in zip(COLUMNS[1:6], line[1:6], strict=True) if text]
        failed = record["status"] != "ok"
        say(f"[{done}/{total}] {line[0]}: {line[1] if failed else ', '.join(facts)}")

    return tell


def tell_record(record: dict) -> None:
    """One line per step, or matmul beside a lookup, as it ends."""
    say(f"{record['name']}: {record_text(record)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
