"""A small integer program: non-negative integers under linear constraints, of least cost.

Made for the flow of a few warps through a few dozen blocks, where propagation of bounds fixes nearly everything.
"""

import math
from dataclasses import dataclass


class Unsolvable(Exception):
    """No integers meet the constraints."""


@dataclass
class _Term:
    """``weight * abs(sum(factor * value) - wanted)``, part of the cost."""

    factors: dict[int, int]
    wanted: int
    weight: float


class IntegerProgram:
    #: Nodes of the search after which the best solution so far is taken.
    most_nodes = 4000

    def __init__(self):
        self.low: list[int] = []
        self.high: list[int] = []
        self.cost: list[float] = []
        self._constraints: list[tuple[dict[int, int], float, float]] = []
        self._terms: list[_Term] = []
        self._of: list[list[int]] = []
        self.proved = True  # that no solution is better than the one returned

    def variable(self, low: int, high: int, cost: float = 0.0) -> int:
        self.low.append(low)
        self.high.append(high)
        self.cost.append(cost)
        self._of.append([])
        return len(self.low) - 1

    def constrain(self, factors: dict[int, int], low: float = -math.inf, high: float = math.inf) -> None:
        """``low <= sum(factor * value) <= high``."""
        factors = {variable: factor for variable, factor in factors.items() if factor}
        for variable in factors:
            self._of[variable].append(len(self._constraints))
        self._constraints.append((factors, low, high))

    def prefer(self, factors: dict[int, int], wanted: int, weight: float) -> None:
        self._terms.append(_Term(factors, wanted, weight))

    def solve(self) -> list[int]:
        """Values of the variables. Raises :class:`Unsolvable`."""
        low, high = list(self.low), list(self.high)
        if not self._propagate(low, high, range(len(self._constraints))):
            raise Unsolvable
        best, least, nodes = None, math.inf, 0
        waiting = [(low, high)]
        while waiting:
            low, high = waiting.pop()
            nodes += 1
            if nodes > self.most_nodes and best is not None or nodes > 20 * self.most_nodes:
                self.proved = False
                break
            bound = self._bound(low, high)
            if bound >= least - 1e-9:
                continue
            open_ = [(high[v] - low[v], v) for v in range(len(low)) if high[v] > low[v]]
            if not open_:
                best, least = low, bound
                continue
            _, variable = min(open_)
            middle = (low[variable] + high[variable]) // 2
            halves = []
            for start, end in ((low[variable], middle), (middle + 1, high[variable])):
                part = list(low), list(high)
                part[0][variable], part[1][variable] = start, end
                if self._propagate(*part, self._of[variable]):
                    halves.append((self._bound(*part), part))
            waiting += [part for _, part in sorted(halves, key=lambda half: -half[0])]  # the better one comes out first
        if best is None:
            raise Unsolvable
        return best

    def _bound(self, low, high) -> float:
        """What any solution within the bounds costs at least."""
        total = sum(cost * value for cost, value in zip(self.cost, low, strict=True) if cost)
        for term in self._terms:
            least, most = _range(term.factors, low, high)
            total += term.weight * max(0, least - term.wanted, term.wanted - most)
        return total

    def _propagate(self, low, high, constraints) -> bool:
        """Narrow the bounds in place; False where nothing is left."""
        waiting = list(constraints)
        queued = set(waiting)
        while waiting:
            index = waiting.pop()
            queued.discard(index)
            factors, at_least, at_most = self._constraints[index]
            least, most = _range(factors, low, high)
            if least > at_most or most < at_least:
                return False
            for variable, factor in factors.items():
                start, end = low[variable], high[variable]
                if start == end:
                    continue
                rest_least = least - factor * (start if factor > 0 else end)
                rest_most = most - factor * (end if factor > 0 else start)
                down, up = (at_least - rest_most) / factor, (at_most - rest_least) / factor
                if factor < 0:
                    down, up = up, down
                new_start = start if down == -math.inf else max(start, math.ceil(down - 1e-9))
                new_end = end if up == math.inf else min(end, math.floor(up + 1e-9))
                if new_start > new_end:
                    return False
                if (new_start, new_end) != (start, end):
                    low[variable], high[variable] = new_start, new_end
                    least, most = _range(factors, low, high)
                    for other in self._of[variable]:
                        if other not in queued:
                            queued.add(other)
                            waiting.append(other)
        return True


def _range(factors, low, high):
    least = sum(factor * (low[v] if factor > 0 else high[v]) for v, factor in factors.items())
    most = sum(factor * (high[v] if factor > 0 else low[v]) for v, factor in factors.items())
    return least, most
