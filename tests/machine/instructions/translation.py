"""Instructions to Python functions of (lanes, mask)."""

import re

import numpy as np

from tests.machine.faults import Fault

from . import access, warp
from .forms import FORMS, dtype_of
from .operands import Source, lost_of, note, target_of, vector, widened
from .values import UNSIGNED

KEPT = np.zeros(1, bool)
# Order or hint alone: every access here is seen at once, and races are found from the log.
NOTHING = {"membar.cta", "membar.gl", "membar.sys", "griddepcontrol.launch_dependents"}
NOTHING |= {f"fence.{order}.{scope}" for order in ("acq_rel", "sc") for scope in ("cta", "cluster", "gpu", "sys")}


def translate(kernel, instruction):
    """The instruction's function, which its predicate guards."""
    try:
        step = _unguarded(kernel, instruction)
    except Fault as fault:
        if not fault.report.location:
            raise Fault(fault.report.kind, f"{fault.report.text}: {instruction}", instruction.location) from None
        raise
    if instruction.guard is None:
        return step
    register = kernel.register(instruction.guard, instruction.scope)
    instruction.sources = (*instruction.sources, register)

    def guarded(lanes, mask):
        lanes.require(register, mask, "predicate", instruction)
        on = enabled(lanes, instruction, register, mask)
        if on is None or on.any():
            step(lanes, on)

    return guarded


def enabled(lanes, instruction, register, mask):
    """The lanes of the mask whose predicate lets them through; None for all lanes."""
    on = lanes.values[register]
    on = ~on if instruction.negated else on
    if mask is not None:
        on = on & mask
    if on.all():
        return None
    return np.broadcast_to(on, lanes.count)


def _unguarded(kernel, instruction):
    opcode = instruction.opcode
    if opcode in FORMS:
        return _compute(kernel, instruction, FORMS[opcode])
    if opcode == "griddepcontrol.wait":
        return lambda lanes, mask: lanes.wait_for_predecessor(mask)
    if opcode in NOTHING:
        return lambda lanes, mask: None
    make = TABLE.get(opcode.split(".")[0])
    if make is None:
        raise Fault("unknown", f"instruction {instruction}", instruction.location)
    return make(kernel, instruction)


def _compute(kernel, instruction, form):
    names = instruction.operands
    if len(names) != len(form.sources) + 1:
        raise Fault("unknown", f"{len(names)} operands")
    bits = 1 if form.result == "pred" else 8 * dtype_of(form.result).itemsize
    target = target_of(kernel, instruction, names[0], bits, form.wide)
    sources = [Source(kernel, instruction, *each, form.wide) for each in zip(names[1:], form.sources, strict=True)]
    note(instruction, [target], sources)
    gets, registers = [each.get for each in sources], instruction.sources
    finish = widened(form.result, bits, kernel.bits[target])
    function, rule, unspecified = form.function, form.undefined, form.unspecified
    of = [each.register for each in sources]

    def compute(lanes, mask):
        values, undefined = lanes.values, lanes.undefined
        operands = [get(values) for get in gets]
        lost = lost_of(undefined, registers)
        if lost is not None and rule is not None:
            lost = rule(operands, [KEPT if undefined[each] is None else undefined[each] for each in of])
        if unspecified is not None and (open_ := unspecified(*operands)).any():
            lost = open_ if lost is None else lost | open_
        lanes.put(target, finish(function(*operands)), lost, mask)

    return compute


# ---- moves
def _move(kernel, instruction):
    """mov: a register, a constant, an address, or the parts of a vector."""
    kind = instruction.opcode.removeprefix("mov.")
    if kind != "pred" and not re.fullmatch(r"[busf](16|32|64)", kind) or len(instruction.operands) != 2:
        raise Fault("unknown", "form")
    bits = 1 if kind == "pred" else int(kind[1:])
    targets, sources = (vector(each) for each in instruction.operands)
    if len(targets) > 1:
        return _split(kernel, instruction, targets, bits)
    kinds = [kind if kind == "pred" else f"u{bits // len(sources)}"] * len(sources)
    sources = [Source(kernel, instruction, *each) for each in zip(sources, kinds, strict=True)]
    target = target_of(kernel, instruction, targets[0], bits)
    note(instruction, [target], sources)
    registers, width = instruction.sources, bits // len(sources)

    def move(lanes, mask):
        value = sources[0].get(lanes.values)
        if len(sources) > 1:
            value = value.astype(UNSIGNED[bits])
            for place, each in enumerate(sources[1:], 1):
                value = value | each.get(lanes.values).astype(UNSIGNED[bits]) << UNSIGNED[bits](width * place)
        lanes.put(target, value, lost_of(lanes.undefined, registers), mask)

    return move


def _split(kernel, instruction, targets, bits):
    width = bits // len(targets)
    source = Source(kernel, instruction, instruction.operands[1], f"u{bits}")
    named = [(place, name) for place, name in enumerate(targets) if name != "_"]
    targets = [(place, target_of(kernel, instruction, name, width)) for place, name in named]
    note(instruction, [register for _, register in targets], [source])

    def split(lanes, mask):
        value, lost = source.get(lanes.values), lost_of(lanes.undefined, instruction.sources[:1])
        for place, register in targets:
            part = (value >> UNSIGNED[bits](width * place)).astype(UNSIGNED[width])
            lanes.put(register, part, lost, mask)

    return split


def _parameter(kernel, instruction):
    """ld.param of a whole parameter."""
    found = re.fullmatch(r"ld\.param\.([busf])(8|16|32|64)", instruction.opcode)
    name = instruction.operands[1][1:-1].strip()
    types = {each: int(kind[1:]) for kind, each in kernel.parameters}
    if not found or types.get(name) != int(found[2]):
        raise Fault("unknown", "form, or a part of a parameter")
    bits = types[name]
    target = target_of(kernel, instruction, vector(instruction.operands[0])[0], bits, wide=True)
    finish = widened(found[1], bits, kernel.bits[target])
    instruction.targets = (target,)

    def parameter(lanes, mask):
        lanes.put(target, finish(lanes.launch.arguments[name]), None, mask)

    return parameter


def _load(kernel, instruction):
    if instruction.opcode.startswith("ld.param."):
        return _parameter(kernel, instruction)
    return access.load(kernel, instruction)


def _policy(kernel, instruction):
    """createpolicy: how long a cache keeps lines, of which nothing is seen here."""
    if not instruction.opcode.startswith("createpolicy.fractional.L2::evict_"):
        raise Fault("unknown", "form")
    target = target_of(kernel, instruction, instruction.operands[0], 64)
    instruction.targets = (target,)
    return lambda lanes, mask: lanes.put(target, np.zeros(1, np.uint64), None, mask)


TABLE = {
    "mov": _move,
    "ld": _load,
    "st": access.store,
    "red": access.atomic,
    "atom": access.atomic,
    "cp": access.copy,
    "ldmatrix": access.load_matrix,
    "stmatrix": access.store_matrix,
    "createpolicy": _policy,
    "shfl": warp.shuffle,
    "vote": warp.vote,
    "redux": warp.reduce,
    "bar": warp.barrier,
}
