"""gate_conv_residual: the reference against token-by-token numpy and golden data, the kernel against float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from engram_kernels import gate_conv_residual, reference, split_kv
from engram_kernels.ops.conv_kernels.residual import conv_config
from engram_kernels.testing import tolerances
from engram_kernels.testing.golden import demo_kv, demo_layer
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.inputs import CONV_EPS, conv_inputs, exact_and_bound, packed, state

from .test_gate import EPS


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (2, 3), (4, 2)])
def test_reference_equals_oracle_in_float64(taps, dilation, residual):
    tensors, cu = conv_inputs(12, 3, 20, taps, torch.float64, torch.float64), packed()
    conv_state = state(4, 3, 20, (taps - 1) * dilation, torch.float64)
    mask = torch.arange(12) % 5 != 3
    options = dict(dilation=dilation, eps=EPS, conv_eps=CONV_EPS, residual=residual)
    result, new = reference.gate_conv_residual(*tensors, **options, cu_seqlens=cu, conv_state=conv_state, mask=mask)
    exact, _ = exact_and_bound(
        tensors, torch.float64, dilation=dilation, cu=cu, conv_state=conv_state, mask=mask, residual=residual
    )
    np.testing.assert_allclose(result[:10].numpy(), exact, rtol=1e-12, atol=1e-13)
    assert torch.equal(result[10:], tensors[0][10:] if residual else torch.zeros_like(result[10:]))
    if taps == 4:  # the last sequence's four tokens, of which token 8 is masked, after two of its old state
        assert torch.equal(new[0][3], torch.cat([conv_state[0][3, -2:], tensors[2][6:10] * mask[6:10, None]]))
        assert torch.equal(new[1][3, :2], conv_state[1][3, -2:])
        assert new[1][3, 2:].eq(0).all(1).tolist() == (~mask[6:10]).tolist()


@pytest.mark.parametrize(("zero_gate", "clamp"), [("sign", 1e-6), ("copysign", 0.5)])
def test_reference_options_of_gate_and_norms(zero_gate, clamp):
    """Among them both eps None, on inputs whose mean square is as small as the machine epsilon that they mean."""
    hidden, key, value, *rest = conv_inputs(6, 2, 20, 3, torch.float64, torch.float64)
    tensors = 1e-8 * hidden, 1e-8 * key, 1e-8 * value, *rest
    options = dict(dilation=1, zero_gate=zero_gate, clamp=clamp, residual=False)
    result = reference.gate_conv_residual(*tensors, **options, eps=None, conv_eps=None)
    exact, _ = exact_and_bound(tensors, torch.float64, **options, eps=2.0**-52, conv_eps=2.0**-52)
    np.testing.assert_allclose(result.numpy(), exact, rtol=1e-12, atol=1e-20)


def batch_and_packed(op, device):
    """Two sequences with a state and a mask, as rows of a batch and packed: (out, value, scale) of both."""
    tensors = [x.to(device) for x in conv_inputs(8, 2, 32, 3)]
    old = tuple(part.to(device) for part in state(2, 2, 32, 4))
    mask = torch.arange(8, device=device) % 5 != 3
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS, conv_state=old)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    packed_out, packed_state = op(*tensors, **options, cu_seqlens=cu, mask=mask)
    batch = [x.unflatten(0, (2, 4)) for x in tensors[:3]]
    out, new = op(*batch, *tensors[3:], **options, mask=mask.view(2, 4))
    return (out.flatten(0, 1), *new), (packed_out, *packed_state)


def test_reference_batch_with_state():
    batch, packed = batch_and_packed(reference.gate_conv_residual, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(batch, packed, strict=True))
    assert not any(torch.equal(part[0], part[1]) for part in batch[1:])


@pytest.mark.parametrize("layer", [1, 15])
def test_reference_equals_golden_demo(layer):
    """Rows to output through the demo's own weights, float64 rounding apart."""
    part = demo_layer(layer)
    key, value = demo_kv(layer)
    output = reference.gate_conv_residual(
        part["hidden"],
        key,
        value,
        part["query_norm"],
        part["key_norm"],
        part["conv_norm"],
        part["conv_weight"].view(4, 64, 4),
        dilation=3,
        eps=None,
        conv_eps=1e-5,
        zero_gate="sign",
        residual=False,
    )
    torch.testing.assert_close(output, part["output"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [True, False])
def test_reference_gradients_know_nothing_of_masked_and_padding_tokens(masked):
    tensors = [x.requires_grad_() for x in conv_inputs(5, 2, 4, 3, torch.float64, torch.float64)]
    mask = torch.tensor([True, True, False, False, True]) if masked else None
    cu = None if masked else torch.tensor([0, 2], dtype=torch.int32)
    spoilt = slice(2, 4) if masked else slice(2, 5)

    def gradients():
        options = dict(dilation=1, eps=EPS, conv_eps=CONV_EPS, mask=mask, cu_seqlens=cu, residual=False)
        out = reference.gate_conv_residual(*tensors, **options)
        return torch.autograd.grad((out * torch.arange(4)).sum(), tensors)

    calm = gradients()
    with torch.no_grad():
        for tensor in tensors[:3]:
            tensor[spoilt] = math.nan
    for before, after in zip(calm, gradients(), strict=True):
        assert torch.equal(before, after)
    assert all(gradient[spoilt].eq(0).all() for gradient in calm[:3]) and calm[3].ne(0).any()


def chunked(op, tensors, lengths, conv_state, **options):
    """One sequence in chunks, its state carried along."""
    outputs, first = [], 0
    for length in lengths:
        part = [x[first : first + length] for x in tensors[:3]]
        out, conv_state = op(*part, *tensors[3:], conv_state=conv_state, **options)
        outputs.append(out)
        first += length
    return torch.cat(outputs), conv_state


@pytest.mark.parametrize("lengths", [(9,), (1, 1, 7), (4, 0, 5), (8, 1)])
def test_reference_state_carries_over(lengths):
    tensors = conv_inputs(9, 2, 12, 3, torch.float64, torch.float64)
    zeros = tuple(torch.zeros_like(part) for part in state(1, 2, 12, 4, torch.float64))
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    whole = reference.gate_conv_residual(*tensors, **options)
    parts, last = chunked(reference.gate_conv_residual, tensors, lengths, zeros, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    assert torch.equal(last[0][0], tensors[2][-4:])
    assert all(part.eq(0).all() for part in zeros)  # the state given is not written


CASES = [
    # tokens, branches, width, taps, dilation, dtype, norms, packed, state, mask, residual
    (12, 4, 64, 4, 3, torch.float32, torch.float32, True, True, True, True),
    (12, 3, 80, 4, 2, torch.bfloat16, torch.float32, True, False, True, False),
    (12, 1, 100, 2, 1, torch.float16, torch.bfloat16, True, True, False, True),
    (1, 4, 48, 4, 3, torch.float32, torch.float16, False, True, False, True),
    (3, 2, 7, 1, 5, torch.float32, torch.float32, False, False, True, True),
    (40, 2, 160, 3, 4, torch.float32, torch.float32, False, False, False, False),
    (3, 4, 2560, 4, 3, torch.bfloat16, torch.bfloat16, False, True, False, True),
]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens", "branches", "width", "taps", "dilation", "dtype", "norms", "pack", "carry", "masked", "residual"), CASES
)
def test_kernel(device, tokens, branches, width, taps, dilation, dtype, norms, pack, carry, masked, residual):
    tensors = conv_inputs(tokens, branches, width, taps, dtype, norms)
    cu = packed() if pack else None
    span = (taps - 1) * dilation
    conv_state = state(4 if pack else 1, branches, width, span, dtype) if carry else None
    mask = torch.arange(tokens) % 5 != 3 if masked else None
    given = [x.clone() for x in tensors]
    if masked:
        given[1][~mask], given[2][~mask] = math.nan, math.nan
    options = dict(dilation=dilation, eps=EPS, conv_eps=CONV_EPS, residual=residual)
    out = Guarded((tokens, branches, width), dtype, device)

    def move(x):
        return None if x is None else x.to(device)

    result = gate_conv_residual(
        *(move(x) for x in given),
        **options,
        cu_seqlens=move(cu),
        conv_state=None if conv_state is None else tuple(move(part) for part in conv_state),
        mask=move(mask),
        out=out.tensor,
    )
    exact, bound = exact_and_bound(
        tensors, dtype, dilation=dilation, cu=cu, conv_state=conv_state, mask=mask, residual=residual
    )
    tolerances.assert_within(out.check()[: len(exact)], exact, bound)
    padding = tensors[0][len(exact) :] if residual else torch.zeros_like(tensors[0][len(exact) :])
    assert torch.equal(out.tensor[len(exact) :].cpu().view(torch.uint8), padding.view(torch.uint8))
    if conv_state is None:
        assert result is out.tensor
        return
    _, expected = reference.gate_conv_residual(
        *(x.double() for x in given),
        **options,
        cu_seqlens=cu,
        conv_state=tuple(part.double() for part in conv_state),
        mask=mask,
    )
    new_value, new_scale = (part.cpu() for part in result[1])
    assert new_value.dtype == dtype and torch.equal(new_value.double(), expected[0])
    torch.testing.assert_close(new_scale.double(), expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.kernel
def test_kernel_in_place_with_strided_inputs(device):
    """hidden a slice of a wider stream, rewritten in place; key and value views of kv; the weight with taps first."""
    tensors = conv_inputs(7, 4, 40, 4, torch.bfloat16, torch.bfloat16)
    hidden, key, value, *norms, weight = tensors
    kv = torch.cat([key.flatten(1), value], 1).to(device)
    room = torch.full((7, 6, 40), 7.0, dtype=torch.bfloat16, device=device)
    stream = room[:, 1:5]
    stream.copy_(hidden)
    taps_first = weight.permute(2, 0, 1).contiguous().to(device).permute(1, 2, 0)
    views = split_kv(kv, 4, 40)
    moved = [x.to(device) for x in norms]
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    assert gate_conv_residual(stream, *views, *moved, taps_first, **options, out=stream) is stream
    exact, bound = exact_and_bound(tensors, torch.bfloat16, dilation=2)
    tolerances.assert_within(stream, exact, bound)
    assert room[:, 0].eq(7).all() and room[:, 5].eq(7).all()


@pytest.mark.kernel
@pytest.mark.parametrize("lengths", [(1, 1, 7), (4, 0, 5), (8, 1)])
def test_kernel_chunks_change_no_bit(device, lengths):
    """Prefill in chunks, down to single tokens, gives the bits of one call: outputs and states."""
    tensors = [x.to(device) for x in conv_inputs(9, 2, 64, 4)]
    zeros = tuple(torch.zeros_like(part).to(device) for part in state(1, 2, 64, 6))
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    whole, last = gate_conv_residual(*tensors, **options, conv_state=zeros)
    again, last_again = gate_conv_residual(*tensors, **options, conv_state=zeros)
    assert torch.equal(again, whole) and all(torch.equal(a, b) for a, b in zip(last, last_again, strict=True))
    assert torch.equal(gate_conv_residual(*tensors, **options), whole)
    parts, carried = chunked(gate_conv_residual, tensors, lengths, zeros, **options)
    assert torch.equal(parts, whole)
    assert all(torch.equal(a, b) for a, b in zip(last, carried, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize(("zero_gate", "clamp"), [("sign", 1e-6), ("copysign", 0.5)])
def test_kernel_options_of_gate_and_norms(device, zero_gate, clamp):
    """Among them both eps None, on inputs whose mean square is as small as they are."""
    hidden, key, value, *rest = conv_inputs(6, 2, 64, 3)
    tensors = 3e-4 * hidden, 3e-4 * key, 3e-4 * value, *rest
    options = dict(dilation=1, zero_gate=zero_gate, clamp=clamp, residual=False)
    result = gate_conv_residual(*(x.to(device) for x in tensors), **options, eps=None, conv_eps=None)
    exact, bound = exact_and_bound(tensors, torch.float32, **options, eps=2.0**-23, conv_eps=2.0**-23)
    tolerances.assert_within(result, exact, bound)


@pytest.mark.kernel
def test_kernel_batch_with_state(device):
    """Rows of a batch are the sequences that cu_seqlens would name: the same bits, states included."""
    batch, packed = batch_and_packed(gate_conv_residual, device)
    assert all(torch.equal(a, b) for a, b in zip(batch, packed, strict=True))
    assert not any(torch.equal(part[0], part[1]) for part in batch[1:])


def masked_without_eps(device):
    """Output and new state of tokens of which some are masked and some padding, with conv_eps = 0."""
    tensors = [x.to(device) for x in conv_inputs(7, 2, 16, 3)]
    mask = torch.tensor([True, False, True, True, False, True, True], device=device)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    options = dict(dilation=1, eps=EPS, conv_eps=0.0, mask=mask, cu_seqlens=cu)
    out, new_state = gate_conv_residual(*tensors, **options, conv_state=tuple(x.to(device) for x in state(2, 2, 16, 2)))
    return [x.cpu() for x in (out, *new_state)]


def test_reference_without_eps_keeps_masked_tokens_finite():
    out, value, scale = masked_without_eps("cpu")
    assert out.isfinite().all() and value.isfinite().all() and scale.isfinite().all()
    assert scale[0, 1].eq(0).all() and scale[1, 1].eq(0).all()  # tokens 1 and 4
    assert scale[0, 0].ne(0).all() and scale[1, 0].ne(0).all()


@pytest.mark.kernel
def test_kernel_without_eps_keeps_masked_tokens_finite(device):
    out, value, scale = masked_without_eps(device)
    assert out.isfinite().all() and scale.isfinite().all()
    assert scale[0, 1].eq(0).all() and scale[1, 1].eq(0).all() and value[:, 1].eq(0).all()


@pytest.mark.kernel
def test_kernel_nan_stays_where_the_window_reaches(device):
    """NaN in one key makes that token's gate NaN, and the convolution carries it to the tokens whose taps read it."""
    tensors = list(conv_inputs(9, 2, 16, 3))
    tensors[1][2, 1, 0] = math.nan
    moved = [x.to(device) for x in tensors]
    result = gate_conv_residual(*moved, dilation=2, eps=EPS, conv_eps=CONV_EPS).cpu()
    spoiled = torch.zeros(9, 2, dtype=torch.bool)
    spoiled[[2, 4, 6], 1] = True
    assert torch.equal(result.isnan().all(-1), spoiled) and torch.equal(result.isnan().any(-1), spoiled)
    expected = reference.gate_conv_residual(*tensors, dilation=2, eps=EPS, conv_eps=CONV_EPS)
    assert torch.equal(expected.isnan(), result.isnan())


@pytest.mark.kernel
def test_kernel_sequences_do_not_mix(device):
    """Two sequences packed, batched, or one at a time: the same bits."""
    tensors = [x.to(device) for x in conv_inputs(8, 2, 32, 3)]
    options = dict(dilation=2, eps=EPS, conv_eps=CONV_EPS)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    whole = gate_conv_residual(*tensors, **options, cu_seqlens=cu)
    batch = [x.unflatten(0, (2, 4)) for x in tensors[:3]]
    assert torch.equal(gate_conv_residual(*batch, *tensors[3:], **options).flatten(0, 1), whole)
    alone = gate_conv_residual(*(x[4:] for x in tensors[:3]), *tensors[3:], **options)
    assert torch.equal(alone, whole[4:])


@pytest.mark.kernel
def test_kernel_allocates_no_gated_tensor(device):
    """Besides the output only [T, H] scalars are allocated: at most 8 bytes a token and branch, whatever D is."""
    tensors = [x.to(device) for x in conv_inputs(6, 2, 512, 3)]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "empty" in func.__name__ or "zeros" in func.__name__ or "new" in func.__name__:
                seen.append(result.numel() * result.element_size())
            return result

    out = torch.empty_like(tensors[0])
    with Watch():
        gate_conv_residual(*tensors, dilation=1, eps=EPS, conv_eps=CONV_EPS, out=out)
    assert seen and sum(seen) <= 6 * 2 * 8


def test_conv_config():
    assert conv_config(1, 5120, 4).block_t == 4
    assert conv_config(8192, 5120, 4) == conv_config(33, 5120, 4)
    assert conv_config(32, 5120, 4) == dataclasses.replace(conv_config(33, 5120, 4), branches=1)
    assert all(conv_config(tokens, 7, 3).num_warps >= 1 for tokens in range(1, 70))
