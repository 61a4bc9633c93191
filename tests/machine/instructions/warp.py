"""Instructions of a whole warp: what they compute, and their functions of (lanes, mask)."""

import re

import numpy as np

from tests.machine.faults import Fault

from .operands import Source, note, target_of
from .values import s32, s64, u32


def shuffle_source(mode, lane, operand, control):
    """(lane of the warp that each lane reads from, whether that is in range); out of range lanes read themselves."""
    operand, control = operand.astype(s64) & 31, control.astype(s64)
    segment, clamp = control >> 8 & 31, control & 31
    lane = lane.astype(s64)
    highest = (lane & segment) | (clamp & ~segment & 31)
    if mode == "up":
        source = lane - operand
        inside = source >= highest
    else:
        source = {"down": lane + operand, "bfly": lane ^ operand}.get(mode)
        if mode == "idx":
            source = (lane & segment) | (operand & ~segment & 31)
        inside = source <= highest
    return np.where(inside, source, lane), inside


def vote_of(mode, values):
    """any, all, uni or ballot of booleans, [warps, 32]; an item for each lane."""
    if mode == "ballot":
        found = (values.astype(u32) << np.arange(32, dtype=u32)).sum(1, dtype=u32)
    elif mode == "uni":
        found = values.all(1) | ~values.any(1)
    else:
        found = values.any(1) if mode == "any" else values.all(1)
    return np.repeat(found, 32)


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduction_of(mode, values):
    """Of integers, [warps, 32]; an item for each lane."""
    return np.repeat(REDUCTIONS[mode].reduce(values, axis=1, dtype=values.dtype), 32)


def _member(instruction, text):
    """A shuffle, vote or reduction of the whole warp: its member mask is a constant of 32 ones."""
    if text not in ("-1", "0xffffffff", "0xffffffffU", "4294967295"):
        raise Fault("unknown", f"member mask {text}")


def shuffle(kernel, instruction):
    found = re.fullmatch(r"shfl\.sync\.(idx|up|down|bfly)\.b32", instruction.opcode)
    if not found or len(instruction.operands) != 5:
        raise Fault("unknown", "form")
    _member(instruction, instruction.operands[4])
    names = instruction.operands[0].split("|")
    target = target_of(kernel, instruction, names[0], 32)
    told = target_of(kernel, instruction, names[1], 1) if len(names) > 1 else None
    sources = [Source(kernel, instruction, text, "u32") for text in instruction.operands[1:4]]
    note(instruction, [target] if told is None else [target, told], sources)

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction)
        value, place, control = (each.get(lanes.values) for each in sources)
        for each, what in ((1, "lane"), (2, "bounds")):
            lanes.require(sources[each].register, mask, f"{what} of a shuffle", instruction)
        source, inside = shuffle_source(found[1], lanes.lane, place, control)
        source = source + (np.arange(lanes.count) & ~31)
        lost = lanes.undefined[sources[0].register]
        if lost is not None:
            lost = np.broadcast_to(lost, lanes.count)[source]
        lanes.put(target, np.broadcast_to(value, lanes.count)[source], lost, mask)
        if told is not None:
            lanes.put(told, inside, None, mask)

    return step


def vote(kernel, instruction):
    found = re.fullmatch(r"vote\.sync\.(?:(any|all|uni)\.pred|(ballot)\.b32)", instruction.opcode)
    if not found or len(instruction.operands) != 3:
        raise Fault("unknown", "form")
    _member(instruction, instruction.operands[2])
    negated = instruction.operands[1][0] == "!"
    source = Source(kernel, instruction, instruction.operands[1].lstrip("!"), "pred")
    target = target_of(kernel, instruction, instruction.operands[0], 32 if found[2] else 1)
    note(instruction, [target], [source])

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction)
        value = source.get(lanes.values)
        value = np.broadcast_to(~value if negated else value, lanes.count).reshape(-1, 32)
        lanes.put(target, vote_of(found[1] or found[2], value), _spread(lanes, source.register), mask)

    return step


def _spread(lanes, register):
    """Undefined lanes of a register make their whole warp's result undefined."""
    lost = lanes.undefined[register]
    return lost if lost is None else np.repeat(np.broadcast_to(lost, lanes.count).reshape(-1, 32).any(1), 32)


def reduce(kernel, instruction):
    found = re.fullmatch(r"redux\.sync\.(?:(add|min|max)\.([us]32)|(and|or|xor)\.(b32))", instruction.opcode)
    if not found or len(instruction.operands) != 3:
        raise Fault("unknown", "form")
    source = Source(kernel, instruction, instruction.operands[1], found[2] or "b32")
    member = Source(kernel, instruction, instruction.operands[2], "u32")
    target = target_of(kernel, instruction, instruction.operands[0], 32)
    note(instruction, [target], [source, member])

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction)
        lanes.require(member.register, mask, "member mask", instruction)
        members = member.get(lanes.values)
        if (members[slice(None) if mask is None or len(members) == 1 else mask] != u32(0xFFFFFFFF)).any():
            raise Fault("unknown", "member mask of a part of a warp", instruction.location)
        value = np.broadcast_to(source.get(lanes.values), lanes.count).reshape(-1, 32)
        result = reduction_of(found[1] or found[3], value).view(u32)
        lanes.put(target, result, _spread(lanes, source.register), mask)

    return step


def barrier(kernel, instruction):
    if instruction.opcode != "bar.warp.sync":
        raise Fault("unknown", "form")
    _member(instruction, instruction.operands[0])

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction)
        lanes.warp_epoch = lanes.warp_epoch + (1 if mask is None else mask.astype(s32))

    return step
