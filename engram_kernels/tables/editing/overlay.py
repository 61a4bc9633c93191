"""Rows that lie over those of a table for a while, and the rows below them.

Applied, the table itself holds the edited rows: every way to read it, kernels by address, caches, prefetched lookups,
replays of graphs, shards and saving, reads them and nothing else, at no cost. What they replaced is kept here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch

from engram_kernels.geometry.kinds import Keyed, Optional, Text, takes
from engram_kernels.geometry.kinds import Path as PathKind

from ..trainable import TrainableRows
from .exchange import StoredRows, exchange_rows
from .files import save_rows
from .stored import check_writable, checked_ids, encoded, on_writer, read_rows


class RowOverlay:
    """Edited rows of one table; :meth:`EngramTable.overlay` makes one and applies it.

    ids: int64 ``[n]`` on the CPU. applied: whether the table has the edited rows now. As a context manager it is
    removed at the end, unless it was before or the table was closed.
    """

    def __init__(
        self,
        table: TrainableRows,
        ids: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        where: str,
    ):
        """Checked, and not applied; arguments are those of :meth:`EngramTable.overlay`."""
        check_writable(table, where)
        self.table, self.applied = table, False
        self.ids = checked_ids(table, ids, where)
        check_free(table, self.ids, where)
        #: The edited rows while it is not applied; those that they replaced while it is.
        self._other = on_writer(table, self.ids, *encoded(table, rows, scales, len(self.ids), where))

    def apply(self) -> Self:
        """Exchange the table's rows for the edited ones again, on the current stream; returns the overlay.

        ValueError where it is applied, where another one over the same rows is, or where the table cannot be written.
        """
        self.check_applicable("RowOverlay.apply")
        self._exchange()
        self.table.overlays.append(self)
        return self

    def check_applicable(self, where: str) -> None:
        """Raise ValueError where :meth:`apply` would."""
        if self.applied:
            raise ValueError(f"{where}: the overlay is applied")
        check_writable(self.table, where)
        check_free(self.table, self.ids, where)

    def remove(self) -> None:
        """Put the rows back that were there, bit for bit, on the current stream; ValueError where it is not applied."""
        where = "RowOverlay.remove"
        if not self.applied:
            raise ValueError(f"{where}: the overlay is not applied")
        check_writable(self.table, where)
        self._exchange()
        self.table.overlays.remove(self)

    @takes(path=PathKind(), metadata=Optional(Keyed(Text(), Text())))
    def save_safetensors(self, path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None) -> Path:
        """Write the edited rows as ``path`` (``*.safetensors``, or a folder), for :meth:`EngramTable.load_overlay`.

        Applied or not. The file is there whole or not at all; metadata: texts for its header. Needs the extra ``hf``.
        """
        where = "RowOverlay.save_safetensors"
        self.table.check_usable(where)
        rows, scales = read_rows(self.table, self.ids) if self.applied else self._other[1:]
        return save_rows(self.table, StoredRows(self.ids, rows, scales), path, where, metadata)

    def _exchange(self) -> None:
        exchange_rows(self.table, self._other)
        if self._other.ids.is_cuda:  # the buffers may have been made on another stream
            for tensor in self._other:
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.applied = not self.applied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.applied and not self.table.closed:
            self.remove()

    def __repr__(self) -> str:
        state = "applied" if self.applied else "not applied"
        return f"RowOverlay({len(self.ids):,} rows of {self.table!r}, {state})"


def check_free(table: TrainableRows, ids: torch.Tensor, where: str) -> None:
    """Raise ValueError where an overlay that is applied has one of the rows, or where the table is trainable.

    Two over one row would have to be removed in reverse order, and a step of training under one would be lost with it.
    """
    if table.requires_row_grad:
        raise ValueError(
            f"{where}: {table!r} is trainable, and steps that move rows under an overlay would be lost when it is "
            "removed; freeze it first (requires_row_grad_(False))"
        )
    check_uncovered(table, ids, where)


def check_uncovered(table: TrainableRows, ids: torch.Tensor, where: str) -> None:
    """Raise ValueError where an overlay that is applied has one of the rows."""
    covered = torch.cat([ids[:0], *(overlay.ids for overlay in table.overlays)])
    both = ids[torch.isin(ids, covered)]
    if len(both):
        raise ValueError(
            f"{where}: ids must have no row of an overlay that is applied, got {int(both[0])} and {len(both) - 1:,} "
            "more; remove that overlay first"
        )
