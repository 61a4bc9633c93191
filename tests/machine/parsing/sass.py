"""Machine code of a kernel: a cubin's disassembly as functions and blocks, with the PTX line of each instruction.

ptxas notes for every instruction which line of the PTX it comes from (Triton asks it to), and ``nvdisasm`` prints it.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import triton

_LINE = re.compile(r'^\s*//## File "\.nv_debug_ptx_txt", line (\d+)')
_LABEL = re.compile(r"^\s*(\.L_\w+|\$\S+):")
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")

_GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG", "ATOM", "LD", "ST")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
_SHUFFLE = ("SHFL", "VOTE", "VOTEU", "REDUX", "MATCH")
_BARRIER = ("BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "WARPSYNC", "ERRBAR", "CCTL", "ARRIVES", "SYNCS")
_CONTROL = ("BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "BRX", "JMP", "YIELD", "ACQBULK", "BMOV")
_CONVERT = ("F2F", "F2FP", "F2I", "I2F", "I2FP", "FRND", "F2IP")
_FLOAT = ("FADD", "FMUL", "FFMA", "FSETP", "FSET", "FSEL", "FMNMX", "FMNMX3", "MUFU", "FCHK", "FSWZADD", "FADD2")
_FLOAT += (
    "FFMA2",
    "FMUL2",
    "HADD2",
    "HMUL2",
    "HFMA2",
    "HSETP2",
    "HSET2",
    "HMNMX2",
    "DADD",
    "DMUL",
    "DFMA",
    "DSETP",
    "DMNMX",
)
#: Kind of instruction -> its opcodes. All others, moves and uniform ones among them, are ``integer``.
OPCODES = dict(float=_FLOAT, convert=_CONVERT, shared=_SHARED, shuffle=_SHUFFLE, barrier=_BARRIER, control=_CONTROL)
OPCODES["global"] = _GLOBAL
_KIND = {opcode: kind for kind, opcodes in OPCODES.items() for opcode in opcodes}
#: In the order in which a report lists them. ``routine`` is all that runs inside called division routines.
KINDS = ("integer", "routine", "float", "convert", "global", "shared", "shuffle", "barrier", "control")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!P0" or nothing
    name: str  # with its modifiers
    operands: str
    line: int | None  # of the PTX, from 1

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> str | None:
        found = re.search(r"`\(([^)]+)\)", self.operands)
        return found[1] if found else None

    @property
    def kind(self) -> str:
        if self.opcode == "HFMA2" and re.match(r"R\d+, -?RZ, -?RZ,", self.operands):
            return "integer"  # a move of a constant through another unit
        if self.name.startswith("HADD2.F32") and "-RZ" in self.operands:
            return "convert"  # of a float16
        return _KIND.get(self.opcode, "integer")

    @property
    def width(self) -> int:
        """Bytes that a lane loads or stores."""
        found = re.search(r"\.(256|128|64|U8|S8|U16|S16)\b", self.name)
        sizes = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return sizes[found[1]] if found else 4


@dataclass
class Block:
    """Instructions that run one after the other; padding is left out."""

    index: int
    code: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)  # where the branch goes first, then what follows; EXIT is -1
    never: list[int] = field(default_factory=list)  # successors that only a warp out of step takes


EXIT = -1


class Function:
    """One function of a cubin: the kernel, or a routine that it calls."""

    def __init__(self, name: str, code: list[Instruction], labels: dict[str, int]):
        """``labels`` gives indices into ``code``."""
        self.name = name
        leaders = {0} | {index for index in labels.values() if index < len(code)}
        leaders |= {index + 1 for index, each in enumerate(code) if _ends_block(each) and index + 1 < len(code)}
        starts = sorted(leaders)
        number = {start: index for index, start in enumerate(starts)}
        blocks = []
        for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
            block = Block(index, [each for each in code[start:end] if each.opcode != "NOP"])
            last, follows = code[end - 1], index + 1 if end < len(code) else EXIT
            if _jumps(last):
                target = number[labels[last.target]]
                conditional = last.guard or not last.operands.startswith("`(")
                block.successors = [target, follows] if conditional else [target]
                block.never = [target] if last.name == "BRA.DIV" else []
            elif last.opcode in ("EXIT", "RET"):
                block.successors = [EXIT, follows] if last.guard else [EXIT]
            else:
                block.successors = [follows]
            blocks.append(block)
        self.blocks = _reachable(blocks)

    @cached_property
    def size(self) -> int:
        return sum(len(block.code) for block in self.blocks)


def _jumps(instruction: Instruction) -> bool:
    """Whether it is a branch. On sm_80 a call to a label of the same function is one: nothing returns from there."""
    to_label = instruction.target is not None and not instruction.target.startswith("$")
    return instruction.opcode == "BRA" or (instruction.opcode == "CALL" and to_label)


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode in ("EXIT", "RET") or _jumps(instruction)


def _reachable(blocks: list[Block]) -> list[Block]:
    """The blocks that can run, numbered anew: the branch to itself behind the end is not among them."""
    seen, waiting = set(), [0]
    while waiting:
        index = waiting.pop()
        if index != EXIT and index not in seen:
            seen.add(index)
            waiting += blocks[index].successors
    kept = [block for block in blocks if block.index in seen]
    number = {block.index: index for index, block in enumerate(kept)} | {EXIT: EXIT}
    for index, block in enumerate(kept):
        block.index = index
        block.successors = list(dict.fromkeys(number[each] for each in block.successors))
        block.never = [number[each] for each in block.never]
    return kept


@dataclass
class Program:
    """All machine code that a launch can run."""

    kernel: Function
    routines: dict[str, Function]
    registers: int
    stack: int

    @property
    def functions(self) -> list[Function]:
        return [self.kernel, *self.routines.values()]


def disassemble(cubin: bytes) -> Program:
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(folder / "cuobjdump", "--dump-resource-usage", file.name)
        text = _run(folder / "nvdisasm", "-c", "-gp", file.name)
    return parse(text, int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1]))


def parse(text: str, registers: int = 0, stack: int = 0) -> Program:
    """From the text of ``nvdisasm -c -gp``. Labels that begin with ``$`` start a routine."""
    functions: list[tuple[str, list, dict]] = [("kernel", [], {})]
    line = None
    for row in text.splitlines():
        if found := _LINE.match(row):
            line = int(found[1])
        elif found := _LABEL.match(row):
            if found[1].startswith("$"):
                functions.append((found[1], [], {}))
            functions[-1][2][found[1]] = len(functions[-1][1])
        elif found := _CODE.match(row):
            functions[-1][1].append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4], line))
    kernel, *routines = (Function(*each) for each in functions if each[1])
    return Program(kernel, {each.name: each for each in routines}, registers, stack)


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
