"""What the executor counts, on kernels whose counts follow from their text."""

import numpy as np
import pytest

from tests import machine
from tests.machine.counting.counters import wavefronts
from tests.support.instructions.snippets import NUMBER, address_of, entry, run

LOAD = address_of(1, 4, 51) + "ld.global.b32 %r1, [%rd51]; "
AGAIN = (
    "ld.param.b64 %rd52, [p1]; mul.wide.u32 %rd53, %r1, 4; add.s64 %rd52, %rd52, %rd53; ld.global.b32 %r1, [%rd52]; "
)
BRANCH = "setp.gt.s32 %p1, %r1, 5; @%p1 bra L; add.s32 %r1, %r1, 1; L: "
SHARED = "shl.b32 %r2, %r99, 2; st.shared.b32 [%r2], %r1; ld.shared.b32 %r1, [%r2]; "
STORE = address_of(0, 4, 50) + "st.global.b32 [%rd50], %r1; "


def aligned(count, dtype=np.uint32):
    raw = np.zeros(count * 4 + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + count * 4].view(dtype)


def count(body, threads=32, items=None, grid=(1,), shared=0, parameters=("u64", "u64")):
    counters, text = machine.Counters(), entry(body.replace("; ", ";\n"), parameters, threads)
    arrays = [aligned(4096), aligned(4096)]
    arrays[1][:] = np.arange(4096) % 64 if items is None else items
    kernel = machine.Kernel(text)
    given = [machine.Allocation(each.ctypes.data, each.nbytes, "memory") for each in arrays]
    found = machine.execute(kernel, [each.ctypes.data for each in arrays], grid, shared, given, counters=counters)
    assert not found.reports
    return kernel, counters


@pytest.mark.parametrize(
    ("body", "chain"),
    [
        (NUMBER + "mov.b32 %r1, 1; " + STORE, 0),
        (NUMBER + LOAD + STORE, 1),
        (NUMBER + LOAD + LOAD + STORE, 1),  # side by side
        (NUMBER + LOAD + AGAIN + STORE, 2),
        (NUMBER + LOAD + AGAIN + AGAIN + STORE, 3),
        (NUMBER + LOAD + STORE + AGAIN, 1),  # behind the store
        (NUMBER + LOAD + "setp.gt.s32 %p1, %r1, 5; @%p1 mov.b32 %r1, 2; " + STORE, 1),
        (NUMBER + LOAD + BRANCH + LOAD + STORE, 2),  # a branch on it
        (NUMBER + LOAD + "shfl.sync.bfly.b32 %r1, %r1, 4, 31, -1; " + AGAIN + STORE, 2),
        (NUMBER + LOAD + SHARED + AGAIN + STORE, 2),
        (NUMBER + LOAD + "xor.b32 %r1, %r1, %r1; mov.b32 %r1, 3; " + AGAIN + STORE, 1),  # overwritten
        (NUMBER + LOAD + "mov.b32 %r1, 5; " + address_of(0, 4, 50) + "red.global.add.u32 [%rd50], %r1; ", 0),
        (NUMBER + LOAD + "mul.wide.u32 %rd9, %r1, 4; ld.param.b64 %rd8, [p0]; add.s64 %rd9, %rd8, %rd9; "
         "atom.global.add.u32 %r1, [%rd9], 1; " + STORE, 1),
    ],
)  # fmt: skip
def test_chains_of_dependent_loads(body, chain):
    assert count(body, shared=128)[1].chain == chain


def test_chains_through_copies_and_barriers():
    """cp.async loads; a barrier hands a branch's depth to the CTA's other warps."""
    copy = "shl.b32 %r2, %r99, 2; cp.async.ca.shared.global [%r2], [%rd51], 4; cp.async.wait_all; "
    copy += "ld.shared.b32 %r1, [%r2]; "
    assert count(NUMBER + address_of(1, 4, 51) + copy + STORE, shared=128)[1].chain == 1
    assert count(NUMBER + address_of(1, 4, 51) + copy + AGAIN + STORE, shared=128)[1].chain == 2
    branch = (
        "setp.gt.u32 %p1, %r99, 31; @%p1 bra M; " + LOAD + "setp.gt.s32 %p2, %r1, 5; @%p2 bra M; mov.b32 %r3, 1; M: "
    )
    late = "mov.b32 %r1, 1; setp.lt.u32 %p3, %r99, 32; @%p3 bra E; " + STORE + "E: "
    assert count(NUMBER + branch + late, 64)[1].chain == 0
    assert count(NUMBER + branch + "bar.sync 0; " + late, 64)[1].chain == 1
    # One lane's branch holds up its warp.
    one = "mov.b32 %r1, 7; setp.lt.u32 %p1, %r99, 5; @%p1 ld.global.b32 %r1, [%rd51]; setp.gt.s32 %p2, %r1, 5; "
    one += "@%p2 bra L; mov.b32 %r3, 1; L: mov.b32 %r1, 1; setp.ge.u32 %p3, %r99, 20; " + address_of(0, 4, 50)
    assert count(NUMBER + address_of(1, 4, 51) + one + "@%p3 st.global.b32 [%rd50], %r1; ")[1].chain == 1
    # The deepest store may be behind the first.
    counters = count(NUMBER + LOAD + STORE + AGAIN + STORE)[1]
    assert (counters.chain, counters.deepest) == (1, 2)


