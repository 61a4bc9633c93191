"""Operands of an instruction: texts to numbers of registers, and to functions that read them."""

import re

from tests.machine.faults import Fault

from .forms import dtype_of
from .values import SIGNED, UNSIGNED

SPECIALS = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
HEXADECIMAL = ("0f", "0F", "0d", "0D")  # how constants of floating point begin


class Source:
    """An operand that is read: ``register`` number; ``get(values)`` gives it in the type that was asked for."""

    def __init__(self, kernel, instruction, text, kind, wide=False):
        bits = 8 * dtype_of(kind).itemsize if kind != "pred" else 1
        if kind[0] == "f" and text[0] in "-0123456789" and text[:2] not in HEXADECIMAL:
            raise Fault("unknown", f"integer {text} as {kind}")
        self.register = number_of(kernel, instruction, text, bits)
        held, number, view = kernel.bits[self.register], self.register, dtype_of(kind)
        self.variable = kernel.variable(number)
        if held == bits:
            if view == (bool if bits == 1 else UNSIGNED[bits]):
                self.get = lambda values: values[number]
            else:
                self.get = lambda values: values[number].view(view)
        elif held > bits and wide:
            self.get = lambda values: values[number].astype(UNSIGNED[bits]).view(view)
        else:
            raise Fault("unknown", f"{text} has {held} bits, {bits} are needed")


def number_of(kernel, instruction, text, bits):
    if text[0] == "%" and text[1] in "tnclw" and SPECIALS.fullmatch(text):
        return kernel.special(text)
    if text[0] in "-0123456789":
        if text[:2] in HEXADECIMAL:
            if bits != (32 if text[1] in "fF" else 64):
                raise Fault("unknown", f"constant {text} of {bits} bits")
            return kernel.constant(int(text[2:], 16), bits)
        number = int(text.rstrip("U"), 0)
        return kernel.constant(number if bits > 1 else number != 0, bits)
    if text in kernel.program.shared_symbols:
        return kernel.constant(0, bits)
    return kernel.register(text, instruction.scope)


def target_of(kernel, instruction, text, bits, wide=False):
    """Number of a register that is written; ``wide`` allows one of more bits."""
    register = kernel.register(text, instruction.scope)
    held = kernel.bits[register]
    if held != bits and not (wide and held > bits):
        raise Fault("unknown", f"{text} has {held} bits, the result has {bits}")
    return register


def widened(kind, bits, held):
    """A function from arrays of a type to what a register of ``held`` bits keeps of them."""
    if bits == held:
        return lambda array: array if array.dtype == bool else array.view(UNSIGNED[bits])
    if kind[0] == "s":
        return lambda array: array.view(SIGNED[bits]).astype(SIGNED[held]).view(UNSIGNED[held])
    return lambda array: array.view(UNSIGNED[bits]).astype(UNSIGNED[held])


def vector(text):
    """Operands of a vector, or the one."""
    return [each.strip() for each in text[1:-1].split(",")] if text[0] == "{" else [text]


def note(instruction, targets, sources):
    """For the counters: registers that depend on each other."""
    instruction.targets = tuple(targets)
    instruction.sources = tuple(dict.fromkeys(each.register for each in sources if each.variable))


def lost_of(undefined, registers):
    lost = None
    for each in registers:
        mark = undefined[each]
        if mark is not None:
            lost = mark if lost is None else lost | mark
    return lost
