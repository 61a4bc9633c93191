"""Mutation check: every kernel broken in one way at a time, and the assertion that notices.

    python -m tests.mutation [--jobs 2] [-k text]

Each mutant of mutants/ is a copy of the package and its tests in a temporary folder. It must compile for sm_90 from
its launcher's real arguments (``--few`` leaves that out), then its tests run until an assertion fails: in Triton's
interpreter, or, of what that cannot show, on the machine code (``Mutant.lane``), whose reports are assertions. An
exception or a crash does not count: the tests have to say what is wrong. Copies without a change come last and must
pass the tests that failed, or "caught" would mean nothing. The exit status is 0 if every mutant was caught, whatever
time that took.

Importing torch and Triton takes seconds, so each of the stages is one process that imports them, not the package,
and forks a child per mutant.
"""

import argparse
import compileall
import contextlib
import dataclasses
import gc
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.cases import each_value
from tests.support.patience import HANG

from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
BUDGET = 480  # seconds for the whole list on two cores with no other work
PATIENCE = 60  # seconds of a processor for one mutant: a loop that does not end is not an assertion
COPIED = ("engram_kernels", "reference", "tests", "pyproject.toml")


def source_of(mutant: Mutant, root: Path) -> Path:
    return root / "engram_kernels" / f"{mutant.file}.py"


def mutated(mutant: Mutant, source: str) -> str:
    """``source`` with the change, which must apply exactly once."""
    found = source.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} is in {mutant.file}.py {found} times, expected once")
    if mutant.old == mutant.new:
        raise ValueError(f"{mutant.name} changes nothing")
    return source.replace(mutant.old, mutant.new)


def controls(results: dict[Mutant, dict]) -> list[Mutant]:
    """For each file and lane with tests that caught mutants, one that changes nothing and runs just these tests."""
    caught = {}
    for mutant, result in results.items():
        if result["verdict"] == "caught":
            test = f"tests/{result['test']}"
            caught.setdefault((test.split("::")[0], mutant.lane), set()).add(test)
    return [
        Mutant("unchanged", file, lane, "", "", "", tuple(sorted(tests)), "", (), lane)
        for (file, lane), tests in sorted(caught.items())
    ]


def copy_whole(folder: Path) -> None:
    """The checkout's package and tests at ``folder``, compiled to bytecode; data by a link."""
    ignore = shutil.ignore_patterns("__pycache__", "data")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
            compileall.compile_dir(folder / name, quiet=1)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for data in ("engram_kernels/commands/data", "engram_kernels/testing/data", "tests/data"):
        (folder / data).symlink_to(ROOT / data)


def copy_for(mutant: Mutant, folder: Path, whole: Path) -> None:
    """Hard links to the files of ``whole`` at ``folder``, but for the one that the mutant changes."""
    changed = mutated(mutant, source_of(mutant, whole).read_text()) if mutant.old else None
    shutil.copytree(whole, folder, symlinks=True, copy_function=os.link)
    if changed is not None:
        path = source_of(mutant, folder)
        path.unlink()
        path.write_text(changed)
        Path(importlib.util.cache_from_source(str(path))).unlink()  # of the same second and size it would be believed


class Watch:
    """A pytest plugin that stops at the first assertion that fails, and remembers an exception before it.

    Only a test that launched ``kernel`` counts: another kernel's test may notice a change in a helper that both share.
    """

    def __init__(self, kernel, folder):
        self.kernel, self.folder = kernel, folder
        self.passed, self.before, self.failure = 0, 0, None

    def launches(self):
        return sys.modules["tests.conftest"].launches[self.kernel]

    def pytest_runtest_setup(self, item):
        self.before = self.launches()

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node, call, report):
        asserted, launched = call.excinfo.errisinstance(AssertionError), self.launches() > self.before
        caught = asserted and launched
        if self.failure and not caught:
            return
        tests = self.folder / "tests"
        ours = [entry for entry in call.excinfo.traceback if Path(entry.path).is_relative_to(tests)]
        place = ours[-1] if ours else call.excinfo.traceback[-1]
        line = str(place.statement).strip().splitlines()[0]
        if line.startswith("raise Report"):  # of the executor, which says more than its place
            line = str(call.excinfo.value).splitlines()[0]
        missed = f"asserted without {self.kernel}" if asserted else f"{call.excinfo.typename}, no assertion"
        self.failure = dict(
            verdict="caught" if caught else missed,
            test=node.nodeid.removeprefix("tests/"),
            place=f"{Path(place.path).name}:{place.lineno + 1}: {line}",
        )
        if caught:
            node.session.shouldstop = "an assertion failed"


