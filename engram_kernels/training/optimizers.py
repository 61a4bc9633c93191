"""Optimizers of tables: a step costs what its distinct rows cost, whatever the size of the table.

    RowAdagrad   one float32 a row
    RowAdam      two float32 moments per element, and an int32 count of steps a row
    RowSinkhorn  one float32 momentum per element, an int32 step a row, and 2 KiB by R for the steps gone by

The rules are those of reference/training. All are torch optimizers over the tables' anchors, so that learning rate
schedulers, GradScaler and clip_grad_norm_ work as they do for parameters; docs/training.md shows how.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload
from weakref import ref

import torch
import torch.distributed as dist

from engram_kernels.checkpoints.parallel import spans
from engram_kernels.geometry.choices import Reduce, StatePlacement
from engram_kernels.geometry.kinds import Function, OneOf, Optional, takes
from engram_kernels.tables.engram import EngramTable

from .replicas import ALONE
from .row_optimizer import OPTIONS, RATES, Loss, RowOptimizer
from .sinkhorn import sinkhorn_rule, take_moves
from .update import ADAGRAD, ADAM


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: a row's rate falls with the sum, over its own steps, of its gradient's mean square.

        s += mean(g ** 2)                                        float32 [rows]: "sums" in states()
        row = (1 - lr * weight_decay) * row - lr * g / (sqrt(s) + eps)

    tables: one or more trainable tables, or parameter groups, as torch has them: dicts with tables as "params" and the
    options in which a group differs (lr, eps, weight_decay).
    lr, eps: the rate, and what keeps the quotient finite.
    weight_decay: times lr, the fraction of itself that a row loses in each step in which it has a gradient.
    state_placement: "device", "host" or "cpu", where the states are; None is the table's ("host" for a shared one,
    which one process writes).
    stochastic_rounding: of bfloat16 rows, reproducible by ``seed``; other rows, and False, round to nearest.
    reduce: of several ranks. "mean" or "sum" of the row gradients of all ranks of ``group`` (None: a group over the
    world), each of which has a copy of the tables: as DistributedDataParallel does with dense parameters, in the
    backward pass, before gradients are clipped. The backward pass and the step are collective then. None trains tables
    that differ on purpose. "alone", as it is, refuses plain tables in a job of more than one rank. Parts of a
    :class:`ShardedTable` reduce as that says.

    TypeError for what is no :class:`EngramTable`. ValueError for tables that are not trainable, that were attached or
    are given twice, for a ``group`` that is not to reduce, and with ``reduce`` where copies on the ranks differ.
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
        state_placement: StatePlacement | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        reduce: Reduce | None = ALONE,
        group: "dist.ProcessGroup | None" = None,
    ):
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(tables, defaults, state_placement, seed if stochastic_rounding else None, reduce, group)


class RowAdam(RowOptimizer):
    """Adam with two moments per element, corrected for bias by the number of steps that a row has taken itself.

        t += 1;  m += (1 - b1) * (g - m);  v += (1 - b2) * (g ** 2 - v)
        row = (1 - lr * weight_decay) * row - lr * (m / (1 - b1 ** t)) / (sqrt(v / (1 - b2 ** t)) + eps)

    A row that has no gradient keeps its moments as they are. m and v are float32 ``[rows, R]``, t is int32 ``[rows]``:
    "first", "second" and "steps" in :meth:`states`.

    tables: one or more trainable tables, or parameter groups: dicts with tables as "params" and the options in which a
    group differs (lr, betas, eps, weight_decay).
    lr, betas, eps: rate, decay (b1, b2) of the two moments, and what keeps the quotient finite.
    weight_decay: times lr, the fraction of itself that a row loses in each step in which it has a gradient.
    state_placement: "device", "host" or "cpu", where the moments are; None is the table's ("host" for a shared one).
    stochastic_rounding: of bfloat16 rows, reproducible by ``seed``; other rows, and False, round to nearest.
    reduce, group: "mean" or "sum" adds the row gradients of all ranks of ``group`` (None: a group over the world), each
    with a copy of the tables, in the backward pass. None trains tables that differ on purpose; "alone" refuses plain
    tables in a job of more than one rank.

    TypeError for what is no :class:`EngramTable`. ValueError for tables that are not trainable, that were attached or
    are given twice, for a ``group`` that is not to reduce, and with ``reduce`` where copies on the ranks differ.
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
        state_placement: StatePlacement | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        reduce: Reduce | None = ALONE,
        group: "dist.ProcessGroup | None" = None,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(tables, defaults, state_placement, seed if stochastic_rounding else None, reduce, group)


