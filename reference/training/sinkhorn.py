"""Momentum whose matrix is brought to balanced rows and columns: how DeepSeek-V4.1 trains embeddings and Engram tables.

One step over a whole matrix, of gradient g ``[rows, R]``:

    m = beta m + (1 - beta) g                 momentum, the one state per element
    u = beta m + (1 - beta) g                 Nesterov's look ahead
    u_i = 0  where |u_i| <= tau mean |u_i|    rows without news, the mean being that over all rows
    u_i /= |u_i| + eps,  u_j /= |u_j| + eps   rows and columns in turn, K in all, the last of them rows
    weight -= lr gamma sqrt(R) u

so that every row that moves does so by lr gamma, root mean square. Norms are Euclidean. :func:`sinkhorn` is this step.

Sources: algorithm 1 of DeepSeek-V4.1-Flash's technical report, with beta 0.95, K 11, tau 1e-3, gamma 0.18, eps 1e-20,
as NVIDIA's Emerging-Optimizers (``sinkhorn_balance``) and DeepSeek's TileKernels 2.1 have it as well; the balancing is
that of Scetbon et al. 2025 (arXiv 2502.06742).

A table of 100 GB cannot be rewritten in each step, so :func:`row_sinkhorn` touches the rows that have a gradient alone.
What the last balancing leaves is ``u_i * c / |u_i * c|`` with one scale c_j a column, and a row without a gradient
keeps its direction, since its momentum only shrinks. So what it still has to move follows later from the scales of
the steps gone by, which are kept: :func:`take_moves`, which a row takes before it is read. Two things differ from the
whole matrix: scales come from the rows with a gradient in that step, not from those that move by momentum alone; and a
row moves for as many steps after its last gradient as are kept, beyond which less than 2^-30 of its momentum is left.
"""

import functools
import math
from typing import NamedTuple

import torch

from .update import finite_rows, move_rows

LEFT = 2.0**-30


class SinkhornState(NamedTuple):
    """What is kept of a table of ``rows`` rows; N steps are remembered, step k at index k modulo N."""

    momentum: torch.Tensor  #: ``[rows, R]``, as of the step that ``taken`` says
    taken: torch.Tensor  #: int32 ``[rows]``, the last step whose moves the row has taken; 0 before its first gradient
    columns: torch.Tensor  #: ``[N, R]``, the columns' scales of each step
    rates: torch.Tensor  #: ``[N]``, lr gamma sqrt(R)
    thresholds: torch.Tensor  #: ``[N]``, norms up to which rows did not move
    total: torch.Tensor  #: float64 ``[1]``, the sum of the norms of all rows' momentum
    clock: torch.Tensor  #: int64 ``[1]`` on the CPU, steps that the table has taken


def steps_remembered(momentum: float) -> int:
    """N: steps until a momentum has shrunk to 2^-30."""
    return max(1, math.ceil(math.log(LEFT) / math.log(momentum))) if momentum else 1


