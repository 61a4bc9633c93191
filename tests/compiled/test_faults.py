"""What the executor reports: a fault of each kind planted in a small kernel, and the same kernel without it."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests import machine
from tests.machine.state.races import Log
from tests.support.instructions.snippets import NUMBER, address_of, allocation, entry, kinds, run

LOAD = address_of(1, 4, 51) + "{}ld.global.b32 %r1, [%rd51{}]; "
STORE = address_of(0, 4, 50) + "{}st.global.b32 [%rd50{}], %r1; "
COPY = NUMBER + "setp.lt.u32 %p1, %r99, 30; " + LOAD + STORE


def copy(load="", load_at="", store="", store_at="", size=32):
    arrays = [np.zeros(size, np.uint32), np.arange(size, dtype=np.uint32)]
    return entry(COPY.format(load, load_at, store, store_at), ("u64", "u64")), arrays


def test_a_clean_copy():
    text, arrays = copy()
    assert kinds(text, arrays) == [] and (arrays[0] == arrays[1]).all()


# ---- addresses
@pytest.mark.parametrize("where", ["load_at", "store_at"])
@pytest.mark.parametrize("offset", ["+4", "+-4", "+4096"])
def test_out_of_bounds_by_one_item(where, offset):
    text, arrays = copy(**{where: offset})
    assert kinds(text, arrays) == ["out of bounds"]
    text, arrays = copy("@%p1 ", store="@%p1 ", size=30)  # one thread less touches nothing beyond
    assert kinds(text, arrays) == []
    text, arrays = copy("@%p1 ", store="@%p1 ", size=29)
    assert kinds(text, arrays) == ["out of bounds"]


def test_out_of_bounds_between_two_allocations_and_without_any():
    """The gap between two is nobody's; a fault says where it is and what was found before it."""
    whole = np.zeros(96, np.uint32)
    text, arrays = copy()
    kernel, arguments = machine.Kernel(text), [whole.ctypes.data, arrays[1].ctypes.data]
    here = [allocation(whole[:16], "left"), allocation(whole[16:64], "right"), allocation(arrays[1], "source")]
    assert not machine.execute(kernel, arguments, (1,), 0, here).reports  # side by side they are as one
    here[1] = allocation(whole[17:64], "right")
    with pytest.raises(machine.Fault, match=r"store of 4 bytes at byte 64 of left, which has 64; 1 lanes"):
        machine.execute(kernel, arguments, (1,), 0, here)
    with pytest.raises(machine.Fault, match="the launch has no memory"):
        machine.execute(kernel, arguments, (1,), 0, [])
    with pytest.raises(ValueError, match="overlap"):
        machine.execute(kernel, arguments, (1,), 0, [allocation(whole, "a"), allocation(whole[5:], "b")])


@pytest.mark.parametrize(
    "line", ["ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+{}]", "st.global.v2.b64 [%rd1+{}], {%rd9, %rd9}"]
)
def test_misaligned_vectors(line):
    raw = np.zeros(128, np.uint8)
    start = -raw.ctypes.data % 16
    for offset, found in ((0, []), (16, []), (8, ["misaligned"]), (4, ["misaligned"])):
        text = entry("ld.param.b64 %rd1, [p0]; mov.b64 %rd9, 0; " + line.replace("{}", str(offset)) + "; ")
        assert kinds(text, [raw[start : start + 64]]) == found


def test_shared_memory_has_bounds_and_alignment_too():
    for offset, found in ((0, []), (508, []), (512, ["out of bounds"]), (2, ["misaligned"])):
        body = f"mov.b32 %r1, {offset}; mov.b32 %r2, 1; st.shared.b32 [%r1], %r2; "
        body += "bar.warp.sync -1; ld.shared.b32 %r3, [%r1]; "
        assert kinds(entry(body), [np.zeros(4, np.uint8)], shared=512) == found


def test_read_only_memory():
    text, arrays = copy()
    assert kinds(text, arrays, read_only=[1]) == []
    assert kinds(text, arrays, read_only=[0]) == ["read only"]
    assert not arrays[0].any() or (arrays[0] == arrays[1]).all()
    add = entry("ld.param.b64 %rd1, [p0]; mov.b32 %r1, 1; red.global.add.u32 [%rd1], %r1; ")
    assert kinds(add, arrays[:1], read_only=[0]) == ["read only"]