class RowSinkhorn(RowOptimizer):
    """DeepSeek-V4.1's optimizer of embeddings and Engram tables: momentum balanced over rows and columns.

    A row that moves does so by ``lr * update_rms``, root mean square. There is no weight decay. Rows that momentum
    alone moves take these moves before they are next read, by :meth:`EngramTable.take_moves`, so that a step costs
    what its distinct rows cost; the columns' scales come from these rows. Where a table was passed over, as one
    without a gradient, its clock stands. Formulas, sources, and what differs from a step over all rows are in
    reference/training/sinkhorn.py. Of the :meth:`states` "momentum" is float32 ``[rows, R]`` and "taken", the last step
    that each row has taken, int32 ``[rows]``; the others are of the steps gone by.

    tables: one or more trainable tables, or parameter groups: dicts with tables as "params" and options.
    lr, update_rms: their product is how far a row moves.
    momentum: what is left of it after a step; it stays as it is.
    threshold: of the mean norm of all rows' updates, what a row must exceed to move.
    balancings: of rows and columns in turn, an odd number. eps: what keeps their quotients finite.
    state_placement: "device", "host" or "cpu", where the momentum is; None is the table's ("host" for a shared one).
    stochastic_rounding: of bfloat16 rows, reproducible by ``seed``; other rows, and False, round to nearest.
    reduce: None is for ranks whose tables are different ones; copies on ranks would be rounded at different times, as
    their rows are read, and take a :class:`ShardedTable` instead.

    One of these a table. TypeError for what is no :class:`EngramTable`; ValueError for tables that are not trainable,
    that were attached or are given twice.
    """

    _options = {name: kind for name, kind in OPTIONS.items() if name not in ("weight_decay", "group")}
    _options |= dict(reduce=Optional(OneOf(ALONE)))
    _taken = ("momentum", "update_rms", "threshold", "balancings")

    @takes(**_options, **{name: RATES[name] for name in _taken})
    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable] | Sequence[dict[str, Any]],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        update_rms: float = 0.18,
        threshold: float = 1e-3,
        balancings: int = 11,
        eps: float = 1e-20,
        state_placement: StatePlacement | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        reduce: Literal["alone"] | None = ALONE,
    ):
        defaults = dict(lr=lr, momentum=momentum, update_rms=update_rms, threshold=threshold)
        defaults |= dict(balancings=balancings, eps=eps)
        self._momentum, self._rule, self._put_off = momentum, sinkhorn_rule(momentum), []
        super().__init__(tables, defaults, state_placement, seed if stochastic_rounding else None, reduce)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @takes(closure=Optional(Function()))
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Move the rows that have a gradient; those that momentum alone moves take their moves when they are next read.

        closure: computes the loss again, with gradients, and returns it; the step returns what it returned, else None.
        ValueError, and none has moved, where momentum was changed, the optimizer or a table is closed, an option is out
        of bounds, or a gradient was changed other than by a factor.
        """
        for group in self.param_groups:
            self._check_momentum("RowSinkhorn.step", group["momentum"])
        return super().step(closure)

    def close(self) -> None:
        """Release the states' memory; closing again is no error. What rows have not taken yet they never take."""
        for table, put_off in zip(self.tables, self._put_off, strict=False):
            if table.put_off is put_off:
                table.put_off = None
        super().close()

    def _checked_group(self, where, group, others):
        group = super()._checked_group(where, group, others)
        self._check_momentum(where, group.get("momentum", self._momentum))
        for table in group["params"]:
            if table.put_off is not None and table.put_off.alive:
                raise ValueError(f"{where}: {table!r} has another RowSinkhorn; close that first")
            if table.shard is not None and table.shard.copies > 1:
                raise ValueError(
                    f"{where}: tables must have no replicas, which would take moves that are put off at different "
                    f"times and round them differently, got a part with {table.shard.copies}"
                )
        return group

    def _take(self, where, group) -> None:
        super()._take(where, group)
        for table in group["params"]:
            table.put_off = _PutOff(self, len(self._put_off))
            self._put_off.append(table.put_off)

    def _update(self, table, state, group) -> None:
        with table.as_it_stands():
            super()._update(table, state, group)
        self._put_off[self.tables.index(table)].due = True

    def _take_over(self, where, content, fill) -> None:
        for group in content.groups if isinstance(content.groups, (list, tuple)) else ():
            if isinstance(group, Mapping):
                self._check_momentum(where, group.get("momentum", self._momentum))
        super()._take_over(where, content, fill)
        for put_off in self._put_off:
            put_off.due = True

    def _check_momentum(self, where: str, momentum) -> None:
        if momentum != self._momentum:
            raise ValueError(
                f"{where}: momentum must stay {self._momentum}, of which powers are kept, got {momentum}; give "
                "cycle_momentum=False to schedulers such as OneCycleLR"
            )

    def _take_moves(self, index: int, row_ids: torch.Tensor | None) -> None:
        """:meth:`EngramTable.take_moves` of table number ``index``; rows are distinct, and -1 is none."""
        table, state = self.tables[index], self._states[index]
        device = table.anchor_device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "RowSinkhorn: rows have moves to take, which a CUDA graph cannot; call EngramTable.take_moves before "
                "the capture, and before each replay that follows a step"
            )
        group = [group for group in self.param_groups for _ in group["params"]][index]
        options = dict(momentum=self._momentum, eps=float(group["eps"]), seed=self._seed)
        on_cpu = row_ids is None or not row_ids.is_cuda
        with torch.no_grad(), table.as_it_stands():
            if row_ids is not None:
                table.rows_changed(row_ids.to(device))
                take_moves(table.weight.data, state.tensors, row_ids.to(device), **options)
            else:
                table.wait_for_steps()  # the CPU reads which rows these are
                for begin, end in spans(table.rows, 2**24):
                    taken = state.tensors["taken"][begin:end]
                    ids = ((taken > 0) & (taken < state.tensors["clock"].item())).nonzero()[:, 0] + begin
                    table.rows_changed(ids.to(device))
                    take_moves(table.weight.data, state.tensors, ids.to(device), **options)
                self._put_off[index].due = False
            if on_cpu:
                table.wait_for_steps()


class _PutOff:
    """What a table calls for moves that its optimizer has put off; it does not keep that alive."""

    def __init__(self, optimizer: RowSinkhorn, index: int):
        self._optimizer, self._index = ref(optimizer), index
        #: Whether any row may have moves to take.
        self.due = False

    @property
    def alive(self) -> bool:
        return self._optimizer() is not None

    def __call__(self, row_ids: torch.Tensor | None) -> None:
        optimizer = self._optimizer()
        if self.due and optimizer is not None:
            optimizer._take_moves(self._index, row_ids)
