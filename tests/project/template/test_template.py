"""scale_columns: the reference by hand, arguments, the kernel against its reference. To copy to tests/ops."""

import pytest
import torch

from bench.running.cases import Workbench
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.tolerances import U32, rounding

from . import reference
from .bench_template import cases
from .op import scale_columns


def inputs(tokens, hidden_size, dtype=torch.float32):
    return torch.randn(tokens, hidden_size).to(dtype), torch.randn(hidden_size)


def test_reference_by_hand():
    x, weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([10.0, 0.5])
    assert reference.scale_columns(x, weight).tolist() == [[10.0, 1.0], [30.0, -2.0]]


def test_gradients_are_the_references():
    x, weight = (tensor.requires_grad_() for tensor in inputs(3, 5))
    scale_columns(x, weight).sum().backward()
    assert torch.equal(x.grad, weight.detach().expand_as(x)) and torch.equal(weight.grad, x.detach().sum(0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor of float32"),
        (dict(x=torch.zeros(4)), ValueError, r"x must have shape \[T, D\], got \[4\]"),
        (dict(x=torch.zeros(4, 3).T), ValueError, "x must be contiguous"),
        (dict(weight=torch.zeros(3)), ValueError, r"weight must have shape \[4\], got \[3\]"),
        (dict(out=torch.zeros(3, 4).half()), TypeError, "out must be a tensor of float32"),
    ],
)
def test_arguments(change, error, words):
    given = dict(x=torch.zeros(3, 4), weight=torch.zeros(4)) | change
    with pytest.raises(error, match=f"scale_columns: {words}"):
        scale_columns(**given)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden_size"), [(1, 1), (3, 24), (2, 1056)])  # 1056: two blocks, the last partial
def test_kernel_equals_reference(device, tokens, hidden_size, dtype):
    x, weight = inputs(tokens, hidden_size, dtype)
    expected = reference.scale_columns(x.double(), weight.double())
    out = Guarded(x.shape, dtype, device)
    for _ in range(2):  # the second call starts the launch that the first one prepared
        assert scale_columns(x.to(device), weight.to(device), out=out.tensor) is out.tensor
        error = (out.check().cpu().double() - expected).abs()
        assert (error.numpy() <= rounding(expected.numpy(), dtype) + U32 * expected.abs().numpy()).all()


@pytest.mark.kernel
def test_opcheck(device):
    x, weight = (tensor.to(device) for tensor in inputs(3, 8))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.engram.scale_columns.default, (x, weight), test_utils=checks)
    torch.library.opcheck(torch.ops.engram.scale_columns_out.default, (x, weight, x.clone()), test_utils=checks)


@pytest.mark.kernel
def test_compiles_to_one_graph(device):
    x, weight = (tensor.to(device) for tensor in inputs(3, 8))
    compiled = torch.compile(lambda *tensors: scale_columns(*tensors) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), scale_columns(x, weight) + 1)


def test_the_case_of_the_benchmark():
    case = next(cases())
    with Workbench(torch.device("cpu"), host_limit=1 << 20, device_limit=1 << 20) as bench:
        prepared = case.prepare(bench)
        assert prepared.check(prepared.calls[0](), 0) is None
        assert "differ" in prepared.check(prepared.calls[0]() + 1, 0)
