"""Which sequence each token of a packed batch belongs to, and what came before it."""

from math import prod

import torch


def token_sequences(shape, cu_seqlens, device):
    """For token ids of ``shape`` ``[T]`` (packed) or ``[B, S]`` (each row a sequence), flattened to T tokens.

    Returns int64 ``sequence [T]`` and ``start [T]`` (the first token of that sequence), and bool ``padding [T]``:
    tokens at or beyond ``cu_seqlens[B]``, which belong to none.
    """
    total = prod(shape)  # torch.Size.numel() would make a constant of T in an exported program
    token = torch.arange(total, device=device)
    if cu_seqlens is None:
        length = max(1, shape[-1] if len(shape) == 2 else total)
        sequence = token // length
        return sequence, sequence * length, torch.zeros_like(token, dtype=torch.bool)
    ends = cu_seqlens[1:].long()
    # Counting the sequences that end at or before a token also steps over empty ones.
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=max(0, ends.shape[0] - 1))
    return sequence, cu_seqlens.long()[sequence], token >= cu_seqlens[-1]


def slot_history(history, slots):
    """History ``[B, N - 1]``, rows ``slots [B]`` of ``history [slots, N - 1]``; -1, no token, where there is none."""
    unknown = (slots < 0) | (slots >= len(history))
    return history.index_select(0, slots.clamp(0, len(history) - 1)).masked_fill(unknown.unsqueeze(1), -1)
