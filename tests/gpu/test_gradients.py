"""What only a GPU shows of the gates' gradients: generated code at size, graphs, memory. Kernel tests run there too.

Written to need nothing but torch, Triton, numpy and pytest.
"""

import pytest
import torch

from engram_kernels import gate_conv_residual, gate_residual
from engram_kernels.ops.gate_kernels.gradients import split_kv
from tests.ops.conv_kernels.test_backward import ALL, exact_gradients
from tests.ops.conv_kernels.test_backward import check_gradients as check_conv_gradients
from tests.ops.gate_kernels.test_backward import backward, check_gradients, gradient_of
from tests.ops.test_gate import EPS, inputs
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs
from tests.ops.test_registration import same

from .test_kernels import graph_of

pytestmark = pytest.mark.gpu
CONV = dict(dilation=3, eps=EPS, conv_eps=CONV_EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "branches", "width"), [(301, 4, 5120), (2100, 4, 2560), (33, 8, 16_384), (50, 3, 777)]
)
def test_gate_gradients_at_size(device, dtype, tokens, branches, width):
    tensors, grad = inputs(tokens, branches, width, dtype), gradient_of(tokens, branches, width, dtype)
    _, found = backward(gate_residual, [x.to(device) for x in tensors], grad.to(device), eps=EPS)
    check_gradients(found, tensors, grad, (dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_gradients_at_size(device, dtype):
    tensors, grad = conv_inputs(1030, 4, 2560, 4, dtype, dtype), gradient_of(1030, 4, 2560, dtype)
    _, found = backward(gate_conv_residual, [x.to(device) for x in tensors], grad.to(device), ALL, **CONV)
    exact = exact_gradients(tensors, grad, **CONV)
    check_conv_gradients(found, tensors, grad, (dtype, dtype), dilation=3, starts=[0] * 1030, exact=exact)


@pytest.mark.parametrize("tokens", [1, 31, 1000, 5000])
def test_the_same_bits_again_and_for_a_part(device, tokens):
    """Twice the same call, and the first tokens alone: programs of the grid change, a token's gradients do not."""
    tensors = [x.to(device) for x in conv_inputs(tokens, 4, 1280, 4, torch.bfloat16, torch.bfloat16)]
    grad = gradient_of(tokens, 4, 1280, torch.bfloat16).to(device)
    for op, count, options in ((gate_residual, 5, dict(eps=EPS)), (gate_conv_residual, 7, CONV)):
        _, whole = backward(op, tensors[:count], grad, ALL[:count], **options)
        for _ in range(5):
            _, again = backward(op, tensors[:count], grad, ALL[:count], **options)
            assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    first = tokens // 2 + 1
    part = [*(x[:first] for x in tensors[:3]), *tensors[3:5]]
    _, whole = backward(gate_residual, tensors[:5], grad, eps=EPS)
    _, found = backward(gate_residual, part, grad[:first], eps=EPS)
    assert all(torch.equal(a, b[:first]) for a, b in zip(found[:3], whole[:3], strict=True))


def test_forward_and_backward_in_a_graph(device):
    """Inputs change between replays."""
    tensors = [x.to(device).requires_grad_() for x in conv_inputs(100, 4, 256, 4)]
    grad = gradient_of(100, 4, 256).to(device)

    def step():
        gate = torch.autograd.grad(gate_residual(*tensors[:5], eps=EPS), tensors[:5], grad)
        return *gate, *torch.autograd.grad(gate_conv_residual(*tensors, **CONV), tensors, grad)

    graph, captured = graph_of(step)
    for _ in range(3):
        with torch.no_grad():
            tensors[0].normal_()
            grad.normal_()
        graph.replay()
        torch.cuda.synchronize()
        kept = [x.clone() for x in captured]
        assert all(same(a, b) for a, b in zip(kept, step(), strict=True))


def test_compiled_code(device):
    """torch.compile with inductor, forward and backward as whole graphs over two lengths."""
    norms = [x.to(device) for x in inputs(1, 4, 64)[3:]]

    def step(hidden, kv):
        return gate_residual(hidden * 2, *split_kv(kv, 4, 64), *norms, eps=EPS).square()

    run = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (5, 12):
        leaves = [torch.randn(tokens, *shape, device=device).requires_grad_() for shape in ((4, 64), (5 * 64,))]
        results = []
        for function in (run, step):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for compiled, eager in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)


def test_memory_of_a_backward_pass(device):
    """Beyond the gradients: the programs' products, a float32 value and sums over chunks; no second [T, H, D]."""
    tensors = [x.to(device).requires_grad_() for x in conv_inputs(4096, 4, 1024, 4, torch.bfloat16, torch.bfloat16)]
    out = gate_conv_residual(*tensors, **CONV)
    grad = torch.ones_like(out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(out, tensors, grad)
    torch.cuda.synchronize()
    given = sum(x.numel() * x.element_size() for x in found)
    value, size = 4096 * 1024 * 4, 4 * 1024 * 4
    products = (32 * 4 + 2) * torch.cuda.get_device_properties(device).multi_processor_count * size
    sums = 32 * 2 * 4096 * 4 * 4
    assert torch.cuda.max_memory_allocated() - before <= given + value + sums + products + (8 << 20)
