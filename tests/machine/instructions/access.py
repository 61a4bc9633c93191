"""Instructions that touch memory: their functions of (lanes, mask)."""

import re

import numpy as np

from tests.machine.faults import Fault

from . import atomics
from .operands import Source, note, target_of, vector, widened
from .values import UNSIGNED, f32, u8, u16, u32

# Behind these every form of a load or store does the same here.
HINTS = re.compile(r"nc|ca|cg|cs|lu|wb|wt|weak|L1::\w+|L2::\w+")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def _form(instruction):
    """(space, vector, type) of a load or store."""
    _, space, *words = instruction.opcode.split(".")
    kind, count = words.pop(), 1
    for word in words:
        if re.fullmatch(r"v[248]", word):
            count = int(word[1:])
        elif not HINTS.fullmatch(word):
            raise Fault("unknown", "form")
    policy = "L2::cache_hint" in words
    known = space in ("global", "shared") and re.fullmatch(r"[busf](8|16|32|64)", kind)
    if not known or len(instruction.operands) != 2 + policy or count * int(kind[1:]) > 256:
        raise Fault("unknown", "form")
    return space, count, kind


def _address(kernel, instruction, text, space):
    """Operand, and a function from registers to its value with the offset added."""
    found = ADDRESS.fullmatch(text)
    if not found:
        raise Fault("unknown", f"address {text}")
    bits = 64 if space == "global" else 32
    source = Source(kernel, instruction, found[1], f"u{bits}")
    offset = int(found[2] or "0", 0) & (1 << bits) - 1
    if not offset:
        return source, source.get
    step = UNSIGNED[bits](offset)
    return source, lambda values: source.get(values) + step


def _load_items(lanes, space, at, size, index, where):
    """(items, their undefined bytes or None) from either memory, counted."""
    if lanes.counters is not None:
        lanes.counters.access(lanes, space, "load", at, size, index)
    memory = lanes.memory if space == "global" else lanes.shared
    return memory.load(at, size, lanes, index, where)


