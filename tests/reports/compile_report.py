"""The compile report: what every kernel compiles to, by Triton version and target.

``python -m tests.reports.compile_report`` measures under the Triton at hand and writes
``tests/data/compile_report.json`` (its version's part) and ``docs/compile_report.md``, where what was executed
(tests/reports/executed_report.py) stands in front. ``make compile-report`` does so under the oldest and the newest
Triton. The compile lane compares and never writes.
"""

import json
from dataclasses import asdict
from pathlib import Path

import triton

from . import executed_report
from .compile_cases import CASES
from .offline import TARGETS, compiling_for, machine_code

JSON = Path(__file__).parents[1] / "data" / "compile_report.json"
MARKDOWN = Path(__file__).parents[2] / "docs" / "compile_report.md"
HEAD = """# What the kernels compile to, and what they execute

Written by `make compile-report` from offline compilation; no GPU is involved, and nothing here is a time. The compile
lane of the tests recompiles every row, runs some, and fails where one differs, so a change of these numbers is always
made on purpose.
"""
STATIC = """
# Code

Instructions are static: a loop's body counts once. "Per unit" is warp instructions for each row (lookup, hash_lookup)
or token (the others) of one step of a program. Loads and stores are from and to global memory, as count x width in
bytes.
"""


def compiled_for(case, target):
    """Every kernel that a case launches, in order, as :func:`compiling_for` yields them."""
    with compiling_for(target) as compiled:
        CASES[case]()
    return compiled


def measure(case, target):
    """The machine code of these."""
    return [machine_code(entry) for entry in compiled_for(case, target)]


def load():
    return json.loads(JSON.read_text()) if JSON.exists() else {}


def markdown(report, executed):
    """The document, of what was compiled and what was executed by Triton version."""
    lines = [HEAD, "# Jobs\n", executed_report.HEAD.rstrip()]
    for version in executed_report.newest_first(executed):
        lines += [f"\n## Jobs under Triton {version}\n", *executed_report.rows(executed[version])]
    lines += [STATIC]
    for version, targets in sorted(report.items(), reverse=True):
        for target, cases in targets.items():
            lines += [f"\n## Triton {version}, {target}\n"]
            lines += [
                "| case | kernel | registers | shared B | instructions | per unit | loads | stores |",
                "|---|---" * 4 + "|",
            ]
            for case, kernels in cases.items():
                for code in kernels:
                    widths = [", ".join(f"{n} x {w}" for w, n in code[kind].items()) for kind in ("loads", "stores")]
                    cells = [case, code["kernel"], code["registers"], code["shared_bytes"], code["instructions"]]
                    lines.append("| " + " | ".join(map(str, [*cells, code["per_unit"], *widths])) + " |")
    return "\n".join(lines) + "\n"


def main():
    report = load()
    report[triton.__version__] = {
        target: {case: [asdict(code) for code in measure(case, target)] for case in CASES} for target in TARGETS
    }
    JSON.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    MARKDOWN.write_text(markdown(load(), executed_report.load()))
    print(f"wrote {JSON} and {MARKDOWN} for Triton {triton.__version__}")


if __name__ == "__main__":
    main()
