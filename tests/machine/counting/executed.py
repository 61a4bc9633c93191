"""How often each block of machine code ran, from what the executor saw of the PTX.

The executor counts, for every warp, how often each line of PTX ran; the disassembly names the line that each
instruction comes from. ptxas moves, copies and merges instructions, so that a line's count is not simply that of a
block; what holds is this. What enters a block leaves it. A load, store, shuffle or barrier of the PTX runs as often
in the machine code, summed over its copies (a loop that was unrolled has several), or as often as a lane had it
enabled where ptxas made a branch of its predicate. No block runs more often than the most frequent of its lines. Of
what all this leaves open, which is little, lines of arithmetic decide, and then the fewest instructions: an unrolled
loop takes the rest only where the trips do not divide. The numbers are whole for each warp, which a mean is not.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tests.machine.parsing import ptx
from tests.machine.parsing.graph import Graph
from tests.machine.parsing.sass import KINDS, Function, Program

from .integers import IntegerProgram, Unsolvable

#: Beginning of a PTX instruction -> opcodes that it becomes, one for each time that it runs.
_ANCHORS = (
    ("ld.global", ("LDG",)),
    ("st.global", ("STG",)),
    ("ld.shared", ("LDS",)),
    ("st.shared", ("STS",)),
    ("cp.async.c", ("LDGSTS",)),
    ("ldmatrix", ("LDSM",)),
    ("stmatrix", ("STSM",)),
    ("red.", ("RED", "REDG", "ATOMG", "ATOM")),
    ("atom.", ("RED", "REDG", "ATOMG", "ATOM")),
    ("shfl.sync", ("SHFL",)),
    ("bar.sync", ("BAR",)),
    ("call", ("CALL",)),
    ("rem.s64", ("CALL",)),
    ("rem.u64", ("CALL",)),
    ("div.s64", ("CALL",)),
    ("div.u64", ("CALL",)),
)
_MUCH = 1 << 20
_ALL = tuple(start for start, _ in _ANCHORS)
_EFFECTS = tuple(start for start in _ALL if not start.startswith("ld"))


@dataclass(frozen=True)
class Trace:
    """What each warp of a launch did, by line of the PTX (from 1): arrays over the warps."""

    warps: int
    executed: Mapping[int, np.ndarray]
    enabled: Mapping[int, np.ndarray]  # of predicated lines and branches: times that a lane was enabled
    partial: Mapping[int, np.ndarray]  # and times that some were and others not


@dataclass(frozen=True)
class Statement:
    """A line of PTX, and the block that it is in."""

    name: str
    predicated: bool
    block: int

    @property
    def opcodes(self) -> tuple[str, ...]:
        return next((opcodes for start, opcodes in _ANCHORS if self.name.startswith(start)), ())

    @property
    def width(self) -> int | None:
        """Bytes of a lane, of loads and stores."""
        if not self.name.startswith(("ld.", "st.")):
            return None
        vector = re.search(r"\.v(\d)\b", self.name)
        return int(re.search(r"(\d+)$", self.name)[1]) // 8 * int(vector[1] if vector else 1)


def statements(program: ptx.Program) -> dict[int, Statement]:
    """The instructions of a kernel's PTX by line."""
    return {
        each.line: Statement(each.opcode, each.guard is not None, block.index)
        for block in program.blocks
        for each in [*block.instructions, *([block.end] if block.end else [])]
    }


@dataclass
class Flow:
    """How often one warp ran each block of a function, and went along each edge."""

    function: Function
    blocks: list[int]
    edges: dict[tuple[int, int], int]


@dataclass
class WarpClass:
    """Warps that did the same."""

    warps: int
    flows: list[Flow]  # of the kernel, and of the routines that it calls
    doubt: str  # what was not certain, or nothing


