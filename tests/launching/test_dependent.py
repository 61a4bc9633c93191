"""Dependent launches: which are, what their machine code does before it waits, and what the executor says of it."""

import ast
import importlib
import inspect
from collections import Counter

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.ops.host_cost import calls, launches_of, launching_nothing
from engram_kernels import set_dependent_launch
from engram_kernels.launching import dependent
from engram_kernels.launching.dependent import dependent_options, follow_predecessor, grid_trigger, grid_wait
from tests.conftest import package_kernels
from tests.machine import gpu
from tests.machine.parsing.dependence import TRIGGER, WAIT, unwaited
from tests.reports import compile_report
from tests.reports.offline import DEPENDENT, TARGETS, compiling_for
from tests.support.instructions.snippets import entry, kinds, run


@pytest.fixture(autouse=True)
def switched_on():
    before = set_dependent_launch(True)
    yield
    set_dependent_launch(before)


@pytest.mark.parametrize("target", TARGETS)
def test_where_launches_are_dependent(target):
    with compiling_for(target):
        assert dependent_options() == ({"launch_pdl": True} if target in DEPENDENT else {})
        assert set_dependent_launch(False) is True
        assert dependent_options() == {} and set_dependent_launch(True) is False


def test_not_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(dependent, "INTERPRETING", True)
    monkeypatch.setattr(driver, "_active", None)
    assert dependent_options() == {}
    grid_wait(), grid_trigger()  # as the interpreter calls them


def test_the_switch_takes_no_numbers():
    with pytest.raises(ValueError, match="set_dependent_launch: enabled must be True or False, got 1"):
        set_dependent_launch(1)


@pytest.mark.parametrize("enabled", [True, False])
def test_every_launch_of_an_op(enabled):
    set_dependent_launch(enabled)
    with launching_nothing(), torch.no_grad():
        for name, call in calls().items():
            options = [kwargs.get("launch_pdl", False) for *_, kwargs in launches_of(call)]
            assert options and set(options) == {enabled}, name


def test_kept_launches_follow_the_switch(monkeypatch):
    """What Launch keeps for either is found again, and a change is seen by the next call."""
    seen, run = [], JITFunction.run

    def watch(self, *args, **kwargs):
        seen.append(kwargs.get("launch_pdl", False))
        return run(self, *args, **kwargs)

    with launching_nothing(), torch.no_grad():
        call = calls()["gate_conv_residual"]
        monkeypatch.setattr(JITFunction, "run", watch)
        for enabled, new in ((True, [True] * 2), (False, [False] * 2), (True, []), (False, [])):
            set_dependent_launch(enabled)
            call()
            assert seen == new
            seen.clear()


@pytest.mark.parametrize("kernel", sorted(package_kernels()))
def test_every_kernel_waits_once_ahead_of_every_branch(kernel):
    """In its own body, not in a branch or a loop, behind nothing that loads or stores."""
    module = importlib.import_module(package_kernels()[kernel].fn.__module__)
    tree = ast.parse(inspect.getsource(module))
    body = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == kernel).body
    at = [place for place, each in enumerate(body) if ast.unparse(each) == "follow_predecessor()"]
    assert len(at) == 1, kernel
    ahead = "\n".join(ast.unparse(each) for each in body[: at[0]])
    assert not any(word in ahead for word in ("tl.load", "tl.store", "tl.atomic", "return")), kernel


# ---- machine code; tests/compiled/test_compile.py has the rule on all of it
@pytest.mark.compile
@pytest.mark.parametrize("case", ["gate/v41", "gate_conv/27b-packed-state", "cached_lookup/v41", "row_adam/27b"])
def test_nothing_else_changes(case):
    """Addresses may be computed elsewhere; accesses, and arithmetic on floats, are the same."""
    found = []
    for enabled in (True, False):
        set_dependent_launch(enabled)
        found.append([(kernel, _operations(kernel)) for kernel, *_ in compile_report.compiled_for(case, "sm_90")])
    for (_, on), (kernel, off) in zip(*found, strict=True):
        assert "griddepcontrol" not in kernel.asm["ptx"] and not kernel.metadata.launch_pdl
        assert on - off == Counter({WAIT: 1, TRIGGER: 1}) and not off - on, kernel.metadata.name


