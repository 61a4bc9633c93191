"""Gradients of gate_residual: the reference by finite differences, the kernels against its autograd in float64."""

import math

import pytest
import torch

from engram_kernels import gate_residual, reference, split_kv
from engram_kernels.ops.gate_kernels import backward as gate_backward
from engram_kernels.ops.gate_kernels.backward import gate_backward_config
from engram_kernels.ops.gate_kernels.gradients import split_gradient
from engram_kernels.testing import tolerances
from engram_kernels.testing.guards import Guarded
from tests.ops.test_gate import EPS, doubles, inputs
from tests.ops.test_registration import same
from tests.support.launches import launch_gate_backward

NAMES = ("hidden", "key", "value", "query_norm", "key_norm")


def gradient_of(tokens, branches, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + width)
    return torch.randn(tokens, branches, width, generator=generator).to(dtype)


def backward(op, tensors, grad, needs=(True,) * 5, **options):
    """The result of ``op`` and the gradients of its tensors, None where ``needs`` has False."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    out = op(*leaves, **options)
    out.backward(grad)
    return out.detach(), [leaf.grad for leaf in leaves]


def exact_gradients(op, tensors, grad, **options):
    return backward(op, [x.double().cpu() for x in tensors], grad.double().cpu(), **options)[1]


def check_gradients(found, tensors, grad, dtypes, mask=None, zero_gate="copysign", clamp=1e-6, residual=True):
    """Every gradient within its derived bound of the float64 reference."""
    options = dict(eps=EPS, clamp=clamp, mask=mask, zero_gate=zero_gate, residual=residual)
    exact = exact_gradients(reference.gate_residual, tensors, grad, **options)
    live = torch.ones(len(grad), dtype=torch.bool) if mask is None else mask
    arrays = doubles([*(x[live] for x in tensors[:3]), *tensors[3:]])
    bounds = tolerances.gate_gradient_bounds(
        arrays, *doubles([grad[live]]), eps=EPS, clamp=clamp, zero_gate=zero_gate, dtypes=dtypes, residual=residual
    )
    for place, (name, result) in enumerate(zip(NAMES, found, strict=True)):
        assert result.dtype == tensors[place].dtype and result.shape == tensors[place].shape, name
        result, wanted = result.cpu(), exact[place]
        if place < 3:
            rest = grad[~live] if name == "hidden" and residual else torch.zeros_like(tensors[place][~live])
            assert torch.equal(result[~live], rest), name
            result, wanted = result[live], wanted[live]
        tolerances.assert_within(result, wanted.numpy(), bounds[place])


@pytest.mark.parametrize("zero_gate", ["copysign", "sign"])
@pytest.mark.parametrize("clamp", [1e-6, 0.4])
def test_reference_gradcheck(zero_gate, clamp):
    tensors = [x.requires_grad_() for x in inputs(3, 2, 5, torch.float64, torch.float64)]
    mask = torch.tensor([True, False, True])
    options = dict(eps=EPS, clamp=clamp, zero_gate=zero_gate)
    assert torch.autograd.gradcheck(lambda *x: reference.gate_residual(*x, **options, mask=mask), tensors)
    assert torch.autograd.gradcheck(lambda *x: gate_residual(*x, **options, residual=False), tensors)


def test_reference_second_derivative():
    tensors = [x.requires_grad_() for x in inputs(2, 2, 3, torch.float64, torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *x: reference.gate_residual(*x, eps=EPS), tensors)


@pytest.mark.parametrize("zero_gate", ["copysign", "sign"])
@pytest.mark.parametrize("clamp", [0.0, 1e-6])
def test_reference_gradient_at_zero(zero_gate, clamp):
    """d = 0: the gate's slope counts as 0, with a clamp of 0 too, where that of the square root is infinite."""
    tensors, grad = inputs(5, 2, 16), gradient_of(5, 2, 16)
    _, found = backward(reference.gate_residual, tensors, grad, eps=EPS, zero_gate=zero_gate, clamp=clamp)
    assert all(x.isfinite().all() for x in found)
    assert torch.equal(found[0][2], grad[2]) and found[1][2].eq(0).all() and found[2][2].ne(0).all()


