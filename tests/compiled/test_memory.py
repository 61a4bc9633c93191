"""The executor's memory instructions: every width and vector, shared memory, copies, matrices, atomics."""

import numpy as np
import pytest

from tests import machine
from tests.machine.instructions import access, atomics, translation
from tests.support.instructions.snippets import LETTER, NUMBER, address_of, entry, kinds, run

FRESH = np.random.default_rng(0)


def random_bytes(size):
    """At an address that is a multiple of 32."""
    raw = np.zeros(size + 32, np.uint8)
    start = -raw.ctypes.data % 32
    raw[start : start + size] = FRESH.integers(1, 256, size)
    return raw[start : start + size]


def named(bits, count):
    """Text of a vector operand, of registers that no address is in."""
    names = [f"{LETTER[bits]}{10 + place}" for place in range(count)]
    return names[0] if count == 1 else f"{{ {', '.join(names)} }}"


@pytest.mark.parametrize(
    ("space", "hint"),
    [("global", ""), ("global", "L1::evict_last."), ("global", "nc."), ("global", "cg."), ("shared", "")],
)
@pytest.mark.parametrize(
    ("bits", "count"), [(8, 1), (8, 4), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (32, 8), (64, 1), (64, 2), (64, 4)]
)
def test_widths_and_vectors(space, hint, bits, count):
    """Each thread's item goes through memory and back unchanged; offsets in the address count."""
    size, vector = bits * count // 8, f"v{count}." if count > 1 else ""
    stored = "" if hint in ("nc.", "cg.") else hint
    body = NUMBER + address_of(0, size, 50) + address_of(1, size, 51)
    body += f"ld.global.{hint}{vector}b{bits} {named(bits, count)}, [ %rd51 + {size} ]; "
    if space == "shared":
        body += f"mad.lo.s32 %r50, %r99, {size}, {size}; add.s32 %r50, %r50, global_smem; "
        body += f"st.shared.{vector}b{bits} [%r50+-{size}], {named(bits, count)}; bar.sync 0; "
        body += f"ld.shared.{vector}b{bits} {named(bits, count)}, [ %r50 + {-size} ]; "
    body += f"st.global.{stored}{vector}b{bits} [ %rd50 + 0 ], {named(bits, count)}; "
    arrays = [random_bytes(64 * size), random_bytes(65 * size)]
    assert not run(entry(body, ("u64", "u64"), 64), arrays, shared=65 * size).reports
    assert (arrays[0] == arrays[1][size:]).all()


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "b8", "s32"])
def test_narrow_loads_widen_by_their_type(kind):
    bits = int(kind[1:])
    body = NUMBER + address_of(0, 8, 50) + address_of(1, bits // 8, 51)
    body += f"ld.global.{kind} %rd10, [%rd51]; st.global.b64 [%rd50], %rd10; "
    source = (
        FRESH.integers(0, 256, 32 * bits // 8).astype(np.uint8).view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    )
    out = np.zeros(32, np.int64)
    assert not run(entry(body, ("u64", "u64")), [out, source]).reports
    assert (out == source).all()


def test_lanes_that_are_off_keep_what_they_have():
    """Loads and stores under a predicate, and a vector of which a part is thrown away."""
    body = NUMBER + address_of(0, 4, 50) + address_of(1, 16, 51)
    body += "setp.lt.u32 %p1, %r99, 5; mov.b32 %r12, 7; "
    body += "@%p1 ld.global.v4.b32 { _, _, %r12, _ }, [%rd51]; @!%p1 st.global.b32 [%rd50], %r12; "
    body += "@%p1 st.global.b32 [%rd50], %r12; "
    source, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    assert not run(entry(body, ("u64", "u64")), [out, source[:20]]).reports  # not one byte more is there
    assert out.tolist() == [2, 6, 10, 14, 18] + [7] * 27


def test_parameters():
    """By their types: bits of floats, negative numbers, and narrow ones extended."""
    body = "ld.param.b64 %rd50, [p0]; ld.param.b32 %r1, [p1]; ld.param.b32 %r2, [p2]; ld.param.s32 %rd1, [p2]; "
    body += "ld.param.u8 %rs1, [p3]; ld.param.b64 %rd2, [p4]; cvt.u32.u16 %r3, %rs1; "
    body += "st.global.b32 [%rd50], %r1; st.global.b32 [%rd50+4], %r2; st.global.b64 [%rd50+8], %rd1; "
    body += "st.global.b32 [%rd50+16], %r3; st.global.b64 [%rd50+24], %rd2; "
    out = np.zeros(32, np.uint8)
    text = entry(body, ("u64", "f32", "u32", "u8", "f64"))
    run(text, [out], 1.5, -2, 300, 0.1)
    assert out[:4].view(np.float32)[0] == 1.5 and out[4:8].view(np.int32)[0] == -2
    assert out[8:16].view(np.int64)[0] == -2 and out[16:20].view(np.int32)[0] == 300 % 256
    assert out[24:].view(np.float64)[0] == 0.1
    with pytest.raises(TypeError, match="u32 got 2.5"):
        run(text, [out], 1.5, 2.5, 1, 0.1)
    with pytest.raises(ValueError, match="5 parameters"):
        run(text, [out], 1.5)


def test_special_registers():
    names = ["tid.x", "tid.y", "ctaid.x", "ctaid.y", "ctaid.z", "ntid.x", "ntid.y", "nctaid.x", "nctaid.y", "nctaid.z"]
    names += ["laneid", "warpid"]
    body = "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; "
    body += "mad.lo.s32 %r3, %r4, 2, %r3; mad.lo.s32 %r2, %r3, 3, %r2; mad.lo.s32 %r1, %r2, 64, %r1; "
    body += f"ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd1, %r1, {4 * len(names)}, %rd1; "
    for place, name in enumerate(names):
        body += f"mov.u32 %r5, %{name}; st.global.b32 [%rd1+{4 * place}], %r5; "
    out = np.zeros((2, 2, 3, 64, len(names)), np.uint32)
    run(entry(body, threads=64), [out], grid=(3, 2, 2))
    found = dict(zip(names, np.moveaxis(out, -1, 0), strict=True))
    thread = np.arange(64)
    assert (found["tid.x"] == thread).all() and (found["laneid"] == thread % 32).all()
    assert (found["warpid"] == thread // 32).all() and (found["ntid.x"] == 64).all() and (found["ntid.y"] == 1).all()
    assert (found["ctaid.x"] == np.arange(3)[:, None]).all() and (found["tid.y"] == 0).all()
    assert (found["ctaid.y"] == np.arange(2)[:, None, None]).all()
    assert (found["ctaid.z"] == np.arange(2)[:, None, None, None]).all()
    assert [int(found[f"nctaid.{axis}"].max()) for axis in "xyz"] == [3, 2, 2]


def test_moves_of_vectors():
    """Halves of a register are taken apart and put together, all read before any is written."""
    body = NUMBER + address_of(0, 8, 50) + address_of(1, 8, 51) + "ld.global.b64 %rd1, [%rd51]; "
    body += "mov.b64 {%r1, %r2}, %rd1; mov.b32 {%rs1, %rs2}, %r1; mov.b32 {_, %rs3}, %r2; "
    body += "mov.b32 %r1, {%rs2, %rs3}; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1}; "
    body += "mov.b64 %rd1, {%r2, %r1}; st.global.b64 [%rd50], %rd1; "
    source, out = FRESH.integers(0, 2**16, (32, 4)).astype(np.uint16), np.zeros((32, 4), np.uint16)
    run(entry(body, ("u64", "u64")), [out, source])
    assert (out == source[:, [3, 1, 1, 3]]).all()


# ---- cp.async
COPY = (
    NUMBER
    + address_of(0, 16, 50)
    + address_of(1, 16, 51)
    + (
        "shl.b32 %r50, %r99, 4; setp.lt.u32 %p1, %r99, 20; selp.b32 %r51, 16, 0, %p1; "
        "cp.async.cg.shared.global [ %r50 + 0 ], [ %rd51 + 0 ], 0x10, %r51; cp.async.commit_group; "
        "cp.async.ca.shared.global [%r50+512], [%rd51], 4; cp.async.commit_group; "
        "cp.async.wait_group {wait}; bar.warp.sync -1; xor.b32 %r50, %r50, 16; "
        "ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r50]; st.global.v4.b32 [%rd50], {{%r1, %r2, %r3, %r4}}; "
    )
)


@pytest.mark.parametrize("wait", ["1", "0"])
def test_copies(wait):
    """Copied bytes are there behind the wait for their group; a length of 0 fills with zeros."""
    arrays = [np.zeros((32, 4), np.uint32), FRESH.integers(0, 2**32, (32, 4)).astype(np.uint32)]
    assert not run(entry(COPY.format(wait=wait), ("u64", "u64")), arrays, shared=1024).reports
    wanted = np.where(np.arange(32)[:, None] < 20, arrays[1], 0)
    assert (arrays[0] == wanted[np.arange(32) ^ 1]).all()


def test_a_copy_without_its_wait_is_reported():
    arrays = [np.zeros((32, 4), np.uint32), np.ones((32, 4), np.uint32)]
    assert kinds(entry(COPY.format(wait="2"), ("u64", "u64")), arrays, shared=1024) == ["undefined"]
    waited_for_all = COPY.replace("wait_group {wait}", "wait_all").format()
    assert kinds(entry(waited_for_all, ("u64", "u64")), arrays, shared=1024) == []
    partly = COPY.replace("selp.b32 %r51, 16", "selp.b32 %r51, 8").format(wait="0")
    with pytest.raises(machine.Fault, match="a part of its 16 bytes"):
        run(entry(partly, ("u64", "u64")), arrays, shared=1024)


# ---- matrices
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count, transposed):
    """ldmatrix and stmatrix against the manual: thread t holds two items of row t / 4 from column 2 (t % 4)."""
    trans, registers = ".trans" if transposed else "", ", ".join(f"%r{each}" for each in range(1, count + 1))
    load = NUMBER + address_of(0, 4 * count, 50) + address_of(1, 16, 51) + "shl.b32 %r50, %r99, 4; "
    load += "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd51]; st.shared.v4.b32 [%r50], {%r1, %r2, %r3, %r4}; "
    load += f"bar.sync 0; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r50]; "
    store = load + f"bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r50], {{{registers}}}; "
    store += "bar.sync 0; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r50]; "
    load += "".join(f"st.global.b32 [%rd50+{4 * each}], %r{each + 1}; " for each in range(count))
    source = FRESH.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((32, count, 2), np.uint16)
    assert not run(entry(load, ("u64", "u64")), [out, source], shared=512).reports
    for thread in range(32):
        for matrix in range(count):
            row, column = thread // 4, 2 * (thread % 4)
            whole = source[matrix].T if transposed else source[matrix]
            assert out[thread, matrix].tolist() == whole[row, column : column + 2].tolist()
    back = np.zeros((32, 8), np.uint16)
    store = store.replace(f"%r99, {4 * count}, %rd50", "%r99, 16, %rd50")
    store += "st.global.v4.b32 [%rd50], {%r1, %r2, %r3, %r4}; "
    assert not run(entry(store, ("u64", "u64")), [back, source], shared=512).reports
    assert (back.reshape(4, 8, 8) == source).all()


# ---- atomics
EXACT = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "inc": lambda old, new: 0 if old >= new else old + 1,
    "dec": lambda old, new: new if old == 0 or old > new else old - 1,
}
ATOMICS = [(operation, kind) for operation, known in atomics.TYPES.items() for kind in known]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("operation", "kind"), ATOMICS)
def test_atomics(operation, kind, space):
    """Eight threads to a place, in order, with what each found there."""
    bits, size = int(kind[1:]), int(kind[1:]) // 8
    dtype = np.dtype(np.float32 if kind == "f32" else f"{'i' if kind[0] == 's' else 'u'}{size}")
    letter = LETTER[bits]
    body = NUMBER + address_of(0, size, 50) + address_of(2, size, 52) + "and.b32 %r99, %r99, 3; "
    body += address_of(1, size, 51) + f"ld.global.b{bits} {letter}2, [%rd52]; "
    place, values = "%rd51", f"{letter}2"
    if space == "shared":
        body += f"mul.lo.s32 %r51, %r99, {size}; ld.global.b{bits} {letter}3, [%rd51]; "
        body += f"st.shared.b{bits} [%r51], {letter}3; bar.sync 0; "
        place = "%r51"
    if operation == "cas":
        body += f"mov.b{bits} {letter}4, 3; "
        values = f"{letter}4, {letter}2"
    scope = "gpu.acq_rel." if space == "global" else ""
    body += f"atom.{space}.{scope}{operation}.{kind} {letter}1, [ {place} + 0 ], {values}; "
    body += f"st.global.b{bits} [%rd50], {letter}1; "
    start = np.array([3, 0, 3, 7]).astype(dtype)
    if dtype.kind != "f":
        start[1] = np.iinfo(dtype).max
    given = FRESH.integers(0, 2**bits, 32, np.uint64, False).astype(f"u{size}").view(dtype)
    if operation in ("inc", "dec"):
        given = given % dtype.type(5)
    if kind == "f32":
        given = FRESH.standard_normal(32).astype(np.float32)
    places, found = start.copy(), np.zeros(32, dtype)
    assert not run(entry(body, ("u64",) * 3), [found, places, given], shared=64).reports
    old = start.tolist()
    for lane in range(32):
        assert found[lane] == np.array(old[lane % 4]).astype(dtype)
        if operation == "cas":
            old[lane % 4] = int(given[lane]) if old[lane % 4] == 3 else old[lane % 4]
        elif kind == "f32":
            old[lane % 4] = np.float32(old[lane % 4]) + given[lane]
        else:
            new = EXACT[operation](old[lane % 4], int(given[lane])) % (1 << bits)
            old[lane % 4] = new - (1 << bits) if dtype.kind == "i" and new >> bits - 1 else new
    if space == "global":
        assert places.tolist() == [np.array(each).astype(dtype) for each in old]


def test_atomics_of_many_programs():
    """red of all threads of all CTAs: none is lost. The value that atom gives makes every thread's number another."""
    body = NUMBER + address_of(1, 4, 51) + "ld.param.b64 %rd50, [p0]; mov.b32 %r1, 1; "
    body += "red.global.gpu.relaxed.add.u32 [ %rd50 + 0 ], %r1; "
    body += "atom.global.gpu.relaxed.add.u32 %r2, [ %rd50 + 4 ], %r1; st.global.b32 [%rd51], %r2; "
    counters, numbers = np.zeros(2, np.uint32), np.zeros(640, np.uint32)
    assert not run(entry(body, ("u64", "u64"), 64), [counters, numbers], grid=(10,)).reports
    assert counters.tolist() == [640, 640] and sorted(numbers.tolist()) == list(range(640))


@pytest.mark.parametrize(
    "line",
    [
        "ld.global.volatile.b32 %r1, [%rd1]",
        "ld.global.v3.b32 {%r1, %r2, %r3}, [%rd1]",
        "ld.local.b32 %r1, [%rd1]",
        "ld.global.v2.b32 {%r1}, [%rd1]",
        "st.global.v8.b64 [%rd1], {%rd1, %rd2, %rd3, %rd4, %rd5, %rd6, %rd7, %rd8}",
        "atom.global.add.s64 %rd2, [%rd1], %rd3",
        "red.global.add.noftz.f16x2 [%rd1], %r1",
        "cp.async.cg.shared.global [%r1], [%rd1], 8",
        "cp.async.bulk.wait_group 0",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r4]",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r4]",
        "ld.param.b32 %r1, [p0]",
        "ld.global.b32 %r1, [%rd1, 4]",
        "mov.b128 %rd1, %rd2",
        "mov.b32 %r1, other_symbol",
        "createpolicy.range.L2::evict_last.b64 %rd1, [%rd2], 1, 2",
    ],
)
def test_a_form_that_is_not_known_is_named(line):
    with pytest.raises(machine.Fault, match=line.split(" ")[0].replace(".", r"\.")) as caught:
        run(entry(f"{line}; "), [np.zeros(4, np.uint32)])
    assert caught.value.report.kind == "unknown"


@pytest.mark.parametrize("opcode", sorted(translation.NOTHING))
def test_instructions_that_only_order_or_hint(opcode):
    body = NUMBER + address_of(0, 4, 50) + f"{opcode}; createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0; "
    body += "st.global.L1::evict_first.L2::cache_hint.b32 [%rd50], %r99, %rd9; "
    out = np.zeros(32, np.uint32)
    assert not run(entry(body), [out]).reports and out.tolist() == list(range(32))


def test_every_instruction_is_in_one_of_the_tests():
    """Those that are not arithmetic, by the first part of their names."""
    here = {"mov", "ld", "st", "red", "atom", "cp", "ldmatrix", "stmatrix", "createpolicy"}
    of_warps = {"shfl", "vote", "redux", "bar"}  # tests/compiled/test_control.py
    assert set(translation.TABLE) == here | of_warps


def test_every_memory_instruction_has_a_test():
    """The table of the module that makes them, so that a new one is not forgotten here."""
    makers = {name for name in vars(access) if not name.startswith("_") and callable(getattr(access, name))}
    makers &= {name for name, value in vars(access).items() if getattr(value, "__module__", "") == access.__name__}
    assert makers == {"load", "store", "copy", "load_matrix", "store_matrix", "atomic"}
