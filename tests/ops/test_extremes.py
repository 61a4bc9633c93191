"""Kernels at their limits: tokens and rows beyond 2^31 elements, inputs of the size of eps, and the margins of the
convolution's scalars and new state.
"""

import pytest
import torch

from engram_kernels import EngramTable, HashPlan, gate_conv_residual, gate_residual, hash_lookup, lookup, reference
from engram_kernels.ops.conv_kernels.slots import ConvSlots
from engram_kernels.ops.conv_kernels.state import launch_advance_state
from engram_kernels.tables.memory.host import HostMapping
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.tolerances import assert_within
from tests.ops.conv_kernels.test_backward import ALL
from tests.ops.conv_kernels.test_backward import check_gradients as check_conv_gradients
from tests.ops.conv_kernels.test_backward import exact_gradients as exact_conv_gradients
from tests.ops.gate_kernels.test_backward import backward, check_gradients, gradient_of
from tests.support.launches import launch_gate_scale

from .test_gate import EPS, check, inputs
from .test_gate_conv import CONV_EPS, conv_inputs, exact_and_bound, state

pytestmark = pytest.mark.kernel
FAR = 2**30  # elements between tokens, so that the third token's first is 2^31


def far_apart(tensor):
    """``tensor [3, ...]`` with its tokens FAR elements apart, in memory that costs only the pages written.

    The mapping begins 2^31 elements before the first token: a product that wraps reads zeros there.
    """
    mapping = HostMapping((2 * 2**31 + tensor[0].numel()) * tensor.element_size())
    buffer = mapping.bytes.view(tensor.dtype)
    apart = buffer.as_strided(tensor.shape, (FAR, *tensor.stride()[1:]), 2**31)
    return apart.copy_(tensor)


def branches_apart(tensor):
    """``tensor [T, 3, D]`` with its branches FAR elements apart, as a view of ``[3, T, D]`` may have them."""
    return far_apart(tensor.transpose(0, 1).contiguous()).transpose(0, 1)


def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("needs registered memory of 8 GiB a tensor")


def test_gate_of_tokens_beyond_2_31_elements(device):
    on_the_cpu(device)
    tensors = inputs(3, 2, 48, torch.bfloat16)
    hidden, key, value = (far_apart(x) for x in tensors[:3])
    gate_residual(hidden, key, value, *tensors[3:], eps=EPS, out=hidden)
    check(hidden, tensors, torch.bfloat16)


def test_conv_of_tokens_beyond_2_31_elements(device):
    on_the_cpu(device)
    tensors, old = conv_inputs(3, 2, 48, 4, torch.bfloat16), state(1, 2, 48, 3, torch.bfloat16)
    hidden, key, value = (far_apart(x) for x in tensors[:3])
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS)
    _, (new_value, _) = gate_conv_residual(hidden, key, value, *tensors[3:], **options, conv_state=old, out=hidden)
    assert_within(hidden, *exact_and_bound(tensors, torch.bfloat16, dilation=1, conv_state=old))
    assert torch.equal(new_value[0], tensors[2])


def test_conv_of_slots_beyond_2_31_elements(device):
    """The last slot's window is read, and its token written, where 32 bits wrap."""
    on_the_cpu(device)
    tensors, width, capacity = conv_inputs(2, 1, 1024, 3, torch.bfloat16), 1024, 8
    slots = 2**31 // (capacity * width) + 1
    # With 2^31 elements before the first slot, as in far_apart().
    room = HostMapping((2**31 + slots * capacity * width) * 2).bytes.view(torch.bfloat16)
    value = room[2**31 :].view(slots, capacity, width)
    scale, cursor = torch.zeros(slots, capacity, 1), torch.full((slots,), capacity, dtype=torch.int32)
    old = state(1, 1, width, 2, torch.bfloat16)
    value[-1, 6:], scale[-1, 6:] = old[0][0], old[1][0]
    ring = ConvSlots(value, scale, cursor, torch.tensor([slots - 1], dtype=torch.int32))
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS)
    out, _ = gate_conv_residual(*tensors, **options, conv_state=ring)
    expected, (new_value, _) = gate_conv_residual(*tensors, **options, conv_state=old)
    assert torch.equal(out, expected) and torch.equal(value[-1, :2], new_value[0])


