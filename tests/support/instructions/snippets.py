"""PTX of small kernels, for the tests of tests/machine."""

import numpy as np

from tests import machine

BITS = {"pred": 1, "bf16": 16, "f16": 16, "bf16x2": 32, "f16x2": 32, "e4m3x2": 16, "f32x2": 64}
LETTER = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def bits_of(kind):
    return BITS.get(kind) or int(kind[1:])


def entry(body, parameters=("u64",), threads=32, name="snippet"):
    """A module with one kernel: ``body`` in the registers %p, %rs, %r and %rd, its parameters p0, p1, ..."""
    listed = ",\n".join(f"\t.param .{kind} p{place}" for place, kind in enumerate(parameters))
    registers = "".join(f"\t.reg .{kind} {name}<100>;\n" for kind, name in zip(*REGISTERS, strict=True))
    return (
        ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry {name}(\n{listed}\n)\n.reqntid {threads}\n{{\n{registers}{body}\n\tret;\n}}\n"
    )


REGISTERS = ("pred", "b16", "b32", "b64"), ("%p", "%rs", "%r", "%rd")


def allocation(array, name="memory", **options):
    """What a kernel may touch: the bytes of a numpy array, which has to stay alive."""
    return machine.Allocation(array.ctypes.data, array.nbytes, name, **options)


def run(text, arrays, *more, grid=(1,), shared=0, undefined=None, read_only=(), dependent=False, **options):
    """Execute a kernel whose first parameters are the arrays' addresses; ``undefined`` by number of an array."""
    named = [
        allocation(array, f"p{place}", undefined=(undefined or {}).get(place), writable=place not in read_only)
        for place, array in enumerate(arrays)
    ]
    arguments = [array.ctypes.data for array in arrays] + list(more)
    return machine.execute(machine.Kernel(text, dependent), arguments, grid, shared, named, **options)


def kinds(text, arrays, *more, **options):
    """Kinds of what is reported, a fault last, each once."""
    try:
        reports = run(text, arrays, *more, **options).reports
    except machine.Fault as fault:
        reports = fault.reports
    return list(dict.fromkeys(report.kind for report in reports))


def address_of(place, size, register):
    """PTX that puts the address of item %r99 of parameter ``place`` into a register %rd."""
    return f"ld.param.b64 %rd{register}, [p{place}]; mad.wide.u32 %rd{register}, %r99, {size}, %rd{register}; "


NUMBER = "mov.u32 %r97, %ctaid.x; mov.u32 %r98, %ntid.x; mov.u32 %r99, %tid.x; mad.lo.s32 %r99, %r97, %r98, %r99; "


def instruction_kernel(opcode, result, sources, immediates=(), threads=32):
    """A kernel that loads operands from p1, p2, ..., executes one instruction and stores the result to p0."""
    body, operands = NUMBER, []
    for place, kind in enumerate(sources, 1):
        bits = bits_of(kind)
        size = max(bits, 8)
        register = f"{LETTER[size]}{place}"
        body += address_of(place, size // 8, 50 + place)
        body += f"ld.global.b{size} {register}, [%rd{50 + place}]; "
        if bits == 1:
            body += f"setp.ne.b16 %p{place}, {register}, 0; "
            register = f"%p{place}"
        operands.append(register)
    bits = bits_of(result)
    held = max(bits, 16)
    target = "%p10" if bits == 1 else f"{LETTER[bits]}10"
    body += f"{opcode} {', '.join([target, *operands, *immediates])}; "
    if bits == 1:
        body += "selp.b16 %rs10, 1, 0, %p10; "
    body += address_of(0, held // 8, 50) + f"st.global.b{held} [%rd50], {LETTER[held]}10; "
    return entry(body, ("u64",) * (1 + len(sources)), threads)


def outcome(opcode, result, sources, operands, immediates=()):
    """Bits that an instruction gives for operands' bits, arrays of unsigned integers, one item a thread."""
    count = len(operands[0])
    threads = 256
    padded = -(-count // threads) * threads
    arrays = [np.zeros(padded, f"u{max(bits_of(result), 16) // 8}")]
    for kind, values in zip(sources, operands, strict=True):
        array = np.ones(padded, f"u{max(bits_of(kind), 8) // 8}")
        array[:count] = values
        arrays.append(array)
    text = instruction_kernel(opcode, result, sources, immediates, threads)
    done = run(text, arrays, grid=(padded // threads,), races=False)
    assert not done.reports, done.reports[:3]
    return arrays[0][:count]