def load(kernel, instruction):
    space, count, kind = _form(instruction)
    bits, names = int(kind[1:]), vector(instruction.operands[0])
    if len(names) != count:
        raise Fault("unknown", "form")
    targets = [None if name == "_" else target_of(kernel, instruction, name, bits, wide=True) for name in names]
    source, address = _address(kernel, instruction, instruction.operands[1], space)
    note(instruction, [each for each in targets if each is not None], [source])
    finish = [None if each is None else widened(kind, bits, kernel.bits[each]) for each in targets]
    size, what = count * bits // 8, f"address of a load from {space} memory"

    def step(lanes, mask):
        lanes.require(source.register, mask, what, instruction)
        index = lanes.numbers(mask)
        at = lanes.pick(address(lanes.values), index)
        items, lost = _load_items(lanes, space, at, size, index, instruction)
        words = items.view(UNSIGNED[bits]).reshape(-1, count)
        if lost is not None:
            lost = lost.reshape(-1, count, bits // 8).any(2)
        for place, target in enumerate(targets):
            if target is not None:
                mark = None if lost is None or not lost[:, place].any() else lost[:, place]
                lanes.fill(target, finish[place](np.ascontiguousarray(words[:, place])), mark, index)

    return step


def store(kernel, instruction):
    space, count, kind = _form(instruction)
    bits, names = int(kind[1:]), vector(instruction.operands[1])
    if len(names) != count:
        raise Fault("unknown", "form")
    sources = [Source(kernel, instruction, name, f"u{bits}", wide=True) for name in names]
    target, address = _address(kernel, instruction, instruction.operands[0], space)
    note(instruction, [], [target, *sources])
    what = f"address of a store to {space} memory"

    def step(lanes, mask):
        lanes.require(target.register, mask, what, instruction)
        index = lanes.numbers(mask)
        at = lanes.pick(address(lanes.values), index)
        data = np.empty((len(at), count), UNSIGNED[bits])
        for place, source in enumerate(sources):
            data[:, place] = lanes.pick(source.get(lanes.values), index)
        data = data.view(u8)
        if lanes.counters is not None:
            lanes.counters.access(lanes, space, "store", at, data.shape[1], index)
        if space == "global":
            for source in sources:
                lanes.require(source.register, mask, "value stored to global memory", instruction)
            lanes.memory.store(at, data, lanes, index, instruction)
        else:
            lanes.shared.store(at, data, _lost_bytes(lanes, sources, index, bits // 8), lanes, index, instruction)

    return step


def _lost_bytes(lanes, sources, index, size):
    """Which bytes of the sources side by side are undefined, or None."""
    marks = [lanes.undefined[source.register] for source in sources]
    if all(mark is None for mark in marks):
        return None
    columns = [lanes.pick(np.zeros(1, bool) if mark is None else mark, index) for mark in marks]
    return np.repeat(np.stack(columns, 1), size, axis=1)


# ---- cp.async
def copy(kernel, instruction):
    """cp.async: copies from global to shared memory, their groups, and waits for these."""
    if instruction.opcode == "cp.async.commit_group":

        def commit(lanes, mask):
            lanes.groups = lanes.groups + (1 if mask is None else mask.astype(np.int32))

        return commit
    if instruction.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        keep = int(instruction.operands[0], 0) if instruction.opcode.endswith("group") else None
        return lambda lanes, mask: lanes.shared.wait(keep, lanes, lanes.numbers(mask))
    found = re.fullmatch(r"cp\.async\.(?:cg|ca)\.shared\.global(?:\.L2::\w+)?", instruction.opcode)
    if not found or len(instruction.operands) not in (3, 4) or "cache_hint" in instruction.opcode:
        raise Fault("unknown", "form")
    size = int(instruction.operands[2], 0)
    into, offset = _address(kernel, instruction, instruction.operands[0], "shared")
    source, address = _address(kernel, instruction, instruction.operands[1], "global")
    length = Source(kernel, instruction, instruction.operands[-1], "u32")  # of what is copied; the rest is zeros
    note(instruction, [], [into, source, length])
    if size not in (4, 8, 16) or (size < 16 and ".cg" in instruction.opcode):
        raise Fault("unknown", "size")

    def step(lanes, mask):
        for each in (into, source, length):
            lanes.require(each.register, mask, "operand of cp.async", instruction)
        index = lanes.numbers(mask)
        at, offsets = (lanes.pick(get(lanes.values), index) for get in (address, offset))
        lengths = lanes.pick(length.get(lanes.values), index)
        if ((lengths != 0) & (lengths != size)).any():
            raise Fault("unknown", f"cp.async of a part of its {size} bytes", instruction.location)
        data, lost, live = np.zeros((len(at), size), u8), None, np.flatnonzero(lengths)
        if len(live):
            chosen = live if index is None else index[live]
            items, bad = _load_items(lanes, "global", at[live], size, chosen, instruction)
            if bad is not None:
                lost = np.zeros(data.shape, bool)
                lost[live] = bad
            data[live] = items.view(u8).reshape(-1, size)
        if lanes.counters is not None:
            lanes.counters.access(lanes, "shared", "copy", offsets, size, index)
        lanes.shared.copy(offsets, data, lost, lanes, index, instruction)

    return step


# ---- matrices
def _matrix_form(instruction, name):
    """(number of matrices, transposed)."""
    found = re.fullmatch(name + r"\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode)
    if not found or len(instruction.operands) != 2:
        raise Fault("unknown", "form")
    return int(found[1]), bool(found[2])


def _rows(lanes, address, source, matrix, mask, index, where):
    """Numbers of the lanes that address the rows of a matrix, eight of each warp, and the rows' offsets."""
    chosen = np.arange(lanes.count) if index is None else index
    chosen = chosen.reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)
    here = np.zeros(lanes.count, bool)
    here[chosen] = True
    lanes.require(source.register, here, f"address for {where.opcode}", where)
    return chosen, lanes.pick(address(lanes.values), chosen)


def _matrix(items, transposed):
    """Matrices of 8 x 8, transposed or not, with their items side by side."""
    return np.ascontiguousarray(items.swapaxes(1, 2)) if transposed else items


def load_matrix(kernel, instruction):
    count, transposed = _matrix_form(instruction, "ldmatrix")
    targets = [target_of(kernel, instruction, name, 32) for name in vector(instruction.operands[0])]
    source, address = _address(kernel, instruction, instruction.operands[1], "shared")
    note(instruction, targets, [source])
    if len(targets) != count:
        raise Fault("unknown", "form")

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction, needed=True)
        index, filled = lanes.numbers(mask), []
        for matrix in range(count):
            chosen, at = _rows(lanes, address, source, matrix, mask, index, instruction)
            items, lost = _load_items(lanes, "shared", at, 16, chosen, instruction)
            if lost is not None:
                lost = _matrix(lost.reshape(-1, 8, 8, 2).any(3), transposed).reshape(-1, 2).any(1)
            halves = _matrix(items.view(u16).reshape(-1, 8, 8), transposed)
            filled.append((halves.view(u32).reshape(-1), lost))
        for target, (words, lost) in zip(targets, filled, strict=True):
            lanes.fill(target, words, lost, index)

    return step


def store_matrix(kernel, instruction):
    count, transposed = _matrix_form(instruction, "stmatrix")
    sources = [Source(kernel, instruction, name, "u32") for name in vector(instruction.operands[1])]
    target, address = _address(kernel, instruction, instruction.operands[0], "shared")
    note(instruction, [], [target, *sources])
    if len(sources) != count:
        raise Fault("unknown", "form")

    def step(lanes, mask):
        lanes.whole_warps(mask, instruction, needed=True)
        index = lanes.numbers(mask)
        for matrix, value in enumerate(sources):
            chosen, at = _rows(lanes, address, target, matrix, mask, index, instruction)
            words = np.ascontiguousarray(lanes.pick(value.get(lanes.values), index))
            lost = _lost_bytes(lanes, [value], index, 4)
            halves = _matrix(words.view(u16).reshape(-1, 8, 8), transposed)
            if lost is not None:
                lost = _matrix(lost.reshape(-1, 8, 8, 2), transposed).reshape(-1, 16)
            if lanes.counters is not None:
                lanes.counters.access(lanes, "shared", "store", at, 16, chosen)
            lanes.shared.store(at, halves.view(u8).reshape(-1, 16), lost, lanes, chosen, instruction)

    return step


# ---- atomics
ATOMIC = re.compile(r"(?P<name>red|atom)\.(?P<space>global|shared)\.(?P<words>(?:\w+\.)*)(?P<kind>[busf]\d+)")
SCOPES = {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"}


def atomic(kernel, instruction):
    """atom and red, in the order of the lanes; the former gives what it found."""
    found = ATOMIC.fullmatch(instruction.opcode)
    words = [word for word in found["words"].split(".") if word and word not in SCOPES] if found else []
    if len(words) != 1 or found["kind"] not in atomics.TYPES.get(words[0], ()):
        raise Fault("unknown", "form")
    operation, kind, returns = words[0], found["kind"], found["name"] == "atom"
    names, bits, space = list(instruction.operands), int(kind[1:]), found["space"]
    if len(names) != 2 + returns + (operation == "cas") or (operation in ("exch", "cas") and not returns):
        raise Fault("unknown", "form")
    target = names.pop(0) if returns else "_"
    target = None if target == "_" else target_of(kernel, instruction, vector(target)[0], bits)
    place, address = _address(kernel, instruction, names[0], space)
    sources = [Source(kernel, instruction, name, kind) for name in names[1:]]
    note(instruction, [] if target is None else [target], [place, *sources])
    dtype, size = np.dtype(f32 if kind == "f32" else f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"), bits // 8

    def step(lanes, mask):
        for each, what in ((place, "address"), *((each, "operand") for each in sources)):
            lanes.require(each.register, mask, f"{what} of an atomic", instruction)
        index = lanes.numbers(mask)
        at = lanes.pick(address(lanes.values), index)
        operands = [lanes.pick(each.get(lanes.values), index) for each in sources]
        if lanes.counters is not None:
            lanes.counters.access(lanes, space, "atomic", at, size, index)
        old = np.empty(len(at), dtype)
        memory = lanes.memory if space == "global" else lanes.shared
        for items, chosen, numbers in memory.atomic(at, size, lanes, index, instruction):
            part = operands if chosen is None else [each[chosen] for each in operands]
            old[slice(None) if chosen is None else chosen] = atomics.apply(operation, items.view(dtype), numbers, part)
        if target is not None:
            lanes.fill(target, old.view(UNSIGNED[bits]), None, index)

    return step