# ---- values that nobody has written
USES = {
    "store": STORE.format("", ""),
    "address": "mul.wide.u32 %rd2, %r1, 0; ld.param.b64 %rd3, [p0]; add.s64 %rd2, %rd2, %rd3; "
    "ld.global.b32 %r2, [%rd2]; ",
    "predicate": "setp.gt.s32 %p2, %r1, 3; mov.b32 %r2, 1; @%p2 mov.b32 %r2, 2; ",
    "branch": "setp.gt.s32 %p2, %r1, 3; @%p2 bra L; mov.b32 %r2, 1; L: mov.b32 %r3, 1; ",
    "atomic": "ld.param.b64 %rd3, [p0]; red.global.add.u32 [%rd3], %r1; ",
    "shuffle": "shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1; " + STORE.format("", ""),
    "lane of a shuffle": "shfl.sync.idx.b32 %r2, %r99, %r1, 31, -1; ",
    "vote": "setp.gt.s32 %p2, %r1, 3; vote.sync.ballot.b32 %r1, %p2, -1; " + STORE.format("", ""),
    "reduction": "mov.b32 %r2, -1; redux.sync.add.s32 %r1, %r1, %r2; " + STORE.format("", ""),
    "shared memory": "shl.b32 %r2, %r99, 2; st.shared.b32 [%r2], %r1; ld.shared.b32 %r1, [%r2]; "
    + STORE.format("", ""),
    "matrix": "shl.b32 %r2, %r99, 4; st.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1}; bar.warp.sync -1; "
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r4, %r5, %r3}, [%r2]; or.b32 %r1, %r1, %r3; "
    + STORE.format("", ""),
    "arithmetic": "add.f32 %r1, %r1, %r99; mul.lo.s32 %r1, %r1, 0; " + STORE.format("", ""),
    "vector of halves": "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r1, {%rs1, %rs1}; " + STORE.format("", ""),
}


@pytest.mark.parametrize("use", USES)
def test_what_a_masked_load_left_out_is_used(use):
    """The load is off in the last two lanes; with a default it is clean."""
    body = NUMBER + "setp.lt.u32 %p1, %r99, 30; {}" + LOAD.format("@%p1 ", "") + USES[use]
    arrays = [np.zeros(32, np.uint32), np.zeros(32, np.uint32)]
    parameters = ("u64", "u64")
    assert kinds(entry(body.replace("{}", "mov.b32 %r1, 0; ", 1), parameters), arrays, shared=512) == []
    assert kinds(entry(body.replace("{}", "", 1), parameters), arrays, shared=512) == ["undefined"]
    # The same value out of memory that was never written.
    undefined = np.zeros(128, np.uint8)
    undefined[4 * 7 + 1] = 1
    whole = entry(NUMBER + LOAD.format("", "") + USES[use], parameters)
    assert kinds(whole, arrays, shared=512) == []
    assert kinds(whole, arrays, shared=512, undefined={1: undefined}) == ["undefined"]


def test_undefined_values_that_decide_nothing():
    """Thrown away by a selection, by a zero of an and, by a one of an or, or in lanes whose store is off."""
    start = NUMBER + "setp.lt.u32 %p1, %r99, 30; setp.ge.u32 %p3, %r99, 30; " + LOAD.format("@%p1 ", "")
    arrays = [np.zeros(32, np.uint32), np.full(32, 7, np.uint32)]
    for use in (
        "selp.b32 %r1, %r1, 5, %p1; " + STORE.format("", ""),
        "selp.b32 %r2, -1, 0, %p1; and.b32 %r1, %r1, %r2; " + STORE.format("", ""),
        "setp.eq.s32 %p2, %r1, 3; and.pred %p2, %p2, %p1; @%p2 bra L; L: ",
        "setp.eq.s32 %p2, %r1, 3; or.pred %p2, %p3, %p2; @%p2 bra L; L: ",
        STORE.format("@%p1 ", ""),
    ):
        assert kinds(entry(start + use, ("u64", "u64")), arrays) == []
    for use in (
        "selp.b32 %r1, 5, %r1, %p1; " + STORE.format("", ""),
        "setp.eq.s32 %p2, %r1, 3; or.pred %p2, %p2, %p1; @%p2 bra L; L: ",
        "setp.eq.s32 %p2, %r1, 3; and.pred %p2, %p3, %p2; @%p2 bra L; L: ",
        "setp.eq.s32 %p2, %r1, 3; xor.pred %p2, %p2, %p1; @%p2 bra L; L: ",
    ):
        assert kinds(entry(start + use, ("u64", "u64")), arrays) == ["undefined"]


