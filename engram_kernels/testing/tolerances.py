"""Error bounds, derived from the element type and the length of the sums. The one place where tolerances come from.

Notation: u is the unit roundoff. A value rounded once to a type is off by at most u of itself; a sum of n float32 terms
whose longest chain of additions is c is off by at most c * u32 of the sum of their magnitudes (Higham, Accuracy and
Stability, 2002, section 4.2). Kernels add D terms in chains of D / 256 within a lane and 8 across lanes.

The interpreter truncates float32 to bfloat16 where hardware rounds to nearest: twice the roundoff, there only.
"""

import numpy as np
import torch
import triton

from . import oracles

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float64: 0.0}
U32 = UNIT[torch.float32]


def rounding(values, dtype):
    """Bound on one rounding of ``values`` (numpy) to ``dtype``."""
    truncated = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return np.abs(values) * UNIT[dtype] * (2 if truncated else 1) + TINY[dtype]


def chain(hidden_size):
    """Longest chain of float32 operations from an element to a sum over D: lanes, tree, and the products around it."""
    return -(-hidden_size // 256) + 8 + 12


def gate_bound(d, magnitude, hidden_size, clamp, zero_gate):
    """Bound on the error of a gate whose exact ``d`` is a sum of terms of total size ``magnitude``.

    The gate rises with d, so an error of delta in d moves it at most to the gate of d - delta or d + delta. Near zero
    that is the step between the signs, not a slope.
    """
    delta = chain(hidden_size) * U32 * magnitude
    exact = oracles.gate_of(d, clamp, zero_gate)
    low, high = (oracles.gate_of(d + side, clamp, zero_gate) for side in (-delta, delta))
    # A d of exactly zero stays zero: all its terms are.
    moved = np.where(magnitude == 0, 0.0, np.maximum(high - exact, exact - low))
    return moved + 16 * U32


def gated_bound(exact, hidden, value, gate_error, dtype):
    """Bound on ``hidden + gate * value`` rounded once to ``dtype``."""
    addend = np.abs(value)[:, None] * (gate_error[..., None] + 2 * U32)
    return addend + 2 * U32 * np.abs(hidden) + rounding(exact, dtype)


def conv_bound(exact, hidden, value, gate, gate_error, size, hidden_size, taps, dtype):
    """Bound on ``hidden + v + silu(conv)``. A term's relative error is that of its gate plus the sum over D in its
    scale; silu stretches an error by at most 1.1. ``size`` is the sum of the terms' magnitudes.
    """
    relative = float((gate_error / gate).max(initial=0)) + (chain(hidden_size) + taps + 8) * U32
    return gated_bound(exact, hidden, value, gate_error, dtype) + 1.1 * relative * size


def eager_conv_bound(exact, value, gate, d, magnitude, size, zero_gate, dtype, clamp=1e-6):
    """Bound on ``v + silu(conv)`` where every step is an operation of torch, and rounds to ``dtype``.

    Into d go five roundings of each term: two norms, product, sum, division. A gate is then a root and a logistic
    function, v a product, and an input of the convolution one more, normed: where elements of v are off by their own
    roundings and a common factor, norms follow it, so that twice the relative error bounds it. Convolution, silu and
    sum round once each.
    """
    u = UNIT[dtype]
    delta = 5 * u * magnitude
    low, high = (oracles.gate_of(d + side, clamp, zero_gate) for side in (-delta, delta))
    gate_error = np.maximum(high - gate, gate - low) + u * (np.sqrt(np.abs(d) + delta) / 4 + gate)
    v = np.abs(gate[..., None] * value[:, None])
    relative = 2 * float((gate_error / gate).max()) + 6 * u
    return np.abs(value)[:, None] * gate_error[..., None] + u * v + 1.1 * relative * size + 3 * u * (v + size)


def slope_bound(d, delta, clamp):
    """The slope of the gate at ``d``, and how far it may be off where d is off by ``delta``.

    It falls with |d| and jumps to zero below the clamp, so it is largest at the least |d| of the interval that is not.
    """
    low, high = np.maximum(np.abs(d) - delta, 0), np.abs(d) + delta
    most = oracles.gate_slope(np.maximum(low, clamp), clamp)
    least = np.where(low < clamp, 0, oracles.gate_slope(high, clamp))
    exact = oracles.gate_slope(d, clamp)
    moved = np.where((delta == 0) | (high < clamp), 0, np.maximum(most - exact, exact - least))
    return exact, moved + 32 * U32 * exact


def gate_gradient_bounds(tensors, grad, *, eps, clamp, zero_gate, dtypes, residual=True, known=None):
    """Bounds on the gradients of hidden, key, value and both norms that kernels compute from ``grad``; float64 arrays.

    dtypes: of the inputs and of the norms. known: (gate_grad, its bound, bound on grad_value) where a convolution
    decides them. First-order propagation through the formulas of ops/gate_kernels/backward.py: a scale is off by half
    of what its sum of squares is, a product by the sum of its factors' relative errors.
    """
    hidden, key, value, query_norm, key_norm = tensors
    tokens, branches, width = hidden.shape
    scale_error, root_width = chain(width) * U32, np.sqrt(width)
    d, magnitude = oracles.gate_parts(hidden, key, query_norm, key_norm, eps)
    delta = chain(width) * U32 * magnitude
    slope, slope_error = slope_bound(d, delta, clamp)
    gate = oracles.gate_of(d, clamp, zero_gate)
    gate_error = gate_bound(d, magnitude, width, clamp, zero_gate)
    if known is None:
        terms = grad * value[:, None]
        gate_grad, gate_grad_error = terms.sum(-1), chain(width) * U32 * np.abs(terms).sum(-1)
        addends = np.abs(gate[..., None] * grad)
        value_error = (np.abs(grad) * gate_error[..., None] + (branches + 4) * U32 * addends).sum(1)
        value_error += rounding((gate[..., None] * grad).sum(1), dtypes[0])
    else:
        gate_grad, gate_grad_error, value_error = known
    d_grad = gate_grad * slope
    d_grad_error = np.abs(gate_grad) * slope_error + (slope + slope_error) * gate_grad_error + 4 * U32 * np.abs(d_grad)
    along_w, along_w_error = np.abs(d_grad) / root_width, d_grad_error / root_width
    along_state = np.abs(d_grad * d) / width
    along_state_error = (d_grad_error * np.abs(d) + (np.abs(d_grad) + d_grad_error) * delta) / width
    hidden_scale = 1 / np.sqrt((hidden**2).mean(-1, keepdims=True) + eps)
    key_scale = 1 / np.sqrt((key**2).mean(-1, keepdims=True) + eps)
    q, k, w = np.abs(hidden * hidden_scale), np.abs(key * key_scale), np.abs(query_norm * key_norm)

    def state_error(own_scale, own, other, base):
        """Of ``base + own_scale * (along_w * w * other - along_state * own)`` before its last rounding."""
        first, second = along_w[..., None] * w * other, along_state[..., None] * own
        error = along_w_error[..., None] * w * other + along_state_error[..., None] * own
        error += (2 * scale_error + 12 * U32) * (first + second)
        return own_scale * error + 2 * U32 * (np.abs(base) + own_scale * (first + second))

    product = along_w_error[..., None] * q * k + (2 * scale_error + (tokens + 8) * U32) * along_w[..., None] * q * k
    product, size = product.sum(0), (along_w[..., None] * q * k).sum(0)
    base = grad if residual else np.zeros_like(grad)
    reach = hidden_scale * (along_w[..., None] * w * k + along_state[..., None] * q)
    return (
        state_error(hidden_scale, q, k, base) + rounding(np.abs(base) + reach, dtypes[0]),
        state_error(key_scale, k, q, np.zeros_like(grad))
        + rounding(key_scale * (along_w[..., None] * w * q + along_state[..., None] * k), dtypes[0]),
        value_error,
        np.abs(key_norm) * product + rounding(np.abs(key_norm) * size, dtypes[1]),
        np.abs(query_norm) * product + rounding(np.abs(query_norm) * size, dtypes[1]),
    )


def conv_gradient_bounds(tensors, grad, gate, gate_error, *, dilation, conv_eps, starts, dtypes):
    """Bounds on the gradients of conv_norm and conv_weight, and what :func:`gate_gradient_bounds` takes as ``known``.

    gate: 0 where a token is masked. starts: first token of each token's sequence. All tokens belong to one. Propagation
    through the formulas of ops/conv_kernels/backward.py; silu' is at most 1.1 and its slope at most 0.5.
    """
    value, conv_norm, weight = tensors[2], *tensors[5:]
    tokens, branches, width = grad.shape
    taps = weight.shape[-1]
    value_size = np.abs(value)[:, None]
    norm = 1 / np.sqrt(gate**2 * (value**2).mean(-1)[:, None] + conv_eps)
    scale = gate * norm
    live = gate != 0
    scale_error = np.divide(gate_error, gate, out=np.zeros_like(gate), where=live) + chain(width) * U32
    sources = [(t, k, t - (taps - 1 - k) * dilation) for t in range(tokens) for k in range(taps)]
    sources = [(t, k, s) for t, k, s in sources if s >= starts[t]]
    conv, conv_error = np.zeros_like(grad), np.zeros_like(grad)
    for t, k, s in sources:
        term = value[s] * scale[s][:, None] * conv_norm * weight[..., k]
        conv[t] += term
        conv_error[t] += np.abs(term) * (scale_error[s][:, None] + (taps + 4) * U32)
    half = np.tanh(conv / 2) / 2
    conv_grad = grad * ((0.5 + half) * (1 + conv * (0.5 - half)))
    conv_grad_error = np.abs(grad) * (0.5 * conv_error + 8 * U32 * (1 + np.abs(conv)))
    through, through_size, through_error = (np.zeros_like(grad) for _ in range(3))
    product_size, product_error = (np.zeros((taps, branches, width)) for _ in range(2))
    for t, k, s in sources:
        tap = np.abs(conv_norm * weight[..., k])
        through[s] += conv_grad[t] * conv_norm * weight[..., k]
        through_size[s] += np.abs(conv_grad[t]) * tap
        through_error[s] += tap * (conv_grad_error[t] + (taps + 4) * U32 * np.abs(conv_grad[t]))
        normed = np.abs(value[s]) * scale[s][:, None]
        product_size[k] += normed * np.abs(conv_grad[t])
        relative = scale_error[s][:, None] + (tokens + 8) * U32
        product_error[k] += normed * (conv_grad_error[t] + np.abs(conv_grad[t]) * relative)
    sizes = np.abs(gate[..., None] * grad) + scale[..., None] * through_size
    part_error = np.abs(grad) * gate_error[..., None] + scale[..., None] * through_error
    part_error += (scale * scale_error)[..., None] * np.abs(through) + (2 * branches + 4) * U32 * sizes
    scale_grad, direct = (through * value[:, None]).sum(-1), (grad * value[:, None]).sum(-1)
    scale_grad_error = (value_size * (through_error + chain(width) * U32 * through_size)).sum(-1)
    relative = 3 * scale_error + 8 * U32
    gate_grad = direct + scale_grad * conv_eps * norm**3
    gate_grad_error = chain(width) * U32 * np.abs(grad * value[:, None]).sum(-1)
    gate_grad_error += conv_eps * norm**3 * (scale_grad_error + np.abs(scale_grad) * relative)
    factor = (scale**3 * np.abs(scale_grad)).sum(-1, keepdims=True) / width
    factor_error = (scale**3 * (scale_grad_error + np.abs(scale_grad) * relative)).sum(-1, keepdims=True) / width
    value_error = part_error.sum(1) + np.abs(value) * (factor_error + 4 * U32 * factor)
    value_error += rounding(sizes.sum(1) + np.abs(value) * factor, dtypes[0])
    weight_size = (np.abs(conv_norm) * product_size).transpose(1, 2, 0)
    weight_error = (np.abs(conv_norm) * product_error).transpose(1, 2, 0) + rounding(weight_size, dtypes[1])
    by_tap = np.abs(weight).transpose(2, 0, 1)
    norm_size = (by_tap * product_size).sum(0)
    norm_error = (by_tap * product_error).sum(0) + (taps + 2) * U32 * norm_size + rounding(norm_size, dtypes[1])
    return norm_error, weight_error, (gate_grad, gate_grad_error, value_error)


def assert_within(result, exact, bound, spread=True):
    """Every element within its bound, and the root mean square well within theirs: no bound is met by all at once.

    ``spread=False`` leaves the second out, for bounds that few roundings can reach. AssertionError where not.
    """
    result = result.detach().to(torch.float64).cpu().numpy()
    if result.shape != exact.shape:
        raise AssertionError(f"shape {list(result.shape)}, expected {list(exact.shape)}")
    error = np.abs(result - exact)
    if not (error <= bound).all():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - bound)), error.shape)
        at = [int(index) for index in worst]
        raise AssertionError(f"error {error[worst]:.3e} above {bound[worst]:.3e} at {at}; value {exact[worst]}")
    if error.size and spread:
        rms, limit = np.sqrt((error**2).mean()), np.sqrt((bound**2).mean())
        if not rms <= 0.75 * limit:
            raise AssertionError(f"RMS error {rms:.3e} above 0.75 of its bound {limit:.3e}")
