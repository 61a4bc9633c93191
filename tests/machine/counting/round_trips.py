"""Round trips to global memory that the order of a warp's machine code makes, all loads taken as equally slow.

A warp waits where an instruction touches a register whose load is under way, or where it asks for its copies to
shared memory to have come; then all that it asked for before has come as well.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from tests.machine.parsing.graph import Graph
from tests.machine.parsing.sass import EXIT, Instruction

from .executed import Flow

_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


@dataclass(frozen=True)
class RoundTrips:
    before_store: int  # before the first store to global memory; all, where there is none
    total: int
    most_bytes: int  # that a lane has under way at once


def way(flow: Flow, most: int = 200_000) -> Iterator[Instruction]:
    """The instructions of a warp in the order in which it runs them: every block as often as the flow says."""
    graph = Graph([block.successors for block in flow.function.blocks])
    left = Counter(flow.edges)
    back = {edge: loop for loop in graph.loops for edge in loop.back}
    rounds: dict[int, int] = {}  # header -> times that its loop goes back before it is left
    node, came = 0, None
    for _ in range(most):
        for loop in graph.loops:
            if loop.header == node and (came, node) not in loop.back:
                entries = [edge for edge in graph.edges if edge[1] == node and edge not in loop.back]
                waiting = sum(left[edge] for edge in entries) + 1  # this entry among them
                rounds[node] = -(-sum(left[edge] for edge in loop.back) // waiting)
        yield from flow.function.blocks[node].code
        out = [(node, to) for to in flow.function.blocks[node].successors]
        again = [edge for edge in out if edge in back and left[edge] and rounds[back[edge].header]]
        # Into a block that lanes of the warp run, rather than past it; the way that leaves a loop, last of all.
        onward = sorted(
            (edge for edge in out if edge not in back and left[edge]), key=lambda edge: _leaves(graph, edge)
        )
        chosen = (again or onward or [edge for edge in out if left[edge]] or [None])[0]
        if chosen is None or chosen[1] == EXIT:
            return
        left[chosen] -= 1
        if chosen in back:
            rounds[back[chosen].header] = max(0, rounds[back[chosen].header] - 1)
        came, node = chosen


def _leaves(graph: Graph, edge: tuple[int, int]) -> tuple[int, int]:
    node, to = edge
    return sum(node in loop.body and to not in loop.body for loop in graph.loops), to if to != EXIT else graph.count


def round_trips(code: Iterator[Instruction]) -> RoundTrips:
    pending: set[int] = set()  # registers
    groups: deque[bool] = deque()  # copies to shared memory: for each group whether any of it may be under way
    copies = under_way = most = waits = 0
    first = None
    for each in code:
        touched = set()
        for register, wide in _REGISTER.findall(each.operands):
            touched |= {int(register), int(register) + 1} if wide else {int(register)}
        came = bool(touched & pending)
        if each.opcode == "DEPBAR" and (found := re.search(r"SB0, (0x[0-9a-f]+)", each.operands)):
            while len(groups) > int(found[1], 16):
                came |= groups.popleft()
        if came:
            waits, under_way = waits + 1, 0
            pending.clear()
            groups = deque(False for _ in groups)
        if each.opcode == "LDGDEPBAR":
            groups.append(copies > 0)
            copies = 0
        elif each.opcode == "LDGSTS":
            copies += 1
            under_way += each.width
        elif each.opcode == "LDG":
            register = re.match(r"R(\d+)", each.operands)
            if register:
                pending |= {int(register[1]) + part for part in range(max(1, each.width // 4))}
                under_way += each.width
        elif each.opcode in ("STG", "RED", "REDG") and first is None:
            first = waits
        most = max(most, under_way)
    return RoundTrips(waits if first is None else first, waits, most)