class Executed:
    """Machine instructions that a launch ran."""

    def __init__(self, program: Program, source: ptx.Program, trace: Trace):
        self.program, self.trace = program, trace
        self._solvers = [_Solver(function, statements(source)) for function in program.functions]

    @cached_property
    def classes(self) -> list[WarpClass]:
        lines = sorted(self.trace.executed)
        tables = (self.trace.executed, self.trace.enabled, self.trace.partial)
        counts = np.stack([table[line] for table in tables for line in lines if line in table])
        _, first, sizes = np.unique(counts, axis=1, return_index=True, return_counts=True)
        found: dict[tuple, WarpClass] = {}
        for warp, size in zip(first, sizes, strict=True):
            seen = [{line: int(values[warp]) for line, values in table.items()} for table in tables]
            key = self._solvers[0].question(*seen)
            if key in found:
                found[key].warps += int(size)
            else:
                found[key] = WarpClass(int(size), *self._solve(seen))
        return list(found.values())

    def _solve(self, seen):
        flow, doubt = self._solvers[0].solve(1, *seen)
        flows, doubts = [flow], [doubt]
        calls = Counter()
        for block, times in zip(flow.function.blocks, flow.blocks, strict=True):
            for each in block.code:
                if each.opcode == "CALL":
                    calls[each.target] += times
        for solver in self._solvers[1:]:
            times = calls[solver.function.name]
            if times:
                flow, doubt = solver.solve(times, {}, {}, {})
                flows.append(flow)
                doubts.append(doubt)
        return flows, "; ".join(dict.fromkeys(each for each in doubts if each))

    def by_kind(self) -> dict[str, int]:
        """Warp instructions of the launch by kind."""
        found = dict.fromkeys(KINDS, 0)
        for each in self.classes:
            for number, flow in enumerate(each.flows):
                for block, times in zip(flow.function.blocks, flow.blocks, strict=True):
                    for instruction in block.code:
                        found["routine" if number else instruction.kind] += each.warps * times
        return found

    @property
    def doubts(self) -> list[str]:
        return sorted({each.doubt for each in self.classes} - {""})


