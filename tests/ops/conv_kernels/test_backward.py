"""Gradients of gate_conv_residual: the reference by finite differences, the kernels against its autograd in float64."""

import math

import numpy as np
import pytest
import torch

from engram_kernels import gate_conv_residual, reference, split_kv
from engram_kernels.ops.conv_kernels import backward as gate_conv_backward
from engram_kernels.ops.conv_kernels.backward import conv_backward_config, make_conv_gradients
from engram_kernels.ops.gate_kernels.gradients import split_gradient
from engram_kernels.testing import oracles, tolerances
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.inputs import starts_of
from tests.ops.gate_kernels.test_backward import backward, gradient_of
from tests.ops.test_gate import EPS, doubles
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs, packed, state
from tests.ops.test_registration import same
from tests.support.launches import launch_gate_conv_backward

NAMES = ("hidden", "key", "value", "query_norm", "key_norm", "conv_norm", "conv_weight")
ALL = (True,) * 7


def check_gradients(found, tensors, grad, dtypes, *, dilation, starts, mask=None, residual=True, exact):
    """Every gradient within its derived bound of ``exact``; ``starts`` ends where padding begins."""
    known = len(starts)
    on = torch.ones(known, dtype=torch.bool) if mask is None else mask[:known]
    hidden, key, value, *weights = doubles(tensors)
    hidden, key, value = hidden[:known], np.where(on[:, None, None], key[:known], 1.0), value[:known]
    value = np.where(on[:, None], value, 0.0)
    d, magnitude = oracles.gate_parts(hidden, key, *weights[:2], EPS)
    gate = np.where(on[:, None], oracles.gate_of(d), 0.0)
    gate_error = np.where(on[:, None], tolerances.gate_bound(d, magnitude, hidden.shape[-1], 1e-6, "copysign"), 0.0)
    arrays, (grad_array,) = (hidden, key, value, *weights), doubles([grad[:known]])
    options = dict(dilation=dilation, conv_eps=CONV_EPS, starts=starts, dtypes=dtypes)
    *conv_bounds, parts = tolerances.conv_gradient_bounds(arrays, grad_array, gate, gate_error, **options)
    live = [x[on.numpy()] for x in (hidden, key, value)]
    gate_bounds = tolerances.gate_gradient_bounds(
        (*live, *weights[:2]),
        grad_array[on.numpy()],
        eps=EPS,
        clamp=1e-6,
        zero_gate="copysign",
        dtypes=dtypes,
        residual=residual,
        known=[part[on.numpy()] for part in parts],
    )
    on = torch.cat([on, torch.zeros(len(grad) - known, dtype=torch.bool)])
    for place, (name, bound) in enumerate(zip(NAMES, [*gate_bounds, *conv_bounds], strict=True)):
        result, wanted = found[place], exact[place]
        assert result.dtype == tensors[place].dtype and result.shape == tensors[place].shape, name
        result = result.cpu()
        if place < 3:
            rest = grad[~on] if name == "hidden" and residual else torch.zeros_like(tensors[place][~on])
            assert torch.equal(result[~on], rest), name
            result, wanted = result[on], wanted[on]
        tolerances.assert_within(result, wanted.numpy(), bound)


def exact_gradients(tensors, grad, **options):
    tensors = [x.double().cpu() for x in tensors]
    return backward(reference.gate_conv_residual, tensors, grad.double().cpu(), ALL, **options)[1]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("zero_gate", ["copysign", "sign"])
def test_reference_gradcheck(residual, zero_gate):
    tensors = [x.requires_grad_() for x in conv_inputs(5, 2, 3, 3, torch.float64, torch.float64)]
    cu, mask = torch.tensor([0, 2, 2, 4], dtype=torch.int32), torch.tensor([True, True, False, True, True])
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS, cu_seqlens=cu, mask=mask, residual=residual)
    op = reference.gate_conv_residual
    assert torch.autograd.gradcheck(lambda *x: op(*x, **options, zero_gate=zero_gate), tensors)


