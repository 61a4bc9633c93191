"""Which cases run: of many that cross the same values, as few as show each value of each parameter."""


def each_value(cases: list, values) -> list:
    """A part of ``cases``, in their order, that has every value of ``values(case)``, a set, at least once.

    Greedily: always the case with the most values not yet seen, and of equals the one whose values came least often, so
    that a short parameter's values take turns along a long one's.
    """
    sets = [values(case) for case in cases]
    left, times, chosen = set().union(*sets), dict.fromkeys(set().union(*sets), 0), set()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(sets[i] & left), -sum(times[value] for value in sets[i])))
        chosen.add(best)
        left -= sets[best]
        for value in sets[best]:
            times[value] += 1
    return [case for i, case in enumerate(cases) if i in chosen]


def parameters(item) -> set:
    """The values of a collected test's parameters, by name; a value is what it prints as."""
    return {(name, str(value)) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {""}


def chosen(items: list, cases: str) -> list:
    """Of collected tests all, a few cases of each (each value of each parameter), or one, as ``--cases`` says."""
    if cases == "all":
        return items
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    if cases == "one":
        return [of[0] for of in tests.values()]
    return [item for of in tests.values() for item in each_value(of, parameters)]