class _Solver:
    """The flow through one function."""

    def __init__(self, function: Function, lines: dict[int, Statement]):
        self.function, self.ptx = function, lines
        self.graph = Graph([block.successors for block in function.blocks])
        self.same = self.graph.classes()
        self.lines: dict[int, Counter] = {}  # line -> block -> instructions
        for block in function.blocks:
            for each in block.code:
                if each.line in lines:
                    self.lines.setdefault(each.line, Counter())[block.index] += 1
        self.branches = {
            block.index: block.code[-1] for block in function.blocks if len(block.successors) > 1 and block.code
        }
        self.anchors = list(self._anchors())
        self.preferences = list(self._preferences())

    def _anchors(self):
        """(line, copies by block, whether the line has a predicate, and whether copies have a guard: some may)."""
        for line, statement in self.ptx.items():
            code = [
                (block.index, each)
                for block in self.function.blocks
                for each in block.code
                if each.line == line and each.opcode in statement.opcodes
            ]
            copies = Counter(index for index, _ in code)
            if statement.width is not None and code:
                widths = {each.width for _, each in code}
                parts = statement.width // max(widths)
                if len(widths) > 1 or parts == 0 or any(count % parts for count in copies.values()):
                    continue
                copies = Counter({index: count // parts for index, count in copies.items()})
            if code:
                yield line, copies, statement.predicated, {bool(each.guard) for _, each in code}

    @staticmethod
    def _wanted(line, predicated, guarded, executed, enabled):
        """The least and the most that copies of a line run, in all."""
        all_, some = executed.get(line, 0), enabled.get(line, 0) if predicated else 0
        if guarded == {False}:  # of a line with a predicate: behind a branch, where it runs if a lane has it enabled
            return (some, some) if predicated else (all_, all_)
        # A guard may be a branch that was folded, whose other side issues it too.
        return some if predicated and guarded == {False, True} else all_, math.inf

    def _preferences(self):
        """(line, factors by block): how the lines of a block of PTX mostly lie in the machine code."""
        votes: dict[int, Counter] = {}
        example = {}
        for line, blocks in self.lines.items():
            factors = tuple(sorted(blocks.items()))
            divisor = int(np.gcd.reduce([count for _, count in factors]))
            factors = tuple((index, count // divisor) for index, count in factors)
            votes.setdefault(self.ptx[line].block, Counter())[factors] += 1
            example.setdefault(self.ptx[line].block, line)
        for block, found in votes.items():
            factors, support = found.most_common(1)[0]
            yield example[block], dict(factors), support

    def question(self, executed, enabled, partial):
        """What the solution depends on."""
        lines = sorted(self.lines)
        return (
            tuple(executed.get(line, 0) for line in lines),
            tuple(enabled.get(line, 0) for line, _, predicated, _ in self.anchors if predicated),
            tuple(partial.get(branch.line, 0) > 0 for branch in self.branches.values()),
        )

    def solve(self, times, executed, enabled, partial):
        """The flow of a warp that enters ``times`` times; and what is doubtful about it."""
        for bounded, hard, doubt in (
            (True, _ALL, ""),
            (True, _EFFECTS, ""),  # a load that only one side of a branch needs is moved there
            (False, _EFFECTS, "a block ran more often than its lines"),
            (False, (), "stores of the PTX and the machine code do not agree"),
        ):
            try:
                return self._attempt(times, executed, enabled, partial, bounded, hard, doubt)
            except Unsolvable:
                continue
        raise Unsolvable(f"no way through {self.function.name} fits what ran")

    def _attempt(self, times, executed, enabled, partial, bounded, hard, doubt):
        program, graph = IntegerProgram(), self.graph
        most = max(executed.values(), default=times)
        most = max(most, times) * 2
        size = Counter()
        limit = dict.fromkeys(self.same, most)
        for block in self.function.blocks:
            size[self.same[block.index]] += len(block.code)
            known = [
                executed.get(each.line, 0) for each in block.code if each.line in self.ptx and each.kind != "control"
            ]
            if bounded and known and executed:
                limit[self.same[block.index]] = min(limit[self.same[block.index]], max(known))
        of_class = {each: program.variable(0, limit[each], size[each] / _MUCH) for each in dict.fromkeys(self.same)}
        block_of = [of_class[each] for each in self.same]
        edge_of = {edge: program.variable(0, most) for edge in graph.edges}
        split = {index for index, branch in self.branches.items() if partial.get(branch.line, 0)}
        meeting = {graph.meeting_point(index) for index in split}
        for node in range(graph.count):
            out = [edge_of[node, to] for to in graph.successors[node]]
            back = [edge_of[source, node] for source in graph.predecessors[node]]
            if node in split:  # lanes of a warp part: it may go both ways
                for edge in out:
                    program.constrain({edge: 1, block_of[node]: -1}, high=0)
                program.constrain(dict.fromkeys(out, 1) | {block_of[node]: -1}, low=0)
            else:
                program.constrain(dict.fromkeys(out, 1) | {block_of[node]: -1}, 0, 0)
            enters = times if node == 0 else 0
            if node not in meeting:
                program.constrain(dict.fromkeys(back, 1) | {block_of[node]: -1}, -enters, -enters)
        for block in self.function.blocks:
            for to in block.never:
                if block.index not in split:
                    program.constrain({edge_of[block.index, to]: 1}, 0, 0)
        for loop in graph.loops:
            entries = [edge for edge in graph.edges if edge[1] == loop.header and edge not in loop.back]
            factors = {edge_of[edge]: 1 for edge in loop.back} | {edge_of[edge]: -most for edge in entries}
            program.constrain(factors, high=most * times if loop.header == 0 else 0)
        for line, copies, *form in self.anchors if executed else ():
            least, most_often = self._wanted(line, *form, executed, enabled)
            factors = Counter()
            for index, count in copies.items():
                factors[block_of[index]] += count
            if self.ptx[line].name.startswith(hard):
                program.constrain(factors, least, most_often)
            else:
                program.prefer(factors, least, 100)
        for line, copies, support in self.preferences if executed else ():
            factors = Counter()
            for index, count in copies.items():
                factors[block_of[index]] += count
            program.prefer(factors, executed.get(line, 0), support / 100)
        found = program.solve()
        flow = Flow(self.function, [found[each] for each in block_of], {e: found[v] for e, v in edge_of.items()})
        return flow, "; ".join(filter(None, (doubt, "" if program.proved else "the search was cut short")))
