"""A kernel: PTX parsed once, each block translated when it is first executed."""

import numpy as np

from .instructions import translation
from .parsing import flow, ptx


class Kernel:
    """``name``, ``threads`` of a CTA, ``parameters`` [(type without its dot, name)], ``instructions`` in their order.

    A ``dependent`` one is launched before the kernel ahead of it has ended: until a thread has waited, it may neither
    touch global memory nor end. ``program.blocks`` are the blocks, whose numbers the counters speak of.
    """

    def __init__(self, text, dependent=False):
        self.text, self.dependent = text, dependent
        self.program = ptx.Program(text)
        self.name, self.threads, self.parameters = self.program.name, self.program.threads, self.program.parameters
        self.instructions, self.opcodes = self.program.instructions, self.program.opcodes
        self.ranks = np.array(flow.ranks(self.program))
        # Of each register number what it holds at first: bits of what nobody has written, a special's name, a constant.
        self.initial = []
        self.bits = []
        self._registers, self._constants, self._seen = {}, {}, {}
        self._steps = [None] * len(self.program.blocks)

    def steps(self, block):
        """Functions of (lanes, mask), one for each instruction of the block but its end."""
        if self._steps[block] is None:
            held = self.program.blocks[block]
            self._steps[block] = [translation.translate(self, each) for each in held.instructions]
            if held.end is not None and held.end.guard is not None:
                self.register(held.end.guard, held.end.scope)
        return self._steps[block]

    def register(self, name, scope=0):
        """Number of a register."""
        number = self._seen.get((name, scope))
        if number is None:
            key = self.program.declared(name, scope)
            if key not in self._registers:
                self._registers[key] = self._add(key[2], key[2])
            number = self._seen[name, scope] = self._registers[key]
        return number

    def constant(self, number, bits):
        """Number of a register that holds a constant for good, cut to its bits."""
        key = (number & (1 << bits) - 1, bits)
        if key not in self._constants:
            array = np.array([key[0]], bool if bits == 1 else f"u{bits // 8}")
            self._constants[key] = self._add(array, bits)
        return self._constants[key]

    def special(self, name):
        """Number of a register that holds a special register of 32 bits."""
        if name not in self._constants:
            self._constants[name] = self._add(name, 32)
        return self._constants[name]

    def variable(self, number):
        """Whether a register is one of the kernel's own, rather than a constant."""
        return isinstance(self.initial[number], int)

    def _add(self, initial, bits):
        self.initial.append(initial)
        self.bits.append(bits)
        return len(self.bits) - 1