def run_tests(mutant: Mutant, folder: Path) -> dict:
    """What the mutant's tests say."""
    import pytest

    watch = Watch(mutant.kernel, folder)
    options = ["--lane", mutant.lane, "-k", mutant.select, "-c", "pyproject.toml", "--rootdir", "."]
    quick = ["-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
    status = pytest.main([*mutant.tests, *options, *quick], plugins=[watch])
    import engram_kernels

    if not Path(engram_kernels.__file__).is_relative_to(folder):
        return dict(verdict=f"tested {engram_kernels.__file__}, not its copy")
    if watch.failure:
        return watch.failure
    if status != 0 or not watch.passed:
        return dict(verdict=f"pytest ended with status {int(status)} after {watch.passed} tests")
    return dict(verdict="survived")


def run_compiler(mutant: Mutant, folder: Path) -> dict:
    """Whether the mutant's kernel compiles for sm_90; its machine code is not looked at."""
    from tests.reports.compile_cases import CASES
    from tests.reports.offline import compiling_for

    with compiling_for("sm_90") as compiled:
        for case in mutant.cases:
            CASES[case]()
    names = {kernel.metadata.name for kernel, *_ in compiled}
    return dict(verdict="compiled" if mutant.kernel in names else f"its cases compile only {sorted(names)}")


STAGES = {"compile": run_compiler, "interpret": run_tests, "machine": run_tests}


def child(stage: str, mutant: Mutant, folder: Path) -> None:
    """One mutant in a forked process that has never imported the package; writes ``<stage>.json``."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    with open(f"{stage}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        result = STAGES[stage](mutant, folder)
    except BaseException as error:
        result = dict(verdict=f"{type(error).__name__}: {error}".splitlines()[0])
    (folder / f"{stage}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def run_stage(stage: str, tasks: list[tuple[Mutant, Path]], jobs: int) -> None:
    """Run ``tasks`` in forks of this process, ``jobs`` at a time."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import sympy  # noqa: F401
    import torch
    import triton
    from triton.runtime.cache import triton_key

    if triton.knobs.runtime.interpret != (stage == "interpret"):
        raise RuntimeError(f"stage {stage} was started with TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}")
    triton_key()  # a digest of Triton's libraries, 0.3 s once a process
    torch.set_num_threads(1)
    gc.freeze()  # collections in the children leave these imports out
    fork, waiting, running = multiprocessing.get_context("fork"), list(reversed(tasks)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            process = fork.Process(target=child, args=(stage, *task))
            process.start()
            running[process.sentinel] = process, task[1], time.monotonic() + HANG
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for sentinel in list(running):
            process, folder, deadline = running[sentinel]
            late = time.monotonic() > deadline
            if sentinel not in ready and not late:
                continue
            if sentinel not in ready:
                process.kill()
            process.join()
            del running[sentinel]
            if not (folder / f"{stage}.json").exists():
                verdict = "hangs" if late else f"crashed with status {process.exitcode}"
                if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) and not late:
                    verdict = f"took more than {PATIENCE} s of a processor"
                (folder / f"{stage}.json").write_text(json.dumps(dict(verdict=verdict)))
    gc.unfreeze()


def start_stage(stage: str, tasks: list[tuple[Mutant, Path]], jobs: int, folder: Path) -> None:
    """:func:`run_stage` in a process of its own, since Triton's interpreter is switched on at import."""
    (folder / "tasks").write_bytes(pickle.dumps(tasks))
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    env |= dict(TRITON_CACHE_DIR=str(folder / "cache"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    env |= dict(TRITON_INTERPRET="1") if stage == "interpret" else {}
    command = [sys.executable, "-m", "tests.mutation", "--jobs", str(jobs), "--stage", stage, str(folder)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def check(mutants: list[Mutant], jobs: int, folder: Path, compiled: bool = True) -> dict[Mutant, dict]:
    """The verdict on each mutant and then on each control; ``compiled``: whether all must compile for sm_90."""
    results, places, whole = {}, {}, folder / "unchanged"
    copy_whole(whole)

    def place(mutant):
        places[mutant] = folder / str(len(places))
        copy_for(mutant, places[mutant], whole)

    def run(stage, chosen):
        if not chosen:
            return
        start_stage(stage, [(mutant, places[mutant]) for mutant in chosen], jobs, folder)
        for mutant in chosen:
            results[mutant] = json.loads((places[mutant] / f"{stage}.json").read_text())

    # A change in a helper that several kernels share is compiled in the first of them.
    first = {}
    for mutant in mutants:
        try:
            place(mutant)
        except ValueError as error:
            results[mutant] = dict(verdict=f"does not apply: {error}")
            continue
        results[mutant] = dict(verdict="compiled")
        first.setdefault((mutant.file, mutant.old, mutant.new), mutant)
    if compiled:
        run("compile", list(first.values()))
    for mutant in mutants:
        if results[mutant]["verdict"] == "compiled":
            results[mutant] = results[first[mutant.file, mutant.old, mutant.new]]
    tested = [mutant for mutant in mutants if results[mutant]["verdict"] == "compiled"]
    for lane in ("interpret", "machine"):
        run(lane, [mutant for mutant in tested if mutant.lane == lane])
    unchanged = controls(results)
    for mutant in unchanged:
        place(mutant)
    for lane in ("interpret", "machine"):
        run(lane, [mutant for mutant in unchanged if mutant.lane == lane])
    return results


def report(results: dict[Mutant, dict], seconds: float) -> tuple[str, bool]:
    """What was found, a mutant a paragraph, and whether it is as it should be."""
    lines, failed = [], 0
    for mutant, result in results.items():
        good = result["verdict"] == ("caught" if mutant.old else "survived")
        failed += not good
        verdict = "passed" if good and not mutant.old else result["verdict"]
        lines.append(f"{mutant.name}: {verdict if good else verdict.upper()}")
        if "test" in result:
            lines.append(f"    {result['test']}: {result['place']}")
    mutants = sum(bool(mutant.old) for mutant in results)
    lines.append(
        f"{mutants} mutants of {len({m.kernel for m in results if m.old})} kernels, {failed} not as they should be; "
        f"{seconds:.0f} s of {BUDGET}{', over budget (a warning)' if seconds > BUDGET else ''}"
    )
    return "\n".join(lines), not failed


def jobs(text: str) -> int:
    """What pytest's -n takes: a number, or "auto" for one to each processor."""
    return os.cpu_count() or 1 if text == "auto" else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=jobs, default=2, help="mutants tested at the same time, a number or auto")
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutants whose name holds TEXT")
    parser.add_argument("--few", action="store_true", help="each kernel and each kind of change, uncompiled")
    parser.add_argument("--lane", choices=("interpret", "machine"), help="run all in this lane, whatever shows them")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the copies and their logs in FOLDER")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, folder = options.stage
        run_stage(stage, pickle.loads((Path(folder) / "tasks").read_bytes()), options.jobs)
        return 0
    mutants, began = [mutant for mutant in MUTANTS if options.k in mutant.name], time.monotonic()
    if options.few:
        mutants = each_value(mutants, lambda mutant: {(mutant.kernel, mutant.lane), mutant.kind})
    if options.lane:
        mutants = [dataclasses.replace(mutant, lane=options.lane) for mutant in mutants]
    if not mutants:
        parser.error(f"no mutant's name holds {options.k!r}")
    if options.keep and options.keep.exists():
        parser.error(f"{options.keep} is there already")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutation-")))
        folder.mkdir(parents=True, exist_ok=not options.keep)
        results = check(mutants, options.jobs, folder.resolve(), not options.few)
    text, good = report(results, time.monotonic() - began)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