# Tokens, branches, width, dtype, norm dtype, zero_gate, clamp, masked, residual.
CASES = [
    (1, 4, 64, torch.float32, torch.float32, "copysign", 1e-6, False, True),
    (13, 4, 80, torch.bfloat16, torch.float32, "sign", 1e-6, True, True),
    (5, 3, 300, torch.float16, torch.bfloat16, "copysign", 0.2, False, False),
    (127, 1, 1000, torch.float32, torch.float16, "sign", 1e-6, False, True),
    (9, 8, 48, torch.bfloat16, torch.bfloat16, "copysign", 1e-6, True, False),
    (4, 5, 7, torch.float32, torch.float32, "sign", 0.0, False, True),
    (4, 2, 1, torch.float32, torch.float32, "copysign", 1e-6, False, True),
    (5, 4, 5120, torch.bfloat16, torch.bfloat16, "copysign", 1e-6, False, True),
    (2, 1, 16_384, torch.float32, torch.float32, "copysign", 1e-6, False, False),
]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens", "branches", "width", "dtype", "norms", "zero_gate", "clamp", "masked", "residual"), CASES
)
def test_kernel(device, tokens, branches, width, dtype, norms, zero_gate, clamp, masked, residual):
    tensors, grad = inputs(tokens, branches, width, dtype, norms), gradient_of(tokens, branches, width, dtype)
    mask = torch.arange(tokens) % 4 != 2 if masked else None
    given = [x.clone() for x in tensors]
    if masked:
        given[1][~mask], given[2][~mask] = math.nan, math.nan
    moved, options = [x.to(device) for x in given], dict(eps=EPS, clamp=clamp, zero_gate=zero_gate, residual=residual)
    options["mask"] = None if mask is None else mask.to(device)
    out, found = backward(gate_residual, moved, grad.to(device), **options)
    assert same(out, gate_residual(*moved, **options)), "recording changes the result"
    checked = dict(mask=mask, zero_gate=zero_gate, clamp=clamp, residual=residual)
    check_gradients(found, tensors, grad, (dtype, norms), **checked)


@pytest.mark.kernel
@pytest.mark.parametrize(("branches", "width"), [(5, 7), (3, 80), (4, 300)])
def test_kernel_writes_gradients_and_nothing_else(device, branches, width):
    """Guard bands wider than what a tile has beyond the last branch or element."""
    tensors, grad = inputs(5, branches, width), gradient_of(5, branches, width)
    moved = [x.to(device) for x in tensors]
    _, scalars = torch.ops.engram.gate_residual_scalars(*moved, EPS, 1e-6, None, "copysign", True)
    shapes = grad.shape, (5, (branches + 1) * width), tensors[3].shape, tensors[4].shape
    guarded = [Guarded(shape, torch.float32, device) for shape in shapes]
    needs, gradients = [True] * 5, [part.tensor for part in guarded]
    options = (scalars, 1e-6, None, "copysign", True, needs)
    launch_gate_backward(grad.to(device), *moved, *options, gradients)
    hidden, kv, *norms = (part.check() for part in guarded)
    key_value = split_gradient(kv, branches, width, needs)
    check_gradients([hidden, *key_value, *norms], tensors, grad, (torch.float32, torch.float32))


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_kernel_strides(device, layout):
    """Key and value of a misaligned kv, hidden a slice, and gradients as autograd hands them on."""
    tensors = inputs(6, 4, 72, torch.bfloat16)
    hidden, key, value, *norms = tensors
    wide = torch.zeros(6, 5 * 72 + 3, dtype=torch.bfloat16, device=device)
    wide[:, 3:] = torch.cat([key.flatten(1), value], 1).to(device)
    room = torch.zeros(6, 9, 72, dtype=torch.bfloat16, device=device)
    room[:, 2:6] = hidden.to(device)
    grad = gradient_of(6, 4, 72, torch.bfloat16).to(device)
    if layout == "expanded":
        grad = grad[:1, :1, :1].expand(6, 4, 72)
    elif layout == "transposed":
        grad = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    else:
        grad = torch.cat([grad, grad], 1)[:, 2:6]
    assert not grad.is_contiguous()
    views = room[:, 2:6], wide[:, 3:-72].unflatten(1, (4, 72)), wide[:, -72:], *(x.to(device) for x in norms)
    _, found = backward(gate_residual, views, grad, eps=EPS)
    check_gradients(found, tensors, grad.cpu(), (torch.bfloat16, torch.float32))


@pytest.mark.kernel
def test_kernel_batch_shape(device):
    """[B, S] has the gradients of its flattened tokens, from a gradient whose tokens do not view as one too."""
    hidden, key, value, *norms = (x.to(device) for x in inputs(6, 2, 32))
    grad = gradient_of(6, 2, 32).to(device)
    _, flat = backward(gate_residual, (hidden, key, value, *norms), grad, eps=EPS)
    tokens = [x.unflatten(0, (2, 3)) for x in (hidden, key, value, grad)]
    swapped = tokens[3].transpose(0, 1).contiguous().transpose(0, 1)
    for given in (tokens[3], swapped):
        _, found = backward(gate_residual, (*tokens[:3], *norms), given, eps=EPS)
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(found, flat, strict=True))