def test_undefined_values_on_one_side_of_a_branch_and_of_a_whole_warp():
    """A register that a part of the lanes gets undefined; a vote or a reduction that one lane spoils for all."""
    arrays = [np.zeros(32, np.uint32)]
    for value, found in (("5", []), ("%r7", ["undefined"])):
        body = NUMBER + f"mov.b32 %r1, 1; setp.lt.u32 %p1, %r99, 9; @%p1 bra L; add.s32 %r1, %r99, {value}; L: "
        assert kinds(entry(body + STORE.format("", "")), arrays) == found
        assert kinds(entry(body + STORE.format("@%p1 ", "")), arrays) == []
        start = NUMBER + f"mov.b32 %r1, 1; setp.lt.u32 %p1, %r99, 9; @!%p1 mov.b32 %r1, {value}; mov.b32 %r2, -1; "
        reduced = start + "redux.sync.add.s32 %r1, %r1, %r2; " + STORE.format("@%p1 ", "")
        voted = start + "setp.eq.s32 %p2, %r1, 1; vote.sync.ballot.b32 %r1, %p2, -1; " + STORE.format("@%p1 ", "")
        assert kinds(entry(reduced), arrays) == kinds(entry(voted), arrays) == found


def test_only_the_undefined_items_of_a_vector_are():
    """One word of four that a vector load or a copy brings; the upper half of a word that a matrix does."""
    undefined = np.zeros(512, np.uint8)
    undefined[4::16] = 1
    vector = NUMBER + address_of(1, 16, 51) + "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd51]; mov.b32 %r1, %r{}; "
    moved = NUMBER + address_of(1, 16, 51) + "shl.b32 %r9, %r99, 4; cp.async.ca.shared.global [%r9], [%rd51], 16; "
    moved += "cp.async.wait_all; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r9]; mov.b32 %r1, %r{}; "
    arrays = [np.zeros(32, np.uint32), np.zeros(128, np.uint32)]
    if arrays[1].ctypes.data % 16:
        arrays[1] = np.zeros(130, np.uint32)[2:]
    for body in (vector, moved):
        for word, found in ((2, []), (3, ["undefined"]), (4, []), (5, [])):
            text = entry(body.replace("%r{}", f"%r{word}") + STORE.format("", ""), ("u64", "u64"))
            assert kinds(text, arrays, shared=512, undefined={1: undefined.copy()}) == found
    matrix = NUMBER + "shl.b32 %r9, %r99, 4; mov.b32 %r2, 0; st.shared.v4.b32 [%r9], {%r2, %r2, %r2, %r2}; "
    matrix += "setp.eq.s32 %p1, %r99, 3; bar.warp.sync -1; @%p1 st.shared.b16 [%r9+6], %rs7; bar.warp.sync -1; "
    matrix += "ldmatrix.sync.aligned.m8n8.x1{}.shared.b16 {%r1}, [%r9]; setp.ne.s32 %p2, %r99, {}; "
    for trans, lane in (
        ("", 13),
        (".trans", 13),
    ):  # item 3 of row 3: threads 4 x 3 + 1, with the rows' and columns' item
        text = matrix.replace("{}", trans, 1).replace("{}", str(lane), 1)
        assert kinds(entry(text + STORE.format("@%p2 ", "")), arrays[:1], shared=512) == []
        assert kinds(entry(text + STORE.format("", "")), arrays[:1], shared=512) == ["undefined"]


