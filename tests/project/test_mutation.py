"""The list of mutants fits the package as it is, and the runner believes no mutant that a test did not catch."""

import ast
import importlib.util
from pathlib import Path

import pytest

from tests import mutants
from tests.conftest import package_kernels
from tests.mutants import KINDS, MUTANTS, Mutant
from tests.mutation import BUDGET, ROOT, controls, copy_for, copy_whole, mutated, report, source_of
from tests.reports import compile_cases

KERNELS = sorted({mutant.kernel for mutant in MUTANTS})


def example(**changes):
    known = dict(
        kernel="a_kernel", kind="taps reversed", detail="", file="rows", old="offs_w = begin", new="offs_w = 1"
    )
    return Mutant(**(known | dict(tests=("tests/ops/test_rows.py",), select="", cases=()) | changes))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_is_python(mutant):
    source = source_of(mutant, ROOT).read_text()
    changed = mutated(mutant, source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), "only a comment or the layout changes"
    assert all((ROOT / file).is_file() for file in mutant.tests)
    assert mutant.cases and set(mutant.cases) <= set(compile_cases.CASES)


def test_every_change_is_read():
    """One for each line that names a file; what the pattern did not match would go missing silently."""
    texts = {
        name: value
        for file in mutants.FILES
        for name, value in vars(file).items()
        if name.isupper() and isinstance(value, str)
    }.values()
    lines = [line for text in texts for line in text.splitlines()]
    assert all(line.startswith(("- ", "+ ")) or " @ " in line for line in lines)
    assert sum(" @ " in line for line in lines) == len({(m.kind, m.detail, m.file, m.old, m.new) for m in MUTANTS})


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_kernel_and_every_kind_has_mutants():
    assert KERNELS == sorted(package_kernels())
    for kernel in KERNELS:
        assert sum(mutant.kernel == kernel for mutant in MUTANTS) >= 3, kernel
    assert set(KINDS) <= {mutant.kind for mutant in MUTANTS}


@pytest.mark.parametrize(
    ("old", "new"), [("no such text", "x"), ("tl.load", "x"), ("offs_w = begin", "offs_w = begin")]
)
def test_a_mutant_that_does_not_apply_once_is_an_error(old, new):
    source = "offs_w = begin\ntl.load(a)\ntl.load(b)\n"
    with pytest.raises(ValueError, match="times, expected once|changes nothing"):
        mutated(example(old=old, new=new), source)


def test_a_copy_differs_in_one_file_only(tmp_path):
    """It has bytecode of all others, which comes from the copy without a change: that stays as it is."""
    mutant, whole, place = MUTANTS[0], tmp_path / "whole", tmp_path / "place"
    copy_whole(whole)
    copy_for(mutant, place, whole)
    assert source_of(mutant, place).read_text() == mutated(mutant, source_of(mutant, ROOT).read_text())
    assert (place / "engram_kernels/reference").resolve() == place / "reference"
    for folder in ("engram_kernels", "reference", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            copy, kept = (root / path.relative_to(ROOT) for root in (place, whole))
            assert kept.read_text() == path.read_text()
            assert copy == source_of(mutant, place) or copy.samefile(kept)
            bytecode = Path(importlib.util.cache_from_source(str(copy)))
            assert bytecode.exists() is (copy != source_of(mutant, place))


def test_controls_run_the_tests_that_caught_mutants():
    """In the lane that they were caught in; of what was caught by no test there is nothing to believe."""
    caught = {
        example(detail="a"): "ops/test_rows.py::test_a[1]",
        example(detail="b"): "ops/test_rows.py::test_b",
        example(detail="c"): "ops/test_rows.py::test_a[1]",
        example(detail="d", lane="machine"): "ops/test_rows.py::test_a[1]",
        example(detail="e"): "ops/test_extremes.py::test_c",
    }
    results = {mutant: dict(verdict="caught", test=test) for mutant, test in caught.items()}
    unchanged = controls(results | {example(detail="f"): dict(verdict="survived")})
    assert [(control.lane, control.tests) for control in unchanged] == [
        ("interpret", ("tests/ops/test_extremes.py::test_c",)),
        ("interpret", ("tests/ops/test_rows.py::test_a[1]", "tests/ops/test_rows.py::test_b")),
        ("machine", ("tests/ops/test_rows.py::test_a[1]",)),
    ]
    assert not any(control.old or control.select for control in unchanged)


@pytest.mark.parametrize(
    ("change", "verdict", "good"),
    [
        ({}, "caught", True),
        ({}, "survived", False),
        ({}, "crashed with status -11", False),
        ({}, "InterpreterError, no assertion", False),
        (dict(old="", new=""), "survived", True),
        (dict(old="", new=""), "caught", False),
    ],
)
def test_only_an_assertion_counts(change, verdict, good):
    """And only what passes unchanged shows that it was the change."""
    mutant = example(**change)
    text, passed = report({mutant: dict(verdict=verdict, test="test_a", place="b.py:1: assert c")}, 1.0)
    assert passed is good
    assert (verdict.upper() in text) is not good
    assert "test_a: b.py:1: assert c" in text


def test_a_run_beyond_its_budget_warns():
    results = {example(): dict(verdict="caught")}
    text, passed = report(results, BUDGET)
    assert passed and "over budget" not in text
    text, passed = report(results, BUDGET + 1)
    assert passed and "over budget" in text