def test_gate_of_branches_beyond_2_31_elements(device):
    """Hidden states kept branch by branch: the stride fits 32 bits, its product with the branch does not."""
    on_the_cpu(device)
    tensors = inputs(4, 3, 48, torch.bfloat16)
    hidden, key = (branches_apart(x) for x in tensors[:2])
    gate_residual(hidden, key, *tensors[2:], eps=EPS, out=hidden)
    check(hidden, tensors, torch.bfloat16)


def test_conv_of_branches_beyond_2_31_elements(device):
    on_the_cpu(device)
    tensors = conv_inputs(4, 3, 48, 2, torch.bfloat16)
    hidden, key = (branches_apart(x) for x in tensors[:2])
    gate_conv_residual(hidden, key, *tensors[2:], dilation=1, eps=EPS, conv_eps=CONV_EPS, out=hidden)
    assert_within(hidden, *exact_and_bound(tensors, torch.bfloat16, dilation=1))


def test_gate_gradients_of_tokens_beyond_2_31_elements(device):
    on_the_cpu(device)
    tensors, grad = inputs(3, 2, 48, torch.bfloat16), gradient_of(3, 2, 48, torch.bfloat16)
    far = [*(far_apart(x) for x in tensors[:3]), *tensors[3:]]
    _, found = backward(gate_residual, far, far_apart(grad), eps=EPS)
    check_gradients(found, tensors, grad, (torch.bfloat16, torch.float32))


def test_conv_gradients_of_tokens_beyond_2_31_elements(device):
    on_the_cpu(device)
    tensors, grad = conv_inputs(3, 2, 48, 2, torch.bfloat16), gradient_of(3, 2, 48, torch.bfloat16)
    far = [*(far_apart(x) for x in tensors[:3]), *tensors[3:]]
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS)
    _, found = backward(gate_conv_residual, far, far_apart(grad), ALL, **options)
    exact = exact_conv_gradients(tensors, grad, **options)
    checked = dict(dilation=1, starts=[0] * 3, exact=exact)
    check_conv_gradients(found, tensors, grad, (torch.bfloat16, torch.float32), **checked)


