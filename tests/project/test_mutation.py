"""The list of mutants fits the package as it is, and the runner believes no mutant that a test did not catch."""

import ast

import pytest

from tests import mutants
from tests.conftest import package_kernels
from tests.mutants import KINDS, MUTANTS, Mutant
from tests.mutation import BUDGET, ROOT, controls, copy_for, mutated, report, source_of
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
    mutant = MUTANTS[0]
    copy_for(mutant, tmp_path)
    assert source_of(mutant, tmp_path).read_text() == mutated(mutant, source_of(mutant, ROOT).read_text())
    assert (tmp_path / "engram_kernels/reference").resolve() == tmp_path / "reference"
    for folder in ("engram_kernels", "reference", "tests"):
        for path in (ROOT / folder).glob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            assert copy == source_of(mutant, tmp_path) or copy.read_text() == path.read_text()


def test_each_file_of_tests_has_a_control():
    unchanged = controls(list(MUTANTS))
    tested = {(file, mutant.lane) for mutant in MUTANTS for file in mutant.tests}
    assert {(control.tests[0], control.lane) for control in unchanged} == tested
    assert not any(control.old or (control.select and control.lane == "interpret") for control in unchanged)
    ran = {(mutant.tests[0], mutant.select) for mutant in MUTANTS if mutant.lane == "machine"}
    assert ran == {(control.tests[0], control.select) for control in unchanged if control.lane == "machine"}


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
    text, passed = report([(mutant, dict(verdict=verdict, test="test_a", place="b.py:1: assert c"))], 1.0)
    assert passed is good
    assert (verdict.upper() in text) is not good
    assert "test_a: b.py:1: assert c" in text


def test_a_run_beyond_its_budget_warns():
    results = [(example(), dict(verdict="caught"))]
    text, passed = report(results, BUDGET)
    assert passed and "over budget" not in text
    text, passed = report(results, BUDGET + 1)
    assert passed and "over budget" in text
