"""A token's gradients are the same bits in every form of a call, and those of the weights whatever else is asked for.

Each case runs whole, then again in other forms: gradients alone and in pairs, tokens alone, masks, packed,
addresses and strides that are no multiples of 16 bytes. Each form may be another variant of a kernel, with layouts of
its own, which the interpreter does not have: one case of each is enough there. Sizes are chosen in pairs. Compiling all
forms of all cases takes minutes: with ``--cases few`` one case takes every sixth form, the next one the next ones, so
that each form is taken by a case or two.
"""

import itertools

import pytest
import torch
import triton

from engram_kernels import split_kv
from engram_kernels.ops.gate_kernels.gradients import arrange_gradients
from engram_kernels.tables.gradient import row_gradient
from tests.ops.test_gate import EPS
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs

from .test_backward import gradient_of

pytestmark = pytest.mark.kernel
FULL, HALF, SHORT = torch.float32, torch.bfloat16, torch.float16
GATES = [  # branches, D, dtype, norms' dtype
    (3, 80, HALF, FULL),
    (5, 7, FULL, FULL),
    (1, 1000, FULL, SHORT),
    (2, 12, FULL, FULL),
    (4, 320, FULL, HALF),
    (4, 1536, HALF, HALF),
    (6, 31, SHORT, HALF),
    (7, 5, HALF, FULL),
    (8, 64, HALF, SHORT),
]
CONVS = [  # branches, D, dtype, norms' dtype, taps, dilation
    (2, 12, FULL, FULL, 2, 1),
    (7, 5, HALF, FULL, 4, 1),
    (1, 1000, FULL, HALF, 2, 1),
    (3, 80, HALF, FULL, 4, 3),
    (4, 320, HALF, HALF, 4, 2),
    (5, 7, FULL, FULL, 3, 1),
    (6, 31, SHORT, HALF, 1, 5),
    (8, 64, FULL, SHORT, 3, 2),
]
TOKENS = 5
CASES = slice(1 if triton.knobs.runtime.interpret else None)
SUBSETS = [{0}, {1}, {2}, {3}, {4}, {0, 2}, {1, 4}, {0, 1, 2}]
CONV_SUBSETS = [{0}, {1}, {2}, {3}, {5}, {6}, {0, 2}, {1, 5}, {0, 1, 2}]


def moved(tensor, pad=0):
    """The same values an element further in memory, and with ``pad``, rows that many elements further apart."""
    rows = tensor.reshape(len(tensor), -1)
    buffer = rows.new_zeros(1 + len(rows) * (rows.shape[1] + pad))
    view = buffer[1:].view(len(rows), -1)[:, : rows.shape[1]].unflatten(1, tensor.shape[1:])
    return view.copy_(tensor)


def compare(found, whole, label, tokens=slice(None)):
    for place, (gradient, wanted) in enumerate(zip(found, whole, strict=True)):
        if gradient is not None:
            wanted = wanted[tokens] if place < 3 else wanted
            assert torch.equal(gradient, wanted), f"gradient {place} has other bits: {label}"


@pytest.fixture
def turns(request):
    """``turns(number)``: a function that says whether case ``number`` takes its next form."""
    few = request.config.option.cases == "few" and not triton.knobs.runtime.interpret

    def of(number):
        count = itertools.count(number)
        return lambda: not few or next(count) % 6 == 0

    return of


def every_form(run, tensors, recorded, grad, subsets, device, turn):
    """Compare the forms that gates with a convolution and without have in common; returns the whole gradients."""
    whole = run(grad, tensors, recorded)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in whole)
    for wanted in [subset for subset in subsets if turn()]:
        needs = [place in wanted for place in range(len(tensors))]
        found = run(grad, tensors, recorded, needs=needs)
        assert [gradient is not None for gradient in found] == needs
        compare(found, whole, f"{wanted} alone")
    everyone = torch.ones(TOKENS, dtype=torch.bool, device=device)
    if turn():
        compare(run(grad, tensors, recorded, mask=everyone), whole, "a mask of all tokens")
    hidden, key, value, *weights = tensors
    branches, width = hidden.shape[1:]
    kv = torch.cat([key.flatten(1), value], 1)
    views = split_kv(kv, branches, width)
    norms = [moved(weight) for weight in weights[:2]]
    for label, given in {
        "views of one kv": (hidden, *views, *weights),
        "hidden elsewhere": (moved(hidden), key, value, *weights),
        "key and value elsewhere": (hidden, moved(key, 3), moved(value, 5), *weights),
        "norms elsewhere": (hidden, key, value, *norms, *weights[2:]),
    }.items():
        if turn():
            compare(run(grad, given, recorded), whole, label)
    if turn():
        compare(run(moved(grad, 1), tensors, recorded), whole, "grad elsewhere")
    return whole


