"""What a kernel does before it has waited for the kernel ahead of it, read from the flow graph of its machine code."""

from .flow import successors
from .ptx import Program

WAIT, TRIGGER = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


def unwaited(text):
    """Accesses to global memory, and ends, that some way through the kernel comes to without the wait; as texts."""
    program = Program(text)
    follow, early, waiting = successors(program), set(), [0]
    while waiting:
        block = waiting.pop()
        if block not in early:
            early.add(block)
            if not any(_waits(each) for each in program.blocks[block].instructions):
                waiting += follow[block]
    found = []
    for number in sorted(early):
        block = program.blocks[number]
        for each in [*block.instructions, *([] if block.end is None else [block.end])]:
            if _waits(each):
                break
            if _touches(each.opcode):
                found.append(str(each))
    return found


def triggers(text):
    """How many triggers a kernel has."""
    return sum(each.opcode == TRIGGER for block in Program(text).blocks for each in block.instructions)


def _waits(instruction):
    return instruction.opcode == WAIT and instruction.guard is None


def _touches(opcode):
    words = opcode.split(".")
    if words[0] in ("ld", "st", "atom", "red", "cp", "prefetch"):
        return not {"param", "shared", "commit_group", "wait_group", "wait_all"} & set(words) or words[0] == "cp"
    return words[0] in ("ret", "exit")
