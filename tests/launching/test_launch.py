"""Launch: what Triton compiled is launched again as it is, compiled anew where addresses ask for another variant."""

import pytest
import torch
from triton.compiler import CompiledKernel

from engram_kernels.launching.launch import Launch


class Compiled(CompiledKernel):
    """A compiled kernel that notes its launches."""

    module = None

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *values: self.log.append(("again", grid, values))


class Kernel:
    """A kernel of (x_ptr, size, out_ptr, BLOCK), compiled or interpreted."""

    arg_names = ["x_ptr", "size", "out_ptr", "BLOCK"]

    def __init__(self, interpreted=False):
        self.log, self.interpreted = [], interpreted

    def run(self, *values, grid, warmup, **options):
        self.log.append(("first", grid, values, options))
        return None if self.interpreted else Compiled(self.log)


def tensor(offset=0):
    return torch.zeros(16 + offset)[offset:]


def launch_of(kernel):
    return Launch(kernel, (5,), dict(size=7, BLOCK=32, num_warps=2))


def test_what_was_compiled_is_launched_again():
    kernel = Kernel()
    launch, (x, out, other) = launch_of(kernel), (tensor() for _ in range(3))
    launch(x, out)
    launch(other, out)
    assert kernel.log == [
        ("first", (5,), (x, 7, out, 32), dict(num_warps=2)),
        ("again", (5, 1, 1), (other, 7, out, 32)),
    ]


def test_each_alignment_is_compiled_once():
    """Of every tensor by itself; what is None has none."""
    kernel = Kernel()
    launch = launch_of(kernel)
    pairs = [(tensor(a), tensor(b)) for a in (0, 1) for b in (0, 1)]
    for x, out in [*pairs, *reversed(pairs)]:
        launch(x, out)
    assert [kind for kind, *_ in kernel.log] == ["first"] * 4 + ["again"] * 4
    assert [values for _, _, values, *_ in kernel.log[4:]] == [(x, 7, out, 32) for x, out in reversed(pairs)]
    launch(None, tensor())
    assert kernel.log[-1][0] == "again" and kernel.log[-1][2][0] is None


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    launch = launch_of(kernel)
    for _ in range(3):
        launch(tensor(), tensor())
    assert [kind for kind, *_ in kernel.log] == ["first"] * 3


def test_what_is_no_tensor_must_be_given():
    with pytest.raises(TypeError, match="lacks size"):
        Launch(Kernel(), (5,), dict(BLOCK=32, num_warps=2))


def test_as_many_tensors_as_named():
    with pytest.raises(ValueError, match="zip"):
        launch_of(Kernel())(tensor())