def test_a_store_makes_memory_defined():
    undefined = np.ones(128, np.uint8)
    arrays = [np.zeros(32, np.uint32)]
    again = address_of(0, 4, 50) + "ld.global.b32 %r2, [%rd50]; st.global.b32 [%rd50], %r2; "
    store = address_of(0, 4, 50) + "st.global.b32 [%rd50], %r99; "
    assert kinds(entry(NUMBER + again), arrays, undefined={0: undefined.copy()}) == ["undefined"]
    assert kinds(entry(NUMBER + store + again), arrays, undefined={0: undefined}) == []
    assert not undefined.any()
    add = entry("ld.param.b64 %rd1, [p0]; mov.b32 %r1, 1; atom.global.add.u32 %r2, [%rd1], %r1; ")
    assert kinds(add, arrays, undefined={0: np.ones(128, np.uint8)}) == ["undefined"]


def test_registers_and_shared_memory_start_undefined():
    arrays = [np.zeros(32, np.uint32)]
    assert kinds(entry(NUMBER + address_of(0, 4, 50) + "st.global.b32 [%rd50], %r7; "), arrays) == ["undefined"]
    body = (
        NUMBER + address_of(0, 4, 50) + "shl.b32 %r2, %r99, 2; ld.shared.b32 %r7, [%r2]; st.global.b32 [%rd50], %r7; "
    )
    assert kinds(entry(body), arrays, shared=128) == ["undefined"]
    body = body.replace("ld.shared", "st.shared.b16 [%r2], 0; st.shared.b16 [%r2+2], 0; ld.shared", 1)
    assert kinds(entry(body), arrays, shared=128) == []
    assert kinds(entry(body.replace("[%r2+2]", "[%r2]")), arrays, shared=128) == ["undefined"]


# ---- races
EXCHANGE = (
    NUMBER + "shl.b32 %r2, %r99, 2; xor.b32 %r3, %r2, {other}; st.shared.b32 [%r2], %r99; {barrier}\n"
    "ld.shared.b32 %r1, [%r3]; " + STORE.format("", "")
)


@pytest.mark.parametrize("schedule", machine.SCHEDULES)
@pytest.mark.parametrize(
    ("other", "barrier", "found"),
    [
        (128, "", ["race"]),
        (128, "bar.sync 0;", []),
        (128, "bar.warp.sync -1;", ["race"]),  # of the wrong extent
        (4, "", ["race"]),
        (4, "bar.warp.sync -1;", []),
        (4, "bar.sync 0;", []),
        (0, "", []),  # a thread's own
    ],
)
def test_a_missing_barrier_in_shared_memory(other, barrier, found, schedule):
    arrays = [np.zeros(64, np.uint32)]
    text = entry(EXCHANGE.format(other=other, barrier=barrier), threads=64)
    assert [each for each in kinds(text, arrays, shared=256, schedule=schedule) if each == "race"] == found
    if found:
        assert kinds(text, arrays, shared=256, schedule=schedule, races=False) in ([], ["undefined"])


def test_a_race_names_threads_places_and_memory():
    body = "\t.loc\t1 12 5 // ops/rows.py:12:5\n" + EXCHANGE.format(other=128, barrier="")
    report = run(entry(body, threads=64), [np.zeros(64, np.uint32)], shared=256).reports[0]
    assert report.kind == "race" and report.text.startswith("shared memory: ")
    assert "two warps without a barrier between" in report.text and "of CTA 0" in report.text
    assert report.location.count("ops/rows.py:12:5") == 2 and "st.shared.b32" in report.location


MIXED = NUMBER + "ld.param.b64 %rd1, [p0]; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %tid.x; shr.u32 %r4, %r4, 5; "


