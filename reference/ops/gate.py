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
    # Each input once, so that autograd too adds in float32 and rounds an input's gradient once.
    dtype = compute_dtype(hidden)
    residue, key, value, query_norm, key_norm = (x.to(dtype) for x in (hidden, key, value, query_norm, key_norm))
    query = residue
    if mask is not None:
        # Ones: what a masked token holds, NaN included, must not reach the norm weights' gradients either.
        query, key = (x.where(mask[..., None, None], 1) for x in (query, key))
        value = value.where(mask[..., None], 0)
    gate = branch_gate(query, key, query_norm, key_norm, eps=eps, clamp=clamp, zero_gate=zero_gate)
    addend = gate[..., None] * value[..., None, :]
    result = (residue + addend if residual else addend).to(hidden.dtype)
    if mask is not None:
        unchanged = hidden if residual else torch.zeros_like(hidden)
        result = torch.where(mask[..., None, None], result, unchanged)
    return result if out is None else out.copy_(result)


def branch_gate(hidden, key, query_norm, key_norm, *, eps, clamp, zero_gate):
    """The gate of every token and branch, ``[..., H]``; all tensors are of the type the op computes in."""
    query = rms_norm(hidden, query_norm, eps)
    # Not an einsum, which torch.autocast would compute in half precision.
    d = (query * rms_norm(key, key_norm, eps)).sum(-1) / math.sqrt(hidden.shape[-1])
    sign = torch.sign(d) if zero_gate == "sign" else torch.where(d < 0, -1.0, 1.0).to(d.dtype)
    # Not clamp, whose gradient is zero where d is NaN. What is filled has none, also at d = 0 with a clamp of zero,
    # where the slope of the square root is infinite.
    magnitude = d.abs()
    magnitude = magnitude.masked_fill((magnitude < clamp) | (d == 0), clamp)
    return torch.sigmoid(sign * torch.sqrt(magnitude))


def rms_norm(x, weight, eps):
    """``x`` over its root mean square along the last dimension, times ``weight``."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    # Not square(), whose gradient takes 2 x, infinite beyond 1.7e38.
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def compute_dtype(hidden):
    """float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
