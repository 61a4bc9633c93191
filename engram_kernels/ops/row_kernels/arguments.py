"""Arguments of the ops that read rows: tables that they can read, and ids as they walk them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from engram_kernels.geometry.kinds import Instance
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import ROW_ALIGNMENT
from engram_kernels.launching.tokens import Tokens
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.staging import stage
from engram_kernels.tables.view import TableView, view_tables


class TableOverRanks(ABC):
    """A table whose rows lie on several ranks, all of which take part in a lookup: :class:`ShardedTable`.

    part: the rows of this rank. rows: of the whole table.
    """

    part: EngramTable
    rows: int

    @abstractmethod
    def metrics(self) -> dict[str, int]:
        """What its lookups exchanged so far."""

    @abstractmethod
    def look_up(self, tokens: Tokens, plan: HashPlan, out, **options) -> None:
        """Rows of a plan of this layer alone into ``out``; options: out_dtype and out_format of :func:`hash_lookup`."""

    @abstractmethod
    def refusing(self, ids) -> AbstractContextManager[None]:
        """Where the block raises, peers that are in a lookup learn that this rank takes no part in it."""


def check_tables(where: str, tables, device: torch.device) -> None:
    """Tables that one launch can read together on ``device``."""
    # The flag itself: Dynamo of torch 2.11 folds is_exporting() to True under plain torch.compile.
    if torch.compiler._is_exporting_flag:
        raise ValueError(
            f"{where}: tables must stay out of torch.export, as a program would hold addresses of this process; "
            "export what takes rows, such as Engram.forward(hidden, rows=rows)"
        )
    for place, table in enumerate(tables):
        Instance(EngramTable).check(where, f"tables[{place}]", table)
        table.check_readable_on(device, where)
        if (table.format, table.width) != (tables[0].format, tables[0].width):
            raise ValueError(f"{where}: tables must share format and width, got {tables[0]!r} and {table!r}")
        if device.type == "cuda" and table.format.dtype == torch.float64:
            raise ValueError(f"{where}: kernels read no float64 rows; use placement 'cpu' and CPU tensors")
        if not table.aligned and not table.mapped:  # a checkpoint's rows lie where they lie, and a CPU reads them
            raise ValueError(
                f"{where}: rows must start at a multiple of {ROW_ALIGNMENT} bytes, scales of 8; {table!r} does not "
                "(placement 'staged' takes any address)"
            )


def check_tables_of_plan(where: str, plan: HashPlan, tables) -> tuple[EngramTable, ...]:
    """``tables`` as a tuple; raises unless they are one per layer that a launch on the plan's device can read."""
    return parts_of_plan(where, plan, tables, ())


def parts_of_plan(where: str, plan: HashPlan, tables, over_ranks: Sequence[TableOverRanks]) -> tuple[EngramTable, ...]:
    """As :func:`check_tables_of_plan`; the parts on this rank of ``over_ranks``, where these are the tables."""
    if not isinstance(tables, Sequence):
        raise TypeError(f"{where}: tables must be a sequence of EngramTable, got {type(tables).__name__}")
    if len(tables) != len(plan.rows_per_layer):
        raise ValueError(
            f"{where}: tables must be one per layer of the plan, {len(plan.rows_per_layer)}, got {len(tables)}"
        )
    parts = tuple(table.part for table in over_ranks) or tuple(tables)
    check_tables(where, parts, plan.device)
    for layer, (table, rows) in enumerate(zip(tables, plan.rows_per_layer, strict=True)):
        if table.rows < rows:
            raise ValueError(f"{where}: tables[{layer}] must have at least {rows} rows, got {table.rows}")
    return parts


def identities(tables: Sequence[EngramTable]) -> tuple | None:
    """What stands for tables in a signature, and keeps none alive; None where checks will refuse them."""
    try:
        return tuple([table.identity for table in tables])
    except (AttributeError, TypeError):
        return None


def is_staged(table: EngramTable, device: torch.device) -> bool:
    """Whether rows for ``device`` are gathered by CPU threads."""
    return table.placement == "staged" and device.type != "cpu" and not table.read_in_place(device)


def view_rows(table: EngramTable, row_ids: torch.Tensor, where: str) -> tuple[torch.Tensor, TableView]:
    """Ids and the view to look them up in: the table's own, or of a staged one a copy of the rows asked for."""
    if is_staged(table, row_ids.device):
        return stage(table, row_ids, where)
    return row_ids, view_tables((table,), row_ids.device)


def two_dimensional(row_ids: torch.Tensor, keep_columns: bool) -> torch.Tensor:
    """``row_ids`` as a view ``[T, C]``, or where columns do not matter ``[T * C, 1]``; a copy is made of no tensor."""
    if row_ids.dim() == 1 or (row_ids.is_contiguous() and not keep_columns):
        return row_ids.view(-1, 1)
    try:
        return row_ids.view(-1, row_ids.shape[-1])
    except RuntimeError:
        raise ValueError(
            "lookup: leading dimensions of row_ids must be viewable as one, "
            f"got shape {list(row_ids.shape)} with strides {list(row_ids.stride())}"
        ) from None
