"""Few cases of many: which ones they are."""

import itertools

from tests.support.cases import each_value


def test_each_value_comes_and_short_parameters_take_turns():
    """Of 12 x 4 pairs 12: each of the longer one's values once, each of the shorter one's three times."""
    pairs = list(itertools.product(range(12), "abcd"))
    found = each_value(pairs, lambda pair: {("number", pair[0]), ("letter", pair[1])})
    assert [number for number, _ in found] == list(range(12))
    assert sorted(letter for _, letter in found) == sorted("abcd" * 3)


def test_cases_that_cross_nothing_all_stay():
    assert each_value([3, 1, 2], lambda case: {case}) == [3, 1, 2]
    assert each_value([], lambda case: {case}) == []
    assert each_value([1, 1], lambda case: {case}) == [1]
