"""What replaces rows of a table: overlays, which can be removed again, rows written for good, and a master's rows."""

import os
from collections.abc import Mapping

import torch

from engram_kernels.checkpoints.convert import check_pair
from engram_kernels.geometry.choices import FormatName
from engram_kernels.geometry.kinds import Flag, Instance, Keyed, Number, OneOf, Optional, Text, Whole, takes
from engram_kernels.geometry.kinds import Path as PathKind
from engram_kernels.geometry.row_format import FORMATS, checked_scale

from ..trainable import TrainableRows
from .changes import ChangeRecord
from .conversion import Copy, check_copy, convert_rows, update_rows
from .exchange import StoredRows, exchange_rows
from .files import load_rows, save_rows
from .overlay import RowOverlay, check_uncovered
from .stored import ROW_KINDS, check_writable, checked_ids, encoded, on_writer


class EditableRows(TrainableRows):
    """Rows that can be replaced in place, in the order of the stream that reads them."""

    #: Of which record the changes are that were loaded (:meth:`load_changes`).
    origin: str | None = None

    @takes(**ROW_KINDS)
    def overlay(self, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> RowOverlay:
        """Lay ``rows [n, R]`` over rows ``ids [n]`` of the table; :meth:`RowOverlay.remove` takes them off again.

        ids: int32 or int64, distinct. rows: in the table's dtype, as stored (where G elements share a scale with
        ``scales [n, R / G]``, uint8 or what torch calls them), or float32, bfloat16 or float16 values, rounded as
        ``table convert`` does. All are copied; ids on a GPU are waited for.

        What the current stream does from here on reads the edited rows, what it was given before the old ones; with
        placement "staged" and on a CPU the same holds of calls. ValueError where a value does not fit the format, for
        rows of an overlay that is applied, and for tables that are trainable, attached, or mapped otherwise than by
        ``from_safetensors(mapped=True)``.
        """
        return RowOverlay(self, ids, rows, scales, "EngramTable.overlay").apply()

    @takes(path=PathKind())
    def load_overlay(self, path: str | os.PathLike) -> RowOverlay:
        """The overlay of file ``path``, by :meth:`RowOverlay.save_safetensors`, applied. Needs the extra ``hf``.

        ValueError unless it is for a table of as many rows, of this width, format, scale and, where both know it,
        token map.
        """
        where = "EngramTable.load_overlay"
        return RowOverlay(self, *load_rows(self, path, where)[0], where).apply()

    @takes(**ROW_KINDS)
    def write_rows(self, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Write ``rows [n, R]`` over rows ``ids [n]`` for good, in stream order.

        ids: int32 or int64, distinct. rows: as stored, with ``scales [n, R / G]`` where elements share one; or float
        values. A trainable table may be written to; the state of its optimizer stays. ValueError where a value does
        not fit the format, for rows of an overlay that is applied, and for tables that are attached or mapped by other
        means.
        """
        where = "EngramTable.write_rows"
        check_writable(self, where)
        found = checked_ids(self, ids, where)
        check_uncovered(self, found, where)
        exchange_rows(self, on_writer(self, found, *encoded(self, rows, scales, len(found), where)))

    @takes(on=Flag())
    def record_changes(self, on: bool = True) -> None:
        """Note from now on which rows change, for :meth:`changed_since`; an int32 a row, where steps are taken.

        False forgets, and frees it. Changes that came before, and :attr:`version` numbers of then, are not known.
        """
        self.check_usable("EngramTable.record_changes")
        self.changes = None
        if on:
            self.take_moves()
            self.changes = ChangeRecord(self.rows, self.version, self.writing_device)

    @takes(version=Whole(0))
    def changed_since(self, version: int) -> torch.Tensor | None:
        """Rows that may have changed since :attr:`version` was that number: int64 ``[n]``, ascending; None is any.

        It is None where the record began later, or where rows were written since by what does not say which: writes of
        torch to ``weight``, and :meth:`rows_changed` without ids. A row with a gradient counts as changed by the step.
        Waits for the device. ValueError without :meth:`record_changes`, and for a version that is yet to come.
        """
        where = "EngramTable.changed_since"
        self.check_usable(where)
        if self.changes is None:
            raise ValueError(f"{where}: the table must note its changes, from record_changes() on, and does not")
        self.take_moves()
        now = self.version
        if version > now:
            raise ValueError(f"{where}: version must be at most the table's, {now}, got {version}")
        return self.changes.since(version, now)

    @takes(master=Instance("EngramTable"), since=Optional(Whole(0)), clip=Flag())
    def update_from(self, master: "EditableRows", since: int | None = None, *, clip: bool = False) -> int:
        """Convert rows of ``master`` that changed since version ``since``, None is all, and write them to this table.

        Returns the master's version, for ``since`` of the next call: this table is then, bit for bit, what converting
        all of the master to its format, at its scale, gives. Rows are written in place in stream order, as by
        :meth:`write_rows`; on an error none is, and the same ``since`` is right again.
        clip: values beyond float16, or beyond 448 times this table's own scale, become infinite or 448 times it, as of
        a conversion with that scale; False refuses them with a ValueError. Waits for the master's steps.
        """
        where = "EngramTable.update_from"
        check_writable(self, where)
        if master is self:
            raise ValueError(f"{where}: master must be another table, got the table itself")
        check_copy(where, master, self)
        ids = None if since is None else master.changed_since(since)
        master.take_moves()
        version = master.version
        for overlay in self.overlays:
            check_uncovered(self, overlay.ids if ids is None else ids.cpu(), where)
        update_rows(self, master, ids, where, clip)
        return version

    @takes(
        path=PathKind(),
        since=Whole(0),
        format=OneOf(*FORMATS),
        scale=Optional(Number()),
        clip=Flag(),
        metadata=Optional(Keyed(Text(), Text())),
    )
    def save_changes(
        self,
        path: str | os.PathLike,
        since: int,
        *,
        format: FormatName,
        scale: float | None = None,
        clip: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Write the rows that changed since version ``since``, converted, as ``path`` (``*.safetensors``, or a folder).

        Returns the version that they are of, for ``since`` of the next file.
        format, scale: of the serving copy, which takes the file by :meth:`load_changes`; scale for "e4m3" and "nvfp4".
        clip: True bounds values that the format does not reach; False refuses them. metadata: texts for the header.
        The file is there whole or not at all. ValueError where any row may have changed: save and convert the table
        then.
        """
        where = "EngramTable.save_changes"
        kind = FORMATS[format]
        if (scale is None) == kind.table_scale:
            raise ValueError(
                f"{where}: scale must be a number for formats 'e4m3' and 'nvfp4', and None else, got {scale}"
            )
        check_pair(self.format, kind, scale, where)
        own = None if scale is None else float(checked_scale(scale, where))
        kind.check_width(self.width, where)
        ids = self.changed_since(since)
        if ids is None:
            raise ValueError(
                f"{where}: rows changed since version {since} without saying which; save_safetensors the table, "
                "convert it, and go on from its version"
            )
        version, copy = self.version, Copy(self.rows, self.width, kind, own, self.token_map)
        ids = ids.cpu()
        stored = StoredRows(ids, *convert_rows(self, copy, ids, where, clip))
        said = dict(origin=self.changes.origin, since=since, until=version)
        save_rows(copy, stored, path, where, metadata, **said)
        return version

    @takes(path=PathKind(), since=Whole(0))
    def load_changes(self, path: str | os.PathLike, since: int) -> int:
        """Write the rows of a file ``path`` of :meth:`save_changes` to this table; returns the master's version since.

        since: the master's version that it has now: what the last call returned, or what the master's was when this
        table's content was saved. Rows are written in place in stream order; on an error none is. ValueError where a
        file before this one is missing, where it is older than what the table has, or of another run of the trainer.
        """
        where = "EngramTable.load_changes"
        check_writable(self, where)
        (ids, rows, scales), said = load_rows(self, path, where)
        origin, first, last = (said.get(name) for name in ("origin", "since", "until"))
        if type(origin) is not str or type(first) is not int or type(last) is not int:
            raise ValueError(f"{where}: path must be a file of save_changes, got one without a version: {path}")
        if self.origin not in (None, origin):
            raise ValueError(f"{where}: path must be of the record {self.origin}, as the last one, got {origin}")
        if not first <= since <= last:  # a longer file has these changes too
            raise ValueError(f"{where}: path must have what changed since {since}, got changes of {first} to {last}")
        found = checked_ids(self, ids, where)
        check_uncovered(self, found, where)
        exchange_rows(self, on_writer(self, found, *encoded(self, rows, scales, len(found), where)))
        self.origin = origin
        return last