# A place of each CTA's own; thread 40 and thread 3 of it.
EACH = "mul.wide.u32 %rd2, %r3, 8; add.s64 %rd2, %rd1, %rd2; mov.u32 %r5, %tid.x; "
EACH += "setp.eq.s32 %p1, %r5, 40; setp.eq.s32 %p2, %r5, 3; "


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("st.global.b32 [%rd1], %r3;", ["race"]),  # CTAs store different values
        ("st.global.b32 [%rd1], 5;", []),
        ("st.global.b32 [%rd1], %r4;", ["race"]),  # so do warps
        ("ld.global.b32 %r5, [%rd1];", []),
        ("ld.global.b32 %r5, [%rd1]; st.global.b32 [%rd1], 0;", ["race"]),
        ("ld.global.b32 %r5, [%rd1]; bar.sync 0; st.global.b32 [%rd1], 0;", ["race"]),  # the other CTA's
        ("setp.eq.s32 %p1, %r3, 0; @%p1 ld.global.b32 %r5, [%rd1]; bar.sync 0; @%p1 st.global.b32 [%rd1], 0;", []),
        ("setp.eq.s32 %p1, %r3, 0; @%p1 ld.global.b32 %r5, [%rd1]; @%p1 st.global.b32 [%rd1], 0;", ["race"]),
        (EACH + "@%p1 st.global.b32 [%rd2], 5; @%p2 ld.global.b32 %r6, [%rd2]; ", ["race"]),
        (EACH + "@%p1 st.global.b32 [%rd2], 5; @%p1 ld.global.b32 %r6, [%rd2]; ", []),
        ("st.global.b8 [%rd1], %rs1;", ["race"]),
        ("red.global.add.u32 [%rd1], %r3;", []),
        ("red.global.add.u32 [%rd1], %r3; st.global.b32 [%rd1+4], 5;", []),
        ("red.global.add.u32 [%rd1], %r3; st.global.b32 [%rd1], 5;", ["race"]),
        ("st.global.b64 [%rd1], 5; ld.global.b16 %rs2, [%rd1+6];", ["race"]),  # of parts of an item
        ("st.global.b32 [%rd1], 5; ld.global.b16 %rs2, [%rd1+6];", []),
    ],
)
def test_races_in_global_memory(body, found):
    """Two warps in each of two CTAs, at one address."""
    text = entry(MIXED + "cvt.u16.u32 %rs1, %r3; " + body, threads=64)
    for schedule in machine.SCHEDULES:
        assert kinds(text, [np.zeros(4, np.uint64)], grid=(2,), schedule=schedule) == found
    assert kinds(text, [np.zeros(4, np.uint64)], grid=(2,), races=False) == []


@pytest.mark.parametrize(
    ("threads", "before", "between", "behind", "found"),
    [
        (32, "ld.global.b32 %r5, [%rd1];", "shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;", "st.global.b32 [%rd1], 5;", []),
        (32, "ld.global.b32 %r5, [%rd1];", "", "st.global.b32 [%rd1], 5;", ["race"]),
        (
            32,
            "st.global.b32 [%rd1], 5;",
            "shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;",
            "ld.global.b32 %r5, [%rd1];",
            ["race"],
        ),
        (
            64,
            "ld.global.b32 %r5, [%rd1];",
            "shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;",
            "st.global.b32 [%rd1], 5;",
            ["race"],
        ),
    ],
)
def test_a_shuffle_orders_a_warp_s_read_before_its_store(threads, before, between, behind, found):
    """A store that every thread of a warp waited for before a load is not: a shuffle promises nothing of memory."""
    text = entry(MIXED + before + between + behind, threads=threads)
    assert kinds(text, [np.zeros(4, np.uint64)]) == found


def test_races_of_wide_stores_and_across_batches(monkeypatch):
    """16 bytes a lane that differ in the last; CTAs that are not executed together."""
    from tests.machine import executor

    body = MIXED + "st.global.v4.b32 [%rd1], {{%r4, %r4, %r4, {}}}; ".replace("{{", "{").replace("}}", "}")
    body = body.replace("%r4, %r4, %r4, {}", "5, 5, 5, {}")
    memory = np.zeros(8, np.uint64)
    start = memory.ctypes.data % 16 // 8
    monkeypatch.setattr(executor, "LANES", 64)
    for last, found in (("5", []), ("%r3", ["race"])):
        assert kinds(entry(body.replace("{}", last, 1), threads=64), [memory[start:]], grid=(3,)) == found


