"""Placement "shared": a table is published, attached to, known by its digest, and freed."""

from typing import Self

from engram_kernels.geometry.choices import FormatName, ScalePlacement
from engram_kernels.geometry.kinds import Function, Number, OneOf, Optional, Text, Whole, takes
from engram_kernels.geometry.row_format import FORMATS, MAX_ROW_WIDTH, RowFormat, checked_scale

from .editing.rows import EditableRows
from .memory import allocation as table_memory
from .memory.kept import free_shared
from .memory.pages import Progress
from .memory.shared import SharedMapping
from .placement import check_geometry, check_scales

GEOMETRY = dict(rows=Whole(1), width=Whole(1, MAX_ROW_WIDTH), format=OneOf(*FORMATS))


class SharedRows(EditableRows):
    """Rows that several processes may have in one memory."""

    @classmethod
    @takes(
        name=Text(),
        scale=Optional(Number()),
        scales=Optional(OneOf("device")),
        digest=Optional(Text()),
        timeout=Number(0),
        **GEOMETRY,
    )
    def attach(
        cls,
        name: str,
        rows: int,
        width: int,
        format: FormatName,
        *,
        scale: float | None = None,
        scales: ScalePlacement | None = None,
        digest: str | None = None,
        timeout: float = 600.0,
    ) -> Self:
        """The table that another process publishes under ``name``, in the same memory; readers must not write to it.

        Waits for it: TimeoutError after ``timeout`` seconds, RuntimeError as soon as its writer has died. A kept one is
        there whether its writer lives or not.
        rows, width, format: what it must have, ValueError otherwise; scale, the table's own, too unless None.
        digest: what :attr:`digest` must be, ValueError otherwise; None accepts any.
        scales: "device" keeps this process's own copy of the scales of groups in GPU memory.
        """
        where = "EngramTable.attach"
        fmt = check_geometry(where, rows, width, format)
        check_scales(where, "shared", fmt, scales)
        if scale is not None and fmt.table_scale:
            scale = float(checked_scale(scale, where))
        options = dict(scale=scale, scales=scales, timeout=timeout, digest=digest or "", where=where)
        return cls._attached(name, rows, width, fmt, **options)

    @classmethod
    def _attached(cls, name: str, rows: int, width: int, fmt: RowFormat, *, scales, **options) -> Self:
        memory = table_memory.attach(name, rows, width, fmt, scales=scales, **options)
        table = cls(*memory[:2], fmt, "shared", memory.mapping, scales, memory.own_scale)
        table.attached = True
        return table

    @takes(progress=Optional(Function()))
    def publish(self, *, progress: Progress | None = None) -> None:
        """Tell the processes that wait for this shared table that all of its content is there. Once.

        Its pages are collapsed to huge ones first (progress: bytes done, all) and registered; kernels read it after
        that. ValueError for a table of another placement, and for one that was attached or published before.
        """
        self.check_usable("EngramTable.publish")
        if self.placement != "shared":
            raise ValueError(f"EngramTable.publish: only placement 'shared' is published, got {self.placement!r}")
        self._mapping.publish(progress)
        self.rows_changed()
        self._mapping.vouched = self.digest is not None  # from here on rows_changed is about others
        if self._scales == "device":
            self._scale = table_memory.on_the_gpu(self._scale, self._mapping)
        self._describe()

    @property
    def digest(self) -> str | None:
        """SHA-256, in hex, of what a shared table was loaded from by :meth:`from_safetensors`; else None.

        It is made of the files' sizes and times of change, of the table's tensors (name, dtype, shape, place in the
        file), and of its scale, and says "from these files". It is not made of rows, neither in the files nor in
        memory: :meth:`rows_changed` of the table that was published, which all that writes rows calls (overlays,
        :meth:`write_rows`, optimizers), takes it away for good; who writes to ``weight`` himself has to call it.
        """
        self.check_usable("EngramTable.digest")
        return self._mapping.digest if isinstance(self._mapping, SharedMapping) else None

    @classmethod
    @takes(name=Text())
    def free(cls, name: str) -> None:
        """Take the name of a shared table of this user away, kept or not, and its memory when no process maps it.

        Processes that have it go on reading; the name may be used again at once. FileNotFoundError where there is
        none, ValueError while another process fills it.
        """
        free_shared(name, "EngramTable.free")
