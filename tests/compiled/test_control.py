"""The executor's control flow, barriers and instructions of a warp."""

import numpy as np
import pytest

from tests import machine
from tests.machine.parsing import flow, ptx
from tests.support.instructions.snippets import NUMBER, address_of, entry, kinds, run

IN, OUT = address_of(1, 4, 51) + "ld.global.b32 %r1, [%rd51]; ", address_of(0, 4, 50)
STORE = OUT + "st.global.b32 [%rd50], %r10; "
ONES = np.ones(32, bool)


def numbers(*values, count=32):
    return [np.zeros(count, np.uint32), np.resize(np.array(values, np.uint32), count)]


def test_a_loop_that_lanes_leave_one_by_one():
    """Collatz: every thread has trips of its own, and all meet behind the loop."""
    body = NUMBER + IN + "mov.b32 %r10, 0; LOOP: setp.le.u32 %p1, %r1, 1; @%p1 bra DONE; "
    body += "and.b32 %r2, %r1, 1; setp.eq.b32 %p2, %r2, 0; @%p2 bra EVEN; mad.lo.s32 %r1, %r1, 3, 1; "
    body += "bra.uni NEXT; EVEN: shr.u32 %r1, %r1, 1; NEXT: add.s32 %r10, %r10, 1; bra LOOP; DONE: "
    body += "shfl.sync.bfly.b32 %r11, %r10, 0, 31, -1; mov.b32 %r10, %r11; " + STORE  # only whole warps may shuffle
    arrays = numbers(*range(1, 65), count=64)
    assert not run(entry(body, ("u64", "u64"), 64), arrays).reports

    def trips(n):
        return 0 if n == 1 else 1 + trips(3 * n + 1 if n % 2 else n // 2)

    assert arrays[0].tolist() == [trips(n) for n in range(1, 65)]


def test_nested_loops_and_breaks():
    """Products by addition: an inner loop of other lengths in every thread, and a break in the middle."""
    body = NUMBER + IN + "mov.b32 %r10, 0; mov.b32 %r3, 0; OUTER: setp.ge.u32 %p1, %r3, %r1; @%p1 bra DONE; "
    body += "mov.b32 %r4, 0; INNER: add.s32 %r10, %r10, 1; setp.gt.u32 %p3, %r10, 50; @%p3 bra DONE; "
    body += "add.s32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, %r3; @%p2 bra INNER; add.s32 %r3, %r3, 1; "
    body += "bra OUTER; DONE: " + STORE
    arrays = numbers(*range(32))
    assert not run(entry(body, ("u64", "u64")), arrays).reports
    assert arrays[0].tolist() == [min(51, sum(max(1, i) for i in range(n))) for n in range(32)]


@pytest.mark.parametrize("schedule", machine.SCHEDULES)
def test_threads_leave_early(schedule):
    """ret under a predicate; those that stay go on, by warp and by CTA."""
    body = NUMBER + IN + "add.s32 %r10, %r1, 1; setp.gt.u32 %p1, %r1, 10; @%p1 ret; " + STORE
    arrays = numbers(*range(20), count=256)
    assert not run(entry(body, ("u64", "u64"), 64), arrays, grid=(4,), schedule=schedule).reports
    assert arrays[0].tolist() == [n + 1 if n <= 10 else 0 for n in arrays[1].tolist()]


def test_registers_and_labels_in_scopes():
    """Inline assembly: names that a scope declares hide those around it; labels may stand before an instruction."""
    body = NUMBER + IN + "mov.b32 %r2, 5; { .reg .b32 %r2, t; .reg .pred q; mov.b32 %r2, 9; mov.b32 t, %r2; "
    body += "{ .reg .b32 t; mov.b32 t, 1; }\nadd.s32 %r3, t, %r1; }\nbra L1; L1: add.s32 %r10, %r3, %r2; " + STORE
    arrays = numbers(*range(32))
    run(entry(body, ("u64", "u64")), arrays)
    assert arrays[0].tolist() == [n + 14 for n in range(32)]
    for wrong in ("mov.b32 %q1, 1; ", "\t}\n", ".local .b8 a[4]; ", "mov.b32 %r1, 1\n"):
        with pytest.raises(machine.Fault):
            run(entry(wrong), [np.zeros(4, np.uint8)])


def test_inline_assembly_may_close_a_scope_at_the_start_of_a_line():
    body = NUMBER + IN + "bra L1;\n{ .reg .b32 t; mov.b32 t, 1;\n}\nL1: add.s32 %r10, %r1, 1; " + STORE
    arrays = numbers(*range(32))
    run(entry(body, ("u64", "u64")), arrays)
    assert arrays[0].tolist() == list(range(1, 33))


def test_blocks_are_ranked_so_that_lanes_meet():
    """Both sides of a branch before what follows them, a loop before what follows it, however they are laid out."""
    body = "@%p1 bra B; bra C; D: add.s32 %r1, %r1, 1; ret; C: @%p2 bra C; B: mov.b32 %r1, 1; bra D; "
    program = ptx.Program(entry(body))
    rank, labels = flow.ranks(program), program.labels
    assert rank[0] < rank[labels["C"]] < rank[labels["B"]] < rank[labels["D"]]
    loop = "\nHEAD: @%p1 bra OUT; add.s32 %r1, %r1, 1; bra HEAD; OUT: mov.b32 %r2, 1; "
    program = ptx.Program(entry(loop))
    rank = flow.ranks(program)
    assert rank[program.labels["OUT"]] == max(rank[block.index] for block in program.blocks[:-1])


def test_lanes_meet_where_the_text_has_the_meeting_point_first():
    body = NUMBER + IN + "setp.lt.u32 %p1, %r1, 7; @%p1 bra B; bra C; D: shfl.sync.bfly.b32 %r10, %r2, 1, 31, -1; "
    body += STORE + "ret; C: mov.b32 %r2, 3; bra D; B: mov.b32 %r2, 4; bra D; "
    arrays = numbers(*range(32))
    assert not run(entry(body, ("u64", "u64")), arrays).reports
    assert arrays[0].tolist() == [4 if n ^ 1 < 7 else 3 for n in range(32)]


# ---- barriers
PASS_ON = NUMBER + IN + "mov.u32 %r97, %tid.x; shl.b32 %r50, %r97, 2; st.shared.b32 [%r50], %r1; bar.sync 0; "
PASS_ON += "xor.b32 %r50, %r50, 128; ld.shared.b32 %r10, [%r50]; " + STORE


@pytest.mark.parametrize("schedule", machine.SCHEDULES)
def test_warps_exchange_through_shared_memory(schedule):
    """In every CTA its own, whichever warp goes first."""
    arrays = numbers(*range(640), count=640)
    assert not run(entry(PASS_ON, ("u64", "u64"), 64), arrays, grid=(10,), shared=256, schedule=schedule).reports
    assert arrays[0].tolist() == [n ^ 32 for n in range(640)]


@pytest.mark.parametrize(("schedule", "wrong"), [(None, 0), ("up", 32), ("down", 32)])
def test_order_of_warps_shows_a_missing_barrier(schedule, wrong):
    """All in step the values are right by luck; alone, the first warp reads what the other has not written."""
    arrays = numbers(*range(64), count=64)
    reports = run(
        entry(PASS_ON.replace("bar.sync 0;", ""), ("u64", "u64"), 64), arrays, shared=256, schedule=schedule
    ).reports
    assert "race" in {report.kind for report in reports}
    assert (arrays[0] != np.arange(64) ^ 32).sum() == wrong
    late = slice(0, 32) if schedule == "down" else slice(32, 64)
    assert (arrays[0][late] == (np.arange(64) ^ 32)[late]).all()


def test_barriers_in_a_loop_with_trips_of_its_own_in_each_cta():
    """CTA c goes round c + 1 times; every thread sees what the other warp wrote in the same trip."""
    body = NUMBER + "mov.u32 %r97, %tid.x; mov.u32 %r96, %ctaid.x; mov.b32 %r10, 0; mov.b32 %r2, 0; "
    body += "shl.b32 %r50, %r97, 2; xor.b32 %r51, %r50, 128; LOOP: add.s32 %r3, %r2, %r97; "
    body += "st.shared.b32 [%r50], %r3; bar.sync 0; ld.shared.b32 %r4, [%r51]; add.s32 %r10, %r10, %r4; "
    body += "bar.sync 0; add.s32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %r96; @%p1 bra LOOP; " + STORE
    for schedule in machine.SCHEDULES:
        out = np.zeros((5, 64), np.uint32)
        assert not run(entry(body, threads=64), [out], grid=(5,), shared=256, schedule=schedule).reports
        for cta in range(5):
            trips = cta + 1
            assert out[cta].tolist() == [trips * (t ^ 32) + sum(range(trips)) for t in range(64)]
    once = body.replace("bar.sync 0; add.s32 %r2", "add.s32 %r2")
    assert kinds(entry(once, threads=64), [out], grid=(5,), shared=256) == ["race"]


BRANCH = NUMBER + IN + "setp.lt.u32 %p1, %r1, {least}; @%p1 bra SKIP; {first}\nSKIP: {second}\n"


@pytest.mark.parametrize(
    ("least", "first", "second", "found"),
    [
        (32, "bar.sync 0;", "bar.sync 0;", ["barrier"]),  # some wait once, others twice, and the latter are left
        (32, "bar.sync 0; bra END;", "bar.sync 0; END:", ["barrier"]),  # as many, at two places
        (0, "bar.sync 0; bra END;", "bar.sync 0; END:", []),
        (0, "bar.sync 0;", "bar.sync 0;", []),
        (64, "bar.sync 0;", "bar.sync 0;", []),
        (32, "ret;", "bar.sync 0;", ["barrier"]),
        (7, "bar.sync 0;", "add.s32 %r3, %r1, 1;", ["divergent", "barrier"]),
        (32, "bar.sync 1;", "bar.sync 0;", ["deadlock"]),
        (32, "trap;", "", ["trap"]),
        (64, "trap;", "", []),
    ],
)
def test_barriers_that_a_part_of_a_cta_reaches(least, first, second, found):
    text = entry(BRANCH.format(least=least, first=first, second=second), ("u64", "u64"), 64)
    for schedule in machine.SCHEDULES:
        assert kinds(text, numbers(*range(64), count=64), schedule=schedule) == found


def test_a_kernel_that_does_not_end(monkeypatch):
    from tests.machine.state import lanes

    monkeypatch.setattr(lanes, "BLOCKS", 1000)
    with pytest.raises(machine.Fault, match="has not ended after 1000 blocks") as caught:
        run(entry("L: mov.b32 %r1, 1; bra L; "), [np.zeros(4, np.uint8)])
    assert caught.value.report.kind == "deadlock"


# ---- warps
def shuffled(mode, lane, operand, control):
    """The manual's own steps for one lane: the lane it reads from, and the predicate."""
    mask, clamp = control >> 8 & 31, control & 31
    highest, lowest, operand = (lane & mask) | (clamp & ~mask), lane & mask, operand & 31
    source = {"up": lane - operand, "down": lane + operand, "bfly": lane ^ operand, "idx": lowest | operand & ~mask}[
        mode
    ]
    inside = source >= highest if mode == "up" else source <= highest
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffles(mode):
    """Every distance, in segments of all sizes, by constants and by a register that differs among lanes."""
    for width in (32, 16, 8, 4, 2):
        control = (32 - width) << 8 | (0 if mode == "up" else 31)
        for operand in (0, 1, 2, 5, 8, 16, 31, 33, None):
            text = "%r3" if operand is None else str(operand)
            body = NUMBER + IN + f"xor.b32 %r3, %r99, 11; shfl.sync.{mode}.b32 %r10|%p1, %r1, {text}, {control}, -1; "
            body += "selp.b32 %r11, 256, 0, %p1; add.s32 %r10, %r10, %r11; " + STORE
            arrays = numbers(*range(64), count=64)
            assert not run(entry(body, ("u64", "u64"), 64), arrays).reports
            for thread in range(64):
                by = (thread ^ 11) if operand is None else operand
                source, inside = shuffled(mode, thread % 32, by, control)
                assert arrays[0][thread] == thread // 32 * 32 + source + 256 * inside, (width, operand, thread)


@pytest.mark.parametrize(
    ("opcode", "of"),
    [
        ("redux.sync.add.s32", lambda x: x.sum(dtype=np.int32)),
        ("redux.sync.add.u32", lambda x: x.view(np.uint32).sum(dtype=np.uint32)),
        ("redux.sync.min.s32", np.min),
        ("redux.sync.max.s32", np.max),
        ("redux.sync.min.u32", lambda x: x.view(np.uint32).min()),
        ("redux.sync.max.u32", lambda x: x.view(np.uint32).max()),
        ("redux.sync.and.b32", np.bitwise_and.reduce),
        ("redux.sync.or.b32", np.bitwise_or.reduce),
        ("redux.sync.xor.b32", np.bitwise_xor.reduce),
    ],
)
def test_reductions(opcode, of):
    values = np.random.default_rng(1).integers(-(2**31), 2**31, 64).astype(np.int32)
    out = np.zeros(64, np.int32)
    body = NUMBER + IN + f"mov.b32 %r2, -1; {opcode} %r10, %r1, %r2; " + STORE
    assert not run(entry(body, ("u64", "u64"), 64), [out, values]).reports
    with np.errstate(over="ignore"):
        wanted = [np.array(of(part)).astype(np.int64).astype(np.int32) for part in (values[:32], values[32:])]
    assert (out.reshape(2, 32) == np.array(wanted).reshape(2, 1)).all()
    part = entry(body.replace("mov.b32 %r2, -1", "mov.b32 %r2, 15"), ("u64", "u64"), 64)
    assert kinds(part, [out, values]) == ["unknown"]


@pytest.mark.parametrize("values", [ONES, ~ONES, np.arange(32) % 3 == 0])
@pytest.mark.parametrize("mode", ["any.pred", "all.pred", "uni.pred", "ballot.b32", "not"])
def test_votes(mode, values):
    name = "!%p1" if mode == "not" else "%p1"
    mode = "ballot.b32" if mode == "not" else mode
    target = "%r10" if mode.startswith("ballot") else "%p2"
    body = NUMBER + IN + f"setp.ne.b32 %p1, %r1, 0; vote.sync.{mode} {target}, {name}, -1; "
    body += ("" if target == "%r10" else "selp.b32 %r10, 1, 0, %p2; ") + STORE
    arrays = [np.zeros(32, np.uint32), values.astype(np.uint32)]
    assert not run(entry(body, ("u64", "u64")), arrays).reports
    values = ~values if name[0] == "!" else values
    ballot = sum(int(each) << place for place, each in enumerate(values))
    wanted = {"any": values.any(), "all": values.all(), "uni": values.all() or not values.any(), "ballot": ballot}
    assert set(arrays[0].tolist()) == {int(wanted[mode.split(".")[0]])}


@pytest.mark.parametrize(
    "line",
    [
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        "vote.sync.any.pred %p2, %p1, -1;",
        "redux.sync.add.s32 %r2, %r1, %r3;",
        "bar.warp.sync -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r4];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r1};",
    ],
)
def test_instructions_of_a_warp_need_all_of_it(line):
    """Lanes that went another way are missed; whole warps may go where they like."""
    start = NUMBER + IN + "mov.b32 %r3, -1; and.b32 %r4, %r99, 31; shl.b32 %r4, %r4, 4; "
    start += "st.shared.v4.b32 [%r4], {%r3, %r3, %r3, %r3}; bar.sync 0; setp.lt.u32 %p1, %r1, "
    text = start + f"LEAST; @%p1 bra SKIP; {line}\nSKIP: "
    arrays = numbers(*range(64), count=64)
    assert "divergent" in kinds(entry(text.replace("LEAST", "5"), ("u64", "u64"), 64), arrays, shared=512)
    assert kinds(entry(text.replace("LEAST", "32"), ("u64", "u64"), 64), arrays, shared=512) == []