# Tokens, branches, width, taps, dilation, dtype, norm dtype, packed, masked, residual.
CASES = [
    (12, 4, 64, 4, 3, torch.float32, torch.float32, True, True, True),
    (12, 3, 80, 4, 2, torch.bfloat16, torch.float32, True, False, False),
    (12, 1, 100, 2, 1, torch.float16, torch.bfloat16, False, True, True),
    (1, 4, 48, 4, 3, torch.float32, torch.float16, False, False, True),
    (3, 2, 7, 1, 5, torch.float32, torch.float32, False, True, True),
    (40, 2, 40, 3, 9, torch.float32, torch.float32, False, True, False),
    (7, 5, 24, 2, 2**29, torch.bfloat16, torch.bfloat16, False, False, True),
]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens", "branches", "width", "taps", "dilation", "dtype", "norms", "pack", "masked", "residual"), CASES
)
def test_kernel(device, tokens, branches, width, taps, dilation, dtype, norms, pack, masked, residual):
    tensors = conv_inputs(tokens, branches, width, taps, dtype, norms)
    grad = gradient_of(tokens, branches, width, dtype)
    cu, mask = packed() if pack else None, torch.arange(tokens) % 5 != 3 if masked else None
    given = [x.clone() for x in tensors]
    if masked:
        given[1][~mask], given[2][~mask] = math.nan, math.nan
    options = dict(dilation=dilation, eps=EPS, conv_eps=CONV_EPS, residual=residual)
    exact = exact_gradients(given, grad, **options, cu_seqlens=cu, mask=mask)
    options["cu_seqlens"], options["mask"] = (None if x is None else x.to(device) for x in (cu, mask))
    moved = [x.to(device) for x in given]
    out, found = backward(gate_conv_residual, moved, grad.to(device), ALL, **options)
    assert same(out, gate_conv_residual(*moved, **options)), "recording changes the result"
    starts = [start for start in starts_of(tokens, cu) if start is not None]
    checked = dict(dilation=dilation, starts=starts, mask=mask, residual=residual, exact=exact)
    check_gradients(found, tensors, grad, (dtype, norms), **checked)


@pytest.mark.kernel
@pytest.mark.parametrize(("branches", "width"), [(3, 40), (5, 7)])
def test_kernel_writes_gradients_and_nothing_else(device, branches, width):
    tensors, grad = conv_inputs(5, branches, width, 3), gradient_of(5, branches, width)
    moved = [x.to(device) for x in tensors]
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    _, *recorded = torch.ops.engram.gate_conv_residual_scalars(
        *moved, 2, EPS, CONV_EPS, 1e-6, None, "copysign", True, None
    )
    shapes = grad.shape, (5, (branches + 1) * width), *(x.shape for x in tensors[3:])
    guarded = [Guarded(shape, torch.float32, device) for shape in shapes]
    rest = (*recorded, 2, CONV_EPS, 1e-6, None, "copysign", True, None, list(ALL))
    launch_gate_conv_backward(grad.to(device), *moved, *rest, [part.tensor for part in guarded])
    hidden, kv, *weights = (part.check() for part in guarded)
    found = hidden, *split_gradient(kv, branches, width, ALL), *weights
    exact = exact_gradients(tensors, grad, **options)
    check_gradients(found, tensors, grad, (torch.float32, torch.float32), dilation=2, starts=[0] * 5, exact=exact)


@pytest.mark.kernel
def test_kernel_strides(device):
    """Key and value of one kv, the weight with taps first, and a gradient whose last dimension is not dense."""
    tensors, grad = conv_inputs(7, 4, 40, 4, torch.bfloat16, torch.bfloat16), gradient_of(7, 4, 40, torch.bfloat16)
    hidden, key, value, *norms, weight = (x.to(device) for x in tensors)
    kv = torch.cat([key.flatten(1), value], 1)
    taps_first = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    views = hidden, *split_kv(kv, 4, 40), *norms, taps_first
    turned = grad.to(device).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    _, found = backward(gate_conv_residual, views, turned, ALL, **options)
    dtypes, exact = (torch.bfloat16, torch.bfloat16), exact_gradients(tensors, grad, **options)
    check_gradients(found, tensors, grad, dtypes, dilation=2, starts=[0] * 7, exact=exact)


