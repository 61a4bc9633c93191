"""Facts of a control-flow graph whose nodes are numbered from 0, the entry; -1 is the exit, and no node."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]
    back: frozenset[tuple[int, int]]  # edges


class Graph:
    def __init__(self, successors: list[list[int]]):
        self.successors = successors
        self.count = len(successors)
        self.edges = [(node, to) for node, out in enumerate(successors) for to in out]
        self.predecessors: list[list[int]] = [[] for _ in successors]
        for node, to in self.edges:
            if to >= 0:
                self.predecessors[to].append(node)
        self.dominators = self._closest(self.predecessors, {0})
        last = {node for node, out in enumerate(successors) if any(to < 0 for to in out)}
        inner = [[to for to in out if to >= 0] for out in successors]
        self.postdominators = self._closest(inner, last)
        self.loops = self._loops()

    def _closest(self, sources, roots) -> list[int]:
        """A bit set for each node: the nodes on every way to it from the roots over ``sources``, itself among them."""
        everything = (1 << self.count) - 1
        found = [0 if node in roots else everything for node in range(self.count)]
        for node in roots:
            found[node] = 1 << node
        changed = True
        while changed:
            changed = False
            for node in range(self.count):
                if node in roots:
                    continue
                new = everything
                for source in sources[node]:
                    new &= found[source]
                new |= 1 << node
                if new != found[node]:
                    found[node], changed = new, True
        return found

    def dominates(self, above: int, node: int) -> bool:
        return bool(self.dominators[node] >> above & 1)

    def postdominates(self, below: int, node: int) -> bool:
        return bool(self.postdominators[node] >> below & 1)

    def _loops(self) -> list[Loop]:
        bodies: dict[int, tuple[set, set]] = {}
        for node, to in self.edges:
            if to < 0 or not self.dominates(to, node):
                continue
            body, back = bodies.setdefault(to, ({to}, set()))
            back.add((node, to))
            waiting = [node]
            while waiting:
                each = waiting.pop()
                if each not in body:
                    body.add(each)
                    waiting += self.predecessors[each]
        loops = [Loop(header, frozenset(body), frozenset(back)) for header, (body, back) in bodies.items()]
        return sorted(loops, key=lambda loop: len(loop.body))

    def loops_of(self, node: int) -> tuple[int, ...]:
        """Headers of the loops around a node."""
        return tuple(sorted(loop.header for loop in self.loops if node in loop.body))

    def classes(self) -> list[int]:
        """A number for each node, the same where one runs whenever the other does."""
        found: list[int] = []
        for node in range(self.count):
            alike = (
                found[other]
                for other in range(node)
                if self.loops_of(other) == self.loops_of(node)
                and (
                    self.dominates(other, node)
                    and self.postdominates(node, other)
                    or self.dominates(node, other)
                    and self.postdominates(other, node)
                )
            )
            found.append(next(alike, node))
        return found

    def meeting_point(self, node: int) -> int | None:
        """The nearest node that every way from ``node`` comes to, None where that is the exit."""
        below = [each for each in range(self.count) if each != node and self.postdominates(each, node)]
        return max(below, key=lambda each: self.postdominators[each].bit_count(), default=None)
