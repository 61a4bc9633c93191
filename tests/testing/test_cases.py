"""The cases: every broken implementation is found, right ones are not, and names can be chosen by."""

import re
from functools import cache

import pytest

import engram_kernels
from engram_kernels import reference
from engram_kernels.testing import Untested, cases

from .broken import BROKEN

cases_of = cache(cases)
WAYS = [(op, name) for op, ways in BROKEN.items() for name, way in vars(ways).items() if callable(way)]


def outcome(case, function):
    """What a case says of a function: None, "untested", or what is wrong."""
    try:
        case.check(function)
    except Untested:
        return "untested"
    except AssertionError as wrong:
        return str(wrong)


@pytest.mark.parametrize(("op", "name"), WAYS)
def test_a_broken_implementation_is_found(op, name):
    function = getattr(BROKEN[op], name)
    found = (outcome(case, function) for case in cases_of(op))
    assert next(each for each in found if each not in (None, "untested"))


@pytest.mark.kernel
@pytest.mark.parametrize(
    "name",
    [
        "ngram_hash/map/wrapping/sequences",
        "lookup/bfloat16/given_out",
        "hash_lookup/batch",
        "gate_residual/float32/mask",
        "gate_conv_residual/float32/state",
    ],
)
def test_our_kernels_pass(device, name):
    """One case of each op, where lanes have kernels; ``pytest --pyargs engram_kernels.testing`` runs all of them."""
    (case,) = [case for case in cases_of(name.split("/")[0]) if case.name == name]
    case.check(getattr(engram_kernels, case.op), device)


def test_names_can_be_chosen_by_k():
    names = [case.name for case in cases_of()]
    assert len(names) == len(set(names)) and not [name for name in names if not re.fullmatch(r"[\w/]+", name)]
    assert all(case.name.startswith(f"{case.op}/") for case in cases_of())


def test_an_invalid_id_may_raise_on_the_cpu_alone():
    """And a ValueError in another case is one."""
    by_name = {case.name: case for case in cases_of("ngram_hash")}

    def refuses(token_ids, plan):
        raise ValueError("no")

    by_name["ngram_hash/map/plain/invalid_ids/one_sequence"].check(refuses)
    with pytest.raises(ValueError, match="no"):
        by_name["ngram_hash/map/plain"].check(refuses)


def test_margins_of_an_output_are_guarded():
    case = next(case for case in cases_of("lookup") if case.name == "lookup/bfloat16/given_out")

    def writes_on(table, row_ids, *, out=None):
        reference.lookup(table, row_ids, out=out)
        out.as_strided((out.numel() + 1,), (1,), out.storage_offset())[-1] = 0
        return out

    with pytest.raises(AssertionError, match="wrote outside the output"):
        case.check(writes_on)