@pytest.mark.kernel
def test_kernel_computes_what_is_needed(device):
    """Each gradient alone, and pairs: those of a full pass bit for bit, and None for the rest."""
    tensors, grad = [x.to(device) for x in inputs(5, 2, 24)], gradient_of(5, 2, 24).to(device)
    _, whole = backward(gate_residual, tensors, grad, eps=EPS)
    for wanted in ({0}, {1}, {2}, {3}, {4}, {0, 2}, {1, 4}, {0, 1, 2}):
        needs = [place in wanted for place in range(5)]
        _, found = backward(gate_residual, tensors, grad, needs, eps=EPS)
        for place, (a, b) in enumerate(zip(found, whole, strict=True)):
            assert torch.equal(a, b) if place in wanted else a is None, (wanted, NAMES[place])


@pytest.mark.kernel
def test_kernel_batch_invariance_and_repeat(device):
    """A token's gradients are its own, bit for bit; those of the norms are the same bits twice."""
    tensors, grad = [x.to(device) for x in inputs(9, 4, 320)], gradient_of(9, 4, 320).to(device)
    _, whole = backward(gate_residual, tensors, grad, eps=EPS)
    _, again = backward(gate_residual, tensors, grad, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for first, last in ((0, 1), (6, 7), (3, 9)):
        part = [x[first:last] for x in tensors[:3]]
        _, found = backward(gate_residual, [*part, *tensors[3:]], grad[first:last], eps=EPS)
        assert all(torch.equal(a, b[first:last]) for a, b in zip(found[:3], whole[:3], strict=True))


@pytest.mark.kernel
def test_kernel_products_of_many_blocks(device, monkeypatch):
    """Few programs and many: a program adds up several blocks, and the reduction several programs' products."""
    tensors, grad = inputs(37, 2, 160), gradient_of(37, 2, 160)
    for processors in (1, 100):
        monkeypatch.setattr(gate_backward, "processors", lambda device, count=processors: count)
        _, found = backward(gate_residual, [x.to(device) for x in tensors], grad.to(device), eps=EPS)
        check_gradients(found, tensors, grad, (torch.float32, torch.float32))


@pytest.mark.kernel
@pytest.mark.parametrize("zero_gate", ["copysign", "sign"])
def test_kernel_flat_regions(device, zero_gate):
    """At d = 0 and below the clamp the gate does not move: the gradient of hidden is grad, that of key zero."""
    tensors, grad = inputs(6, 2, 16), gradient_of(6, 2, 16)
    moved = [x.to(device) for x in tensors]
    for clamp in (0.0, 1e-6):
        _, found = backward(gate_residual, moved, grad.to(device), eps=EPS, zero_gate=zero_gate, clamp=clamp)
        assert torch.equal(found[0][2].cpu(), grad[2]) and found[1][2].eq(0).all() and found[2][2].ne(0).all()
        assert found[1][[0, 1, 3, 4, 5]].ne(0).any(-1).all()
    _, found = backward(gate_residual, moved, grad.to(device), eps=EPS, zero_gate=zero_gate, clamp=9.0)
    assert torch.equal(found[0].cpu(), grad) and all(x.eq(0).all() for x in (found[1], *found[3:]))


@pytest.mark.kernel
def test_kernel_nan_stays_in_its_token(device):
    """NaN in an input or in grad spoils its own token's gradients; where a token is masked, grad alone is passed on."""
    tensors, grad = list(inputs(8, 2, 24)), gradient_of(8, 2, 24)
    tensors[0][1, 0, 3], tensors[1][2, 1, 5], grad[3, 1, 0] = math.nan, math.nan, math.nan
    tensors[0][5], tensors[1][5], tensors[2][5], grad[5, 0, 7] = math.nan, math.nan, math.nan, math.nan
    mask = torch.arange(8) != 5
    moved = [x.to(device) for x in tensors]
    _, found = backward(gate_residual, moved, grad.to(device), eps=EPS, mask=mask.to(device))
    bad = [x.cpu().isnan().flatten(1).any(1).tolist() for x in found[:3]]
    assert bad[0] == [False, True, True, True, False, True, False, False]
    assert bad[1] == bad[2] == [False, True, True, True, False, False, False, False]
    assert torch.equal(found[0][5].cpu().isnan(), grad[5].isnan())


@pytest.mark.kernel
@pytest.mark.parametrize("power", [-130, -60, 60])
def test_kernel_small_and_large(device, power):
    """Subnormal, tiny and huge hidden states: no factor of the gradients leaves float32."""
    hidden, *rest = inputs(6, 2, 80)
    tensors, grad = (hidden * 2.0**power, *rest), gradient_of(6, 2, 80)
    options = dict(eps=EPS, residual=False)
    _, found = backward(gate_residual, [x.to(device) for x in tensors], grad.to(device), **options)
    check_gradients(found, tensors, grad, (torch.float32, torch.float32), residual=False)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_reference_agree_beyond_float32(device, dtype):
    """Rows whose squares leave float32 have scale 0 and d = 0, hence a flat gate; an infinite or NaN row spoils all."""
    tensors, grad = list(inputs(8, 2, 24, dtype)), gradient_of(8, 2, 24, dtype)
    tensors[0][3], tensors[1][4] = 3e38 * torch.sign(tensors[0][3]), 1e38 * torch.sign(tensors[1][4])
    tensors[0][5, 0], tensors[1][5, 0] = 1e38, -1e30
    tensors[0][6, 1, 3], tensors[1][7, 0, 5], grad[2, 0, 1] = math.inf, math.nan, math.inf
    _, expected = backward(reference.gate_residual, tensors, grad, eps=EPS)
    _, found = backward(gate_residual, [x.to(device) for x in tensors], grad.to(device), eps=EPS)
    flat = [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (2, 0)]
    for token, branch in flat:
        assert torch.equal(found[0][token, branch].cpu(), grad[token, branch])
        assert found[1][token, branch].eq(0).all()
    for name, result, wanted in zip(NAMES, found, expected, strict=True):
        result = result.cpu()
        assert torch.equal(result.isnan(), wanted.isnan()), name
        finite = wanted.isfinite()
        close = 2.0**-6 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result[finite], wanted[finite], rtol=close, atol=close)


