"""Gated residual addition with a short convolution, the paper's form.

    v   = gate * value                                              (gate as in ops/gate.py)
    out = hidden + v + silu(conv(rms(v) * conv_norm))

conv is depthwise over tokens, causal, of K taps ``dilation`` tokens apart; tap K-1 is the current token. It never
crosses a sequence. T tokens, B sequences, H branches, D hidden size. Source: arXiv 2601.07372, section 2.3.

Since v = gate * value, ``rms(v)`` is ``value * scale`` with one scalar ``scale = gate * rsqrt(mean(v^2) + conv_eps)``
per token and branch. The state of a sequence is therefore ``value`` and ``scale`` of its last (K-1) * dilation tokens.
"""

import torch

from .conv_slots import gather_conv, store_conv
from .gate import branch_gate, compute_dtype
from .sequences import token_sequences


def gate_conv_residual(
    hidden,
    key,
    value,
    query_norm,
    key_norm,
    conv_norm,
    conv_weight,
    *,
    dilation,
    eps,
    conv_eps,
    clamp=1e-6,
    mask=None,
    zero_gate="copysign",
    residual=True,
    cu_seqlens=None,
    conv_state=None,
    out=None,
):
    """``hidden + v + silu(conv)`` ``[..., H, D]``, and the new state where ``conv_state`` is given.

    Arguments as ``engram_kernels.gate_conv_residual``.
    """
    shape, (branches, width) = hidden.shape[:-2], hidden.shape[-2:]
    sequence, start, padding = token_sequences(shape, cu_seqlens, hidden.device)
    # Each input once, as in ops/gate.py: a value is part of as many convolutions as there are taps.
    dtype = compute_dtype(hidden)
    tensors = (hidden, key, value, query_norm, key_norm, conv_norm, conv_weight)
    residue, key, value, query_norm, key_norm, conv_norm, conv_weight = (x.to(dtype) for x in tensors)
    residue, key = (x.reshape(-1, branches, width) for x in (residue, key))
    value = value.reshape(-1, width)
    live = ~padding if mask is None else ~padding & mask.reshape(-1)
    query, key = (x.where(live[:, None, None], 1) for x in (residue, key))  # as in ops/gate.py
    value = value.where(live[:, None], 0)
    gate = branch_gate(query, key, query_norm, key_norm, eps=eps, clamp=clamp, zero_gate=zero_gate)
    gate = gate.where(live[:, None], 0)
    v = gate[..., None] * value[:, None]
    conv_eps = torch.finfo(v.dtype).eps if conv_eps is None else conv_eps
    mean = (v * v).mean(-1).where(live[:, None], 1)  # where nothing is live the scale is 0 with conv_eps = 0 too
    scale = gate * torch.rsqrt(mean + conv_eps)

    taps = conv_weight.shape[-1]
    span = (taps - 1) * dilation
    ring = conv_state if hasattr(conv_state, "cursor") else None
    past = conv_state if ring is None else gather_conv(ring, span)
    past = None if past is None else tuple(part.to(dtype) for part in past)
    conv = torch.zeros_like(v)
    for tap in range(taps):
        source = torch.arange(v.shape[0], device=v.device) - (taps - 1 - tap) * dilation
        past_value, past_scale = _at(source, value, scale, sequence, start, past, span)
        normed = past_value[:, None] * past_scale[..., None] * conv_norm
        conv = conv + normed * conv_weight[..., tap]
    addend = v + torch.nn.functional.silu(conv)
    result = (residue + addend if residual else addend).to(hidden.dtype)
    unchanged = hidden.reshape(result.shape) if residual else torch.zeros_like(result)
    result = torch.where(padding[:, None, None], unchanged, result).view(hidden.shape)
    result = result if out is None else out.copy_(result)
    if conv_state is None:
        return result
    if ring is not None:
        store_conv(ring, value, scale, span=span, cu_seqlens=cu_seqlens)
        return result, ring
    new = _advance(past, value, scale, shape, cu_seqlens, span)
    return result, tuple(part.to(old.dtype) for part, old in zip(new, conv_state, strict=True))


def _at(source, value, scale, sequence, start, conv_state, span):
    """``value [T, D]`` and ``scale [T, H]`` at tokens ``source``: from the batch, the state before it, or zero."""
    inside = source >= start
    here = source.clamp(min=0)
    past_value, past_scale = value[here].where(inside[:, None], 0), scale[here].where(inside[:, None], 0)
    if conv_state is None or span == 0 or not source.shape[0]:
        return past_value, past_scale
    slot = torch.where(inside, 0, span + source - start)
    old_value, old_scale = (state[sequence, slot] for state in conv_state)
    return (
        torch.where(inside[:, None], past_value, old_value),
        torch.where(inside[:, None], past_scale, old_scale),
    )


def _advance(conv_state, value, scale, shape, cu_seqlens, span):
    """The state after this batch: the last ``span`` entries of each sequence's old state and its tokens here."""
    old_value, old_scale = conv_state
    batch = old_value.shape[0]
    if cu_seqlens is None:
        length = shape[-1] if len(shape) == 2 else shape.numel()
        starts = torch.arange(batch, device=value.device) * length
        lengths = torch.full_like(starts, length)
    else:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    # Entry i of the new state is position i - span, counted from the sequence's end here.
    position = lengths[:, None] + torch.arange(-span, 0, device=value.device)
    inside = position >= 0
    token = torch.where(inside, starts[:, None] + position, 0)
    slot = torch.where(inside, 0, position + span)
    sequence = torch.arange(batch, device=value.device)[:, None]

    def last(old, new):
        kept = old[sequence, slot]
        return torch.where(inside[..., None], new[token], kept) if new.shape[0] else kept

    return last(old_value, value), last(old_scale, scale)
