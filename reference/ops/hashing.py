"""Row ids of the n-grams that end at each token.

    mix_n = XOR over s < n of id[t-s] * multipliers[l, s]           (wrapping int64)
    row   = floor_mod(mix_n, primes[l, c]) + offsets[l, c]          (column c is of order n)

T tokens, L layers, C columns, N the longest n-gram. Source: arXiv 2601.07372, section 2.2.
"""

import torch

from .sequences import slot_history, token_sequences


def ngram_hash(token_ids, plan, *, cu_seqlens=None, history=None, dead=None, slots=None, out=None):
    """Row ids ``[T, L, C]`` (``[B, S, L, C]`` for ids ``[B, S]``); arguments as ``engram_kernels.ngram_hash``.

    A column whose window holds an invalid id, and every padding token, gets -1.
    """
    history = history if slots is None else slot_history(history, slots)
    mixes, bad = ngram_mixes(token_ids, plan, cu_seqlens, history, dead)
    newest = plan.orders.long() - 1  # the oldest shift that each column's n-gram reads
    rows = torch.remainder(mixes[..., newest], plan.primes) + plan.offsets
    rows = torch.where(bad[:, None, newest], -1, rows).to(plan.index_dtype)
    rows = rows.view(*token_ids.shape, *plan.primes.shape)
    return rows if out is None else out.copy_(rows)


def ngram_mixes(token_ids, plan, cu_seqlens, history, dead):
    """Mixes int64 ``[T, L, N]`` of the n-grams of 1 to N tokens that end at each token.

    And bool ``[T, N]``, where there is no such n-gram: it reads an invalid id, or the token is padding.
    """
    windows, invalid, padding = token_windows(token_ids, plan, cu_seqlens, history, dead)
    # [T, L, N] products; the XOR of the first n is the mix of order n
    products = windows[:, None, :] * plan.multipliers.to(windows.device)[None]
    mixes = [products[..., 0]]
    for shift in range(1, plan.max_ngram):
        mixes.append(mixes[-1] ^ products[..., shift])
    return torch.stack(mixes, dim=-1), invalid.cummax(dim=1).values | padding[:, None]


def token_windows(token_ids, plan, cu_seqlens, history, dead):
    """The ids that each token's n-grams read, after the token map.

    Returns ``windows`` int64 ``[T, N]`` (column s is the id s tokens before), ``invalid`` bool ``[T, N]`` (an
    unblocked id outside the vocabulary) and ``padding`` bool ``[T]``.
    """
    sequence, start, padding = token_sequences(token_ids.shape, cu_seqlens, token_ids.device)
    ids = token_ids.reshape(-1).long()
    dead = torch.zeros_like(padding) if dead is None else dead.reshape(-1)
    token = torch.arange(ids.shape[0], device=ids.device)
    blocked = torch.zeros_like(padding)
    windows, invalid = [], []
    for shift in range(plan.max_ngram):
        source = token - shift
        inside = source >= start
        raw = torch.where(inside, ids[source.clamp(min=0)], _before(history, sequence, source - start))
        blocked = blocked | (inside & dead[source.clamp(min=0)]) | (~inside & (raw == -1))
        if plan.eos is not None and shift > 0:
            blocked = blocked | (raw == plan.eos)
        valid = raw >= 0 if plan.vocab_size is None else (raw >= 0) & (raw < plan.vocab_size)
        readable = torch.where(valid, raw, 0)
        mapped = readable if plan.token_map is None else plan.token_map[readable].long()
        windows.append(torch.where(blocked, plan.pad, mapped))
        invalid.append(~valid & ~blocked)
    return torch.stack(windows, 1), torch.stack(invalid, 1), padding


def _before(history, sequence, position):
    """Raw ids at ``position`` (negative: before the sequence's first token here); -1 where history has no token."""
    if history is None or not history.numel():
        return torch.full_like(position, -1)
    slot = position + history.shape[1]
    known = (slot >= 0) & (position < 0)
    return torch.where(known, history.long()[sequence, torch.where(known, slot, 0)], -1)
