"""Second formulations of every op, in scalar Python and numpy float64. They share no code with the package.

The references are the specification; these say the same in other words, so that a slip in one shows against the other.
"""

import math

import numpy as np


def wrap64(number):
    """A Python integer as a wrapping int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def hash_rows(ids, multipliers, primes, *, pad, token_map=None, eos=None, vocab=None, cu=None, history=None, dead=None):
    """Row ids ``[T][L][C]`` token by token; lists of Python integers throughout."""
    cu = [0, len(ids)] if cu is None else cu
    max_ngram = len(multipliers[0])
    heads = len(primes[0]) // (max_ngram - 1)
    limit = len(token_map) if token_map is not None else vocab
    rows = []
    for t in range(len(ids)):
        owner = [b for b in range(len(cu) - 1) if cu[b] <= t < cu[b + 1]]
        if not owner:
            rows.append([[-1] * len(primes[0]) for _ in primes])
            continue
        (b,) = owner
        window, stopped = [], False  # one entry per shift: an id, or None where invalid
        for shift in range(max_ngram):
            place = t - shift
            if place >= cu[b]:
                raw, lost = ids[place], bool(dead and dead[place])
            else:
                back = cu[b] - place
                raw = history[b][-back] if history is not None else -1
                lost = raw == -1
            stopped = stopped or lost or (eos is not None and shift > 0 and raw == eos)
            if stopped:
                window.append(pad)
            elif raw < 0 or (limit is not None and raw >= limit):
                window.append(None)
            else:
                window.append(token_map[raw] if token_map is not None else raw)
        per_layer = []
        for layer in range(len(primes)):
            offset, columns = 0, []
            for column, prime in enumerate(primes[layer]):
                n = 2 + column // heads
                if None in window[:n]:
                    columns.append(-1)
                else:
                    mix = 0
                    for shift in range(n):
                        mix ^= wrap64(window[shift] * multipliers[layer][shift])
                    columns.append(mix % prime + offset)
                offset += prime
            per_layer.append(columns)
        rows.append(per_layer)
    return rows


def e4m3_value(byte):
    """Value of one e4m3 byte: 1 sign, 4 exponent bits of bias 7, 3 of mantissa, no infinity."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def ue8m0_value(byte):
    """Value of one scale byte."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def e2m1_value(code):
    """The float64 value of four bits: a sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def fp4_rows(weight, scales, own_scale, ids):
    """float64 rows of e2m1 pairs; scales ue8m0 per 32 elements, or with ``own_scale`` e4m3 per 16."""
    group, value = (32, ue8m0_value) if own_scale is None else (16, e4m3_value)
    rows = np.zeros((*ids.shape, 2 * weight.shape[1]))
    for place in np.ndindex(ids.shape):
        row = int(ids[place])
        if 0 <= row < len(weight):
            for e in range(rows.shape[-1]):
                code = int(weight[row, e // 2]) >> 4 * (e % 2) & 15
                rows[place][e] = e2m1_value(code) * value(int(scales[row, e // group])) * (own_scale or 1.0)
    return rows


def fp8_rows(rows, scales, ids):
    """Values float64 of rows ``ids`` (numpy, any shape) of a uint8 table with ue8m0 bytes or one float as scales."""
    table = np.array([e4m3_value(byte) for byte in range(256)])
    out = np.zeros((*ids.shape, rows.shape[1]))
    for place in np.ndindex(ids.shape):
        row = int(ids[place])
        if 0 <= row < len(rows):
            factor = scales
            if isinstance(scales, np.ndarray):
                factor = np.array([ue8m0_value(int(byte)) for byte in scales[row]]).repeat(32)
            with np.errstate(invalid="ignore"):
                out[place] = table[rows[row]] * factor
    return out


def gate_parts(hidden, key, query_norm, key_norm, eps):
    """``d`` and ``sum |q_i k_i| / sqrt(D)``, float64 ``[T, H]``, by explicit norms instead of a mean and rsqrt."""
    width = hidden.shape[-1]
    length = np.sqrt((hidden**2).sum(-1) + width * eps) * np.sqrt((key**2).sum(-1) + width * eps)
    terms = hidden * key * query_norm * key_norm
    return terms.sum(-1) / length * math.sqrt(width), np.abs(terms).sum(-1) / length * math.sqrt(width)


def gate_of(d, clamp=1e-6, zero_gate="copysign"):
    """The gate of ``d``, with the logistic function as a hyperbolic tangent."""
    side = np.where(d < 0, -1.0, np.where(d > 0, 1.0, 1.0 if zero_gate == "copysign" else d * 0.0))
    return 0.5 + 0.5 * np.tanh(side * np.sqrt(np.maximum(np.abs(d), clamp)) / 2)


def gate_slope(d, clamp=1e-6):
    """Derivative of :func:`gate_of`, with the logistic function's as a hyperbolic secant; 0 in the flat region."""
    root = np.sqrt(np.maximum(np.abs(d), clamp))
    with np.errstate(divide="ignore"):
        return np.where((np.abs(d) < clamp) | (d == 0), 0.0, 1 / (8 * root * np.cosh(root / 2) ** 2))


def gated(hidden, key, value, query_norm, key_norm, *, eps, clamp=1e-6, zero_gate="copysign"):
    """``hidden + gate * value`` float64 ``[T, H, D]``."""
    d, _ = gate_parts(hidden, key, query_norm, key_norm, eps)
    return hidden + gate_of(d, clamp, zero_gate)[..., None] * value[:, None]


def gate_conv(hidden, gate, value, conv_norm, conv_weight, *, dilation, conv_eps, starts, state=None, magnitude=False):
    """``hidden + v + silu(conv)`` token by token; ``starts[t]`` is the first token of t's sequence.

    state: (value ``[T, S, D]``, scale ``[T, S, H]``) of each token's own sequence. magnitude: also return the sum over
    taps of the terms' absolute values, for error bounds.
    """
    taps = conv_weight.shape[-1]
    span = (taps - 1) * dilation
    v = gate[..., None] * value[:, None]
    normed = v / np.sqrt((v**2).mean(-1, keepdims=True) + conv_eps) * conv_norm
    conv, size = np.zeros_like(v), np.zeros_like(v)
    for t in range(len(v)):
        for tap in range(taps):
            back = (taps - 1 - tap) * dilation
            if t - back >= starts[t]:
                term = normed[t - back]
            elif state is not None:
                slot = span + t - back - starts[t]
                term = state[0][t, slot][None] * state[1][t, slot][:, None] * conv_norm
            else:
                continue
            conv[t] += term * conv_weight[..., tap]
            size[t] += np.abs(term * conv_weight[..., tap])
    out = hidden + v + conv * (0.5 + 0.5 * np.tanh(conv / 2))
    return (out, size) if magnitude else out