@pytest.mark.parametrize("place", [4, 2**35])
def test_races_in_large_memories(place):
    """Tables of the bytes touched would not fit where a memory has 2^35 bytes: the same report."""
    lanes = SimpleNamespace(
        first_cta=0, cta=np.array([0, 1]), thread=np.array([3, 40]), pick=lambda array, index: array
    )
    lanes.epoch = lanes.warp_epoch = lanes.meetings = np.zeros(2, np.int32)
    where = SimpleNamespace(location="here")
    for offsets, found in (([place, place], 1), ([place, place + 4], 0)):
        log = Log()
        log.add(0, "write", np.array(offsets), 4, lanes, None, np.arange(8, dtype=np.uint8).reshape(2, 4), where)
        reports = log.reports(0, "table")
        assert len(reports) == found and (not found or f"of byte {place}, two CTAs" in reports[0].text)


# ---- instructions
def test_an_unknown_instruction_is_named_only_where_it_is_reached():
    skip = "setp.lt.s32 %p1, %r99, {}; @%p1 bra L; tex.1d.v4.f32.s32 {{%r1, %r2, %r3, %r4}}, [%rd1, {{%r5}}]; L: "
    arrays = [np.zeros(4, np.uint32)]
    assert kinds(entry(NUMBER + skip.format(32)), arrays) == []
    with pytest.raises(machine.Fault, match=r"unknown: instruction tex\.1d\.v4\.f32\.s32") as caught:
        run(entry(NUMBER + skip.format(5)), arrays)
    assert "PTX line" in caught.value.report.location


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r2, %r3",
        "add.f64 %rd1, %rd2, %rd3",
        "fma.rz.f32 %r1, %r2, %r3, %r4",
        "cvt.rna.tf32.f32 %r1, %r2",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2",
        "add.s32 %r1, %r2",
        "add.s32 %r1, %rd2, %r3",
        "add.s64 %r1, %rd2, %rd3",
        "add.f32 %r1, %r2, 0d3FF0000000000000",
        "add.f32 %r1, %r2, 1",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15",
        "vote.sync.any.pred %p1, %p2, %r1",
        "redux.sync.max.f32 %r1, %r2, %r3",
        "bar.warp.sync 7",
        "bar.arrive 0, 64",
        "mbarrier.init.shared.b64 [%r1], 1",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "call.uni (%r1), function, (%r2)",
    ],
)
def test_a_form_that_is_not_known_is_a_fault(line):
    with pytest.raises(machine.Fault) as caught:
        run(entry(f"{line}; "), [np.zeros(4, np.uint32)])
    assert caught.value.report.kind == "unknown"
    assert line.split(" ")[0] in str(caught.value)


def test_modules_that_are_not_one_plain_kernel():
    text = entry("mov.b32 %r1, 1; ")
    for wrong in (
        "",
        text + text.replace("snippet", "second"),
        text.replace(".reqntid 32", ""),
        text.replace(".reqntid 32", ".reqntid 48"),
        text.replace(".reqntid 32", ".reqntid 32, 2"),
        ".func f() { ret; }\n" + text,
    ):
        with pytest.raises(machine.Fault):
            machine.Kernel(wrong)
    assert machine.Kernel(text.replace(".reqntid 32", ".reqntid 32, 1, 1\n.maxnreg 64")).threads == 32
    assert machine.Kernel(text.replace(".extern", ".global .align 1 .b8 _str[2] = {95, 0}; .extern")).name == "snippet"


def test_a_fault_keeps_what_was_found_before_it():
    body = NUMBER + "setp.lt.u32 %p1, %r7, 3; @%p1 mov.b32 %r1, 1; ld.global.b32 %r1, [4096]; "
    body = body.replace("[4096]", "[%rd1]").replace("ld.global", "mov.b64 %rd1, 4096; ld.global")
    with pytest.raises(machine.Fault) as caught:
        run(entry(body), [np.zeros(4, np.uint32)])
    assert [report.kind for report in caught.value.reports] == ["undefined", "out of bounds"]
    assert set(machine.KINDS) >= {"undefined", "out of bounds"}
