"""Optimizers of tables: a step costs what its distinct rows cost, whatever the size of the table.

    RowAdagrad   one float32 a row
    RowAdam      two float32 moments per element, and an int32 count of steps a row

The rules are those of reference/row_update.py. Both are torch optimizers over the tables' anchors, so that learning
rate schedulers, GradScaler and clip_grad_norm_ work as they do for parameters; docs/training.md shows how.
"""

from collections.abc import Callable, Sequence

import torch

from .arguments import INTERPRETING
from .reference import row_update as reference
from .row_state import RowState
from .row_update import launch_row_update
from .table import EngramTable


class RowOptimizer(torch.optim.Optimizer):
    """What the optimizers of this file share: tables, their states, and the step over both."""

    _arrays: tuple[tuple[str, torch.dtype, bool], ...]  # of the state: name, dtype, whether it is a number an element
    _rule: Callable  # the reference of a step

    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable],
        defaults: dict,
        *,
        state_placement: str | None,
        stochastic_rounding: bool,
        seed: int,
    ):
        where = type(self).__name__
        tables = (tables,) if isinstance(tables, EngramTable) else tuple(tables)
        for table in tables:
            if not isinstance(table, EngramTable):
                raise TypeError(f"{where}: tables must be EngramTable objects, got {type(table).__name__}")
            if not table.requires_row_grad:
                raise ValueError(f"{where}: {table!r} is not trainable; call requires_row_grad_() on it first")
        if not tables or len(set(map(id, tables))) != len(tables):
            raise ValueError(f"{where}: tables must be one or more different tables, got {list(tables)}")
        for name, low, high in (("lr", 0, None), ("eps", 0, None), ("weight_decay", 0, None)):
            _check_number(where, name, defaults[name], low, high)
        for beta in defaults.get("betas", ()):
            _check_number(where, "betas", beta, 0, 1)
        super().__init__([table.anchor for table in tables], defaults)
        self.tables, self.steps = tables, 0
        self._seed = seed if stochastic_rounding else None
        self._skipped: dict[torch.device, torch.Tensor] = {}
        self._states: list[RowState] = []
        try:
            for table in tables:
                self._states.append(RowState(table, self._arrays, state_placement, where))
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Move every row that has a gradient; the rest of the tables is not touched. Waits for nothing.

        closure: as for torch optimizers. A gradient that was scaled through the table's anchor counts as scaled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        options = {id(anchor): group for group in self.param_groups for anchor in group["params"]}
        for table, state in zip(self.tables, self._states, strict=True):
            if table.row_grad is not None and table.anchor.grad is not None:
                self._update(table, state, options[id(table.anchor)])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the tables' gradients; ``set_to_none`` is there for torch's sake, and they always are."""
        for table in self.tables:
            table.zero_row_grad()

    @property
    def skipped(self) -> int:
        """Rows left as they were so far because their gradient was NaN or infinite. Waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    def states(self, index: int = 0) -> dict[str, torch.Tensor]:
        """The state of table number ``index`` by name, where it lives."""
        return self._states[index].tensors

    def close(self) -> None:
        """Release the states' memory; closing again is no error."""
        for state in self._states:
            state.close()

    def _update(self, table: EngramTable, state: RowState, group: dict) -> None:
        gradient = table.row_grad
        device = gradient.values.device
        state.check_readable_on(device, type(self).__name__)
        table.check_readable_on(device, type(self).__name__)
        norm = gradient.norm()
        scaled = table.anchor.grad[0].to(norm)
        factor = torch.where(torch.isfinite(scaled) & (norm > 0), scaled / norm, 1.0)
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int32, device=device)
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay") if name in group}
        options |= dict(lr=float(group["lr"]), seed=self._seed, step=self.steps)
        arguments = table.weight, tuple(state.tensors.values()), gradient
        if (device.type == "cpu" and not INTERPRETING) or table.weight.dtype == torch.float64:
            self._skipped[device] += type(self)._rule(*arguments, factor=factor, **options)
        else:
            launch_row_update(*arguments, factor[None], self._skipped[device], **options)


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: a row's rate falls with the sum, over its own steps, of its gradient's mean square.

    tables: one or more trainable tables. weight_decay: what a row loses per step and lr, of the rows that have a
    gradient alone. state_placement: "device", "host" or "cpu", where the states live; None is the table's ("host" for a
    shared one, which one process writes).
    stochastic_rounding: of bfloat16 rows, reproducible by ``seed``; other rows, and False, round to nearest.
    """

    _arrays = (("sums", torch.float32, False),)
    _rule = staticmethod(reference.row_adagrad)

    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable],
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        state_placement: str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ):
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay)
        options = dict(state_placement=state_placement, stochastic_rounding=stochastic_rounding, seed=seed)
        super().__init__(tables, defaults, **options)


class RowAdam(RowOptimizer):
    """Adam with two moments per element, corrected for bias by the number of steps that a row has taken itself.

    A row that has no gradient keeps its moments as they are. tables, weight_decay, state_placement,
    stochastic_rounding and seed are those of :class:`RowAdagrad`.
    """

    _arrays = (("first", torch.float32, True), ("second", torch.float32, True), ("steps", torch.int32, False))
    _rule = staticmethod(reference.row_adam)

    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable],
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
        options = dict(state_placement=state_placement, stochastic_rounding=stochastic_rounding, seed=seed)
        super().__init__(tables, defaults, **options)


def _check_number(where: str, name: str, value, low: float, high: float | None) -> None:
    if not low <= value < (float("inf") if high is None else high):
        bound = f"at least {low}" if high is None else f"within {low} <= {name} < {high}"
        raise ValueError(f"{where}: {name} must be a finite number {bound}, got {value!r}")