@pytest.mark.kernel
def test_kernel_many_tiles(device, monkeypatch):
    """One group of several tiles, and a group a tile, whose last tokens reach into the next: the same gradients."""
    tensors, grad = conv_inputs(70, 2, 20, 3), gradient_of(70, 2, 20)
    options = dict(dilation=5, eps=EPS, conv_eps=CONV_EPS)
    exact, per_token = exact_gradients(tensors, grad, **options), []
    for processors in (0, 100):
        monkeypatch.setattr(gate_conv_backward, "processors", lambda device, count=processors: count)
        _, found = backward(gate_conv_residual, [x.to(device) for x in tensors], grad.to(device), ALL, **options)
        dtypes = (torch.float32, torch.float32)
        check_gradients(found, tensors, grad, dtypes, dilation=5, starts=[0] * 70, exact=exact)
        per_token.append(found[:3])
    assert all(torch.equal(a, b) for a, b in zip(*per_token, strict=True))


@pytest.mark.kernel
def test_kernel_computes_what_is_needed(device):
    """Each gradient alone, and pairs: those of a full pass bit for bit, and None for the rest."""
    tensors, grad = [x.to(device) for x in conv_inputs(4, 2, 12, 2)], gradient_of(4, 2, 12).to(device)
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS)
    _, whole = backward(gate_conv_residual, tensors, grad, ALL, **options)
    for wanted in ({0}, {1}, {2}, {3}, {5}, {6}, {4, 6}, {0, 2}, {5, 6}):
        needs = [place in wanted for place in range(7)]
        _, found = backward(gate_conv_residual, tensors, grad, needs, **options)
        for place, (a, b) in enumerate(zip(found, whole, strict=True)):
            assert torch.equal(a, b) if place in wanted else a is None, (wanted, NAMES[place])


@pytest.mark.kernel
def test_kernel_sequences_do_not_mix(device):
    """Two sequences packed, batched, or one at a time: the same bits for tokens; and the same bits twice."""
    tensors, grad = [x.to(device) for x in conv_inputs(8, 2, 32, 3)], gradient_of(8, 2, 32).to(device)
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)
    _, whole = backward(gate_conv_residual, tensors, grad, ALL, **options, cu_seqlens=cu)
    _, again = backward(gate_conv_residual, tensors, grad, ALL, **options, cu_seqlens=cu)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for part in (slice(0, 3), slice(3, 8)):
        alone = [*(x[part] for x in tensors[:3]), *tensors[3:]]
        _, found = backward(gate_conv_residual, alone, grad[part], ALL, **options)
        assert all(torch.equal(a, b[part]) for a, b in zip(found[:3], whole[:3], strict=True))
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    _, even = backward(gate_conv_residual, tensors, grad, ALL, **options, cu_seqlens=cu)
    batch = [*(x.unflatten(0, (2, 4)) for x in tensors[:3]), *tensors[3:]]
    _, found = backward(gate_conv_residual, batch, grad.unflatten(0, (2, 4)), ALL, **options)
    assert all(torch.equal(a.view_as(b), b) for a, b in zip(found, even, strict=True))


