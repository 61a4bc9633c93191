"""Parse the PTX of one kernel into blocks of instructions. Nothing here knows what an instruction does."""

import re
from collections import Counter

from tests.machine.faults import Fault

ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
PARAMETER = re.compile(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*(?:,|$)")
LABEL = re.compile(r"([$\w]+):\s*")
DECLARED = re.compile(r"(%?[\w$]+?)(?:<\d+>)?$")
LINE = (".loc ", ".loc\t")  # where in the source what follows comes from
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
# A block ends behind these.
ENDS = {"bra", "bra.uni", "ret", "ret.uni", "exit", "trap", "bar.sync", "barrier.sync", "barrier.sync.aligned"}


class Instruction:
    """``operands`` are texts; ``guard`` is the name of the predicate in front, or None. ``line`` counts from one."""

    __slots__ = ("opcode", "operands", "guard", "negated", "line", "loc", "scope", "targets", "sources")

    def __init__(self, opcode, operands, guard, negated, line, loc, scope):
        self.opcode, self.operands, self.guard, self.negated = opcode, operands, guard, negated
        self.line, self.loc, self.scope = line, loc, scope
        self.targets, self.sources = (), ()  # register numbers, known once it is translated

    @property
    def location(self):
        """Place in the kernel's source, as Triton notes it, and in the PTX."""
        place = re.search(r"// (\S+)", self.loc)
        return f"{place[1] if place else 'unknown place'} (PTX line {self.line}: {self.opcode})"

    def __str__(self):
        return f"{self.opcode} {', '.join(self.operands)}".strip()


class Block:
    """Instructions of which each is followed by the next; ``end`` goes elsewhere, None falls through."""

    def __init__(self, index):
        self.index, self.instructions, self.end = index, [], None


def _closing(text, start):
    """Place of the brace that closes a scope which is open at ``start``. Inline assembly has scopes of its own."""
    depth, end = 1, None
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth and end is None:
            end = start + brace.start()
        if depth < 0:
            raise Fault("unknown", "a brace too many")
    if end is None:
        raise Fault("unknown", "an entry without an end")
    return end


class Program:
    """An entry: ``name``, ``threads``, ``parameters`` [(type, name)], ``blocks``, ``labels``, and what it declares."""

    def __init__(self, text):
        entries = list(ENTRY.finditer(text))
        if len(entries) != 1 or re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
            raise Fault("unknown", f"a module of {len(entries)} entries, or with functions")
        entry = entries[0]
        # Dynamic shared memory begins at offset 0. Other variables of the module are faults where they are used.
        self.shared_symbols = re.findall(r"^\.extern \.shared [^;]*?(\w+)\[\];", text[: entry.start()], re.M)
        self.name = entry[1]
        self.parameters = PARAMETER.findall(entry[2].strip().replace("\n", " "))
        threads = re.search(r"\.reqntid\s+(\d+)\s*(?:,\s*1\s*)*$", entry[3].strip(), re.M)
        if not threads:
            raise Fault("unknown", f"{self.name} does not say how many threads it needs: {entry[3].strip()}")
        self.threads = int(threads[1])
        if self.threads % 32 or not 0 < self.threads <= 1024:
            raise Fault("unknown", f"{self.name} of {self.threads} threads, which are no whole warps of a program")
        self.blocks, self.labels = [Block(0)], {}
        self.scopes = {0: ({}, None)}  # scope -> declared prefix or name -> bits; the scope around it
        self._scope = 0
        self._parse(text[entry.end() : _closing(text, entry.end())], text.count("\n", 0, entry.end()) + 1)
        self.opcodes = Counter(each.opcode for each in self.instructions)

    @property
    def instructions(self):
        return [each for block in self.blocks for each in [*block.instructions, *([block.end] if block.end else [])]]

    def declared(self, name, scope=0):
        """(name, scope that declares it, bits) of a register as it is seen from a scope."""
        while scope is not None:
            bits = self._declared(name, scope)
            if bits is not None:
                return name, scope, bits
            scope = self.scopes[scope][1]
        raise Fault("unknown", f"{name} of {self.name} is not a register of it")

    def _declared(self, name, scope):
        table = self.scopes[scope][0]
        return table.get(name) or table.get(name.rstrip("0123456789") + "<")

    def _declare(self, line):
        _, kind, names = line.split(None, 2)
        bits = BITS.get("b" + kind[2:] if kind[1:2] in "ufs" and kind[2:].isdigit() else kind[1:])
        if bits is None:
            raise Fault("unknown", f"declaration {line}")
        for name in names.split(","):
            found = DECLARED.match(name.strip())
            self.scopes[self._scope][0][found[1] + ("<" if "<" in name else "")] = bits

    def _parse(self, body, number):
        loc, pending = "", ""
        for at, line in enumerate(body.split("\n"), number):
            line = line.strip()
            if "//" in line:
                if line.startswith(LINE):
                    loc = line
                    continue
                line = line[: line.index("//")].rstrip()
            if not line:
                continue
            line = pending + line
            pending = ""
            if line[0] != "{" and line[-1] == ";" and line.count(";") == 1:
                self._statement(line[:-1], at, loc)
                continue
            *whole, rest = line.split(";")
            for piece in whole:
                self._statement(piece.strip(), at, loc)
            rest = self._braces(rest.strip())
            if rest and not self._labels(rest):
                if rest.startswith((*LINE, ".pragma", ".file", ".section")):
                    loc = rest if rest.startswith(LINE) else loc
                else:
                    pending = rest + " "
        if pending:
            raise Fault("unknown", f"the end of {self.name}: {pending}")
        last = self.blocks[-1]
        if last.end is None:
            last.end = Instruction("ret", [], None, False, at, loc, 0)

    def _braces(self, piece):
        """What is left of the text behind braces that open or close a scope."""
        while piece[:1] in ("{", "}"):
            if piece[0] == "{":
                inner = len(self.scopes)
                self.scopes[inner] = ({}, self._scope)
                self._scope = inner
            else:
                self._scope = self.scopes[self._scope][1]
                if self._scope is None:
                    raise Fault("unknown", f"a brace too many in {self.name}")
            piece = piece[1:].strip()
        return piece

    def _labels(self, piece):
        """Whether the text is a label and nothing else."""
        found = LABEL.fullmatch(piece)
        if found:
            if self.blocks[-1].instructions:
                self.blocks.append(Block(len(self.blocks)))
            self.labels[found[1]] = self.blocks[-1].index
        return bool(found)

    def _statement(self, piece, line, loc):
        if piece[:1] in ("{", "}"):
            piece = self._braces(piece)
        if ":" in piece:
            label = LABEL.match(piece)
            if label and piece[label.end() - 1 : label.end() + 1] != "::":
                self._labels(label[0])
                piece = piece[label.end() :]
        if not piece:
            return
        if piece[0] == ".":
            if piece.startswith(".reg"):
                self._declare(piece)
            elif not piece.startswith((*LINE, ".pragma")):
                raise Fault("unknown", f"directive {piece} of {self.name}")
            return
        guard, negated = None, False
        if piece[0] == "@":
            guard, piece = piece[1:].split(None, 1)
            if guard[0] == "!":
                guard, negated = guard[1:], True
        opcode, _, rest = piece.replace("\t", " ").partition(" ")
        made = Instruction(opcode, OPERAND.findall(rest), guard, negated, line, loc, self._scope)
        block = self.blocks[-1]
        if opcode in ENDS:
            block.end = made
            self.blocks.append(Block(len(self.blocks)))
        else:
            block.instructions.append(made)
