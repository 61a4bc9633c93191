"""History by slot: the reference against lists of ids, the kernels against the reference."""

import pytest
import torch

from engram_kernels import reference
from engram_kernels.reference.ops.sequences import slot_history
from engram_kernels.serving.history import commit_history
from engram_kernels.testing.guards import Guarded

RING, SPAN = 14, 6


def setting(depth=3, slots=6):
    """Histories of which some are short, and cursors: of an empty ring, within it, at its end and beyond."""
    generator = torch.Generator().manual_seed(depth)
    history = torch.randint(0, 50, (slots, depth), generator=generator)
    history[1, :2] = -1
    return history, torch.tensor([0, 5, 13, 14, 27, 3], dtype=torch.int32)


def batch(dtype=torch.int64):
    """Six sequences, of 4, 0, 1, 11, 2 and 3 tokens, then two of padding; a slot of -1 and one that does not exist."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 50, (23,), generator=generator).to(dtype)
    ids[[3, 20]] = -1  # invalid, and in history not to be taken for a missing one
    dead = torch.zeros(23, dtype=torch.bool)
    dead[[2, 14, 15]] = True
    cu = torch.tensor([0, 4, 4, 5, 16, 18, 21], dtype=torch.int32)
    slots = torch.tensor([4, 0, 3, 1, -1, 6], dtype=torch.int32)
    accepted = torch.tensor([2, 0, 1, 9, 2, 1], dtype=torch.int32)
    return slots, ids, cu, dead, accepted


def expected_history(history, slots, ids, cu, dead, accepted=None, restart=False):
    """New history, in lists."""
    ids = [-1 if gone else -2 if id == -1 else id for id, gone in zip(ids.tolist(), dead.tolist(), strict=True)]
    new = history.tolist()
    for b, slot in enumerate(slots.tolist()):
        if 0 <= slot < len(new):
            start, end = cu[b], cu[b + 1] if accepted is None else cu[b] + accepted[b]
            old = [-1] * history.shape[1] if restart else new[slot]
            new[slot] = [*old, *ids[start:end]][-history.shape[1] :]
    return new


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("restart", [None, SPAN])
def test_reference_equals_lists(depth, partial, restart):
    (history, cursor), (slots, ids, cu, dead, accepted) = setting(depth), batch()
    accepted = accepted if partial else None
    expected = expected_history(history, slots, ids, cu.tolist(), dead, accepted, restart is not None)
    options = dict(cu_seqlens=cu, dead=dead, accepted=accepted, ring=RING, span=SPAN, restart=restart)
    reference.serving.history.commit_history(history, cursor, slots, ids, **options)
    assert history.tolist() == expected
    gathered = slot_history(history, slots).tolist()
    assert gathered == [expected[slot] if 0 <= slot < 6 else [-1] * depth for slot in slots.tolist()]
    # 27 + 2 or 4 beyond the ring's end, 14 + 1; of 11 tokens the ring of 14 has room for 8 behind a window of 6.
    moved = dict(zip([4, 3, 1], [15, 15, 5 + 9 - 3] if partial else [17, 15, 13], strict=True))
    moved = dict.fromkeys((4, 3, 1, 0), SPAN) if restart is not None else moved
    assert cursor.tolist() == [moved.get(slot, before) for slot, before in enumerate([0, 5, 13, 14, 27, 3])]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("restart", [None, SPAN])
def test_kernel_equals_reference(device, dtype, depth, partial, restart):
    """Packed and batched, with and without dead tokens and a ring; nothing else is written."""
    slots, ids, cu, dead, accepted = (x.to(device) for x in batch(dtype))
    packed = dict(cu_seqlens=cu, dead=dead, accepted=accepted if partial else None)
    rows = dict(accepted=accepted if partial else None)
    for tokens, options, ring in ((ids, packed, True), (ids[:18].view(6, 3), rows, False), (ids[:0], {}, True)):
        options = dict(options, ring=RING, span=SPAN, restart=restart)
        expected, moved = (x.to(device) for x in setting(depth))
        guarded, cursor = (Guarded(x.shape, x.dtype, device) for x in (expected, moved))
        guarded.tensor.copy_(expected)
        cursor.tensor.copy_(moved)
        commit_history(guarded.tensor, cursor.tensor if ring else None, slots, tokens, **options)
        reference.serving.history.commit_history(expected, moved if ring else None, slots, tokens, **options)
        assert torch.equal(guarded.check(), expected)
        assert torch.equal(cursor.check(), moved)


@pytest.mark.kernel
def test_kernel_of_many_sequences(device):
    """More than a program's: of 150 sequences each has its own slot, in another order."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(160, generator=generator)[:150].int().to(device)
    history = torch.randint(0, 50, (160, 3), generator=generator).to(device)
    cursor, ids = torch.zeros(160, dtype=torch.int32, device=device), torch.arange(300, device=device).view(150, 2)
    accepted = (torch.arange(150, device=device) % 3).int()
    expected, moved = history.clone(), cursor.clone()
    options = dict(accepted=accepted, ring=RING, span=SPAN)
    reference.serving.history.commit_history(expected, moved, slots, ids, **options)
    commit_history(history, cursor, slots, ids, **options)
    assert torch.equal(history, expected) and torch.equal(cursor, moved)
    nobody = slots[:0]
    commit_history(history, cursor, nobody, ids[:0])
    assert torch.equal(history, expected)


@pytest.mark.kernel
def test_a_cursor_never_wraps(device):
    """It stays below twice the ring, however many tokens a slot takes, and says where the ring's next entry is."""
    history, cursor = torch.full((1, 2), -1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    slots, total = torch.zeros(1, dtype=torch.int32, device=device), 0
    for length in (5, 8, 1, 1, 7, 8, 3, 2, 8):
        ids = torch.arange(length, device=device)
        commit_history(history, cursor, slots, ids, ring=RING, span=SPAN)
        total += length
        assert int(cursor) % RING == total % RING and int(cursor) < 2 * RING
        assert int(cursor) >= min(total, RING)
