"""The convolution's state by slot: the ring against a list of tokens, and the kernels against a dense state."""

import pytest
import torch

from engram_kernels import gate_conv_residual, reference
from engram_kernels.ops.conv_kernels.slots import ConvSlots, launch_store_conv
from engram_kernels.reference.ops import conv_slots
from engram_kernels.testing.guards import Guarded
from tests.ops.test_gate import EPS
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs

TAPS, DILATION = 4, 2
SPAN, RING, SLOTS = 6, 14, 5
OPTIONS = dict(dilation=DILATION, eps=EPS, conv_eps=CONV_EPS)


def ring(slots, width, device="cpu", dtype=torch.float32, branches=2):
    """Entries of every slot are there or NaN: slot 0 has none, slot 1 four, the others all; cursors lie all over."""
    generator = torch.Generator().manual_seed(width)
    value = torch.randn(SLOTS, RING, width, generator=generator).to(dtype)
    scale = torch.rand(SLOTS, RING, branches, generator=generator).to(torch.promote_types(dtype, torch.float32))
    cursor = torch.tensor([0, 4, 13, 14, 27], dtype=torch.int32)
    for slot, position in enumerate(cursor.tolist()):
        unread = [entry % RING for entry in range(position - RING, position - SPAN)]
        unread += [entry % RING for entry in range(position - SPAN, min(0, position))]
        value[slot, unread], scale[slot, unread] = float("nan"), float("nan")
    slots = torch.tensor(slots, dtype=torch.int32)
    return ConvSlots(*(x.to(device) for x in (value, scale, cursor, slots)))


def packed(device="cpu"):
    """17 tokens: sequences of 3, 0, 11, 1 and 1, one of padding. And their slots, one of them -1."""
    return torch.tensor([0, 3, 3, 14, 15, 16], dtype=torch.int32, device=device), [4, 0, 2, -1, 1]


def stored(before, after):
    """Entries that differ, as {(slot, entry)}, by value and by scale."""
    changed = [(a.isnan() != b.isnan()) | ((a != b) & ~a.isnan()) for a, b in zip(before[:2], after[:2], strict=True)]
    return [{tuple(place) for place in x.any(-1).nonzero().tolist()} for x in changed]


@pytest.mark.parametrize("restart", [False, True])
def test_reference_stores_behind_the_window(restart):
    cu, slots = packed()
    before, after = ring(slots, 8), ring(slots, 8)
    value, scale, mask = torch.randn(17, 8), torch.rand(17, 2), torch.arange(17) != 1
    conv_slots.store_conv(after, value, scale, span=SPAN, mask=mask, cu_seqlens=cu, restart=restart)
    expected = {}
    for (slot, cursor), tokens in (((4, 27), [0, 1, 2]), ((2, 13), range(6, 14)), ((1, 4), [15])):
        for place, token in enumerate(tokens, 0 if restart else cursor):
            expected[slot, place % RING] = token
    assert stored(before, after) == [set(expected)] * 2
    for place, token in expected.items():
        assert torch.equal(after.value[place], value[token] * mask[token]) and torch.equal(
            after.scale[place], scale[token]
        )


def test_reference_gathers_the_window():
    slots = ring([3, -1, 0, 1, SLOTS], 8)
    value, scale = conv_slots.gather_conv(slots, SPAN)
    assert torch.equal(value[0], slots.value[3, [8, 9, 10, 11, 12, 13]])
    assert torch.equal(scale[3], torch.cat([torch.zeros(2, 2), slots.scale[1, :4]]))
    assert not value[[1, 2, 4]].any() and not scale[[1, 2, 4]].any() and not value.isnan().any()


