"""What makes a table's rows trainable: a leaf of autograd that stands for them, and the gradient of backward passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Self

import torch

from engram_kernels.geometry.kinds import Flag, Optional, Tensor, describe, takes
from engram_kernels.launching.exchange import Ranks

from .anchor import RowNorm
from .gradient import GRAD_DTYPES, RowGradient, row_gradient
from .placed import PlacedRows
from .placement import REGISTERED


class Shard(NamedTuple):
    """A part's place in a table over ranks."""

    ranks: Ranks  #: that hold the table together
    rows: int  #: of the whole table
    copies: int  #: of this part, on other ranks too (replicas), or read from one memory (node)
    ranges: tuple[tuple[int, int], ...]  #: ``[begin, end)`` of its rows that the part holds, one after the other


class TrainableRows(PlacedRows):
    """Rows that autograd can follow."""

    _anchor: torch.Tensor | None = None
    #: Where optimizers take their steps, once the rows were trainable.
    _steps_on: torch.device | None = None
    #: In the place of row_gradient, where ranks train the same rows.
    gradient_of: Callable[[torch.Tensor, torch.Tensor, int], RowGradient] | None = None
    #: Of a ShardedTable's part: its place in that table.
    shard: Shard | None = None
    #: Takes the moves of rows, which are distinct, that an optimizer has put off (RowSinkhorn); None is all.
    put_off: Callable[[torch.Tensor | None], None] | None = None
    _row_grad: RowGradient | None = None

    @property
    def requires_row_grad(self) -> bool:
        """Whether autograd follows values that ops read from this table."""
        return self._anchor is not None and self._anchor.requires_grad

    @property
    def anchor(self) -> torch.Tensor | None:
        """A leaf of one element that stands for the rows in autograd, None where they are not trainable.

        It is float32, or float64 for float64 rows. A backward pass fills ``row_grad`` and makes the anchor's gradient
        that gradient's norm. What scales the one, such as clip_grad_norm_ or a GradScaler, scales the other when an
        optimizer of this package takes its step. Norms of other orders, and clip_grad_value_, are taken of the rows;
        other operations on the anchor's gradient are a ValueError (tables/anchor.py).
        """
        return self._anchor if self.requires_row_grad else None

    @property
    def row_grad(self) -> RowGradient | None:
        """What backward passes have left since the last zero_row_grad. Setting it sets the anchor's gradient too."""
        return self._row_grad

    @row_grad.setter
    def row_grad(self, gradient: RowGradient | None) -> None:
        self._row_grad = gradient
        if self._anchor is not None:
            self._anchor.grad = None if gradient is None else RowNorm.of(gradient, self._anchor)

    @takes(requires=Flag())
    def requires_row_grad_(self, requires: bool = True) -> Self:
        """Make the rows trainable, or with ``requires=False`` no longer so; returns the table.

        An optimizer passes over a table while it is not trainable, and goes on when it is again. Trained rows are in no
        state_dict() of module or torch optimizer; :func:`save_training` saves them.
        ValueError for formats that are not dense, placement "staged", and a table with overlays.
        """
        where = "EngramTable.requires_row_grad_"
        self.check_usable(where)
        if requires == self.requires_row_grad:
            return self
        if requires and self.format.scaled:
            raise ValueError(
                f"{where}: rows must be float32, bfloat16, float16 or float64, got {self!r}. Steps of training are "
                "smaller than what few bits tell apart: train a master table in bfloat16 or float32 and convert it"
            )
        if requires and self.placement == "staged":
            raise ValueError(
                f"{where}: kernels cannot write to placement 'staged'; use 'host' or 'device', got {self!r}"
            )
        if requires and self.direct is not None:
            raise ValueError(f"{where}: rows that are read from a file (memory_bytes=) are not written to; load them")
        if requires and self.overlays:
            raise ValueError(
                f"{where}: {len(self.overlays)} overlays are applied, and steps that move rows under them would be "
                "lost; remove them first"
            )
        if self._anchor is None:
            device = self.weight.device
            if self.placement in REGISTERED and torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
            dtype = torch.float64 if self.format.dtype == torch.float64 else torch.float32
            self._anchor, self._steps_on = torch.zeros(1, dtype=dtype, device=device), device
        self._anchor.requires_grad_(requires)
        self.zero_row_grad()
        return self

    @takes(row_ids=Tensor(torch.int32, torch.int64), grad=Tensor(*GRAD_DTYPES))
    def accumulate_row_grad(self, row_ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradient ``grad [..., R]`` of rows ``row_ids [...]``, as the backward pass of a lookup does.

        ValueError where the table is not trainable, or grad has not the shape and device of row_ids.
        """
        if not self.requires_row_grad:
            raise ValueError("EngramTable.accumulate_row_grad: the table is not trainable (requires_row_grad_)")
        shape = (*row_ids.shape, self.width)
        if grad.shape != shape or grad.device != row_ids.device:
            raise ValueError(
                f"EngramTable.accumulate_row_grad: grad must have shape {list(shape)} on {row_ids.device}, "
                f"as of row_ids, got {list(grad.shape)} on {grad.device}"
            )
        new = (self.gradient_of or row_gradient)(row_ids, grad, self.rows)
        old = self.row_grad if self._anchor.grad is not None else None
        self.row_grad = new if old is None else old.times(self.row_grad_factor()).plus(new)

    def row_grad_factor(self) -> torch.Tensor:
        """What the anchor's gradient was multiplied by since the last backward pass, a scalar: that of ``row_grad``.

        1 where that is unknown, since the gradient is 0 or NaN. ValueError where another gradient was put there.
        """
        found = self._anchor.grad
        if not isinstance(found, RowNorm) or found.gradient is not self.row_grad:
            raise ValueError(
                "EngramTable.row_grad_factor: anchor.grad must be what the backward pass left there, scaled or clamped"
                f", got {'that of another pass' if isinstance(found, RowNorm) else describe(found)}"
            )
        return found.factor()

    @property
    def weight(self) -> torch.Tensor:
        if self.put_off is not None:
            self.take_moves()
        return self.tensor_of_rows()  # torch.compile does not follow a property through super()

    @property
    def anchor_device(self) -> torch.device:
        """Where steps take place, once the rows were trainable; else where they lie."""
        return self._steps_on or self._weight.device

    @contextmanager
    def as_it_stands(self) -> Iterator[None]:
        """Within, rows are read without moves that were put off."""
        put_off, self.put_off = self.put_off, None
        try:
            yield
        finally:
            self.put_off = put_off

    @takes(row_ids=Optional(Tensor(torch.int32, torch.int64)))
    def take_moves(self, row_ids: torch.Tensor | None = None) -> None:
        """Move rows ``row_ids [...]``, None is all, by what an optimizer has put off until they are read.

        Only :class:`RowSinkhorn` puts moves off. Lookups, ``weight`` and saving do this themselves; call it before what
        reads rows without Python: a captured CUDA graph, another process. Ids outside the table are no rows.
        """
        if self.put_off is None:
            return
        if row_ids is not None:  # distinct ones, without waiting for the device to count them
            ids = row_ids.reshape(-1).to(torch.int64)
            ids = torch.where((ids >= 0) & (ids < self.rows), ids, -1).sort().values
            row_ids = torch.where(ids != ids.roll(1), ids, -1)
            row_ids[:1] = ids[:1]
        self.put_off(row_ids)

    def wait_for_steps(self) -> None:
        """Return when a GPU has done all steps and edits given to it, so that the CPU may read or write rows."""
        self.take_moves()
        for device in {self._steps_on, self.writing_device}:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)

    def zero_row_grad(self) -> None:
        """Forget the rows' gradient."""
        self.row_grad = None


@contextmanager
def moves_taken(tables: Sequence[TrainableRows], row_ids: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, rows ``row_ids`` of each table may be read: they have taken the moves put off, and no others need to."""
    with ExitStack() as stack:
        for table, ids in zip(tables, row_ids, strict=True):
            table.take_moves(ids)
        for table in tables:
            stack.enter_context(table.as_it_stands())
        yield
