"""Gated residual addition.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))
    out  = hidden + gate * value

per token t and branch h, in float32 (float64 for float64 inputs), rounded once. T tokens, H branches, D hidden size.
sgn(0) is +1 ("copysign", DeepSeek-V4.1) or 0 ("sign", the demo and Qwen). Source: arXiv 2601.07372, section 2.3.
"""

import math

import torch


def gate_residual(
    hidden,
    key,
    value,
    query_norm,
    key_norm,
    *,
    eps,
    clamp=1e-6,
    mask=None,
    zero_gate="copysign",
    residual=True,
    out=None,
):
    """``hidden + gate * value`` ``[..., H, D]``; arguments as ``engram_kernels.gate_residual``."""
    query = hidden
    if mask is not None:
        # Ones: what a masked token holds, NaN included, must not reach the norm weights' gradients either.
        query, key = (x.where(mask[..., None, None], 1) for x in (hidden, key))
        value = value.where(mask[..., None], 0)
    gate = branch_gate(query, key, query_norm, key_norm, eps=eps, clamp=clamp, zero_gate=zero_gate)
    addend = gate[..., None] * value[..., None, :].to(gate.dtype)
    result = hidden.to(gate.dtype) + addend if residual else addend
    result = result.to(hidden.dtype)
    if mask is not None:
        unchanged = hidden if residual else torch.zeros_like(hidden)
        result = torch.where(mask[..., None, None], result, unchanged)
    return result if out is None else out.copy_(result)


def branch_gate(hidden, key, query_norm, key_norm, *, eps, clamp, zero_gate):
    """The gate of every token and branch, ``[..., H]``, in the type the op computes in."""
    dtype = compute_dtype(hidden)
    query = rms_norm(hidden.to(dtype), query_norm.to(dtype), eps)
    # Not an einsum, which torch.autocast would compute in half precision.
    d = (query * rms_norm(key.to(dtype), key_norm.to(dtype), eps)).sum(-1) / math.sqrt(hidden.shape[-1])
    sign = torch.sign(d) if zero_gate == "sign" else torch.where(d < 0, -1.0, 1.0).to(dtype)
    # The second where changes no value: it makes the gradient at d = 0 zero, with a clamp of zero too.
    magnitude = d.abs().clamp(min=clamp).where(d != 0, clamp)
    return torch.sigmoid(sign * torch.sqrt(magnitude))


def rms_norm(x, weight, eps):
    """``x`` over its root mean square along the last dimension, times ``weight``."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def compute_dtype(hidden):
    """float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
