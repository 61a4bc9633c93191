"""Raw ids before each sequence's first token, kept per slot, and moved on by the tokens accepted.

    history  [slots, N - 1]   raw ids, oldest first; NO_TOKEN, INVALID: see below
    cursor   [slots]          where the convolution's next entry goes (ops/conv_slots.py), or None

B sequences, of which each names its slot; a slot outside 0..slots-1 (-1 for padding) is neither read nor written.
A dead token at the end of a chunk is kept as NO_TOKEN: it blocks look-backs of the next chunk as it blocked those of
its own, since hashing reads nothing that is older than a NO_TOKEN.
"""

import torch

#: In place of an id, no token: before the text, or a dead one. It blocks look-backs to itself and to all that is older.
NO_TOKEN = -1
#: A token whose id was -1. It is invalid as any id outside the vocabulary is, but -1 itself would pass for NO_TOKEN.
INVALID = -2


def commit_history(
    history, cursor, slots, token_ids, *, cu_seqlens=None, dead=None, accepted=None, ring=0, span=0, restart=None
):
    """Write the newest N - 1 ids of each old history and the first ``accepted [B]`` tokens (None: all) to its slot.

    A dead token becomes NO_TOKEN (-1); an id of -1, which is invalid, becomes INVALID (-2), or it would pass for no
    token. The cursor moves by the tokens accepted. ``ring`` is the number of tokens that the convolution's state has
    room for in a slot, ``span`` how many of them it reads (both 0 without one). restart: the old history counts as
    none, and the cursor is set to this number.
    """
    if cu_seqlens is None:
        length = token_ids.numel() // max(1, len(slots))
        start = torch.arange(len(slots), device=slots.device) * length
        length = torch.full_like(start, length)
    else:
        start, length = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    taken = length if accepted is None else torch.minimum(accepted.long().clamp(min=0), length)
    writes = (slots >= 0) & (slots < len(history))
    if restart is None:
        writes = writes & (taken > 0)
    slots, start, length, taken = slots[writes].long(), start[writes], length[writes], taken[writes]
    ids = token_ids.reshape(-1).long()
    ids = torch.where(ids == -1, INVALID, ids)
    if dead is not None:
        ids = ids.masked_fill(dead.reshape(-1), NO_TOKEN)
    depth = history.shape[1]
    position = taken[:, None] - depth + torch.arange(depth, device=history.device)
    inside = position >= 0
    old = torch.full_like(position, NO_TOKEN)
    if restart is None:
        old = history[slots[:, None], torch.where(inside, 0, position + depth)]
    if len(ids):
        old = torch.where(inside, ids[torch.where(inside, start[:, None] + position, 0)], old)
    history[slots] = old
    if cursor is not None and restart is not None:
        cursor[slots] = restart
    elif cursor is not None:
        moved = cursor[slots] + taken - (length - (ring - span)).clamp(min=0)
        cursor[slots] = torch.where(moved < ring, moved.clamp(min=0), ring + moved % ring).to(cursor.dtype)
