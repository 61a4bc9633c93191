"""What the optimizers of rows share: their tables, the states of these, the step over both, and saving."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from engram_kernels.checkpoints.parallel import THREADS, Progress, check_threads
from engram_kernels.geometry import kinds
from engram_kernels.geometry.choices import Reduce, StatePlacement
from engram_kernels.geometry.kinds import Flag, Function, Instance, Keyed, Number, Optional, Whole, check_all, takes
from engram_kernels.launching.device import takes_kernels
from engram_kernels.tables.engram import EngramTable

from .replicas import ALONE, MEAN, REDUCES, SUM, Replicas, check_alone, check_free
from .saving import KEY, Content, fill_states, layout_of, open_states, save_states, tensors_of
from .state import PLACEMENTS, RowState
from .update import Rule


class _Rate(Number):
    """A number, or a tensor of one element, as torch's schedulers set a rate."""

    def fits(self, value) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1 and not value.is_meta and not value.is_complex() and super().fits(value.item())
        return super().fits(value)

    def settled(self, value):
        return value


class _Betas(kinds.Kind):
    """The rates at which Adam's two moments forget."""

    expected, error = "a pair of numbers within 0 <= beta < 1", ValueError
    _beta = Number(0, 1)

    def fits(self, value) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(self._beta.fits, value))

    def settled(self, value):
        return tuple(value)


class _Odd(Whole):
    """An odd number, since the last balancing is one of rows."""

    def __init__(self, least: int):
        super().__init__(least)
        self.expected = "a positive odd int"

    def fits(self, value) -> bool:
        return super().fits(value) and value % 2 == 1


#: Hyper-parameters, checked when they are given, when they are loaded, and in each step, as schedulers change them.
RATES = dict(
    lr=_Rate(0),
    eps=_Rate(0),
    weight_decay=_Rate(0),
    betas=_Betas(),
    momentum=Number(0, 1),
    update_rms=Number(0),
    threshold=Number(0),
    balancings=_Odd(1),
)
#: What a step's closure returns.
Loss = TypeVar("Loss")
#: Parameters of every optimizer of rows.
OPTIONS = dict(
    tables=kinds.AnyOf(Instance(EngramTable), kinds.Many()),
    lr=RATES["lr"],
    eps=RATES["eps"],
    weight_decay=RATES["weight_decay"],
    state_placement=Optional(kinds.OneOf(*PLACEMENTS)),
    stochastic_rounding=Flag(),
    seed=Whole(),
    reduce=Optional(kinds.OneOf(*REDUCES)),
    group=Optional(Instance("ProcessGroup")),
)


