"""Launch: what Triton compiled is launched again as it is, compiled anew where addresses ask for another variant."""

from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel

from engram_kernels.launching import launch
from engram_kernels.launching.launch import Kept, Launch
from tests.reports.offline import compiling_for

DEVICE, STREAM = 3, 17


@pytest.fixture(autouse=True)
def older_gpu():
    """Launches are those of a GPU without dependent ones; tests/launching/test_dependent.py has these."""
    with compiling_for("sm_80"):
        yield


class Compiled(CompiledKernel):
    """A compiled kernel that notes its launches, and those that Triton does, which tell hooks of them."""

    module, function, packed_metadata = None, "function", "packed"

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *values: self.log.append(("told", grid, values))

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        assert (stream, function, packed, metadata, enter, leave) == (STREAM, "function", "packed", None, None, None)
        self.log.append(("again", (x, y, z), values))


class Kernel:
    """A kernel of (x_ptr, size, out_ptr, BLOCK), compiled or interpreted."""

    arg_names = ["x_ptr", "size", "out_ptr", "BLOCK"]

    def __init__(self, interpreted=False):
        self.log, self.interpreted = [], interpreted

    def run(self, *values, grid, warmup, **options):
        self.log.append(("first", grid, values, options))
        return None if self.interpreted else Compiled(self.log)


@pytest.fixture(autouse=True)
def current_stream(monkeypatch):
    """In place of a GPU's driver."""
    active = SimpleNamespace(get_current_device=lambda: DEVICE, get_current_stream={DEVICE: STREAM}.__getitem__)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))


def tensor(offset=0):
    return torch.zeros(16 + offset)[offset:]


def launch_of(kernel):
    return Launch(kernel, (5,), dict(size=7, BLOCK=32, num_warps=2))


def test_what_was_compiled_is_launched_again():
    kernel = Kernel()
    started, (x, out, other) = launch_of(kernel), (tensor() for _ in range(3))
    started(x, out)
    started(other, out)
    assert kernel.log == [
        ("first", (5,), (x, 7, out, 32), dict(num_warps=2)),
        ("again", (5, 1, 1), (other, 7, out, 32)),
    ]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told(hook):
    """As of Triton's profiler: what launches by itself would pass them by."""
    kernel, told = Kernel(), print
    started, (x, out) = launch_of(kernel), (tensor(), tensor())
    started(x, out)
    getattr(knobs.runtime, hook).add(told)
    try:
        started(x, out)
    finally:
        getattr(knobs.runtime, hook).remove(told)
    started(x, out)
    assert [kind for kind, *_ in kernel.log] == ["first", "told", "again"]
    assert kernel.log[1][1:] == kernel.log[2][1:]


def test_kept_launches_are_made_once_and_forgotten_together():
    kept, others, made = Kept(), Kept(), []

    def make():
        made.append(made)
        return len(made)

    assert [kept.get(form, make) for form in ("a", "b", "a")] == [1, 2, 1] and others.get("a", make) == 3
    Kept.forget()
    assert (kept.get("a", make), others.get("a", make)) == (4, 5)
    for form in range(Kept.MOST):
        kept.get(form, make)
    assert kept.get("a", make) == len(made), "too many: all were dropped"


def test_each_alignment_is_compiled_once():
    """Of every tensor by itself; what is None has none."""
    kernel = Kernel()
    started = launch_of(kernel)
    pairs = [(tensor(a), tensor(b)) for a in (0, 1) for b in (0, 1)]
    for x, out in [*pairs, *reversed(pairs)]:
        started(x, out)
    assert [kind for kind, *_ in kernel.log] == ["first"] * 4 + ["again"] * 4
    assert [values for _, _, values, *_ in kernel.log[4:]] == [(x, 7, out, 32) for x, out in reversed(pairs)]
    started(None, tensor())
    assert kernel.log[-1][0] == "again" and kernel.log[-1][2][0] is None


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    started = launch_of(kernel)
    for _ in range(3):
        started(tensor(), tensor())
    assert [kind for kind, *_ in kernel.log] == ["first"] * 3


def test_what_is_no_tensor_must_be_given():
    with pytest.raises(TypeError, match="lacks size"):
        Launch(Kernel(), (5,), dict(BLOCK=32, num_warps=2))


def test_as_many_tensors_as_named():
    with pytest.raises(ValueError, match="zip"):
        launch_of(Kernel())(tensor())
