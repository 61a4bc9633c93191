"""Tokens copied into buffers: the launch against the reference, each part left out in turn; nothing else is written."""

import itertools

import pytest
import torch

from engram_kernels.launching.tokens import Tokens
from engram_kernels.serving.inputs import TokenBuffers, copying
from engram_kernels.testing.guards import Guarded
from tests.support.launches import launch_copy_tokens

DEPTH = 3


def sources(device, dtype, tokens=300, sequences=150, ends=True, past=True, dead=True, slots=True):
    """Tokens of some sequences; history of 160 slots, some of it none, or one row a sequence."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, 50, (tokens,), generator=generator).to(dtype)
    cu = torch.randint(0, tokens + 1, (sequences + 1,), generator=generator).sort().values.int()
    history = torch.randint(-2, 50, (160 if slots else sequences, DEPTH), generator=generator).to(dtype)
    chosen = torch.randperm(160, generator=generator)[:sequences].int()
    chosen[::7], chosen[1::7] = -1, 160  # no slot, and one that does not exist
    given = (
        ids,
        cu if ends else None,
        history if past else None,
        ids == 3 if dead else None,
        chosen if slots else None,
    )
    return Tokens(*(None if part is None else part.to(device) for part in given))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ends, past, dead, slots", [case for case in itertools.product([True, False], repeat=4) if case[1] or not case[3]]
)
def test_copies_equal_what_was_given(device, dtype, ends, past, dead, slots):
    given = sources(device, dtype, ends=ends, past=past, dead=dead, slots=slots)
    expected = given.gathered()
    out = [None if x is None else Guarded(x.shape, kind, device) for x, kind in zip(expected, KINDS, strict=False)]
    launch_copy_tokens(given, Tokens(*(None if part is None else part.tensor for part in out)))
    for part, wanted in zip(out, expected, strict=False):
        assert part is None or torch.equal(part.check(), wanted.to(part.tensor.dtype))


KINDS = (torch.int64, torch.int32, torch.int64, torch.bool)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens, sequences", [(0, 0), (0, 5), (1, 1), (3, 120)])
def test_buffers_hold_less_than_they_could(device, tokens, sequences):
    """More ends or history than tokens, or none at all; a second copy is launched as the first was."""
    buffers = TokenBuffers(400, 160, DEPTH + 1, torch.device(device))
    for _ in range(2):
        buffers.memory.fill_(-1)
        was = [part.clone() for part in buffers.parts]
        given = sources(device, torch.int32, tokens, sequences, past=sequences > 0, slots=sequences > 0)
        copies = buffers.views(given)
        copying(given, copies)(*given)
        for copy, wanted, part, before in zip(copies, given.gathered(), buffers.parts, was, strict=False):
            assert (copy is None) == (wanted is None)
            if copy is not None:
                assert torch.equal(copy, wanted.to(copy.dtype)) and copy.shape == wanted.shape
                assert torch.equal(part[copy.numel() :], before[copy.numel() :])


def test_a_batch_without_ends():
    """``[B, S]`` keeps its shape, and its history is by slot."""
    buffers = TokenBuffers(8, 4, DEPTH + 1, torch.device("cpu"))
    ids, history = torch.arange(8).view(4, 2), torch.arange(6).view(2, 3)
    given = Tokens(ids, None, history, None, torch.tensor([1, -1, 0, 2], dtype=torch.int32))
    copies = buffers.views(given)
    copying(given, copies)(*given)
    assert torch.equal(copies.token_ids, ids)
    assert copies.history.tolist() == [[3, 4, 5], [-1] * 3, [0, 1, 2], [-1] * 3]
    assert copies.cu_seqlens is copies.dead is copies.slots is None
