"""A change to a kernel, and how a list of them is read."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old``, once in ``engram_kernels/<file>.py``, becomes ``new``.

    ``tests`` are files, of which ``select`` keeps what pytest's -k would; ``cases`` are those of
    tests/reports/compile_cases.py that it must compile in. ``lane`` is where the tests run: "interpret", or "machine"
    for what only machine code shows.
    """

    kernel: str
    kind: str
    detail: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str
    cases: tuple[str, ...]
    lane: str = "interpret"

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


_CHANGE = re.compile(r"(.+?)(?:: (.+))? @ ([\w/]+)(?: -k (.+))?\n((?:- .*\n)+)((?:\+ .*\n)+)")


def mutants(kernel, tests, cases, *changes, lane="interpret"):
    """The mutants of one kernel, from texts like those in the files beside this one."""
    found, files = [], tuple(_file(name) for name in (tests, "ops/extremes")[: 1 + (lane == "interpret")])
    for match in _CHANGE.finditer("".join(changes)):
        kind, detail, file, select, *texts = match.groups(default="")
        old, new = ("\n".join(line[2:] for line in text.splitlines()) for text in texts)
        found.append(Mutant(kernel, kind, detail, file, old, new, files, select, cases, lane))
    return found


def _file(name):
    """``tests/ops/test_rows.py`` for ``ops/rows``."""
    room, _, stem = name.rpartition("/")
    return f"tests/{room}/test_{stem}.py"
