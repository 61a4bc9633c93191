"""The table of one Engram layer: rows in a storage format, in the memory of a placement (tables/placement.py)."""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from engram_kernels.geometry.row_format import ROW_ALIGNMENT, RowFormat, format_of, row_format
from engram_kernels.tables.memory.mapped_file import MappedFile
from engram_kernels.tables.memory.pages import Progress
from engram_kernels.tables.memory.report import MemoryReport, size

from .memory import allocation as table_memory
from .placement import REGISTERED, check_placement, check_scales
from .trainable import TrainableRows

if TYPE_CHECKING:
    from engram_kernels.checkpoints.files import Paths
    from engram_kernels.geometry.config import EngramConfig


class EngramTable(TrainableRows):
    """Rows of one layer. Make one with :meth:`empty`, :meth:`from_tensors`, :meth:`from_safetensors`, :meth:`attach`.

    weight: ``[rows, width]`` in the format's dtype. scale: uint8 ``[rows, width / 32]`` for ``e4m3_ue8m0``, a float32
    scalar on the CPU for ``e4m3`` (fixed at construction), else None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        format: RowFormat,
        placement: str,
        mapping: table_memory.Mapping | None = None,
        scales: str | None = None,
    ):
        self._weight, self._scale, self._mapping = weight, scale, mapping
        self._scales = scales
        self.format, self.placement = format, placement
        self.rows, self.width = weight.shape
        #: Files that the tensors of placement "cpu" and "staged" are mapped from.
        self.files: list[MappedFile] = []
        self._kept_views: dict[tuple, TableView] = {}
        #: Buffers of placement "staged" by device, made when it is first read from there.
        self.rings: dict = {}
        self._describe()

    def _describe(self) -> None:
        """What a kernel is told: address of rows, of scales, number of rows, bits of the table's scale."""
        scale_bits = 0
        if self.format.scaling == "table":
            scale_bits = struct.unpack("<i", struct.pack("<f", float(self._scale)))[0]
        scale_address = self._scale.data_ptr() if self.format.scaling == "group" else 0
        # As text, which is a constant to torch.compile where numbers may become symbols.
        self.descriptor = f"{self._weight.data_ptr()} {scale_address} {self.rows} {scale_bits}"
        #: Rows start at multiples of 16 bytes and scales at multiples of 8, as the kernels' loads need; staged ones are
        #: copied to such places.
        aligned = self._weight.data_ptr() % ROW_ALIGNMENT == 0 and scale_address % 8 == 0
        self.aligned = aligned or self.placement == "staged"
        #: Bytes of the pages that a GPU reads over the link; read back once, since ops/row_kernels/order.py asks in
        #: every call.
        self.page_bytes = table_memory.page_bytes(self._mapping)
        #: Launches of lookup; for those that read several tables what stands for all that this table is now.
        self.identity = object()

    @classmethod
    def empty(
        cls,
        rows: int,
        width: int,
        format: str,
        *,
        placement: str,
        scale: float = 1.0,
        scales: str | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> "EngramTable":
        """A table of ``rows`` x ``width`` elements whose content is undefined (zero for "host", "shared" and "staged").

        format: a name of ``row_format.FORMATS``. scale: the table's scale, for format "e4m3".
        scales: "device" keeps the scales of e4m3_ue8m0 rows in GPU memory, with placement "host" or "shared".
        device: the GPU of placement "device"; None is the current one.
        name: of placement "shared", under which other processes :meth:`attach` once this one calls :meth:`publish`;
        FileExistsError where a table has it.
        progress: called with (bytes done, all) while the pages of placement "host" or "shared" are faulted in.
        """
        where = "EngramTable.empty"
        fmt = _checked_geometry(where, rows, width, format)
        device = check_placement(where, placement, fmt, device, name, scales)
        memory = table_memory.allocate(
            rows,
            width,
            fmt,
            placement=placement,
            scale=scale,
            scales=scales,
            device=device,
            name=name,
            progress=progress,
        )
        return cls(*memory[:2], fmt, placement, memory.mapping, scales)

    @classmethod
    def from_tensors(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | float | None = None,
        *,
        placement: str,
        scales: str | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> "EngramTable":
        """A table with the rows of ``weight [rows, width]``, contiguous; the dtype and ``scale`` tell the format.

        float8_e4m3fn takes ``scale``: uint8 or float8_e8m0fnu ``[rows, width / 32]``, or one float.
        Placement "cpu" and "staged" share the tensors' memory, which may be a mapped file; "device" does where they are
        on that device; "host" and "shared" copy, and "shared" is published then.
        scales, device, name and progress are those of :meth:`empty`.
        """
        where = "EngramTable.from_tensors"
        if (
            not isinstance(weight, torch.Tensor)
            or weight.dim() != 2
            or not weight.shape[0]
            or not weight.is_contiguous()
        ):
            got = f"shape {list(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(
                f"{where}: weight must be a contiguous [rows, width] tensor of at least one row, got {got}"
            )
        fmt, scale = format_of(weight, scale, where)
        fmt.check_width(weight.shape[1], where)
        device = check_placement(where, placement, fmt, device, name, scales)
        if placement in REGISTERED:
            value = float(scale) if fmt.scaling == "table" else 1.0
            options = dict(placement=placement, scale=value, scales=scales, name=name, progress=progress)
            table = cls.empty(*weight.shape, fmt.name, **options)
            try:
                table._weight.view(torch.uint8).copy_(weight.view(torch.uint8))
                if fmt.scaling == "group":
                    table._scale.copy_(scale)
                if placement == "shared":
                    table.publish()
            except BaseException:
                table.close()
                raise
            return table
        if placement != "device" and weight.device.type != "cpu":
            raise ValueError(f"{where}: placement {placement!r} needs a weight on the CPU, got {weight.device}")
        if fmt.scaling == "group":
            scale = scale.to(device)
        table = cls(weight.to(device), scale, fmt, placement)
        if placement != "device":
            parts = [weight, scale] if fmt.scaling == "group" else [weight]
            table.files = [file for part in parts if (file := MappedFile.behind(part))]
        return table

    @classmethod
    def attach(
        cls,
        name: str,
        rows: int,
        width: int,
        format: str,
        *,
        scale: float | None = None,
        scales: str | None = None,
        timeout: float = 600.0,
    ) -> "EngramTable":
        """The table that another process publishes under ``name``, in the same memory; readers must not write to it.

        Waits for it: TimeoutError after ``timeout`` seconds, RuntimeError as soon as its writer has died.
        rows, width, format: what it must have, ValueError otherwise; scale of format "e4m3" too unless None.
        scales: as for :meth:`empty`; each process has its own copy.
        """
        where = "EngramTable.attach"
        fmt = _checked_geometry(where, rows, width, format)
        check_scales(where, "shared", fmt, scales)
        memory = table_memory.attach(name, rows, width, fmt, scale=scale, scales=scales, timeout=timeout)
        table = cls(*memory[:2], fmt, "shared", memory.mapping, scales)
        table.attached = True
        return table

    def publish(self, *, progress: Progress | None = None) -> None:
        """Tell the processes that wait for this shared table that all of its content is there. Once.

        Its pages are collapsed to huge ones first (progress: bytes done, all) and registered; kernels read it after
        that.
        """
        self.check_usable("EngramTable.publish")
        if self.placement != "shared":
            raise ValueError(f"EngramTable.publish: only placement 'shared' is published, got {self.placement!r}")
        self._mapping.publish(progress)
        self.rows_changed()
        if self._scales == "device":
            self._scale = table_memory.on_the_gpu(self._scale)
        self._describe()

    def memory_report(self) -> MemoryReport:
        """Where the bytes are, and what the machine granted: huge pages, registration, NUMA node; printable."""
        self.check_usable("EngramTable.memory_report")
        parts = [self._weight, self._scale] if self.format.scaling == "group" else [self._weight]
        return table_memory.report(self.placement, self.nbytes, parts, self._mapping)

    @classmethod
    def from_safetensors(
        cls,
        paths: "Paths",
        *,
        placement: str,
        config: "EngramConfig | None" = None,
        layer: int | None = None,
        prefix: str | None = None,
        mapped: bool = False,
        threads: int = 8,
        progress: Callable[[int, int], object] | None = None,
        **options,
    ) -> "EngramTable":
        """A table from a checkpoint's files, in the format they hold. Needs the extra ``hf``.

        paths: a file, a list of files, a folder (its index, or all its files), or an index (``*.index.json``).
        layer: the model layer whose table is meant, by DeepSeek-V4.1's or Qwen's names; prefix: what comes before
        ``weight`` (or ``shard_0.weight``) in the names, whatever they are. Neither is needed where there is one table.
        config: rows and width must be those of its layer.

        Names, dtypes, shapes and row counts are checked before memory is asked for; the rows then go straight to their
        place, ``threads`` chunks at once, with progress(bytes done, bytes in all). On any error the memory is released.
        mapped: True reads rows where they lie in the file instead, for placement "cpu" and "staged"; nothing is loaded.
        options: as for :meth:`empty`, such as ``device``.
        """
        from .loading import load_table

        named = dict(config=config, layer=layer, prefix=prefix, mapped=mapped, threads=threads, progress=progress)
        return load_table(paths, placement=placement, **named, **options)

    def save_safetensors(
        self,
        path: "str | Path",
        *,
        prefix: str = "",
        shard_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Path:
        """Write the table as ``path`` (``*.safetensors``, or a folder); returns what :meth:`from_safetensors` takes.

        The tensors are ``{prefix}weight`` and ``{prefix}scale`` (``weight_scale`` for the table's own). Files of more
        than ``shard_bytes`` bytes are split, into parts ``{prefix}shard_{k}.weight``, with an index. metadata: texts
        for the files' headers. A table there is replaced at once and as a whole; until then it stays what it was, also
        where saving fails or is killed. Files that hold anything else are never replaced.
        """
        from .saving import save_table

        return save_table(self, path, prefix=prefix, shard_bytes=shard_bytes, metadata=metadata, progress=progress)

    @property
    def weight(self) -> torch.Tensor:
        self.check_usable("EngramTable")
        return self._weight

    @property
    def scale(self) -> torch.Tensor | None:
        self.check_usable("EngramTable")
        return self._scale

    @property
    def closed(self) -> bool:
        return self._weight is None

    @property
    def mapped(self) -> bool:
        """Whether rows are read where they lie in a file."""
        return bool(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and their scales."""
        return self.rows * (self.format.row_bytes(self.width) + self.format.scale_bytes(self.width))

    @property
    def default_out_dtype(self) -> torch.dtype:
        """The table's own dtype where that is dense, bfloat16 for fp8."""
        return self.format.dtype if self.format.scaling == "none" else torch.bfloat16

    def discard(self) -> None:
        """Give the pages of an unregistered host table back: all rows read as zero afterwards."""
        self.check_usable("EngramTable.discard")
        if self.placement != "host":
            raise ValueError(f"EngramTable.discard: only placement 'host' can give pages back, got {self.placement!r}")
        self._mapping.discard()
        self.rows_changed()

    def close(self) -> None:
        """Unregister and release the memory. Using the table afterwards is an error; closing again is not.

        A GPU must be done with it: synchronise the streams that read it first.
        """
        self._weight = self._scale = None
        self._kept_views.clear()
        for part in (*self.rings.values(), *self.files, *([self._mapping] if self._mapping else [])):
            part.close()
        self.rings.clear()
        self.files, self._mapping = [], None

    def __reduce_ex__(self, protocol):
        # Its memory may be 100 GB that a driver holds, and kernels know it by address.
        raise TypeError(
            "EngramTable: a table is not copied or pickled. Let the copy of a model read the same one by "
            "copy.deepcopy(model, {id(table): table}), save it with save_safetensors, or use placement 'shared' for "
            "other processes"
        )

    def __enter__(self) -> "EngramTable":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else size(self.nbytes)
        if not self.closed and self._scales == "device":
            state += ", scales on the device"
        return f"EngramTable({self.rows:,} x {self.width} {self.format.name}, {self.placement}, {state})"

    def check_readable_on(self, device: torch.device, where: str) -> None:
        """Raise ValueError unless an op on ``device`` can read this table."""
        self.check_usable(where)
        scale_device = self._scale.device if self.format.scaling == "group" else device
        if device.type == "cpu":
            readable = self._weight.device.type == scale_device.type == "cpu"
            need = "a table in CPU memory, with its scales"
        elif self.placement == "staged":
            readable, need = True, ""
        elif self.placement in REGISTERED:
            readable = self._mapping is not None and self._mapping.registered
            need = "a registered host table" if self.placement == "host" else "a registered (published) shared table"
            if readable and scale_device not in (torch.device("cpu"), device):
                readable, need = False, f"a table with its scales on {device} or on the host"
        else:
            readable, need = self._weight.device == device, f"a table on {device} or a registered host table"
        if not readable:
            raise ValueError(f"{where}: tensors on {device} need {need}, got {self!r} on {self._weight.device}")

    def check_usable(self, where: str) -> None:
        """Raise ValueError where the table is closed, or its memory is not in this process or no longer there."""
        if self.closed:
            raise ValueError(f"{where}: the table is closed")
        if not torch.compiler.is_compiling():
            for part in (self._mapping, *self.files):
                if part is not None:
                    part.check(where)


class TableView(NamedTuple):
    """What a launch knows of tables: a tensor and constants, so that registered ops can take it apart."""

    descriptors: torch.Tensor  #: int64 ``[L, 4]`` on the device: address of rows, of scales, rows, bits of the scale
    format: str
    width: int
    placement: str
    link_bytes: int = 0  #: of the largest table that is read over the link, and of its pages; 0 for none
    page_bytes: int = 0


def view_tables(tables: Sequence[EngramTable], device: torch.device) -> TableView:
    """The view of tables of one format and width, for launches on ``device``.

    It is kept, by value, on the first table: only the first call with these tables copies to the device. To a compiled
    graph the descriptors are an input then, so that it can be captured; where the first call of all is a compiled one,
    its graph makes them, and the second is compiled anew.
    """
    first = tables[0]
    key = (device, *[table.descriptor for table in tables])
    if key not in first._kept_views:
        numbers = [[int(number) for number in text.split()] for text in key[1:]]
        descriptors = torch.tensor(numbers, dtype=torch.int64).to(device)
        view = TableView(descriptors, first.format.name, first.width, first.placement)
        for table in tables:
            if table.placement in REGISTERED and table.nbytes > view.link_bytes:
                view = TableView(*view[:4], table.nbytes, table.page_bytes)
        first._kept_views[key] = view
    return first._kept_views[key]


def _checked_geometry(where: str, rows: int, width: int, format: str) -> RowFormat:
    fmt = row_format(format, where)
    fmt.check_width(width, where)
    if rows < 1:
        raise ValueError(f"{where}: rows must be at least 1, got {rows}")
    return fmt
