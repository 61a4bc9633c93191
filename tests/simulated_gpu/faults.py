"""Faults in the order of streams, made one at a time: do the gpu lane's tests notice, on the simulated GPU?"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """``old``, once in ``engram_kernels/<file>.py``, becomes ``new``; of ``tests/gpu/test_<tests>`` some must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str


FAULTS = (
    Fault(
        "a staged block is written before the stream that gives it up is done",
        "tables/staging",
        "self._side.wait_stream(torch.cuda.current_stream(self._device))",
        "pass",
        "memory",
        "last_use_of_its_memory",
    ),
    Fault(
        "staged rows are read before they are copied",
        "tables/staging",
        "torch.cuda.current_stream(self._device).wait_stream(self._side)",
        "pass",
        "memory",
        "staged_rows",
    ),
    Fault(
        "a pinned slot is written before its last copy is done",
        "tables/staging",
        "self._events[index].synchronize()\n        return",
        "pass\n        return",
        "memory",
        "staged_rows",
    ),
    Fault(
        "prefetched rows are freed while streams use them",
        "launching/streams",
        "tensor.record_stream(stream)",
        "pass",
        "prefetch",
        "freed_while",
    ),
    Fault(
        "lookups begin before token ids are copied",
        "serving/prefetch",
        "streams.wait(side, self._copied)",
        "pass",
        "prefetch",
        "each_order",
    ),
    Fault(
        "projections are read when their rows are there",
        "serving/started",
        "self._wait(self._taken.projected[index])",
        "self._wait(self._taken.ready[index])",
        "started",
        "in_flight",
    ),
    Fault(
        "a cache is used on two streams at once",
        "cache/store",
        "streams.wait(current, self._used)",
        "pass",
        "cache",
        "take_turns",
    ),
)


def check(root: Path, environment: dict[str, str]) -> int:
    """How many of FAULTS no test notices; prints each. First the same tests have to pass without any."""
    select = " or ".join(dict.fromkeys(fault.select for fault in FAULTS))
    files = sorted({fault.tests for fault in FAULTS})
    if code := _run(root, environment, None, files, select):
        raise RuntimeError(f"without a fault pytest ended with {code}")
    missed = 0
    for fault in FAULTS:
        code = _run(root, environment, fault, [fault.tests], fault.select)
        missed += code != 1
        print("noticed:" if code == 1 else f"NOT NOTICED, pytest ended with {code}:", fault.name, flush=True)
    return missed


def _run(root, environment, fault, files, select):
    """What pytest ends with in a copy of the checkout that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".git", ".venv*", "build", "peers", "__pycache__")
        shutil.copytree(root, folder, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        if fault is not None:
            path = Path(folder) / "engram_kernels" / f"{fault.file}.py"
            text, count = path.read_text(), path.read_text().count(fault.old)
            if count != 1:
                raise ValueError(f"{fault.name}: {fault.old!r} is in {fault.file}.py {count} times, not once")
            path.write_text(text.replace(fault.old, fault.new))
        words = ["--lane", "gpu", "--out", folder, "-q", "-p", "no:cacheprovider", "-k", select]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *words, *(f"tests/gpu/test_{name}.py" for name in files)],
            cwd=folder,
            env=environment | {"PYTHONPATH": environment["PYTHONPATH"].replace(str(root), folder)},
            capture_output=True,
        ).returncode
