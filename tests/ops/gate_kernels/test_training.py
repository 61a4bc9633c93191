"""Training through the gates and the Engram module with plain PyTorch: opcheck, torch.compile, autocast, checkpointing.

In the interpret lane on kernels, in the cpu lane on the references.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from engram_kernels import gate_conv_residual, gate_residual, hash_lookup, split_kv
from tests.nn.test_engram import FORMS, built
from tests.ops.test_gate import inputs
from tests.ops.test_gate_conv import conv_inputs
from tests.ops.test_registration import CHECKS, compiled, same

from .test_backward import gradient_of

CHECKS_OF_GRADIENTS = (*CHECKS, "test_autograd_registration")


def check(name, *arguments, checks=CHECKS_OF_GRADIENTS):
    torch.library.opcheck(getattr(torch.ops.engram, name).default, arguments, test_utils=checks)


@pytest.mark.kernel
@pytest.mark.graphs
def test_opcheck_gate(device):
    hidden, key, value, *norms = (x.to(device).requires_grad_() for x in inputs(5, 4, 24))
    mask = torch.arange(5, device=device) % 2 == 0
    check("gate_residual_scalars", hidden, key, value, *norms, None, 1e-6, mask, "sign", False)
    tensors = [x.detach() for x in (hidden, key, value, *norms)]
    _, scalars = torch.ops.engram.gate_residual_scalars(*tensors, 1e-6, 1e-6, None, "copysign", True)
    grad = gradient_of(5, 4, 24).to(device)
    for needs in ([True] * 5, [False, True, False, False, True]):
        check("gate_residual_backward", grad, *tensors, scalars, 1e-6, None, "copysign", True, needs, checks=CHECKS)


@pytest.mark.kernel
@pytest.mark.graphs
def test_opcheck_conv(device):
    tensors = [x.to(device).requires_grad_() for x in conv_inputs(6, 2, 16, 3)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    options = (2, 1e-6, 1e-5, 1e-6, None, "sign", True, cu)
    check("gate_conv_residual_scalars", *tensors, *options)
    tensors = [x.detach() for x in tensors]
    _, *recorded = torch.ops.engram.gate_conv_residual_scalars(*tensors, *options)
    grad = gradient_of(6, 2, 16).to(device)
    for needs in ([True] * 7, [False, False, True, False, False, False, True]):
        arguments = (grad, *tensors, *recorded, 2, 1e-5, 1e-6, None, "sign", True, cu, needs)
        check("gate_conv_residual_backward", *arguments, checks=CHECKS)


def gradients_of(step, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = step(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.kernel
@pytest.mark.graphs
def test_compile_gates_over_lengths(device):
    """Forward and backward in one graph each, for every number of tokens after the first; equal bits to eager calls."""
    mixed = dict(dilation=2, eps=1e-6, conv_eps=1e-5)
    steps = (
        (lambda *x: gate_residual(*x, eps=1e-6), lambda tokens: inputs(tokens, 2, 16)),
        (lambda *x: gate_conv_residual(*x, **mixed), lambda tokens: conv_inputs(tokens, 2, 16, 3)),
    )
    for step, make in steps:
        run = compiled(step)
        for tokens in (3, 5):
            tensors, grad = [x.to(device) for x in make(tokens)], gradient_of(tokens, 2, 16).to(device)
            found, expected = (gradients_of(each, tensors, grad) for each in (run, step))
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def module_gradients(module, call, hidden):
    """The output, and the gradients of hidden and of every parameter."""
    leaf = hidden.detach().requires_grad_()
    out = call(leaf)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [leaf, *module.parameters()])]


def batch(device, form):
    module, plan, tables = built(form, device)
    hidden, ids = torch.randn(2, 5, 2, 24, device=device), torch.randint(0, 40, (2, 5), device=device)
    return module, hidden, ids, hash_lookup(ids, plan, tables)[-1].flatten(-2)


def check_compiled(device, form):
    module, hidden, ids, _ = batch(device, form)
    run = compiled(module)
    found = module_gradients(module, lambda x: run(x, ids), hidden)
    expected = module_gradients(module, lambda x: module(x, ids), hidden)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def check_checkpointed(device, form, reentrant):
    """Computed again in the backward pass, the same bits."""
    module, hidden, ids, _ = batch(device, form)
    found, expected = [], []
    for gradients, call in (
        (found, lambda x: checkpoint(module, x, ids, use_reentrant=reentrant)),
        (expected, lambda x: module(x, ids)),
    ):
        leaf = hidden.detach().requires_grad_()
        module.zero_grad()
        call(leaf).square().sum().backward()
        gradients += [leaf.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_autocast(device, form):
    """Hidden in float32, the projection in bfloat16: what casting by hand gives; gradients in their tensors' dtypes."""
    module, hidden, ids, rows = batch(device, form)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = module_gradients(module, lambda x: module(x, ids), hidden)
    weights = [None if x is None else x.to(torch.bfloat16) for x in (module.wkv.weight, module.wkv.bias)]
    kv = torch.nn.functional.linear(rows.to(torch.bfloat16), *weights).float()
    key, value = split_kv(kv, 2, 24)
    norms, options = (module.q_weight, module.k_weight), dict(eps=1e-6, zero_gate=module.config.zero_gate)
    if module.config.conv_kernel:
        weights = module.conv_norm, module.conv_weight
        options |= dict(dilation=3, conv_eps=module.config.conv_eps)
        expected = gate_conv_residual(hidden, key, value, *norms, *weights, **options)
    else:
        expected = gate_residual(hidden, key, value, *norms, **options)
    assert torch.equal(found[0], expected) and found[0].dtype == torch.float32
    wanted = [hidden.dtype, *(parameter.dtype for parameter in module.parameters())]
    assert [gradient.dtype for gradient in found[1:]] == wanted
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("form", ["v41", "paper"])
def test_compiled_module_on_a_cpu(form):
    check_compiled(torch.device("cpu"), form)


@pytest.mark.kernel
@pytest.mark.graphs
@pytest.mark.parametrize("form", ["v41", "paper"])
def test_compiled_module(device, form):
    check_compiled(device, form)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_module_on_a_cpu(reentrant):
    check_checkpointed(torch.device("cpu"), "paper", reentrant)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_module(device, form):
    check_checkpointed(device, form, reentrant=False)


@pytest.mark.parametrize("form", ["v41", "paper"])
def test_autocast_module_on_a_cpu(form):
    check_autocast(torch.device("cpu"), form)


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["v41", "paper"])
def test_autocast_module(device, form):
    check_autocast(device, form)


@pytest.mark.kernel
def test_gradients_accumulate(device):
    """Two backward passes without zero_grad add up, and a scaled loss scales them: powers of two, so bit for bit."""
    module, hidden, ids, _ = batch(device, "paper")
    once = module_gradients(module, lambda x: module(x, ids), hidden)[2:]
    for _ in range(2):
        (4 * module(hidden, ids).square().sum()).backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 8 * gradient, rtol=1e-6, atol=0)


@pytest.mark.kernel
def test_kernels_train_as_the_references_do(device):
    """Gradients of every parameter of the module, on kernels and in float64 on the references."""
    module, hidden, ids, rows = batch(device, "paper")
    found = module_gradients(module, lambda x: module(x, ids), hidden)
    exact = module.double().cpu()
    rows = rows.double().cpu().unflatten(-1, (4, 8))
    expected = module_gradients(exact, lambda x: exact(x, rows=rows), hidden.double().cpu())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