@pytest.mark.kernel
def test_no_tokens(device):
    tensors = [x.to(device) for x in inputs(0, 2, 8)]
    out, found = backward(gate_residual, tensors, torch.zeros(0, 2, 8, device=device), eps=EPS)
    assert out.shape == (0, 2, 8) and found[1].shape == (0, 2, 8) and found[2].shape == (0, 8)
    assert found[3].eq(0).all() and found[4].eq(0).all()
    gate_residual(*(x.to(device) for x in inputs(1, 2, 8)), eps=EPS)


@pytest.mark.kernel
def test_second_derivative_is_refused(device):
    tensors = [x.to(device).requires_grad_() for x in inputs(3, 2, 8)]
    (grad_value,) = torch.autograd.grad(gate_residual(*tensors, eps=EPS).square().sum(), tensors[2], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gate_residual: its gradient cannot be differentiated again"):
        grad_value.sum().backward()


@pytest.mark.kernel
def test_recorded_result_is_copied_to_out(device):
    tensors = [x.to(device) for x in inputs(4, 2, 16)]
    tensors[2].requires_grad_()
    out = torch.empty_like(tensors[0])
    result = gate_residual(*tensors, eps=EPS, out=out)
    assert result is out and result.requires_grad
    with torch.no_grad():
        assert torch.equal(out, gate_residual(*tensors, eps=EPS))


@pytest.mark.kernel
def test_split_kv_joins_without_a_copy(device):
    """The gradient of kv is the very tensor that the kernel wrote; other gradients are put together."""
    hidden, key, value, *norms = (x.to(device) for x in inputs(5, 2, 16))
    kv = torch.cat([key.flatten(1), value], 1).requires_grad_()
    out = gate_residual(hidden, *split_kv(kv, 2, 16), *norms, eps=EPS)
    grad = gradient_of(5, 2, 16).to(device)
    allocated = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            allocated.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        (found,) = torch.autograd.grad(out, kv, grad)
    assert not [name for name in allocated if "cat" in name or "copy" in name or "zeros" in name]
    _, expected = backward(gate_residual, (hidden, key, value, *norms), grad, eps=EPS)
    joined = torch.cat([expected[1].flatten(1), expected[2]], 1)
    assert torch.equal(found, joined)
    key_view, value_view = split_kv(kv, 2, 16)
    (found,) = torch.autograd.grad((key_view * 1).sum() + (value_view * 2).sum(), kv)
    assert torch.equal(found, torch.cat([torch.ones(5, 32), torch.full((5, 16), 2.0)], 1).to(device))
    (found,) = torch.autograd.grad((split_kv(kv, 2, 16)[1] * 3).sum(), kv)
    assert found[:, :32].eq(0).all() and found[:, 32:].eq(3).all()


def test_config():
    config = gate_backward_config(4, 5120, 8192, 132)
    assert (config.block_t, config.block_h, config.block_d, config.programs) == (2, 4, 1024, 264)
    assert gate_backward_config(4, 5120, 3, 132).programs == 2
    assert gate_backward_config(4, 5120, 1, 132).block_d == config.block_d