@functools.lru_cache(16)
def decays(momentum: float, steps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``momentum^k`` for k = 0 ... steps + 1."""
    return torch.tensor([momentum**k for k in range(steps + 2)], dtype=torch.float64).to(device, dtype)


def balanced(update: torch.Tensor, *, threshold: float, balancings: int, eps: float) -> torch.Tensor:
    """``update [rows, R]`` with rows and columns normalised in turn, ``balancings`` in all; rows come first."""
    norms = update.norm(dim=1, keepdim=True)
    update = torch.where(norms > threshold * norms.mean(), update, 0)
    for k in range(balancings):
        update = update / (update.norm(dim=1 - k % 2, keepdim=True) + eps)
    return update


def sinkhorn(weight, state, grad, *, lr, momentum, update_rms, threshold, balancings, eps):
    """One step in place over all of ``weight [rows, R]``, with its momentum ``state`` and its gradient alike."""
    state.mul_(momentum).add_(grad, alpha=1 - momentum)
    update = balanced(momentum * state + (1 - momentum) * grad, threshold=threshold, balancings=balancings, eps=eps)
    weight.sub_((lr * update_rms * math.sqrt(weight.shape[1]) * update).to(weight.dtype))


def row_sinkhorn(weight, state, gradient, *, factor, lr, momentum, update_rms, threshold, balancings, eps, seed, step):
    """One step in place of the rows that have a gradient; returns how many were left as they were, int32 ``[1]``.

    state: that of :class:`SinkhornState`; gradient: a RowGradient; factor: a scalar tensor; seed: None rounds to
    nearest. step: the optimizer's, instead of which the table's clock counts.
    """
    state, totals = SinkhornState(*state), gradient.over_ranks
    ids, grad, skipped = finite_rows(gradient, factor, state.momentum.dtype)
    take_moves(weight, state, ids, momentum=momentum, eps=eps, seed=seed)
    state.clock.add_(1)
    clock, slot = int(state.clock), int(state.clock) % len(state.rates)
    before = state.momentum[ids]
    after = momentum * before + (1 - momentum) * grad
    update = momentum * after + (1 - momentum) * grad
    norms = update.norm(dim=1)
    sums = [rows.sum(dtype=torch.float64) for rows in (before.norm(dim=1), after.norm(dim=1), norms)]
    limit = account(state, totals(torch.stack([*sums, sums[0].new_tensor(len(weight))])), momentum, threshold)
    live = norms > limit
    squares = columns = update.new_ones(update.shape[1])
    for _ in range(balancings // 2):
        # A row's scales so far cancel when it is normalised.
        squares = totals(_normalised(update[live] * columns, eps).square().sum(0))
        columns = column_scales(columns, squares, eps)
    if not squares.any():
        columns = state.columns[(clock - 1) % len(state.rates)]  # nothing moved: the scales stay
    rate = lr * update_rms * math.sqrt(weight.shape[1])
    move_rows(weight, ids[live], -rate * _normalised(update[live] * columns, eps), 1.0, seed, clock)
    state.momentum[ids], state.taken[ids] = after, clock
    state.columns[slot], state.rates[slot], state.thresholds[slot] = columns, rate, limit
    return skipped


def account(state: SinkhornState, totals: torch.Tensor, momentum: float, threshold: float) -> torch.Tensor:
    """The norm up to which rows do not move, of this step; ``state.total`` becomes that after it.

    totals: float64 ``[4]``, sums over the rows with a gradient of the norms of their momentum before and after the step
    and of their update, and the number of all rows.
    """
    before, after, update, rows = totals
    rest = (state.total[0] - before).clamp(min=0)
    state.total[0] = momentum * rest + after
    return (threshold * (momentum * momentum * rest + update) / rows).to(state.thresholds.dtype)


def column_scales(columns: torch.Tensor, squares: torch.Tensor, eps: float) -> torch.Tensor:
    """The scales after one more balancing of columns, whose sums of squares are given. An empty column keeps its."""
    norms = squares.sqrt()
    return torch.where(norms > 0, columns / (norms + eps), columns)


def _normalised(rows, eps):
    return rows / (rows.norm(dim=1, keepdim=True) + eps)


def take_moves(weight, state, ids, *, momentum, eps, seed):
    """Move rows ``ids [n]``, which are distinct, by what momentum alone has moved them since; in place."""
    clock, steps = int(state.clock), len(state.rates)
    ids = ids[(state.taken[ids] > 0) & (state.taken[ids] < clock)]
    if not len(ids):
        return
    ids = ids[state.taken[ids].argsort(stable=True)]
    before, taken = state.momentum[ids], state.taken[ids].to(torch.int64)
    left = decays(momentum, steps, before.dtype, before.device)
    norms = before.norm(dim=1)
    direction = torch.where(norms > 0, 1 / norms, 0)[:, None] * before
    moved = torch.zeros_like(before)
    passing = range(int(taken[0]) + 1, clock + 1)
    ends = torch.searchsorted(taken, torch.tensor(passing, device=taken.device)).tolist()
    begins = torch.searchsorted(taken, torch.tensor(passing, device=taken.device) - steps).tolist()
    for k, begin, end in zip(passing, begins, ends, strict=True):  # of rows in the order of the step they have taken
        due = left[k - taken[begin:end] + 1] * norms[begin:end] > state.thresholds[k % steps]
        rates = torch.where(due, state.rates[k % steps], 0)[:, None]
        moved[begin:end] += rates * _normalised(direction[begin:end] * state.columns[k % steps], eps)
    move_rows(weight, ids, -moved, 1.0, seed, clock)
    passed = clock - taken
    state.momentum[ids] = before * torch.where(passed <= steps, left[passed.clamp(max=steps)], 0)[:, None]
    state.taken[ids] = clock
