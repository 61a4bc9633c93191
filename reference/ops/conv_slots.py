"""State of the short convolution per slot: a ring of value and scale of the last tokens.

    value [slots, W, D], scale [slots, W, H], cursor [slots]

S = (K-1) * dilation entries are the window that the convolution reads, W >= 2 S the ring, whose entries are written in
turn: ``cursor % W`` is the next, and there are none before 0. scale is the gate times the factor of the norm
(ops/gate_conv.py). The last W - S tokens of a chunk are written behind the S that are read, so that these stay as they
are until commit_history (serving/history.py) moves the cursor, by any number of accepted tokens.
"""

import torch


def gather_conv(ring, span):
    """State ``(value [B, S, D], scale [B, S, H])`` of the sequences in ``ring.slots [B]``; zeros for padding."""
    known = (ring.slots >= 0) & (ring.slots < len(ring.cursor))
    slots = torch.where(known, ring.slots, 0).long()[:, None]
    position = ring.cursor[slots] + torch.arange(-span, 0, device=slots.device)
    exists = (known[:, None] & (position >= 0))[..., None]
    entry = position % ring.value.shape[1]
    return tuple(torch.where(exists, part[slots, entry], 0) for part in (ring.value, ring.scale))


def store_conv(ring, value, scale, *, span, mask=None, cu_seqlens=None, restart=False):
    """Write the last W - S of each sequence's tokens behind its window; value ``[T, D]``, scale ``[T, H]``.

    ``[B * S]`` tokens without cu_seqlens. A token whose mask is False has value zero. restart: as for an empty ring.
    """
    capacity, batch = ring.value.shape[1], len(ring.slots)
    if cu_seqlens is None:
        length = len(value) // max(1, batch)
        start = torch.arange(batch, device=value.device) * length
        length = torch.full_like(start, length)
    else:
        start, length = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    stored = capacity - span
    known = (ring.slots >= 0) & (ring.slots < len(ring.cursor))
    slots = torch.where(known, ring.slots, 0).long()[:, None]
    cursor = torch.zeros_like(slots) if restart else ring.cursor[slots].long()
    position = length[:, None] - stored + torch.arange(stored, device=value.device)
    live = known[:, None] & (position >= 0)
    entry = (cursor + position - (length[:, None] - stored).clamp(min=0)) % capacity
    slots, entry, token = slots.expand_as(entry)[live], entry[live], (start[:, None] + position)[live]
    new = value[token] if mask is None else value[token].where(mask.reshape(-1)[token][:, None], 0)
    ring.value[slots, entry] = new.detach().to(ring.value.dtype)
    ring.scale[slots, entry] = scale[token].detach().to(ring.scale.dtype)
