"""gate_residual: the reference against another formulation and golden data, the kernel against float64."""

import math

import numpy as np
import pytest
import torch

from engram_kernels import gate_residual, reference
from engram_kernels.ops.gate_kernels.arguments import rows_aligned
from engram_kernels.ops.gate_kernels.branch import gate_config
from engram_kernels.testing import oracles
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.inputs import EPS, doubles
from engram_kernels.testing.inputs import check_gate as check
from engram_kernels.testing.inputs import gate_inputs as inputs
from tests.conftest import recent


@pytest.mark.parametrize(("zero_gate", "clamp"), [("copysign", 1e-6), ("sign", 1e-6), ("copysign", 0.5)])
def test_reference_equals_oracle_in_float64(zero_gate, clamp):
    tensors, options = inputs(6, 3, 40, torch.float64, torch.float64), dict(eps=EPS, zero_gate=zero_gate, clamp=clamp)
    result = reference.gate_residual(*tensors, **options)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), oracles.gated(*doubles(tensors), **options), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_within_bounds(dtype):
    tensors = inputs(6, 4, 96, dtype)
    check(reference.gate_residual(*tensors, eps=EPS), tensors, dtype)


def test_reference_eps_none_is_the_machine_epsilon():
    for dtype in (torch.float32, torch.float64):
        tensors = [x.to(dtype) for x in inputs(4, 2, 16)]
        expected = reference.gate_residual(*tensors, eps=torch.finfo(dtype).eps)
        assert torch.equal(reference.gate_residual(*tensors, eps=None), expected)


@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_reference_gradients_know_nothing_of_masked_tokens(eps):
    """NaN in all that a masked token holds: no gradient but its own hidden state's, which is that of the identity."""
    tensors = [x.requires_grad_() for x in inputs(3, 2, 5, torch.float64, torch.float64)]
    mask = torch.tensor([True, False, True])

    def gradients():
        out = reference.gate_residual(*tensors, eps=eps, mask=mask)
        return torch.autograd.grad((out * torch.arange(5)).sum(), tensors)

    calm = gradients()
    with torch.no_grad():
        for tensor in tensors[:3]:
            tensor[1] = math.nan
    for before, after in zip(calm, gradients(), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(calm[0][1], torch.arange(5.0).double().expand(2, 5)) and calm[1][1].eq(0).all()


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens", "branches", "width", "dtype", "norm_dtype", "zero_gate"),
    [
        (1, 4, 64, torch.float32, torch.float32, "copysign"),
        (7, 4, 80, torch.bfloat16, torch.float32, "sign"),
        (5, 3, 300, torch.float16, torch.bfloat16, "copysign"),
        (3, 1, 1000, torch.float32, torch.float16, "sign"),
        (9, 8, 48, torch.bfloat16, torch.bfloat16, "copysign"),
        (4, 5, 7, torch.float32, torch.float32, "sign"),
        (4, 2, 1, torch.float32, torch.float32, "copysign"),
        (5, 4, 5120, torch.bfloat16, torch.bfloat16, "copysign"),
        (1, 1, 16_384, torch.float32, torch.float32, "copysign"),
    ],
)
def test_kernel(device, tokens, branches, width, dtype, norm_dtype, zero_gate):
    tensors = inputs(tokens, branches, width, dtype, norm_dtype)
    moved = [x.to(device) for x in tensors]
    for residual in (True, False):
        out = Guarded((tokens, branches, width), dtype, device)
        gate_residual(*moved, eps=EPS, zero_gate=zero_gate, residual=residual, out=out.tensor)
        check(out.check(), tensors, dtype, zero_gate=zero_gate, residual=residual)
    assert recent["gate_residual_kernel"]["ALIGNED"] == (width * dtype.itemsize % 16 == 0)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_views_of_kv_in_place(device, dtype):
    """Key and value as views of one kv tensor whose rows start misaligned, hidden a slice, the result in place."""
    hidden, key, value, *norms = inputs(6, 4, 72, dtype)
    kv = torch.cat([key.flatten(1), value], 1)
    wide = torch.zeros(6, 5 * 72 + 3, dtype=dtype, device=device)
    wide[:, 3:] = kv.to(device)
    views = wide[:, 3:-72].unflatten(1, (4, 72)), wide[:, -72:]
    room = torch.full((6, 9, 72), 7.0, dtype=dtype, device=device)
    stream = room[:, 2:6]
    stream.copy_(hidden)
    result = gate_residual(stream, *views, *(x.to(device) for x in norms), eps=EPS, out=stream)
    assert result is stream
    assert not recent["gate_residual_kernel"]["ALIGNED"]  # 16-byte loads of kv's rows would fault
    check(stream, (hidden, key, value, *norms), dtype)
    assert room[:, :2].eq(7).all() and room[:, 6:].eq(7).all()


