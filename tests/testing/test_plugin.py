"""The pytest plugin: what is named, what is wrong with names, what a run says, and a suite of one's own."""

import importlib
import os
import re
import sys

import pytest
import torch

from engram_kernels import lookup, reference
from engram_kernels.testing import cases
from engram_kernels.testing.implementations import Implementation, find_implementations, our_ops
from tests.support.documents import Document

MINE = """
import torch
from engram_kernels import hash_lookup, reference


def gather(table, row_ids, out_dtype):
    return reference.lookup(table, row_ids, out_dtype=out_dtype)


def gate_residual(hidden, key, value, query_norm, key_norm, *, eps):
    raise NotImplementedError("on Mondays")


def off_by_one(token_ids, plan):
    return reference.ngram_hash(token_ids, plan) + 1


def needs_more(table, row_ids, stride):
    pass


class Kernels:
    number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the module ``mine``, which is the current one; imports are forgotten in the end."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken_module.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "broken_module", "my_module"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(mine, capsys):
    """``run(*arguments)``: exit code and output of pytest in that folder, in this process."""

    def run(*arguments):
        always = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", str(mine))
        code = pytest.main([*always, "-p", "engram_kernels.testing.plugin", *arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


SUITE = ("--pyargs", "engram_kernels.testing")


def test_the_page_shows_what_is_printed(run, mine):
    text = Document("docs/testing_your_kernel.md").text
    (module,) = re.findall(r"^```python\n(# my_module\.py\n.*?)^```", text, re.S | re.M)
    (mine / "my_module.py").write_text(module)
    (shown,) = re.findall(r"^```text\n(lookup=my_module:gather: .*) \.\.\.\n", text, re.M)
    code, printed = run(*SUITE, "--implementation", "my_module")
    assert code == 0 and shown in printed


def test_our_own_ops_pass(run):
    code, text = run(*SUITE)
    assert code == 0 and text.count(" cases ran\n") == 5
    assert f"{len(cases())} passed" in text and "skipped" not in text


def test_tables_in_mapped_memory(run):
    assert run(*SUITE, "--placement", "host", "-k", "given_out")[0] == 0


def test_a_summary_says_what_was_not_tested(run):
    code, text = run(*SUITE, "--implementation", "mine:gather", "-k", "mxfp4 and not every")
    assert code == 0, text
    assert "lookup=mine:gather: 11 cases ran, 2 skipped: 1 as it takes no out_format; 1 as it takes no out\n" in text


def test_a_wrong_implementation_fails(run):
    code, text = run(*SUITE, "--implementation", "ngram_hash=mine:off_by_one", "-k", "golden")
    assert code == 1 and "ngram_hash=mine:off_by_one: 5 cases ran, 1 skipped" in text
    assert "mine:off_by_one, ngram_hash/golden/qwen: 288 of 288 elements differ, the first at [0, 0, 0]: got" in text


def test_nothing_that_ran_is_a_failure(run):
    code, text = run(*SUITE, "--implementation", "mine", "-k", "gate_residual or special_values")
    assert code == 1 and " failed" not in text, "nothing but that"
    assert "FAILED: no case of gate_residual=mine:gate_residual ran" in text and "on Mondays" in text
    assert "FAILED: no case of lookup" not in text
    assert run(*SUITE, "--implementation", "mine", "-k", "no_such_case")[0] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_two_implementations_of_an_op(run):
    words = ("--implementation", "mine:gather", "--implementation", "engram_kernels:lookup")
    code, text = run(*SUITE, *words, "--collect-only", "-k", "special_values")
    assert code == 0 and "[lookup/special_values/float32/mine:gather]" in text
    assert "6/228 tests collected" in text


def test_a_suite_of_ones_own(run, mine):
    (mine / "test_mine.py").write_text(
        "def test_mine(implementation):\n    assert implementation.op == 'lookup'\n\n\n"
        "def test_cases(implementation_case):\n    implementation_case()\n"
    )
    code, text = run("test_mine.py", "--implementation", "mine:gather", "-k", "test_mine or bfloat16")
    assert code == 0 and "lookup=mine:gather: " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing", "MODULE must be a module in the current folder or on sys.path, got 'nothing', which is in neither"),
        ("broken_module", "importing broken_module raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("mine.py:gather", "MODULE must be the name of a module, as import takes it, got the path mine.py"),
        ("mine:", "--implementation must be [OP=]MODULE[:NAME], got 'mine:'"),
        ("=mine", "--implementation must be [OP=]MODULE[:NAME], got '=mine'"),
        (
            "look=mine:gather",
            "OP must be one of ngram_hash, lookup, hash_lookup, gate_residual, gate_conv_residual, got",
        ),
        (
            "mine:off_by_one",
            "NAME must be one of ngram_hash, lookup, hash_lookup, gate_residual, gate_conv_residual, gat",
        ),
        ("lookup=mine:nothing", "mine:nothing must be a function, and mine has no nothing"),
        ("lookup=mine:MINE", "mine:MINE must be a function, and mine has no MINE"),
        ("lookup=mine:torch", "mine:torch must be a function, got module"),
        (
            "hash_lookup=mine",
            "mine must have a function with one of the names hash_lookup, and has none; another one is",
        ),
        (
            "os",
            "os must have a function with one of the names ngram_hash, lookup, hash_lookup, gate_residual, gate_conv",
        ),
        (
            "ngram_hash=mine:gate_residual",
            "must take arguments as ngram_hash(token_ids, plan, *, ...) does, got (hidden",
        ),
        ("lookup=mine:needs_more", "got (table, row_ids, stride): stride besides, without a default"),
        ("hash_lookup=mine:off_by_one", "got (token_ids, plan): fewer than 3 by position"),
        ("gate_residual=mine:off_by_one", "gate_residual(hidden, key, value, query_norm, key_norm, *, eps, ...) does"),
    ],
)
def test_wrong_names_are_errors(run, words, message):
    code, text = run(*SUITE, "--implementation", words)
    assert code == 2 and message in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--device", "cuda"], "--device cuda needs a GPU, and torch finds none"),
        (["--placement", "device"], "--placement must be cpu or host with --device cpu, got 'device'"),
    ],
)
def test_wrong_places_are_errors(run, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = run(*SUITE, *words)
    assert code == 2 and message in text


def test_what_a_module_has(mine):
    sys.path.insert(0, str(mine))
    found = find_implementations(["mine", "mine:gather"])
    assert [(each.op, each.name) for each in found] == [
        ("lookup", "mine:gather"),
        ("gate_residual", "mine:gate_residual"),
    ], "what it imports from the package is not its own, and what is named twice counts once"
    assert find_implementations(["engram_kernels"]) == our_ops()
    assert importlib.import_module("mine").gather is found[0].function


def test_an_option_without_a_default_gets_ours():
    """And what takes any option lacks none."""
    by_name = Implementation("lookup", "", lambda table, row_ids, out_dtype, *, order: (out_dtype, order))
    assert by_name(None, None) == (None, None) and by_name(None, None, order="head") == (None, "head")
    assert by_name.lacks(("out_dtype", "out", "order")) == ["out"]
    assert Implementation("lookup", "", lambda *tensors, **options: 1).lacks(("out",)) == []
    assert Implementation("lookup", "", lookup).lacks(("out", "order", "table")) == ["table"]


def test_cases_without_pytest():
    for case in cases("lookup")[:3]:
        case.check(reference.lookup)
    with pytest.raises(AssertionError, match="the result must be a tensor, got NoneType"):
        cases("lookup")[0].check(lambda table, row_ids: None)
    with pytest.raises(ValueError, match="cases: op must be one of ngram_hash, .*, got 'gather'"):
        cases("gather")