def dense_and_slots(op, device, dtype, width, shape):
    """The op with a dense state and with slots: (out, dense state), (out, ring)."""
    cu, slots = packed(device)
    if shape is None:
        sequences, tokens = dict(cu_seqlens=cu), 17
    else:
        sequences, tokens, slots = {}, shape[0] * shape[1], slots[: shape[0]]
    tensors = [x.to(device) for x in conv_inputs(tokens, 2, width, TAPS, dtype)]
    mask = torch.arange(tokens, device=device) % 5 != 1
    if shape is not None:
        tensors[:3], mask = [x.unflatten(0, shape) for x in tensors[:3]], mask.view(shape)
    options = dict(OPTIONS, mask=mask, **sequences)
    given = ring(slots, width, device, dtype)
    dense = conv_slots.gather_conv(given, SPAN)
    return op(*tensors, **options, conv_state=dense), op(*tensors, **options, conv_state=given)


CASES = [(torch.float32, 8, None), (torch.bfloat16, 80, None), (torch.float32, 24, (3, 2)), (torch.float32, 8, (4, 1))]


def check(dense, slots):
    """Equal outputs, and the state after all tokens in the ring of each slot."""
    (out, state), (result, after) = dense, slots
    assert torch.equal(result, out) and isinstance(after, ConvSlots)
    lengths = [3, 0, 11, 1, 1] if out.dim() == 3 else [out.shape[1]] * out.shape[0]
    for b, (slot, length) in enumerate(zip(after.slots.tolist(), lengths, strict=True)):
        if slot >= 0:
            moved = after.cursor + min(length, RING - SPAN)
            window = conv_slots.gather_conv(after._replace(cursor=moved, slots=after.slots[b : b + 1]), SPAN)
            assert all(torch.equal(a[0], full[b]) for a, full in zip(window, state, strict=True))


def test_reference_equals_dense():
    for case in CASES:
        check(*dense_and_slots(reference.gate_conv_residual, torch.device("cpu"), *case))


@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "width", "shape"), CASES)
def test_kernel_equals_dense(device, dtype, width, shape):
    check(*dense_and_slots(gate_conv_residual, device, dtype, width, shape))


@pytest.mark.kernel
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("width", "branches"), [(80, 2), (1056, 3)])
def test_kernel_stores_what_the_reference_does(device, restart, width, branches):
    """Strided values, masked NaN, nothing outside the ring: D of more than a block, branches that fill none."""
    cu, slots = packed(device)
    given, expected = (ring(slots, width, device, branches=branches) for _ in range(2))
    value, scale = torch.randn(17, width + 16, device=device)[:, :width], torch.rand(17, branches, device=device)
    mask = torch.arange(17, device=device) != 1
    value[1] = float("nan")
    guarded = [Guarded(part.shape, part.dtype, device) for part in given[:2]]
    for part, start in zip(guarded, given[:2], strict=True):
        part.tensor.copy_(start)
    after = ConvSlots(*(part.tensor for part in guarded), *given[2:])
    launch_store_conv(after, value, scale, mask, cu, SPAN, restart)
    conv_slots.store_conv(expected, value, scale, span=SPAN, mask=mask, cu_seqlens=cu, restart=restart)
    for part, wanted in zip(guarded, expected[:2], strict=True):
        assert torch.equal(part.check().view(torch.int32), wanted.view(torch.int32))


@pytest.mark.kernel
def test_errors(device):
    tensors = [x.to(device) for x in conv_inputs(4, 2, 8, TAPS)]
    good = ring([0], 8, device)
    for words, changes in (
        (r"conv_state.slots must have shape \[1\], got \[2\]", dict(slots=good.slots.expand(2).contiguous())),
        ("conv_state.slots must be a tensor of int32, got int64", dict(slots=good.slots.long())),
        ("conv_state.cursor must be a tensor of int32", dict(cursor=good.cursor.long())),
        ("conv_state.value must be a tensor of float32, got bfloat16", dict(value=good.value.bfloat16())),
        (r"conv_state.scale must have shape \[5, 14, 2\]", dict(scale=good.scale[:, 1:].contiguous())),
        ("conv_state must hold at least 12 tokens a slot, got 11", dict(value=good.value[:, 3:].contiguous())),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^gate_conv_residual: {words}"):
            gate_conv_residual(*tensors, **OPTIONS, conv_state=good._replace(**changes))
    gate_conv_residual(*tensors, **OPTIONS, conv_state=good)
