"""References in half precision: each result and gradient is what float32 gives of the same numbers, rounded once.

That is tested bit for bit. What float32 itself then misses of float64: an element is rounded wrongly where float32's
error carries it over the middle between two neighbours, which are 2 u of the power of two below it apart (u the unit
roundoff of the type). So the share of such elements is at most the mean of error / (u * element). With an error of 256
units of float32, which sums that cancel to a tenth of their terms have, that is 256 * 2^-24 / u: 0.4 % for bfloat16,
3 % for float16. Gradients that were added in bfloat16 had 6 to 48 % of such elements.
"""

import functools
import math

import pytest
import torch
import triton

from engram_kernels import gate_conv_residual, gate_residual, reference
from engram_kernels.testing.tolerances import U32, UNIT
from tests.ops.test_gate import EPS
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs, packed, state

from .test_backward import backward, gradient_of

HALF = [torch.bfloat16, torch.float16]
DIFFERENCE = 1e-8  # what TileKernels asks of a gradient; adding in bfloat16 gave 4e-7


def difference(x, y):
    """Squared difference relative to the squares, as DeepSeek's TileKernels measures it."""
    x, y = x.double(), y.double()
    return float((x - y).square().sum() / (x.square() + y.square()).sum())


def gate(*tensors, **options):
    return reference.gate_residual(*tensors[:5], eps=EPS, **options)


def conv(*tensors, **options):
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS) | options
    return reference.gate_conv_residual(*tensors, **options)


MASK = torch.arange(12) % 5 != 3
FORMS = {
    "gate": (gate, 5, {}),
    "gate masked": (gate, 5, dict(mask=MASK, zero_gate="sign")),
    "gate addend": (gate, 5, dict(mask=MASK, residual=False)),
    "conv": (conv, 7, {}),
    "conv packed": (conv, 7, dict(mask=MASK, cu_seqlens=packed())),
    "conv addend": (conv, 7, dict(mask=MASK, residual=False, zero_gate="sign")),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_rounded_once(form, dtype):
    op, count, options = FORMS[form]
    tensors, grad = conv_inputs(12, 4, 320, 4, dtype, dtype)[:count], gradient_of(12, 4, 320, dtype)
    needs = (True,) * count
    results = []
    for kind in (dtype, torch.float32, torch.float64):
        out, gradients = backward(op, [x.to(kind) for x in tensors], grad.to(kind), needs, **options)
        results.append([x.to(dtype) for x in (out, *gradients)])
    for found, rounded, exact in zip(*results, strict=True):
        assert found.dtype == dtype and torch.equal(found, rounded)
        wrong = (found != exact).double().mean()
        assert wrong <= 256 * U32 / UNIT[dtype], f"{wrong:.2%} of the elements are not correctly rounded"
        assert difference(found, exact) < DIFFERENCE


@pytest.mark.parametrize("dtype", HALF)
def test_rounded_once_with_a_state(dtype):
    """The gradients through the result and the new state meet in the old state's and in value's."""
    tensors, old = conv_inputs(5, 2, 64, 4, dtype, dtype), state(2, 2, 64, 6, dtype)
    cu = torch.tensor([0, 1, 5], dtype=torch.int32)
    results = []
    for kind in (dtype, torch.float32):
        leaves = [x.detach().to(kind).requires_grad_() for x in (*tensors, old[0])] + [old[1].clone().requires_grad_()]
        out, new = conv(*leaves[:7], cu_seqlens=cu, conv_state=tuple(leaves[7:]))
        assert new[0].dtype == kind and new[1].dtype == torch.float32
        weights = [torch.linspace(-1, 2, x.numel()).view(x.shape).to(dtype) for x in (out, *new)]
        sum((x * w.to(x.dtype)).sum(dtype=torch.float32) for x, w in zip((out, *new), weights, strict=True)).backward()
        results.append([x.to(like.dtype) for x, like in zip((out, *new), (tensors[0], *old), strict=True)])
        results[-1] += [x.grad.to(like.dtype) for x, like in zip(leaves, (*tensors, *old), strict=True)]
    assert len(results[0]) == 12 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", ["gate masked", "conv packed"])
def test_masked_tokens_in_half_precision(form):
    """What a masked token holds comes back bit for bit, and reaches no gradient."""
    op, count, options = FORMS[form]
    tensors, grad = conv_inputs(12, 4, 64, 4, torch.bfloat16, torch.bfloat16)[:count], gradient_of(12, 4, 64)
    grad = grad.bfloat16()
    calm, before = backward(op, tensors, grad, (True,) * count, **options)
    for tensor in tensors[:3]:
        tensor[3] = math.nan
    out, after = backward(op, tensors, grad, (True,) * count, **options)
    keep = torch.arange(12) != 3
    assert torch.equal(out[keep], calm[keep]) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["gate masked", "conv packed"])
def test_kernel_rounded_once(device, form):
    """Kernels too: float64's gradients rounded once, but for what float32 misses, and the interpreter cuts off."""
    specified, count, options = FORMS[form]
    op = gate_residual if count == 5 else functools.partial(gate_conv_residual, dilation=2, conv_eps=CONV_EPS)
    needs = (True,) * count
    tensors, grad = conv_inputs(12, 4, 320, 4, torch.bfloat16, torch.bfloat16)[:count], gradient_of(12, 4, 320)
    grad = grad.bfloat16()
    _, exact = backward(specified, [x.double() for x in tensors], grad.double(), needs, **options)
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    _, found = backward(op, [x.to(device) for x in tensors], grad.to(device), needs, eps=EPS, **moved)
    # The share of wrong elements above, each off by 2 u of itself at most, of the squares of both. Gradients of a slope
    # from the hardware's approximate exponential come to a fifth of it, those added in bfloat16 to seven times.
    limit = 256 * U32 / UNIT[torch.bfloat16] * (2 * UNIT[torch.bfloat16]) ** 2 / 2
    if triton.knobs.runtime.interpret:
        limit = 4 * UNIT[torch.bfloat16] ** 2
    for result, wanted in zip(found, exact, strict=True):
        assert difference(result.cpu(), wanted.to(torch.bfloat16)) < limit
