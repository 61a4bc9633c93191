"""Runs cases in their order until they or the time end, and keeps every result as soon as it is there."""

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.peers.adapters import NAMES as PEERS
from bench.peers.implementations import Skipped, baselines

from .cases import Case, Prepared, Workbench
from .environment import IDENTITY
from .report import NO_TIME
from .timing import Budget, GpuTimer, watching_kernels

#: Seconds that a case of an op is expected to take before one has been measured, and that torch.compile may take.
FIRST_CASE, COMPILATION = 6.0, 30.0
LARGE_TOKENS = 2048  # from here on a case's memory is worth giving back at once
#: The lists of records in a result.
KINDS = ("cases", "steps", "interference")
#: Up to so many tokens the time without launches is measured too: many small ones outlast the flush that hides the
#: host's time to launch.
GRAPH_TOKENS = 128
#: Baselines whose calls work on the CPU, which no graph holds: their time is that of the whole call.
ON_CPU = ("demo", "cpu_gather", "staged")


class UsageError(ValueError):
    """What was asked for cannot be done: its message is all that a user needs to see."""


def read_result(path: Path) -> dict:
    """The content of a result file; UsageError where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or not {"cases", "environment"} <= content.keys():
        raise UsageError(f"{path} is no result of python -m bench")
    return content


class ResultFile:
    """The JSON file of one run, written anew after every case: a run that is cut short loses nothing."""

    def __init__(self, path: Path, environment: dict):
        self.path = path
        self.content: dict = dict(environment=environment, roofs=None, left_out=[], finished=False)
        self.content.update({kind: [] for kind in KINDS})

    @classmethod
    def resume(cls, path: Path, environment: dict) -> "ResultFile":
        """Go on with the file at ``path``; UsageError where it was made with something else."""
        content = read_result(path)
        for name in IDENTITY:
            before, now = content["environment"].get(name), environment.get(name)
            if before != now:
                raise UsageError(f"cannot resume {path.name}: its {name} is {before}, and here it is {now}")
        result = cls(path, content["environment"])
        result.content.update(content, left_out=[], finished=False)
        # What failed is tried again.
        for kind in KINDS:
            result.content[kind] = [record for record in content.get(kind, ()) if record["status"] == "ok"]
        return result

    @property
    def done(self) -> set[str]:
        return {record["name"] for kind in KINDS for record in self.content[kind]}

    @property
    def failed(self) -> bool:
        return any(record["status"] != "ok" for kind in KINDS for record in self.content[kind])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(part, self.path)

    def add(self, record: dict, kind: str = "cases") -> None:
        self.content[kind].append(record)
        self.save()


def run_cases(
    cases: list[Case],
    bench: Workbench,
    timer,
    budget: Budget,
    results: ResultFile,
    most_baselines: int = 3,
    tell: Callable[[dict, int, int], None] = lambda record, done, total: None,
) -> None:
    """Measure what is not in ``results`` yet. What there is no time for is listed in its ``left_out``."""
    todo = [case for case in cases if case.name not in results.done]
    expected: dict[str, float] = {}
    for number, case in enumerate(todo):
        if budget.left() < expected.get(case.op, FIRST_CASE):
            results.content["left_out"].append(case.name)
            continue
        before = budget.left()
        record = run_case(case, bench, timer, budget, most_baselines)
        expected[case.op] = before - budget.left()
        results.add(record)
        tell(record, number + 1, len(todo))
        if not device_answers(bench.device):
            results.content["left_out"] += [left.name for left in todo[number + 1 :]]
            break
    results.save()


def run_each(
    kind: str,
    names: list[str],
    measure: Callable[[str], dict],
    budget: Budget,
    results: ResultFile,
    first: float,
    device: torch.device,
    tell: Callable[[dict], None] = lambda record: None,
) -> None:
    """``measure(name)`` of what is not in ``results`` yet, kept there as ``kind``; one that fails is kept as that.

    first: seconds that one is expected to take before any has been measured; then it is what the last one took.
    """
    expected = first
    for name in names:
        if name in results.done:
            continue
        before = budget.left()
        if before < expected or not device_answers(device):
            results.content["left_out"].append(name)
            continue
        try:
            record = dict(name=name, status="ok") | measure(name)
        except Exception as error:  # one that cannot run must not cost the others
            record = dict(name=name, status="failed", reason=_one_line(error))
        expected = before - budget.left()
        results.add(record, kind)
        tell(record)
    results.save()


def run_case(case: Case, bench: Workbench, timer, budget: Budget, most_baselines: int = 3) -> dict:
    """One record. No time is in it unless the op's result is the reference's."""
    record = dict(name=case.name, op=case.op, model=case.model, variant=case.variant, tokens=case.tokens)
    record.update(roof=case.roof, timer=timer.kind, status="failed", baselines={})
    start = time.perf_counter()
    prepared: Prepared | None = None
    try:
        prepared = case.prepare(bench)
        record.update(nbytes=prepared.nbytes, link_bytes=prepared.link_bytes, wire_bytes=prepared.wire_bytes)
        record.update(facts=prepared.facts)
        record["kernels"], problem = _checked(prepared)
        if problem is None:
            record.update(measure_calls(prepared, timer))
            if isinstance(timer, GpuTimer):
                record["host"] = timer.host(prepared.calls)
                record["graph"] = None
                if case.tokens <= GRAPH_TOKENS:
                    record["graph"] = _graph(timer, prepared.calls, record["facts"])
            record["status"] = "ok"
            named = baselines(bench, case, prepared)
            prepared.baselines = named | prepared.baselines
            for name in _chosen(prepared.baselines, most_baselines, (*PEERS, *named)):
                record["baselines"][name] = _baseline(name, case, prepared, timer, budget)
        else:
            record["reason"] = problem
    except Exception as error:  # one case that cannot run must not cost the others
        record.update(status="failed", reason=_one_line(error))
        for field in ("median", "low", "high", "samples", "host", "graph"):
            record.pop(field, None)
    record["wall"] = round(time.perf_counter() - start, 3)
    prepared = None
    if bench.device.type == "cuda" and case.tokens >= LARGE_TOKENS and device_answers(bench.device):
        gc.collect()  # torch.compile leaves cycles that hold inputs
        torch.cuda.empty_cache()
    return record


def measure_calls(prepared: Prepared, timer) -> dict:
    """Times, and what calls in turn counted. ValueError where the last of those, which comes after them, is wrong."""
    if prepared.in_turn is None:
        return timer.measure(prepared.calls).as_dict()
    prepared.in_turn.start()
    measured = timer.once(prepared.calls[1:-1]).as_dict() | prepared.in_turn.finish()
    last = len(prepared.calls) - 1
    problem = prepared.check(prepared.calls[last](), last)
    if problem is not None:
        raise ValueError(f"after the timed calls {problem}")
    return measured


def _checked(prepared: Prepared) -> tuple[list[dict], str | None]:
    """What was launched, and what is wrong with the results of the first and the last input set."""
    with watching_kernels() as launched:
        result = prepared.calls[0]()
    kernels, problem = list(launched), prepared.check(result, 0)
    if problem is None and prepared.in_turn is None:
        last = len(prepared.calls) - 1
        problem = prepared.check(prepared.calls[last](), last)
    return kernels, problem


def _graph(timer: GpuTimer, calls: list, facts: dict) -> float | None:
    try:
        return timer.graph(calls)
    except Exception as error:  # the cold time stands
        facts["graph_failed"] = _one_line(error)
        return None


def _chosen(names: Iterable[str], most: int, wanted: Iterable[str]) -> list[str]:
    """Those that are there because they were asked for, and the first ``most`` of the others."""
    asked = [name for name in names if name in wanted]
    return asked + [name for name in names if name not in asked][:most]


def _baseline(name: str, case: Case, prepared: Prepared, timer, budget: Budget) -> dict:
    if budget.left() < (COMPILATION if name == "compiled" else 0):
        return {"failed": NO_TIME}
    try:
        call = prepared.baselines[name]()
        problem = prepared.check(call(0), 0)
        if problem is not None:
            return {"failed": problem}
        calls = [lambda index=index: call(index) for index in range(len(prepared.calls))]
        if prepared.in_turn is not None:
            return timer.once(calls[1:-1]).as_dict()
        entry = timer.measure(calls).as_dict()
        if isinstance(timer, GpuTimer) and case.tokens <= GRAPH_TOKENS and name not in ON_CPU:
            entry["graph"] = _graph(timer, calls, entry)
        return entry
    except Skipped as why:
        return {"skipped": str(why)}
    except Exception as error:  # what it needs may be missing here; the case itself stands
        return {"failed": _one_line(error)}


def device_answers(device: torch.device) -> bool:
    """Whether the GPU still works; after a fault in a kernel every call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
