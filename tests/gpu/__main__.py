"""What `make gpu` does on a machine with a GPU: the tests, then the benchmarks, whatever the tests say.

    python -m tests.gpu [--out DIR] [tests] [bench] [sanitize]

Results and the output of every step go to DIR, and all of it that is worth keeping to its first_run.json. The exit
status is the worst one of the steps.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT = ("tests", "bench")
#: Of device memory alone, and whole in minutes under a sanitizer, which slows kernels down tens of times.
SANITIZED = tuple(f"tests/ops/test_{name}.py" for name in ("hashing", "gate", "gate_conv"))
LOST = 70  # exit code of a process that has lost the GPU: watch.LOST, whose module imports torch
MOST = 8  # test processes: each holds half a GiB of the GPU before its first test


def main(arguments=None):
    steps = {"tests": run_tests, "bench": run_benchmarks, "sanitize": run_sanitizers}
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", choices=(*steps, []), metavar="STEP", help=", ".join(steps))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="where results go")
    parser.add_argument("--processes", type=int, default=min(MOST, len(os.sched_getaffinity(0))), help="of the tests")
    chosen = parser.parse_args(arguments)
    chosen.out = chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    join(chosen.out)  # what a run before this one left that was killed
    codes = []
    for name in chosen.steps or DEFAULT:
        start = time.monotonic()
        codes.append(steps[name](chosen))
        join(chosen.out, dict(step=name, code=codes[-1], seconds=round(time.monotonic() - start, 1)))
    for line in summary(chosen.out):
        print(line)
    print(f"Everything of it to send: {chosen.out / 'first_run.json'}")
    return max(codes)


def run_tests(chosen):
    parallel = ["-n", str(chosen.processes)] if importlib.util.find_spec("xdist") else []
    words = ("--lane", "gpu", "--out", str(chosen.out), "tests")
    codes = [run(chosen, "pytest", *parallel, *words)]
    while not parallel and ended_early(chosen.out, codes[-1]):  # pytest-xdist itself starts another process
        codes.append(run(chosen, "pytest", "--go-on", *words))
    # Last and in one process what looks at times: beside other tests these say nothing.
    codes.append(run(chosen, "pytest", "--alone", *words))
    return max(codes)


def ended_early(out, code):
    """Whether the process of the tests lost the GPU, or ended in the middle of one, which is then a failure."""
    path = out / "gpu_results.json"
    if not path.exists():
        return False
    results = json.loads(path.read_text())
    started = [name for name, outcome in results["tests"].items() if outcome == "started"]
    for name in started:
        results["tests"][name], results["reasons"][name] = "failed", "its process ended: see log.txt"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return code == LOST or bool(started)


def run_benchmarks(chosen):
    return run(chosen, "bench", "--out", str(chosen.out))


def run_sanitizers(chosen):
    """One case of each test of the operations, under NVIDIA's sanitizer and under Triton's, where they are here."""
    codes = [0]

    def tests(name, *options, before=()):
        words = [
            "--lane",
            "gpu",
            "--out",
            str(chosen.out / "sanitizers" / name),
            "--cases",
            "one",
            "--patience",
            "1200",
        ]
        codes.append(run(chosen, "pytest", *options, *words, *SANITIZED, before=before))

    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here: left out")
    for check in ("memcheck", "racecheck") if tool else ():
        # Each tensor an allocation of its own: one that is part of a block of torch's has no end to run over.
        before = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", check, "--error-exitcode", "9"]
        tests(check, before=before)
    if importlib.util.find_spec("triton.experimental.gsan"):
        tests("gsan", "-p", "tests.support.gpu.gsan")
    else:
        print("Triton's sanitizer is not here: left out")
    return max(codes)


def run(chosen, *words, before=()):
    """``python -m words``, shown here and kept in log.txt as it comes; the exit status, 1 where a signal ended it.

    before: a command that starts it.
    """
    with (chosen.out / "log.txt").open("a") as log:
        tell(log, f"$ {' '.join([*before, 'python', '-m', *words])}\n")
        command = [*before, sys.executable, "-u", "-m", *words]  # unbuffered: a killed step's last words are in the log
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as step:
            for line in step.stdout:
                tell(log, line)
    return step.returncode if step.returncode >= 0 else 1


def join(out, step=None):
    """Write first_run.json anew: the steps so far, what the tests and what the benchmarks left."""
    path = out / "first_run.json"
    content = json.loads(path.read_text()) if path.exists() else dict(steps=[])
    content["steps"] += [step] if step else []
    for file in sorted(set(out.glob("*.json")) - {path}, key=lambda file: file.stat().st_mtime):
        found = json.loads(file.read_text())
        content |= {name: found for name, key in (("tests", "tests"), ("benchmarks", "cases")) if key in found}
    for file in out.glob("sanitizers/*/gpu_results.json"):
        content.setdefault("sanitizers", {})[file.parent.name] = json.loads(file.read_text())
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def summary(out):
    """Lines: how many tests came out how, and of each that was skipped why."""
    tests = json.loads((out / "first_run.json").read_text()).get("tests")
    if tests is not None:
        counts = Counter(tests["tests"].values())
        yield "Tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        for name, outcome in tests["tests"].items():
            if outcome == "skipped":
                yield f"Skipped: {name}: {tests['reasons'].get(name, '')}"


def tell(log, text):
    for file in (sys.stdout, log):
        file.write(text)
        file.flush()


if __name__ == "__main__":
    sys.exit(main())
