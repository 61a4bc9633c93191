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
    relative = float((gate_error / gate).max()) + (chain(hidden_size) + taps + 8) * U32
    return gated_bound(exact, hidden, value, gate_error, dtype) + 1.1 * relative * size


def assert_within(result, exact, bound, spread=True):
    """Every element within its bound, and the root mean square well within theirs: no bound is met by all at once.

    ``spread=False`` leaves the second out, for bounds that few roundings can reach.
    """
    result = result.detach().to(torch.float64).cpu().numpy()
    assert result.shape == exact.shape, f"shape {result.shape}, expected {exact.shape}"
    error = np.abs(result - exact)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else None
    assert (error <= bound).all(), f"error {error[worst]:.3e} above {bound[worst]:.3e} at {worst}; value {exact[worst]}"
    if error.size and spread:
        rms, limit = np.sqrt((error**2).mean()), np.sqrt((bound**2).mean())
        assert rms <= 0.75 * limit, f"RMS error {rms:.3e} above 0.75 of its bound {limit:.3e}"