def _operations(kernel):
    instructions = gpu.Kernel(kernel.asm["ptx"]).instructions
    words = [(each.opcode, each.opcode.split(".")) for each in instructions]
    touching = ("ld", "st", "atom", "red", "cp", "bar", "griddepcontrol")
    return Counter(name for name, parts in words if parts[0] in touching or parts[-1] in ("f32", "f16x2", "bf16x2"))


READ = "ld.param.b64 %rd1, [p0]; ld.global.b32 %r1, [%rd1]; "
WRITE = "ld.param.b64 %rd1, [p0]; mov.b32 %r1, 1; st.global.b32 [%rd1], %r1; "
ADD = "ld.param.b64 %rd1, [p0]; mov.b32 %r1, 1; red.global.add.u32 [%rd1], %r1; "
HALF = "mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, 16; "
BODIES = {
    "waits": ("{wait}" + READ, 0),
    "reads first": (READ + "{wait}", 1),
    "writes first": (WRITE + "{wait}", 1),
    "adds first": (ADD + "{wait}", 1),
    "never waits": ("mov.b32 %r1, 1; ", 1),
    "a side of a branch waits": (HALF + "@%p1 bra L; {wait}L: mov.b32 %r3, 1; " + READ, 2),
    "a side of a branch ends": (HALF + "@%p1 bra L; {wait}" + READ + "L: mov.b32 %r3, 1; ", 1),
}


@pytest.mark.compile
@pytest.mark.parametrize("body", BODIES)
def test_rule_and_executor_find_what_does_not_wait(body):
    """The rule reads every way; the executor runs one, and says nothing of launches that are not dependent."""
    text, count = BODIES[body]
    text = entry(text.replace("{wait}", WAIT + "; "))
    assert len(unwaited(text)) == count
    array = [np.zeros(4, np.uint32)]
    found = run(text, array, dependent=True, races=False).reports
    assert bool(found) == bool(count) and {each.kind for each in found} <= {"dependence"}
    assert run(text, array, races=False).reports == []


@pytest.mark.compile
def test_a_guarded_wait_is_none():
    text = entry(HALF + f"@%p1 {WAIT}; " + READ)
    assert len(unwaited(text)) == 2 and kinds(text, [np.zeros(4, np.uint32)], dependent=True) == ["dependence"]


@triton.jit
def follow_kernel(x_ptr, out_ptr, PLACE: tl.constexpr):
    """One element, with the wait at a place: "first", "between" load and store, "last", or "none"."""
    if PLACE == "first":
        follow_predecessor()
    x = tl.load(x_ptr)
    if PLACE == "between":
        follow_predecessor()
    tl.store(out_ptr, x + 1)
    if PLACE == "last":
        follow_predecessor()


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_chain_on_machine_code(target):
    """Two launches, the second of which reads what the first writes; without the wait in its place it is an error."""
    x, middle, out = (torch.zeros(1, dtype=torch.int32) for _ in range(3))

    def chain(place):
        options = dict(num_warps=1, enable_fp_fusion=False, **dependent_options())
        follow_kernel[(1,)](x, middle, PLACE="first", **options)
        follow_kernel[(1,)](middle, out, PLACE=place, **options)

    follow_kernel.device_caches.clear()  # it is keyed by device number, and every target is device 0 here
    with gpu.standing_in(target):
        chain("first")
        assert out.item() == 2
        for place in ("between", "last", "none"):
            if target == "sm_90":
                with pytest.raises(gpu.Report, match="dependence: "):
                    chain(place)
            set_dependent_launch(False)
            out.zero_()
            chain(place)
            assert out.item() == 2
            set_dependent_launch(True)