def test_hash_lookup_of_rows_beyond_2_36_bytes(device):
    """One token a sequence and multipliers of one: the row is the id."""
    on_the_cpu(device)
    rows = 384_006_168
    plan = HashPlan.from_parts(torch.ones(1, 2, dtype=torch.int64), torch.tensor([[rows]]), pad=0, vocab_size=rows)
    with EngramTable.empty(rows, 256, "e4m3_ue8m0", placement="host") as table:
        ids = torch.tensor([rows - 1, 2**31 // 256, 2**32 // 256, 1])
        table.weight[ids] = torch.arange(1, 5, dtype=torch.uint8)[:, None].expand(4, 256).view(torch.float8_e4m3fn)
        table.scale[ids] = 127
        result = hash_lookup(ids[:, None], plan, [table], out_dtype=torch.float32)
        assert torch.equal(result[0, :, 0], lookup(table, ids[:, None], out_dtype=torch.float32))
        assert result.ne(0).all()


def test_gate_of_inputs_of_the_size_of_eps(device):
    """Their mean square is 1e-6 too, so that the place where eps enters the norm decides the gate."""
    hidden, key, *rest = inputs(5, 4, 96)
    tensors = 1e-3 * hidden, 1e-3 * key, *rest
    check(gate_residual(*(x.to(device) for x in tensors), eps=EPS), tensors, torch.float32)


def test_conv_of_inputs_of_the_size_of_eps(device):
    hidden, key, *rest = conv_inputs(5, 4, 96, 3)
    tensors = 1e-3 * hidden, 1e-3 * key, *rest
    result = gate_conv_residual(*(x.to(device) for x in tensors), dilation=1, eps=EPS, conv_eps=CONV_EPS)
    assert_within(result, *exact_and_bound(tensors, torch.float32, dilation=1))


def test_new_state_stays_in_bounds(device):
    """Three branches and 80 elements, in blocks of four and 128."""
    value, scale = torch.randn(6, 80, device=device), torch.rand(6, 3, device=device)
    old = torch.zeros(1, 4, 80, device=device), torch.zeros(1, 4, 3, device=device)
    new_value, new_scale = (Guarded(part.shape, part.dtype, device) for part in old)
    launch_advance_state(value, scale, None, None, (6,), 4, old, (new_value.tensor, new_scale.tensor))
    assert torch.equal(new_value.check()[0], value[2:])
    assert torch.equal(new_scale.check()[0], scale[2:])


def test_gates_and_scales_stay_in_bounds(device):
    """Five tokens, in tiles of two: a sixth would lie outside."""
    hidden, key, value, *norms = (x.to(device) for x in inputs(5, 3, 80))
    gate, scale = (Guarded((5, 3), torch.float32, device) for _ in range(2))
    live = torch.arange(5) != 2
    options = (EPS, CONV_EPS, 1e-6, live.to(device), "copysign")
    launch_gate_scale(hidden, key, value, *norms, *options, gate.tensor, scale.tensor)
    assert 0 < gate.check()[live].min() and gate.check().max() < 1
    assert scale.check()[live].ne(0).all() and scale.check().isfinite().all()
    assert gate.check()[2].eq(0).all() and scale.check()[2].eq(0).all()


def test_conv_of_rows_too_wide_for_registers(device):
    """The first pass reads them part by part."""
    tensors = conv_inputs(2, 1, 16_384, 2, torch.bfloat16)
    result = gate_conv_residual(*(x.to(device) for x in tensors), dilation=1, eps=EPS, conv_eps=CONV_EPS)
    assert_within(result, *exact_and_bound(tensors, torch.bfloat16, dilation=1))


def overflowing_inputs(dtype):
    """Rows of hidden and key whose squares exceed float32, of values near its end, and some that are not finite."""
    hidden, key, value, *norms = inputs(12, 2, 96, dtype)
    hidden[:9], key[:9] = hidden[:9].clamp(-3, 3), key[:9].clamp(-3, 3)
    for row in (hidden[1], key[2], hidden[3], key[3], key[8]):
        row *= 1e38
    hidden[4] = 2e19 * hidden[4].sign()
    hidden[5, :, 7], key[6, :, 0], key[7, 0] = float("inf"), float("nan"), float("-inf")
    hidden[8, :, 3] = float("inf")
    value[9] = 3e38
    value[10, ::2] = -3e38
    return hidden, key, value, *norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate_of_rows_whose_squares_overflow(device, dtype):
    """Their scale is 0, so a finite row counts as zeros: as the reference has it, neither infinite nor NaN."""
    tensors, options = overflowing_inputs(dtype), dict(eps=EPS, residual=False)
    expected = reference.gate_residual(*tensors, **options)
    result = gate_residual(*(x.to(device) for x in tensors), **options).cpu()
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    assert result[:5].isfinite().all() and result[5:9].isnan().any(-1).all(-1).tolist() == [True, True, False, True]
    torch.testing.assert_close(result, expected, rtol=2.0**-7, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conv_of_rows_whose_squares_overflow(device, dtype):
    tensors = *overflowing_inputs(dtype), *conv_inputs(12, 2, 96, 2, dtype)[5:]
    options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS)
    expected = reference.gate_conv_residual(*tensors, **options)
    result = gate_conv_residual(*(x.to(device) for x in tensors), **options).cpu()
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