@pytest.mark.parametrize(
    ("size", "stride", "sectors", "distinct"),
    [(4, 4, 4, 128), (4, 0, 1, 4), (4, 32, 32, 128), (8, 8, 8, 256), (16, 16, 16, 512), (4, 8, 8, 128)],
)
def test_requests_and_sectors(size, stride, sectors, distinct):
    vector = {4: "b32 %r1", 8: "v2.b32 {%r1, %r2}", 16: "v4.b32 {%r1, %r2, %r3, %r4}"}[size]
    body = NUMBER + "mov.u32 %r99, %tid.x; " + address_of(1, stride, 51) + f"ld.global.{vector}, [%rd51]; "
    kernel, counters = count(body, 64, grid=(3,))
    line = next(each.line for each in kernel.instructions if each.opcode.startswith("ld.global"))
    key = "load", line
    assert counters.requests == {key: 6} and counters.widths == {("load", size): 6}
    assert counters.sectors == {key: 6 * sectors} and counters.asked == {key: 6 * 32 * size}
    assert counters.distinct == {key: 6 * distinct} and counters.total(counters.sectors, "load") == 6 * sectors
    assert counters.distinct_sectors("load") == (sectors if stride == 0 else 2 * sectors)  # the CTAs load the same
    assert counters.ctas == 3 and counters.distinct_sectors("store") == 0


def test_predicated_lanes_ask_for_nothing():
    """One warp of two has no lane enabled: it issues the load, and makes no request."""
    body = NUMBER + "setp.lt.u32 %p1, %r99, 5; " + address_of(1, 4, 51) + "@%p1 ld.global.b32 %r1, [%rd51]; "
    kernel, counters = count(body, 64)
    line = next(each.line for each in kernel.instructions if each.guard)
    assert counters.off == {(kernel, line): 1}
    assert counters.requests == {("load", line): 1} and counters.asked == {("load", line): 20}
    assert counters.instructions(kernel)[line] == 2


def test_warps_of_each_block():
    """Lane t of a warp goes round t % 3 + 1 times: as often as its slowest lane; 2 CTAs of 2 warps."""
    body = NUMBER + "rem.u32 %r1, %r99, 3; mov.b32 %r2, 0;\nLOOP:\nadd.s32 %r2, %r2, 1;\n"
    body += (
        "setp.le.u32 %p1, %r2, %r1; @%p1 bra LOOP;\nsetp.lt.u32 %p2, %r99, 64; @%p2 bra END;\nmov.b32 %r3, 1;\nEND: "
    )
    kernel, counters = count(body, 64, grid=(2,))
    by_text = {str(each): counters.instructions(kernel)[each.line] for each in kernel.instructions}
    assert by_text["add.s32 %r2, %r2, 1"] == 12 and by_text["rem.u32 %r1, %r99, 3"] == 4
    assert by_text["mov.b32 %r3, 1"] == 2  # the second CTA's
    block = kernel.program.labels["LOOP"]
    assert counters.warps[kernel, block] == 12
    again = count(body, 64, grid=(2,))[1]
    assert again.warps[kernel, block] == 0  # of another kernel


@pytest.mark.parametrize(
    ("size", "stride", "waves", "conflicts"),
    [
        (4, 4, 1, 0),
        (4, 0, 1, 0),
        (4, 128, 32, 31),
        (4, 8, 2, 1),
        (4, 16, 4, 3),
        (1, 1, 1, 0),
        (8, 8, 2, 0),
        (8, 16, 4, 2),
        (16, 16, 4, 0),
        (16, 128, 32, 28),
    ],
)
def test_bank_conflicts(size, stride, waves, conflicts):
    offsets = np.arange(32, dtype=np.int64) * stride
    assert wavefronts(offsets, size, np.arange(32)) == (waves, waves - conflicts)
    # Two warps have twice as many; half a warp of 4 bytes as many at most.
    assert wavefronts(np.tile(offsets, 2), size, np.arange(64)) == (2 * waves, 2 * (waves - conflicts))


def test_shared_accesses():
    """A column of a matrix of 32 words: 32 wavefronts to store it, one to load a row."""
    body = NUMBER + "shl.b32 %r2, %r99, 7; st.shared.b32 [%r2], %r99; bar.sync 0; shl.b32 %r2, %r99, 2; "
    body += "setp.eq.s32 %p1, %r2, 0; @%p1 ld.shared.b32 %r3, [%r2]; "
    _, counters = count(body, shared=4096)
    assert counters.total(counters.shared, "store") == counters.total(counters.shared, "load") == 1
    assert counters.total(counters.wavefronts, "store") == 32 and counters.total(counters.wavefronts, "load") == 1
    assert counters.total(counters.conflicts, "store") == 31 and counters.total(counters.conflicts, "load") == 0


def test_counting_changes_no_result():
    body = NUMBER + LOAD + AGAIN + "setp.gt.u32 %p1, %r1, 9; @%p1 add.s32 %r1, %r1, 7; " + STORE
    outs = []
    for counters in (None, machine.Counters()):
        arrays = [np.zeros(64, np.uint32), np.arange(64, dtype=np.uint32)[::-1].copy()]
        done = run(entry(body, ("u64", "u64"), 64), arrays, counters=counters)
        outs.append((arrays[0].tolist(), done.executed, done.reports))
    assert outs[0] == outs[1]
