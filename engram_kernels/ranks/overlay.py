"""An overlay of a table over ranks: each rank lays the rows of its own shard over it, or none does.

Lookups are collective, and each reads a rank's shard in that rank's own order: with overlays applied and removed
between the same lookups on all ranks, a lookup reads edited rows alone or none. A shard that a node's ranks share is
written by one of them, while the others wait, since no stream is ordered behind another process's.
"""

import hashlib
from typing import Self

import torch

from engram_kernels.geometry.kinds import check_all
from engram_kernels.geometry.row_format import check_content
from engram_kernels.tables.editing.overlay import RowOverlay
from engram_kernels.tables.editing.stored import ROW_KINDS, checked_ids

from .rows import ShardedRows


class ShardedOverlay:
    """Edited rows of a table over ranks; :meth:`ShardedTable.overlay` makes one and applies it.

    applied: whether they are in the table now. As a context manager it is removed at the end, unless it was before or
    the table was closed.
    """

    def __init__(
        self,
        table: ShardedRows,
        ids: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        where: str,
    ):
        self.table, self.applied = table, False
        given = dict(ids=ids, rows=rows, scales=scales)
        facts = {f"{name} of the overlay": _digest(tensor) for name, tensor in given.items()}

        def prepare() -> RowOverlay | None:
            table.ranks.check_equal(facts, where)
            check_all(where, ROW_KINDS, given)
            found = checked_ids(table, ids, where)
            for name, part in given.items():
                if part is not None:
                    check_content(part, name, where)
                if part is not None and (part.dim() < 1 or len(part) != len(found)):
                    raise ValueError(f"{where}: {name} must have {len(found)} rows, one per id, got {list(part.shape)}")
            keys, stride = table.map(found.device).keys(found, -1), table.sharding.key_stride
            mine = torch.div(keys, stride, rounding_mode="floor") == table.ranks.rank
            if table.part.attached:
                return None
            parts = (None if part is None else part[mine.to(part.device)] for part in (rows, scales))
            return RowOverlay(table.part, (keys % stride)[mine], *parts, where)

        self._part = table.groups.attempt(where, "checking an overlay", prepare)

    def apply(self) -> Self:
        """Lay the rows over the table again; collective, returns the overlay. ValueError where it is applied."""
        where = "ShardedOverlay.apply"
        if self.applied:
            raise ValueError(f"{where}: the overlay is applied")
        part = self._part
        self._write(where, part and part.check_applicable, part and part.apply)
        return self

    def remove(self) -> None:
        """Put the rows back that were there, bit for bit; collective. ValueError where it is not applied."""
        where = "ShardedOverlay.remove"
        if not self.applied:
            raise ValueError(f"{where}: the overlay is not applied")
        self._write(where, None, self._part and self._part.remove)

    def _write(self, where: str, check, write) -> None:
        groups, part = self.table.groups, self.table.part

        def settle() -> None:
            """Return when this process's GPU is done with the shard, where other processes have it too."""
            part.check_usable(where)
            if part.placement == "shared" and part.writing_device.type == "cuda":
                torch.cuda.synchronize(part.writing_device)

        def ready() -> None:
            settle()
            if check is not None:
                check(where)

        groups.attempt(where, "waiting for lookups", ready)
        groups.attempt(where, "writing rows", lambda: (write or part.rows_changed)())
        if part.placement == "shared":
            groups.attempt(where, "waiting for the rows", settle)
        self.applied = not self.applied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.applied and not self.table.part.closed:
            self.remove()


def _digest(tensor: torch.Tensor | None) -> str | None:
    """What tells whether ranks gave the same."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return str(type(tensor))
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
