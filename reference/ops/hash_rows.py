"""Hash and lookup together: the rows of every n-gram that ends at each token, for all layers of a plan."""

import torch

from .hashing import ngram_hash
from .rows import lookup
from .sequences import slot_history


def hash_lookup(
    token_ids,
    plan,
    tables,
    *,
    cu_seqlens=None,
    history=None,
    dead=None,
    slots=None,
    out=None,
    out_dtype=None,
    out_format="values",
    programs=None,
    order=None,
    cache=None,
):
    """Rows ``[L, T, C, R]`` (``[L, B, S, C, R]``); arguments as ``engram_kernels.hash_lookup``.

    cache: a ``CacheSimulator``, which says what a cache would have had; the rows come from the tables all the same.
    """
    history = history if slots is None else slot_history(history, slots)
    options = dict(cu_seqlens=cu_seqlens, history=history, dead=dead)
    row_ids = ngram_hash(token_ids, plan, **options)
    if cache is not None:
        cache.look_up_tokens(token_ids, plan, **options)
    return lookup_layers(tables, row_ids.unbind(-2), out, out_dtype, out_format)


def lookup_layers(tables, row_ids, out=None, out_dtype=None, out_format="values"):
    """Rows ``[L, ..., C, R]`` of each table for its ids ``[..., C]``."""
    per_layer = [
        lookup(table, ids, out_dtype=out_dtype, out_format=out_format)
        for table, ids in zip(tables, row_ids, strict=True)
    ]
    if out_format == "values":
        return torch.stack(per_layer) if out is None else torch.stack(per_layer, out=out)
    storage_dtype = tables[0].weight.dtype
    rows = torch.stack([rows.view(torch.uint8) for rows, _ in per_layer])
    scales = None
    if tables[0].format.scaled:
        scales = torch.stack([scales for _, scales in per_layer])
    if out is None:
        return rows.view(storage_dtype), scales
    out[0].view(torch.uint8).copy_(rows)
    if tables[0].format.group:
        out[1].view(torch.uint8).copy_(scales)
        return out
    return out[0], scales