@pytest.mark.kernel
def test_kernel_batch_shape(device):
    hidden, key, value, *norms = (x.to(device) for x in inputs(6, 2, 32))
    flat = gate_residual(hidden, key, value, *norms, eps=EPS)
    batch = gate_residual(hidden.view(2, 3, 2, 32), key.view(2, 3, 2, 32), value.view(2, 3, 32), *norms, eps=EPS)
    assert torch.equal(batch.view_as(flat), flat)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_kernel_mask(device, dtype, residual):
    """Masked tokens: NaN in key and value does not spread, and hidden comes back bit for bit, -0.0 and NaN included."""
    hidden, key, value, *norms = inputs(7, 4, 48, dtype)
    mask = torch.tensor([True, False, True, True, False, True, False])
    hidden[1, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    spoiled_key, spoiled_value = key.clone(), value.clone()
    spoiled_key[~mask], spoiled_value[~mask] = math.nan, math.nan
    arguments = [x.to(device) for x in (hidden, spoiled_key, spoiled_value, *norms, mask)]
    result = gate_residual(*arguments[:-1], eps=EPS, mask=arguments[-1], residual=residual).cpu()
    kept = hidden[~mask] if residual else torch.zeros_like(hidden[~mask])
    assert torch.equal(result[~mask].view(torch.uint8), kept.view(torch.uint8))
    check(result[mask], (hidden[mask], key[mask], value[mask], *norms), dtype, residual=residual)
    on_cpu = reference.gate_residual(hidden, spoiled_key, spoiled_value, *norms, eps=EPS, mask=mask, residual=residual)
    assert torch.equal(on_cpu[~mask].view(torch.uint8), kept.view(torch.uint8))


@pytest.mark.kernel
def test_kernel_zero_product(device):
    """d = 0 exactly: +1e-3 before the sigmoid with "copysign", 0.5 with "sign"; -0.0 counts as zero."""
    hidden, key, value, *norms = inputs(4, 2, 16)
    key.zero_()
    key[1] = -0.0
    moved = [x.to(device) for x in (hidden, key, value, *norms)]
    half = gate_residual(*moved, eps=EPS, zero_gate="sign", residual=False).cpu()
    assert torch.equal(half, (0.5 * value)[:, None].expand_as(half))
    above = gate_residual(*moved, eps=EPS, zero_gate="copysign", residual=False).cpu()
    gate = 1 / (1 + math.exp(-1e-3))
    torch.testing.assert_close(above, (gate * value)[:, None].expand_as(above), rtol=4e-7, atol=0)


@pytest.mark.kernel
@pytest.mark.parametrize("zero_gate", ["copysign", "sign"])
def test_kernel_nan_and_infinity(device, zero_gate):
    """NaN in d makes the gate NaN, in its own token and branch alone; an infinite hidden state does so too."""
    hidden, key, value, *norms = inputs(5, 2, 24)
    hidden[1, 0, 3], key[2, 1, 5], hidden[3, 1, 0] = math.nan, math.nan, math.inf
    moved = [x.to(device) for x in (hidden, key, value, *norms)]
    result = gate_residual(*moved, eps=EPS, zero_gate=zero_gate, residual=False).cpu()
    spoiled = torch.zeros(5, 2, dtype=torch.bool)
    spoiled[1, 0] = spoiled[2, 1] = spoiled[3, 1] = True
    assert torch.equal(result.isnan().all(-1), spoiled) and torch.equal(result.isnan().any(-1), spoiled)
    expected = reference.gate_residual(hidden, key, value, *norms, eps=EPS, zero_gate=zero_gate, residual=False)
    assert torch.equal(expected.isnan(), result.isnan())


@pytest.mark.kernel
@pytest.mark.parametrize("power", [-130, -60, 60])
def test_kernel_small_and_large(device, power):
    """Subnormal, tiny and huge hidden states: eps or the state itself carries the norm, and the gate stays exact."""
    hidden, *rest = inputs(6, 2, 80)
    hidden = hidden * 2.0**power
    assert power > -127 or (hidden != 0).any() and hidden.abs().max() < 2.0**-126
    result = gate_residual(*(x.to(device) for x in (hidden, *rest)), eps=EPS, residual=False)
    check(result, (hidden, *rest), torch.float32, residual=False)


@pytest.mark.kernel
def test_kernel_eps_none_is_the_machine_epsilon_of_float32(device):
    """Of inputs whose mean square is about as large; in the gate it is the difference between 0.55 and 0.6."""
    hidden, key, *rest = inputs(5, 2, 64, torch.float16)
    tensors = 3e-4 * hidden, 3e-4 * key, *rest
    result = gate_residual(*(x.to(device) for x in tensors), eps=None, residual=False)
    check(result, tensors, torch.float16, eps=2.0**-23, residual=False)


@pytest.mark.kernel
def test_kernel_clamp(device):
    """Below the clamp the gate is flat: a huge clamp makes every gate the same on its side of zero."""
    tensors = inputs(5, 2, 64)
    result = gate_residual(*(x.to(device) for x in tensors), eps=EPS, clamp=9.0, residual=False)
    check(result, tensors, torch.float32, clamp=9.0, residual=False)
    assert (result.cpu() / tensors[2][:, None]).sub(1 / (1 + math.exp(-3.0))).abs().min() < 1e-6


@pytest.mark.kernel
def test_kernel_on_rows_too_wide_for_registers(device):
    """They are read part by part, and hidden once more for the output."""
    tensors = inputs(3, 1, 16_384, torch.bfloat16)
    mask = torch.tensor([True, False, True])
    result = gate_residual(*(x.to(device) for x in tensors), eps=EPS, mask=mask.to(device)).cpu()
    check(result[mask], [x[mask] for x in tensors[:3]] + list(tensors[3:]), torch.bfloat16)
    assert torch.equal(result[1], tensors[0][1])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_batch_invariance_and_repeat(device, dtype):
    """A token's bits are its own: alone, anywhere in a batch of few or many, and twice in a row."""
    tensors = [x.to(device) for x in inputs(40, 4, 320, dtype)]
    whole = gate_residual(*tensors, eps=EPS)
    assert torch.equal(gate_residual(*tensors, eps=EPS), whole)
    norms = tensors[3:]
    for first, last in ((0, 1), (6, 7), (3, 11), (39, 40), (8, 40)):
        part = [x[first:last] for x in tensors[:3]]
        assert torch.equal(gate_residual(*part, *norms, eps=EPS), whole[first:last])


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "aligned"),
    [
        ((3, 2, 8), (16, 8, 1), 0, True),
        ((3, 2, 8), (40, 8, 1), 8, True),
        ((3, 2, 8), (16, 8, 1), 1, False),  # misaligned itself
        ((3, 2, 8), (20, 8, 1), 0, False),  # from its second token on
        ((3, 2, 8), (24, 12, 1), 0, False),  # in its second branch
        ((3, 2, 7), (14, 7, 1), 0, False),
    ],
)
def test_rows_aligned(shape, strides, offset, aligned):
    tensor = torch.zeros(400, dtype=torch.bfloat16).as_strided(shape, strides, offset)
    assert rows_aligned(tensor) is aligned
    assert rows_aligned(torch.zeros(3, 2, 8), tensor) is aligned


def test_gate_config_adds_up_in_an_order_of_d_alone():
    """What lies along D fixes the order of sums; the rest fills the GPU and no more."""
    for width in (1, 7, 64, 80, 320, 1000, 1536, 2560, 5120, 16_384):
        alone = gate_config(width, 1, 1, 132)
        for tokens, branches, processors in ((7, 4, 132), (100_000, 4, 132), (100_000, 8, 1)):
            config = gate_config(width, tokens, branches, processors)
            assert (config.block_d, config.num_warps) == (alone.block_d, alone.num_warps)
            assert 1 <= config.programs <= tokens
        assert alone.programs == 1 and alone.block_d <= 256 * max(4, alone.num_warps)
    assert gate_config(5120, 4096, 4, 132).programs == 99  # three programs a multiprocessor
    assert [gate_config(width, 1, 1, 1).block_d for width in (5, 1000, 1536, 2560, 5120)] == [64, 1024, 512, 512, 1024]