@pytest.mark.kernel
def test_kernel_nan_stays_where_the_window_reaches(device):
    """NaN in grad reaches the value of tokens that its token's taps read, itself included, and no other token.

    It reaches their gates too, hence their keys, but token 2's, which is flat at d = 0. The reference has the same.
    """
    tensors, grad = [x.to(device) for x in conv_inputs(9, 2, 16, 3)], gradient_of(9, 2, 16)
    grad[6, 1, 3] = math.nan
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    _, found = backward(gate_conv_residual, tensors, grad.to(device), ALL, **options)
    _, expected = backward(reference.gate_conv_residual, [x.cpu() for x in tensors], grad, ALL, **options)
    for gradient, same_of, tokens in zip(found[1:3], expected[1:3], ((4, 6), (2, 4, 6)), strict=True):
        bad = gradient.cpu().isnan()
        assert bad.flatten(1).any(1).tolist() == [token in tokens for token in range(9)]
        assert torch.equal(bad, same_of.isnan())


@pytest.mark.kernel
def test_kernel_allocates_no_gated_tensor(device):
    """Beyond the gradients: value_part [T, D], sums [chunks, 2, T, H], both float32, and what does not grow with T."""
    tensors, grad = [x.to(device) for x in conv_inputs(11, 2, 256, 2)], gradient_of(11, 2, 256).to(device)
    options = (1e-6, None, "copysign", True, None)
    _, *recorded = torch.ops.engram.gate_conv_residual_scalars(*tensors, 1, EPS, CONV_EPS, *options)
    gradients, seen = make_conv_gradients(tensors[0], *tensors[3:], ALL), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # Not the copies that the interpreter makes of its arguments.
            if "empty" in func.__name__ or "zeros" in func.__name__ or "new" in func.__name__:
                seen.append(tuple(result.shape))
            return result

    with Watch():
        launch_gate_conv_backward(grad, *tensors, *recorded, 1, CONV_EPS, *options, list(ALL), gradients)
    chunks = 256 // conv_backward_config(2, 256, 2, 11, 2).block_d
    assert sorted(shape for shape in seen if 11 in shape) == sorted([(chunks, 2, 11, 2), (11, 256)]), seen
    assert gradients[1].shape == (11, 3 * 256)


@pytest.mark.kernel
def test_a_state_trains_through_the_reference(device):
    tensors = [x.to(device) for x in conv_inputs(5, 2, 12, 3)]
    conv_state = tuple(x.to(device) for x in state(1, 2, 12, 4))
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    gate_conv_residual(*tensors, **options)  # a kernel, where nothing is recorded
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, _ = gate_conv_residual(*leaves, **options, conv_state=conv_state)
    expected, _ = reference.gate_conv_residual(*leaves, **options, conv_state=conv_state)
    assert torch.equal(out, expected)


@pytest.mark.kernel
def test_no_tokens(device):
    tensors = [x.to(device) for x in conv_inputs(0, 2, 8, 3)]
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    _, found = backward(gate_conv_residual, tensors, torch.zeros(0, 2, 8, device=device), ALL, **options)
    assert all(x.shape == y.shape and x.eq(0).all() for x, y in zip(found, tensors, strict=True))
    gate_conv_residual(*(x.to(device) for x in conv_inputs(1, 2, 8, 3)), **options)


@pytest.mark.kernel
def test_second_derivative_is_refused(device):
    tensors = [x.to(device).requires_grad_() for x in conv_inputs(3, 2, 8, 2)]
    out = gate_conv_residual(*tensors, dilation=1, eps=EPS, conv_eps=CONV_EPS)
    (grad_weight,) = torch.autograd.grad(out.square().sum(), tensors[6], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gate_conv_residual: its gradient cannot be differentiated again"):
        grad_weight.sum().backward()


def test_config():
    config = conv_backward_config(4, 2560, 4, 8192, 132)
    assert (config.block_t, config.block_d, config.group_tokens) == (32, 32, 160)
    assert conv_backward_config(4, 2560, 4, 3, 132).group_tokens == 32
    for branches, taps in ((8, 4), (8, 64), (1, 1), (8, 1024)):
        block_d = conv_backward_config(branches, 2560, taps, 8192, 132).block_d
        assert block_d >= 1 and block_d * branches * taps <= 8192