class RowOptimizer(torch.optim.Optimizer):
    """A torch optimizer over the anchors of tables, which moves the rows that have a gradient; a rule says how."""

    _rule: Rule

    def __init__(
        self,
        tables: EngramTable | Sequence[EngramTable] | Sequence[dict[str, Any]],
        defaults: dict[str, Any],
        state_placement: StatePlacement | None,
        seed: int | None,
        reduce: Reduce | None = ALONE,
        ranks: "dist.ProcessGroup | None" = None,
    ):
        """defaults: hyper-parameters. seed: of stochastic rounding; None is to nearest. ranks: group of ``reduce``."""
        self.tables: tuple[EngramTable, ...] = ()
        self.steps = 0
        self._seed, self._state_placement = seed, state_placement
        self._skipped: dict[torch.device, torch.Tensor] = {}
        self._skipped_before = 0
        self._states: list[RowState] = []
        where = type(self).__name__
        self._reduce, self._replicas = reduce, None
        if ranks is not None and reduce in (ALONE, None):
            raise ValueError(f"{where}: group is for reduce 'mean' and 'sum', got one with {reduce!r}")
        given = [tables] if isinstance(tables, EngramTable) else list(tables)
        groups = given if given and all(isinstance(each, dict) for each in given) else [dict(params=given)]
        found = []
        for group in groups:  # all are looked at before memory is asked for
            found.append(self._checked_group(where, group, [table for each in found for table in each["params"]]))
        if reduce in (MEAN, SUM):
            self._replicas = Replicas(self, reduce, ranks, where)
        try:
            super().__init__(found, defaults)
        except BaseException:
            self.close()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    @takes(closure=Optional(Function()))
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Move every row that has a gradient; the rest of the tables is not touched. Waits for nothing.

        A table that is not trainable at the moment is passed over. A gradient that was scaled through the table's
        anchor counts as scaled.
        closure: computes the loss again, with gradients, and returns it; the step returns what it returned, else None.
        ValueError, and none has moved, where the optimizer or a table is closed, an option is out of bounds, or a
        gradient was changed other than by a factor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        where = self._open("step")
        if self._replicas is not None:
            self._replicas.before_step(where)
        elif self._reduce == ALONE:
            check_alone(self.tables, where)
        for group in self.param_groups:
            check_all(where, RATES, group)
        members = iter(zip(self.tables, self._states, strict=True))
        moving = [
            (table, state, group)
            for group in self.param_groups
            for anchor, (table, state) in zip(group["params"], members, strict=False)
            if table.row_grad is not None and anchor.grad is not None
        ]
        for table, state, _ in moving:
            device = table.row_grad.values.device
            state.check_readable_on(device, where)
            table.check_readable_on(device, where)
            table.row_grad_factor()  # raises where that is no scaling
        self.steps += 1
        for table, state, group in moving:
            self._update(table, state, group)
        return loss

    @takes(set_to_none=Flag())
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the tables' gradients; ``set_to_none`` is there for torch's sake, and they always are."""
        for table in self.tables:
            table.zero_row_grad()

    @property
    def skipped(self) -> int:
        """Rows left as they were so far because their gradient was NaN or infinite. Waits for the device."""
        return self._skipped_before + sum(int(count) for count in self._skipped.values())

    @takes(index=Whole(0))
    def states(self, index: int = 0) -> dict[str, torch.Tensor]:
        """The state of table number ``index`` by name, where it lives; shapes are in the docstring of the class.

        ValueError for a number that there is not, and where the optimizer is closed.
        """
        where = self._open("states")
        if index >= len(self._states):
            raise ValueError(f"{where}: index must be within 0..{len(self._states) - 1}, got {index}")
        return self._states[index].tensors

    def state_dict(self) -> dict[str, Any]:
        """As of torch optimizers: states by table number, options, and :meth:`facts` under "row_optimizer".

        Waits for steps that a GPU has yet to take. The tensors are no copies: later steps change them. ValueError where
        the optimizer is closed.
        """
        self._open("state_dict")
        self.wait_for_steps()
        return super().state_dict() | {KEY: self.facts()}

    @takes(state_dict=Instance(Mapping))
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over states, options, seed and counters of ``state_dict``; ValueError, and no change, unless they fit
        these tables.

        States are copied to where this optimizer has its own. An error in copying leaves the optimizer closed.
        """
        where = self._open("load_state_dict")
        states, groups = state_dict.get("state"), state_dict.get("param_groups")
        Keyed(kinds.Anything(), Instance(Mapping)).check(where, "state_dict['state']", states)
        kinds.Each(Instance(Mapping), least=1).check(where, "state_dict['param_groups']", groups)
        given = tensors_of(states)
        if empty := [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.is_meta]:
            raise ValueError(f"{where}: {empty[0]} must be a tensor with content, got one on the meta device")

        def copy(own: Mapping[str, torch.Tensor]) -> None:
            for name, value in own.items():
                value.copy_(given[name])

        self._take_over(where, Content(state_dict.get(KEY), groups, layout_of(given)), copy)

    @takes(path=kinds.Path(), metadata=Optional(Instance(Mapping)), progress=Optional(Function()))
    def save_safetensors(
        self,
        path: str | os.PathLike,
        *,
        metadata: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write what :meth:`state_dict` tells as ``path`` (``*.safetensors``, or a folder); returns the file.

        States go there in chunks, with progress(bytes done, bytes in all). An older file is replaced at once and as a
        whole; until then it stays what it was, also where saving fails or is killed (OSError). ValueError where a file
        is no optimizer's: it is never replaced. metadata: texts for the file's header. Gradients are not saved: save
        between a step and the next backward pass. Needs the extra ``hf``.
        """
        where = f"{type(self).__name__}.save_safetensors"
        return save_states(self.state_dict(), path, where, metadata=metadata, progress=progress)

    @takes(path=kinds.Path(), threads=Whole(1), progress=Optional(Function()))
    def load_safetensors(
        self, path: str | os.PathLike, *, threads: int = THREADS, progress: Progress | None = None
    ) -> None:
        """:meth:`load_state_dict` from file ``path`` of :meth:`save_safetensors`, ``threads`` chunks at once.

        progress: called with (bytes done, all). ValueError where the header does not fit these tables, before a state
        is touched. An error after that leaves the optimizer closed.
        """
        where = self._open("load_safetensors")
        check_threads(threads, where)
        with open_states(path, where) as (checkpoint, content):
            fill = partial(fill_states, checkpoint=checkpoint, threads=threads, progress=progress)
            self._take_over(where, content, fill)

    def facts(self) -> dict[str, Any]:
        """What was counted, and of which optimizer and tables, in plain numbers; ``version`` is that of the file."""
        tables = [
            dict(rows=table.rows, width=table.width, format=table.format.name, token_map=table.token_map)
            for table in self.tables
        ]
        counted = dict(steps=self.steps, skipped=self.skipped, seed=self._seed)
        return dict(version=1, optimizer=type(self).__name__, tables=tables) | counted

    def wait_for_steps(self) -> None:
        """Return when a GPU has taken all steps given to it, so that the CPU may read or write rows and states."""
        for table in self.tables:
            table.wait_for_steps()

    @takes(param_group=Instance(dict))
    def add_param_group(self, param_group: dict) -> None:
        """Add tables: a dict with them as "params", one or several, and the options in which they differ.

        The other options are those of the constructor, as for torch optimizers. TypeError and ValueError for what the
        constructor would refuse; none is added then.
        """
        # The first comes from the constructor.
        where = self._open("add_param_group") if self.param_groups else type(self).__name__
        self._take(where, self._checked_group(where, param_group, self.tables))

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"{type(self).__name__}: an optimizer of tables is neither copied nor pickled; use state_dict()"
        )

    def close(self) -> None:
        """Release the states' memory; closing again is no error."""
        self.state.clear()
        for state in self._states:
            state.close()
        if self._replicas is not None:
            self._replicas.close()

    def check_replicas(self) -> None:
        """Raise ValueError on all ranks where copies of a table, of its states, or their options differ; collective.

        The optimizer does so when it is made with ``reduce``: rows that came from different files or seeds show then.
        It reads all rows and states. Without ``reduce`` there is nothing to compare.
        """
        where = self._open("check_replicas")
        if self._replicas is not None:
            self._replicas.check(where)

    def _checked_group(self, where: str, group: Mapping[str, Any], others: Sequence[EngramTable]) -> dict[str, Any]:
        """The group with its tables in a tuple; raises unless an optimizer can take them beside others."""
        given, name = group.get("params"), "tables" if where == type(self).__name__ else "param_group['params']"
        given = [given] if isinstance(given, EngramTable) else given
        kinds.Many().check(where, name, given)
        tables = tuple(given)
        for table in tables:
            if not isinstance(table, EngramTable):
                raise TypeError(f"{where}: {name} must be EngramTable objects, got {type(table).__name__}")
            if not table.requires_row_grad:
                raise ValueError(f"{where}: {table!r} is not trainable; call requires_row_grad_() on it first")
            if table.attached:
                raise ValueError(
                    f"{where}: {table!r} was attached, and only the process that published it may move rows"
                )
        if not tables or len({id(table) for table in (*tables, *others)}) != len(tables) + len(others):
            raise ValueError(f"{where}: {name} must be one or more different tables, got {list(tables)}")
        check_all(where, RATES, group)
        if self._reduce == ALONE:
            check_alone(tables, where)
        return dict(group) | dict(params=tables)

    def _take(self, where: str, group: dict[str, Any]) -> None:
        """Add a group that was checked."""
        states: list[RowState] = []
        if self._replicas is not None:
            self._replicas.check_new(self.defaults | group, where)
        for table in group["params"]:
            check_free(table, where, self._replicas)
        try:
            for table in group["params"]:
                states.append(RowState(table, self._rule.state, self._state_placement, where))
            super().add_param_group(group | dict(params=[table.anchor for table in group["params"]]))
        except BaseException:
            for state in states:
                state.close()
            raise
        self.tables += group["params"]
        self._states += states
        for table, state in zip(group["params"], states, strict=True):
            self.state[table.anchor] = state.tensors
        if self._replicas is not None:
            self._replicas.join(group["params"])

    def _open(self, method: str) -> str:
        """The method's name for errors; ValueError where the optimizer is closed."""
        where = f"{type(self).__name__}.{method}"
        if not self.state:
            raise ValueError(f"{where}: the optimizer is closed")
        return where

    def _take_over(self, where: str, content: Content, fill: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Become what was saved, once it is found to fit; ``fill`` writes the states, given by their names in files."""
        own = tensors_of({i: state.tensors for i, state in enumerate(self._states)})
        ours = [dict(self.defaults, params=group["params"]) for group in super().state_dict()["param_groups"]]
        groups = content.check(where, Content(self.facts(), ours, layout_of(own)))
        for group in groups:
            check_all(where, RATES, group)
            group |= {"betas": tuple(group["betas"])} if "betas" in group else {}
        facts = content.facts
        check_all(where, dict(steps=Whole(0), skipped=Whole(0), seed=Optional(Whole())), facts)
        for table in facts["tables"]:
            check_all(where, dict(token_map=Optional(kinds.Text())), table)
        self.wait_for_steps()
        try:
            fill(own)
        except BaseException:
            self.close()  # some states are the saved ones and some are not: no step may follow
            raise
        for table, saved in zip(self.tables, facts["tables"], strict=True):
            table.token_map = table.token_map or saved.get("token_map")
        self.steps, self._seed = facts["steps"], facts["seed"]
        self._skipped_before, self._skipped = facts["skipped"], {}
        for own_group, group in zip(self.param_groups, groups, strict=True):
            own_group.update(group)

    def _update(self, table: EngramTable, state: RowState, group: dict) -> None:
        device, factor = table.row_grad.values.device, table.row_grad_factor()
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int32, device=device)
        options = {name: group[name] for name in self.defaults}
        options |= {name: float(value) for name, value in options.items() if isinstance(value, torch.Tensor)}
        options |= dict(seed=self._seed, step=self.steps)
        table.rows_changed(table.row_grad.ids)
        arguments = table.weight.data, tuple(state.tensors.values()), table.row_grad
        if takes_kernels(device) and table.weight.dtype != torch.float64:
            self._rule.launch(*arguments, factor[None], self._skipped[device], **options)
        else:
            self._skipped[device] += self._rule.reference(*arguments, factor=factor, **options)
