"""Counts of machine code: hand-written PTX, assembled by ptxas and executed, whose counts are known beforehand."""

import functools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import triton

from tests import machine
from tests.machine.counting.executed import Executed
from tests.machine.counting.integers import IntegerProgram, Unsolvable
from tests.machine.counting.occupancy import programs_in_flight
from tests.machine.counting.round_trips import round_trips, way
from tests.machine.counting.trace import WarpCounters
from tests.machine.parsing import sass
from tests.machine.parsing.graph import Graph

pytestmark = pytest.mark.compile
WARPS, SIZE = 3, 1024
HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry known(.param .u64 in_ptr, .param .u64 out_ptr, .param .u32 count)
.reqntid 96, 1, 1
{
    .reg .pred %p<9>; .reg .b32 %r<33>; .reg .b64 %rd<33>;
    ld.param.u64 %rd1, [in_ptr];
    ld.param.u64 %rd2, [out_ptr];
    ld.param.u32 %r1, [count];
    mov.u32 %r2, %tid.x;
    shr.u32 %r3, %r2, 5;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
"""


@functools.cache
def assemble(body, *options):
    """(PTX, cubin) of a kernel whose body ends with a return."""
    text = HEAD + body + "\n}\n"
    ran = subprocess.run(
        [
            Path(triton.__file__).parent / "backends/nvidia/bin/ptxas",
            *options,
            "--gpu-name=sm_90",
            "-",
            "-o",
            "/dev/stdout",
        ],
        input=text.encode(),
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    return text, ran.stdout


@functools.cache
def disassemble(body, *options):
    return sass.disassemble(assemble(body, *options)[1])


class Ran:
    """A kernel that ran with ``count``: ``instructions`` of each warp, its blocks, and what was counted of memory."""

    def __init__(self, body, count=0, values=None):
        text, _ = assemble(body, "-lineinfo")
        kernel = machine.Kernel(text)
        given = np.arange(SIZE, dtype=np.int32) if values is None else np.asarray(values, np.int32)
        self.out = np.zeros(SIZE, np.int32)
        memory = [
            machine.Allocation(array.ctypes.data, array.nbytes, name)
            for name, array in (("in", given), ("out", self.out))
        ]
        self.counters = WarpCounters()
        arguments = given.ctypes.data, self.out.ctypes.data, count
        machine.execute(kernel, arguments, (1,), 0, memory, races=False, counters=self.counters)
        self.program = disassemble(body, "-lineinfo")
        self.executed = Executed(self.program, kernel.program, self.counters.trace(kernel))
        self.kinds = self.executed.by_kind()
        assert self.executed.doubts == []

    @property
    def total(self):
        return sum(self.kinds.values())

    def issued(self, opcode):
        """Times that warps issued an instruction of the kernel itself."""
        return sum(
            each.warps * times * sum(one.opcode == opcode for one in block.code)
            for each in self.executed.classes
            for block, times in zip(each.flows[0].function.blocks, each.flows[0].blocks, strict=True)
        )

    def trips(self):
        classes = self.executed.classes
        return {(found.before_store, found.total) for each in classes for found in [round_trips(way(each.flows[0]))]}


STRAIGHT = """
    ld.global.b32 %r4, [%rd4];
    add.s32 %r5, %r4, 7;
    st.global.b32 [%rd5], %r5;
    ret;
"""
LOOP = """
    mov.u32 %r6, 0;
    mov.u32 %r7, 0;
    setp.lt.s32 %p1, %r1, 1;
    @%p1 bra $done;
$again:
    mul.wide.u32 %rd6, %r6, 4;
    add.s64 %rd7, %rd4, %rd6;
    ld.global.b32 %r4, [%rd7];
    xor.b32 %r8, %r7, %r4;
    mad.lo.s32 %r7, %r8, 3, %r6;
    add.s32 %r6, %r6, 1;
    setp.lt.s32 %p2, %r6, %r1;
    @%p2 bra $again;
$done:
    st.global.b32 [%rd5], %r7;
    ret;
"""


def test_straight_code_counts_every_instruction_once():
    ran = Ran(STRAIGHT)
    (block,) = ran.program.kernel.blocks
    assert ran.total == WARPS * len(block.code) and len(block.code) == ran.program.kernel.size > 5
    assert ran.issued("LDG") == ran.issued("STG") == ran.issued("EXIT") == WARPS
    assert ran.kinds["global"] == 2 * WARPS and ran.kinds["control"] == WARPS
    assert ran.trips() == {(1, 1)}
    assert (ran.out[:96] == np.arange(96) + 7).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 8, 13])
def test_an_unrolled_loop_and_its_rest(count):
    """ptxas unrolls by four: groups of four run as often as they fit, and what is left in smaller ones."""
    ran = Ran(LOOP, count)
    blocks = ran.program.kernel.blocks
    copies = [sum(each.opcode == "LDG" for each in block.code) for block in blocks]
    (each,) = ran.executed.classes
    assert sum(times * found for times, found in zip(each.flows[0].blocks, copies, strict=True)) == count
    assert max(copies) == 4, "this loop is no longer unrolled by four: find another"
    in_fours = sum(times for times, found in zip(each.flows[0].blocks, copies, strict=True) if found == 4)
    assert in_fours == count // 4
    assert ran.issued("LDG") == WARPS * count and ran.issued("STG") == WARPS
    assert len({total for _, total in ran.trips()}) == 1


def test_warps_leave_a_loop_at_different_trips():
    body = LOOP.replace("mov.u32 %r6, 0;", "mov.u32 %r6, 0;\n    add.s32 %r1, %r1, %r3;", 1)
    ran = Ran(body, count=2)
    assert ran.issued("LDG") == 2 + 3 + 4 and ran.issued("STG") == WARPS
    assert len(ran.executed.classes) == WARPS


def test_loops_in_loops():
    body = """
    mov.u32 %r6, 0;
    mov.u32 %r7, 0;
$outer:
    mov.u32 %r9, 0;
$inner:
    .pragma "nounroll";
    add.s32 %r10, %r9, %r6;
    mul.wide.u32 %rd6, %r10, 4;
    add.s64 %rd7, %rd4, %rd6;
    ld.global.b32 %r4, [%rd7];
    xor.b32 %r7, %r7, %r4;
    add.s32 %r9, %r9, 1;
    setp.lt.s32 %p1, %r9, %r1;
    @%p1 bra $inner;
    st.global.b32 [%rd5], %r7;
    add.s32 %r6, %r6, 1;
    setp.lt.s32 %p2, %r6, 5;
    @%p2 bra $outer;
    ret;
"""
    ran = Ran(body, count=3)
    assert ran.issued("LDG") == 15 * WARPS and ran.issued("STG") == 5 * WARPS
    assert ran.trips() == {(3, 15)}


_LONG_WAY = "".join(f"    mad.lo.s32 %r4, %r4, %r4, {each};\n    xor.b32 %r4, %r4, %r2;\n" for each in range(24))
BRANCH = """
    and.b32 %r6, %r2, {bits};
    setp.eq.s32 %p1, %r6, 0;
    @%p1 bra $even;
    ld.global.b32 %r4, [%rd4+256];
{long_way}
    st.global.b32 [%rd5+512], %r4;
    bra.uni $done;
$even:
    ld.global.b64 %rd8, [%rd1];
    cvt.u32.u64 %r4, %rd8;
{long_way}
    st.global.b32 [%rd5], %r4;
    st.global.b32 [%rd5+1024], %r4;
$done:
    bar.sync 0;
    st.global.b32 [%rd5+2048], %r2;
    ret;
"""


@pytest.mark.parametrize("bits, odd, even", [(1, 3, 3), (32, 1, 2), (64, 1, 2), (128, 0, 3)])
def test_a_branch_is_counted_for_the_warps_that_go_each_way(bits, odd, even):
    """Lanes of a warp that part take both ways; what follows runs once again."""
    ran = Ran(BRANCH.format(bits=bits, long_way=_LONG_WAY))
    assert ran.issued("LDG") == odd + even and ran.issued("STG") == odd + 2 * even + WARPS
    assert ran.issued("BAR") == WARPS


def test_what_a_predicate_switches_off_is_issued():
    body = """
    setp.eq.s32 %p1, %r3, 1;
    mov.u32 %r4, 0;
    @%p1 ld.global.b32 %r4, [%rd4];
    add.s32 %r4, %r4, 1;
    st.global.b32 [%rd5], %r4;
    ret;
"""
    ran = Ran(body)
    kernel = ran.program.kernel
    assert ran.issued("STG") == WARPS and ran.counters.total(ran.counters.requests, "load") == 1
    guarded = any(each.opcode == "LDG" and each.guard for block in kernel.blocks for each in block.code)
    assert ran.issued("LDG") == (WARPS if guarded else 1)
    assert ran.total <= WARPS * kernel.size


def test_a_branch_that_ptxas_folds_into_a_predicate():
    """The guarded store is issued by warps that never came to it in the PTX."""
    body = """
    setp.ne.u32 %p1, %r3, 1;
    setp.eq.u32 %p2, %r2, 40;
    @%p1 bra $done;
    @%p2 st.global.b32 [%rd5+512], %r2;
$done:
    st.global.b32 [%rd5], %r2;
    ret;
"""
    ran = Ran(body)
    (block,) = ran.program.kernel.blocks
    assert ran.total == WARPS * len(block.code) and ran.issued("STG") == 2 * WARPS
    assert ran.counters.total(ran.counters.requests, "store") == WARPS + 1


def test_a_load_that_ptxas_moves_behind_a_branch():
    """Only the warp that goes on needs it."""
    body = """
    ld.global.b32 %r4, [%rd4];
    setp.ne.u32 %p1, %r3, %r1;
    @%p1 bra $done;
{long_way}
    st.global.b32 [%rd5+512], %r4;
$done:
    ret;
"""
    ran = Ran(body.format(long_way=_LONG_WAY), count=2)
    assert ran.issued("LDG") == 1 and ran.issued("STG") == 1
    assert ran.total < 2 * ran.program.kernel.size


@pytest.mark.parametrize("shift", [1, 33])
def test_a_division_routine_counts_where_it_is_called(shift):
    """As compilers write it: a short division where both numbers have 32 bits, else a call."""
    body = """
    ld.global.b32 %r8, [%rd1+28];
    cvt.u64.u32 %rd8, %r2;
    shl.b64 %rd8, %rd8, %r1;
    or.b64 %rd8, %rd8, 9;
    cvt.u64.u32 %rd9, %r8;
    or.b64 %rd10, %rd8, %rd9;
    and.b64 %rd10, %rd10, -4294967296;
    setp.ne.s64 %p1, %rd10, 0;
    @%p1 bra $long;
    cvt.u32.u64 %r5, %rd8;
    rem.u32 %r6, %r5, %r8;
    bra.uni $done;
$long:
    rem.u64 %rd11, %rd8, %rd9;
    cvt.u32.u64 %r6, %rd11;
$done:
    bar.sync 0;
    st.global.b32 [%rd5], %r6;
    ret;
"""
    ran = Ran(body, count=shift)
    (routine,) = ran.program.routines.values()
    assert (ran.out[:96] == [((each << shift) | 9) % 7 for each in range(96)]).all()
    # Of the first warp one lane, the zeroth, has a short number in any case.
    calls, short = (WARPS, 1) if shift == 33 else (0, WARPS)
    assert ran.issued("CALL") == calls and ran.kinds["routine"] == calls * routine.size and routine.size > 50
    assert ran.issued("I2F") == short


def test_dependent_loads_and_their_order():
    """Two chains of two loads: one after the other, or side by side."""
    chains = """
    ld.global.b32 %r4, [%rd4];
    mul.wide.u32 %rd6, %r4, 4;
    add.s64 %rd7, %rd1, %rd6;
    ld.global.b32 %r5, [%rd7];
    ld.global.b32 %r6, [%rd4+512];
    mul.wide.u32 %rd8, %r6, 4;
    add.s64 %rd9, %rd1, %rd8;
    ld.global.b32 %r7, [%rd9];
    add.s32 %r8, %r5, %r7;
    st.global.b32 [%rd5], %r8;
    ret;
"""
    ran = Ran(chains)
    assert ran.counters.chain == 2 and ran.trips() == {(2, 2)}


def test_line_information_changes_no_instruction():
    for body in (STRAIGHT, LOOP, BRANCH.format(bits=1, long_way=_LONG_WAY)):
        with_lines, without = disassemble(body, "-lineinfo"), disassemble(body)
        texts = [
            [(each.guard, each.name, each.operands) for block in program.kernel.blocks for each in block.code]
            for program in (with_lines, without)
        ]
        assert texts[0] == texts[1]


DISASSEMBLED = """
known:
.text.known:
	//## File ".nv_debug_ptx_txt", line 7
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
	//## File ".nv_debug_ptx_txt", line 9
        /*0010*/                   HADD2.F32 R1, -RZ, R0.H0_H0 ;
        /*0020*/               @P0 CALL.REL.NOINC `(.L_x_0) ;
        /*0030*/              @!P1 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_u64) ;
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0050*/              @!P2 EXIT ;
        /*0060*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
        /*0090*/                   NOP;
$__internal_0_$__cuda_sm20_rem_u64:
        /*00a0*/                   NOP ;
        /*00b0*/                   RET.REL.NODEC R20 `(known) ;
"""


def test_disassembly():
    """A call to a label is how sm_80 leaves a loop; the branch to itself behind the end is no code that runs."""
    program = sass.parse(DISASSEMBLED)
    kernel, (routine,) = program.kernel, program.routines.values()
    assert [block.successors for block in kernel.blocks] == [[1], [3, 2], [1], [-1, 4], [-1]]
    assert [block.successors for block in routine.blocks] == [[-1]] and (kernel.size, routine.size) == (8, 1)
    load, convert, *_ = [each for block in kernel.blocks for each in block.code]
    assert (load.line, load.width, load.kind, convert.line, convert.kind) == (7, 16, "global", 9, "convert")
    assert [each.kind for each in kernel.blocks[4].code] == ["integer", "control"]


def test_integer_program():
    program = IntegerProgram()
    fours, rest = program.variable(0, 100, cost=4.5), program.variable(0, 100, cost=1.3)
    program.constrain({fours: 4, rest: 1}, 14, 14)
    assert program.solve() == [3, 2] and program.proved
    program.prefer({rest: 1}, 6, weight=10)
    assert program.solve() == [2, 6]
    program.constrain({fours: 1}, high=1)
    program.constrain({rest: 1}, high=9)
    with pytest.raises(Unsolvable):
        program.solve()


def test_graph():
    """Entry 0, a loop of 1 to 4 around a branch at 1, then 5; -1 is the exit."""
    graph = Graph([[1], [2, 3], [4], [4], [1, 5], [-1]])
    (loop,) = graph.loops
    assert (loop.header, set(loop.body), set(loop.back)) == (1, {1, 2, 3, 4}, {(4, 1)})
    assert graph.classes() == [0, 1, 2, 3, 1, 0]
    assert graph.meeting_point(1) == 4 and graph.meeting_point(5) is None


@pytest.mark.parametrize(
    "registers, warps, shared, programs",
    [
        (96, 4, 0, 5),  # 21 warps' registers, 5 of them in each quarter
        (40, 4, 0, 12),
        (255, 8, 0, 1),
        (32, 1, 0, 32),  # no more programs than 32
        (32, 4, 0, 16),  # nor warps than 64
        (32, 4, 50 << 10, 4),
    ],
)
def test_programs_in_flight(registers, warps, shared, programs):
    assert programs_in_flight("sm_90", registers, warps, shared) == programs