@pytest.mark.parametrize(("branches", "width", "dtype", "norms"), GATES[CASES])
def test_gate(device, turns, branches, width, dtype, norms):
    turn = turns(GATES.index((branches, width, dtype, norms)))
    tensors = [x.to(device) for x in conv_inputs(TOKENS, branches, width, 1, dtype, norms)[:5]]
    grad = gradient_of(TOKENS, branches, width, dtype).to(device)
    _, scalars = torch.ops.engram.gate_residual_scalars(*tensors, EPS, 1e-6, None, "copysign", True)

    def run(grad, tensors, scalars, needs=(True,) * 5, mask=None):
        options = (scalars, 1e-6, mask, "copysign", True, list(needs))
        found = torch.ops.engram.gate_residual_backward(grad, *tensors, *options)
        return arrange_gradients(found, tensors[0], needs)

    whole = every_form(run, tensors, scalars, grad, SUBSETS, device, turn)
    for tokens in [tokens for tokens in (slice(0, 1), slice(1, 4)) if turn()]:
        part = [x[tokens] for x in tensors[:3]] + tensors[3:]
        found = run(grad[tokens], part, scalars[tokens])
        compare([*found[:3], None, None], whole, f"tokens {tokens} alone", tokens)
    if turn():
        some = torch.arange(TOKENS, device=device) != 2
        found = run(grad, tensors, scalars, mask=some)
        compare([*(x[some] for x in found[:3]), None, None], whole, "a mask of some", some)


@pytest.mark.parametrize(("branches", "width", "dtype", "norms", "taps", "dilation"), CONVS[CASES])
def test_conv(device, turns, branches, width, dtype, norms, taps, dilation):
    turn = turns(CONVS.index((branches, width, dtype, norms, taps, dilation)))
    tensors = [x.to(device) for x in conv_inputs(TOKENS, branches, width, taps, dtype, norms)]
    grad = gradient_of(TOKENS, branches, width, dtype).to(device)
    options = (dilation, EPS, CONV_EPS, 1e-6, None, "copysign", True, None)
    _, *recorded = torch.ops.engram.gate_conv_residual_scalars(*tensors, *options)

    def run(grad, tensors, recorded, needs=(True,) * 7, mask=None, cu=None):
        options = (dilation, CONV_EPS, 1e-6, mask, "copysign", True, cu, list(needs))
        found = torch.ops.engram.gate_conv_residual_backward(grad, *tensors, *recorded, *options)
        return arrange_gradients(found, tensors[0], needs)

    whole = every_form(run, tensors, recorded, grad, CONV_SUBSETS, device, turn)
    *rest, weight = tensors
    taps_first = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if turn():
        compare(run(grad, (*rest, taps_first), recorded), whole, "taps first")
    if turn():
        cu = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
        compare(run(grad, tensors, recorded, cu=cu), whole, "one sequence, packed")
    if not turn():
        return
    # The last sequence alone is what it was, behind others.
    cu = torch.tensor([0, 2, TOKENS], dtype=torch.int32, device=device)
    packed, tokens = run(grad, tensors, recorded, cu=cu), slice(2, None)
    part = [x[tokens] for x in tensors[:3]] + tensors[3:]
    found = run(grad[tokens], part, [x[tokens] for x in recorded])
    compare([*found[:3], *[None] * 4], packed, "a sequence alone", tokens)


@pytest.mark.parametrize(("width", "dtype"), [(7, FULL), (80, HALF), (320, SHORT), (1024, FULL)][CASES])
def test_rows(device, width, dtype):
    """Sums of one to thirty entries a row, at any address and with ids of any width."""
    ids = torch.tensor([3] * 30 + [5] * 9 + [8, 8, 0], device=device)[torch.randperm(42).to(device)]
    grad = torch.randn(42, width).to(dtype).to(device)
    whole = row_gradient(ids, grad, 9)
    for label, other in {
        "elsewhere": row_gradient(ids, moved(grad), 9),
        "rows apart": row_gradient(ids, moved(grad, 3), 9),
        "ids of 32 bits": row_gradient(ids.int(), grad, 9),
        "keys of 64 bits": row_gradient(ids, grad, 2**33),
        "among others": row_gradient(torch.cat([ids, ids + 20]), torch.cat([grad, grad]), 50),
    }.items():
        for found, wanted in ((other.values, whole.values), (other.squares, whole.squares)):
            assert torch.equal(found[:4], wanted[:4]), label
