"""Row-wise optimizer steps: the rows that have a gradient, their state, and nothing else.

Per distinct row, with g its gradient times ``factor``, in float32 (float64 for a float64 table):

    Adagrad   s += mean(g^2)                                      one number a row
              row = (1 - lr * decay) * row - lr * g / (sqrt(s) + eps)
    Adam      t += 1,  m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v)
              row = (1 - lr * decay) * row - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

t counts the row's own steps, so that the correction for bias fits a row that is seldom read. A row whose sum of squares
is not finite keeps its bits and its state, and is counted.

Rounding to bfloat16 is stochastic where asked: the upper 16 bits of ``bits + u``, with u the low 16 bits of SplitMix64
at counter ``(step * rows + row) * R + element``. R elements a row. Sources: Duchi et al. 2011; Kingma and Ba 2015;
Steele, Lea and Flood 2014.
"""

import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
MIX_1, MIX_2 = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def row_adagrad(weight, state, gradient, *, factor, lr, eps, weight_decay, seed, step):
    """One step in place; returns how many rows were left as they were, int32 ``[1]``.

    weight ``[rows, R]``; state: (sums ``[rows]``,); gradient: a RowGradient; factor: a scalar tensor; seed: None rounds
    to nearest.
    """
    (sums,) = state
    ids, g, skipped = finite_rows(gradient, factor, sums.dtype)
    sums[ids] += g.square().mean(1)
    addend = -lr * g / (sums[ids].sqrt() + eps)[:, None]
    move_rows(weight, ids, addend, 1 - lr * weight_decay, seed, step)
    return skipped


def row_adam(weight, state, gradient, *, factor, lr, betas, eps, weight_decay, seed, step):
    """One step in place; as :func:`row_adagrad`, with state (m ``[rows, R]``, v ``[rows, R]``, t int32 ``[rows]``)."""
    first, second, steps = state
    ids, g, skipped = finite_rows(gradient, factor, first.dtype)
    steps[ids] += 1
    first[ids] += (1 - betas[0]) * (g - first[ids])
    second[ids] += (1 - betas[1]) * (g.square() - second[ids])
    taken = steps[ids].to(torch.float64)
    correction = [(1 - beta**taken).to(g.dtype)[:, None] for beta in betas]
    addend = -lr * (first[ids] / correction[0]) / ((second[ids] / correction[1]).sqrt() + eps)
    move_rows(weight, ids, addend, 1 - lr * weight_decay, seed, step)
    return skipped


def finite_rows(gradient, factor, dtype):
    """Ids and scaled gradients of the rows that take the step, and the number of the others."""
    count = int(gradient.count)
    finite = torch.isfinite(gradient.squares[:count] * factor.square())
    skipped = (~finite).sum(0, keepdim=True, dtype=torch.int32)
    return gradient.ids[:count][finite], (gradient.values[:count][finite] * factor).to(dtype), skipped


def move_rows(weight, ids, addend, keep, seed, step):
    """Rows ``ids`` times ``keep``, plus ``addend``, rounded once; ``step`` is the one of the rounding's counter."""
    moved = weight[ids].to(addend.dtype) * keep + addend
    if seed is not None and weight.dtype == torch.bfloat16:
        rows, width = weight.shape
        counter = (step * rows + ids[:, None]) * width + torch.arange(width, device=ids.device)
        weight[ids] = round_stochastic(moved, random_bits(seed, counter))
    else:
        weight[ids] = moved.to(weight.dtype)


def random_bits(seed, counter):
    """SplitMix64 started at ``seed``, at int64 ``counter``: int64 with all bits random."""
    state = seed + GOLDEN * (counter + 1)
    state = (state ^ _shifted(state, 30)) * MIX_1
    state = (state ^ _shifted(state, 27)) * MIX_2
    return state ^ _shifted(state, 31)


def _shifted(state, by):
    """Logical shift right of int64."""
    return (state >> by) & (2 ** (64 - by) - 1)


def round_stochastic(values, bits):
    """float32 to bfloat16, up or down in magnitude with the probability that keeps the mean; ``bits``: low 16 count."""
    raised = values.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    rounded = (raised >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
