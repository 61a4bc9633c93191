"""Optimizers of tables: a step costs what its distinct rows cost, whatever the size of the table.

    RowAdagrad   one float32 a row
    RowAdam      two float32 moments per element, and an int32 count of steps a row

The rules are those of reference/training/update.py. Both are torch optimizers over the tables' anchors, so that
learning rate schedulers, GradScaler and clip_grad_norm_ work as they do for parameters; docs/training.md shows how.
"""

from collections.abc import Sequence
from typing import Any

from engram_kernels.geometry.kinds import takes
from engram_kernels.tables.engram import EngramTable

from .row_optimizer import OPTIONS, RATES, RowOptimizer
from .update import ADAGRAD, ADAM


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: a row's rate falls with the sum, over its own steps, of its gradient's mean square.

    tables: one or more trainable tables, or parameter groups, as torch has them: dicts with tables as "params" and the
    options in which a group differs (lr, eps, weight_decay).
    weight_decay: times lr, the fraction of itself that a row loses in each step in which it has a gradient.
    state_placement: "device", "host" or "cpu", where the states are; None is the table's ("host" for a shared one,
    which one process writes).
    stochastic_rounding: of bfloat16 rows, reproducible by ``seed``; other rows, and False, round to nearest.
    """

    _rule = ADAGRAD

    @takes(**OPTIONS)
    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable] | Sequence[dict[str, Any]],
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        state_placement: str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ):
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(tables, defaults, state_placement, seed if stochastic_rounding else None)


class RowAdam(RowOptimizer):
    """Adam with two moments per element, corrected for bias by the number of steps that a row has taken itself.

    A row that has no gradient keeps its moments as they are. betas may differ by group too. tables, weight_decay,
    state_placement, stochastic_rounding and seed are those of :class:`RowAdagrad`.
    """

    _rule = ADAM

    @takes(betas=RATES["betas"], **OPTIONS)
    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable] | Sequence[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_placement: str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(tables, defaults, state_placement, seed if stochastic_rounding else None)
