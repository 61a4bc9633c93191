"""What replaces rows of a table: overlays, which can be removed again, and rows written for good."""

import os

import torch

from engram_kernels.geometry.kinds import Path as PathKind
from engram_kernels.geometry.kinds import takes

from ..trainable import TrainableRows
from .exchange import exchange_rows
from .files import load_rows
from .overlay import RowOverlay, check_uncovered
from .stored import ROW_KINDS, check_writable, checked_ids, encoded, on_writer


class EditableRows(TrainableRows):
    """Rows that can be replaced in place, in the order of the stream that reads them."""

    @takes(**ROW_KINDS)
    def overlay(self, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> RowOverlay:
        """Lay ``rows [n, R]`` over rows ``ids [n]`` of the table; :meth:`RowOverlay.remove` takes them off again.

        ids: int32 or int64, distinct. rows: in the table's dtype, as stored (float8 rows of "e4m3_ue8m0" with their
        ``scales [n, R / 32]``, uint8 or float8_e8m0fnu), or float32, bfloat16 or float16 values, rounded as ``table
        convert`` does. All are copied; ids on a GPU are waited for.

        What the current stream does from here on reads the edited rows, what it was given before the old ones; with
        placement "staged" and on a CPU the same holds of calls. ValueError where a value does not fit the format, for
        rows of an overlay that is applied, and for tables that are trainable, attached, or mapped otherwise than by
        ``from_safetensors(mapped=True)``.
        """
        return RowOverlay(self, ids, rows, scales, "EngramTable.overlay").apply()

    @takes(path=PathKind())
    def load_overlay(self, path: str | os.PathLike) -> RowOverlay:
        """The overlay of a file that :meth:`RowOverlay.save_safetensors` wrote, applied. Needs the extra ``hf``.

        It must be for a table of as many rows, of this width, format, scale and, where both know it, token map.
        """
        where = "EngramTable.load_overlay"
        return RowOverlay(self, *load_rows(self, path, where)[0], where).apply()

    @takes(**ROW_KINDS)
    def write_rows(self, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Write ``rows [n, R]`` over rows ``ids [n]`` for good; arguments, order and errors of :meth:`overlay`.

        A trainable table may be written to; the state of its optimizer stays.
        """
        where = "EngramTable.write_rows"
        check_writable(self, where)
        found = checked_ids(self, ids, where)
        check_uncovered(self, found, where)
        exchange_rows(self, on_writer(self, found, *encoded(self, rows, scales, len(found), where)))
