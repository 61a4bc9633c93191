"""Rows in a storage format, in the memory of a placement: what kernels are told of them, and who can read them."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from engram_kernels.geometry.choices import Placement, ScalePlacement
from engram_kernels.geometry.kinds import Instance, Number, OneOf, Optional, Tensor, takes
from engram_kernels.geometry.row_format import ROW_ALIGNMENT, RowFormat
from engram_kernels.launching.registry import Registry

from .memory.allocation import page_bytes, report
from .memory.direct import COUNTS, DirectRows
from .memory.host import Mapping
from .memory.mapped_files import MappedFile
from .memory.report import MemoryReport, size
from .placement import PLACEMENTS, REGISTERED, check_storage


class TableDescriptor(NamedTuple):
    """What a kernel is told of a table, four int64."""

    weight_address: int
    scale_address: int  #: of scales of groups, else 0
    rows: int
    scale_bits: int  #: of the table's own float32 scale, else 0


#: What a ring of placement "staged" counts (tables/staging.py).
STAGED = ("calls", "rows", "bytes", "waits")
#: By which registered ops find trainable tables.
TABLES = Registry("trainable table")


class RowCount:
    """Rows that kernels were asked for, of each of some tables. It is no table, so that launches may keep it."""

    __slots__ = ("rows",)

    def __init__(self):
        self.rows = 0


def rows_asked(tables: Sequence["PlacedRows"]) -> RowCount:
    """The count of calls that read these tables together: one addition a call, however many there are."""
    key = tuple([table.identity for table in tables])
    count, _ = tables[0].counts.get(key) or (RowCount(), 0)
    for table in tables:
        table.counts[key] = count, sum(each is table for each in tables)
    return count


def counting(tables: Sequence["PlacedRows"], num_rows: int, launch: Callable) -> Callable:
    """What calls ``launch(call[0], out)`` for (call, out) that ask each of ``tables`` for so many rows."""
    asked = rows_asked(tables)

    def run(call, out):
        asked.rows += num_rows
        launch(call[0], out)

    return run


class PlacedRows:
    """``rows`` x ``width`` elements in ``format`` and ``placement``, and their scales."""

    #: Whether another process published the rows, and is the one to write them.
    attached = False
    #: Digest of the token map by which rows are chosen (:attr:`HashPlan.token_map_digest`), kept in files of the table
    #: and of its optimizers; None until files or :class:`Engram` tell it.
    token_map: str | None = None
    _changes = 0
    #: Rows that the CPU was asked for so far; :attr:`counts` has those that kernels were.
    cpu_rows = 0
    #: Which rows changed when, once :meth:`EngramTable.record_changes` has been called.
    changes: Any = None

    @takes(
        weight=Tensor(),
        scale=Optional(Tensor()),
        format=Instance(RowFormat),
        placement=OneOf(*PLACEMENTS),
        mapping=Optional(Instance(Mapping)),
        scales=Optional(OneOf("device")),
        own_scale=Optional(Number()),
    )
    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        format: RowFormat,
        placement: Placement,
        mapping: Mapping | None = None,
        scales: ScalePlacement | None = None,
        own_scale: float | None = None,
    ):
        check_storage(weight, scale, format, own_scale)
        self._weight, self._scale, self._mapping = weight, scale, mapping
        self._scales = scales
        #: The one scale of a whole table, of formats "e4m3" and "nvfp4"; else None.
        self.own_scale = float(scale) if format.table_scale and not format.group else own_scale
        self.format, self.placement = format, placement
        self.rows, self.width = len(weight), format.width_of(weight)
        #: Files that rows and scales of placement "cpu" and "staged" are mapped from, or read from as they are asked
        #: for.
        self.files: list[MappedFile] = []
        #: What launches know of this table and those read with it, by value (tables/view.py).
        self.kept_views: dict[tuple, NamedTuple] = {}
        #: What reads rows of such files past the page cache, where memory is bounded (tables/memory/direct.py); the
        #: tensor of rows is one without memory then, on torch's device "meta".
        self.direct: DirectRows | None = None
        #: Overlays that are applied now (tables/editing/overlay.py).
        self.overlays: list = []
        #: Rows asked of this table and those read with it, and how often it is among these (:func:`rows_asked`).
        self.counts: dict[tuple, tuple[RowCount, int]] = {}
        #: Buffers of placement "staged" by device, made when it is first read from there (tables/staging.py).
        self.rings: dict = {}
        self._describe()

    def _describe(self) -> None:
        """Set all that follows from where rows and scales are."""
        scale_address = scale_bits = 0
        if self.format.group:
            scale_address = self._scale.data_ptr()
        if self.format.table_scale:
            (scale_bits,) = struct.unpack("<i", struct.pack("<f", self.own_scale))
        self.descriptor = TableDescriptor(self._weight.data_ptr(), scale_address, self.rows, scale_bits)
        #: The descriptor as a key, never to be parsed: to torch.compile a text is a constant, and numbers of an object
        #: may be symbols, which no dictionary finds.
        self.descriptor_key = str(tuple(self.descriptor))
        #: Rows start at multiples of 16 bytes and scales at multiples of 8, as the kernels' loads need. Staged ones may
        #: start anywhere: their copies do.
        aligned = self.descriptor.weight_address % ROW_ALIGNMENT == 0 and scale_address % 8 == 0
        self.aligned = aligned or self.placement == "staged"
        #: Whether kernels can load rows of placement "staged" where they are, on a GPU that reads all memory.
        self.loadable = aligned and self.placement == "staged"
        #: Bytes of the pages that a GPU reads over PCIe or NVLink; read back from the kernel once, since
        #: ops/row_kernels/order.py asks in every call.
        self.page_bytes = page_bytes(self._mapping)
        #: How a GPU reaches them there (tables/memory/access.py).
        self.link = "pcie" if self._mapping is None else self._mapping.access.link
        #: What stands for all of this in signatures of calls (ops/call.py), and keeps no table alive.
        self.identity = object()
        #: Its name in TABLES.
        self.number = TABLES.enter(self)

    @property
    def weight(self) -> torch.Tensor:
        return self.tensor_of_rows()

    def tensor_of_rows(self) -> torch.Tensor:
        """What ``weight`` is; ValueError where the table is closed, or has no such tensor."""
        self.check_usable("EngramTable")
        if self.direct is not None:
            raise ValueError(
                f"EngramTable.weight: expected rows in memory, and those of {self!r} are read from files as they are "
                "asked for (memory_bytes=): look them up; table convert copies files and joins them"
            )
        # Another tensor over the same memory: what in-place operations make of its shape stays out of the table.
        return self._weight.detach()

    @property
    def scale(self) -> torch.Tensor | None:
        self.check_usable("EngramTable")
        return None if self._scale is None else self._scale.detach()

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
        return self.rows * self.format.stored_bytes(self.width)

    @property
    def default_out_dtype(self) -> torch.dtype:
        """The table's own dtype where that is dense, else bfloat16."""
        return torch.bfloat16 if self.format.scaled else self.format.dtype

    @property
    def version(self) -> int:
        """A number that rises whenever the rows change, for what keeps copies of them (:class:`NgramCache`).

        It sees writes by torch to ``weight`` and ``scale``, by optimizers of this package, and :meth:`rows_changed`.
        """
        self.check_usable("EngramTable")
        tensors = [tensor for tensor in (self._weight, self._scale) if tensor is not None and not tensor.is_inference()]
        return self._changes + sum(tensor._version for tensor in tensors)

    @takes(ids=Optional(Tensor(torch.int32, torch.int64)))
    def rows_changed(self, ids: torch.Tensor | None = None) -> None:
        """Say that rows have been written by other means: a kernel, NumPy, another process.

        ids: int32 or int64, of any shape, which rows; ids outside the table are none. None may be any row.
        """
        if self._mapping is not None:
            self._mapping.rows_written()
        if self.changes is None:
            self._changes += 1
            return
        before = self.version
        self._changes += 1
        self.changes.note(ids, before, before + 1)

    @property
    def writing_device(self) -> torch.device:
        """The device whose writes come in the order of what reads the rows: a GPU, on its current stream, or the CPU.

        Rows of placement "staged" are gathered by the CPU.
        """
        for tensor in (self._weight, self._scale):
            if tensor is not None and tensor.is_cuda:
                return tensor.device
        if self.placement in REGISTERED and self._mapping is not None and self._mapping.readable:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def scales_on_device(self) -> bool:
        """Whether rows are on the host and their scales in GPU memory."""
        return self._scales == "device"

    def memory(self, name: str) -> list[tuple[str, int, int]]:
        """(name, address, bytes) of rows and of scales of groups, as errors call them."""
        scales = self.rows * self.format.scale_bytes(self.width)
        rows = (f"{name}.weight", self.descriptor.weight_address, 0 if self.direct else self.nbytes - scales)
        return [rows, (f"{name}.scale", self.descriptor.scale_address, scales)]

    @takes(row_ids=Tensor(torch.int32, torch.int64))
    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begin to read rows of a table that is read from files; returns at once, and a lookup waits for what is left.

        row_ids: int32 or int64, of any shape, best on the CPU; ids outside the table are none. A table in memory has
        nothing to read. What fails is left to the lookup, which reads again. ValueError where the table is closed.
        """
        self.check_usable("EngramTable.prefetch")
        ids = row_ids.detach().reshape(-1).cpu().long().numpy() if self.files else np.empty(0, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self.rows)]
        if not len(ids):
            return
        if self.direct is not None:
            self.direct.prefetch(ids)
            return
        for file in self.files:
            file.read_ahead(ids)

    def memory_report(self) -> MemoryReport:
        """Where the bytes are, and what the machine granted: huge pages, registration, NUMA node; printable."""
        self.check_usable("EngramTable.memory_report")
        tensors = [self._weight] if self.direct is None else []
        tensors += [self._scale] if self.format.group else []
        return report(self.placement, self.nbytes, tensors, self._mapping)

    def metrics(self) -> dict[str, int]:
        """What was read from this table so far, as the host has counted it, without waiting for a GPU.

        rows_asked: by :func:`lookup` and :func:`hash_lookup`, past a cache; duplicates and ids outside are rows too.
        link_bytes: of what these have asked for over PCIe or NVLink, and what was copied for placement "staged".
        staged_calls, staged_rows, staged_bytes, staged_waits: gathers of placement "staged", and how often one found
        that the buffer whose turn it was had still to be copied. rows, nbytes: of the table.
        file_rows, file_distinct, file_hits, file_pages, file_prefetched: rows asked of files that are read with bounded
        memory, distinct ones of each gather, of these found in memory, pages read, and rows read by :meth:`prefetch`.
        docs/metrics.md says what is not counted.
        """
        rings, counts = list(self.rings.values()), list(self.counts.values())  # another thread may add to them
        kernel_rows = sum(count.rows * times for count, times in counts)
        staged = {f"staged_{name}": sum(getattr(ring, name) for ring in rings) for name in STAGED}
        link_bytes = staged["staged_bytes"]
        if self.placement in REGISTERED and self.link != "unified":
            width, scales = self.width, 0 if self.scales_on_device else self.format.scale_bytes(self.width)
            link_bytes += kernel_rows * (self.format.row_bytes(width) + scales)
        asked = dict(rows_asked=kernel_rows + self.cpu_rows, link_bytes=link_bytes)
        direct = {f"file_{name}": getattr(self.direct, name, 0) for name in COUNTS}
        return asked | staged | direct | dict(rows=self.rows, nbytes=self.nbytes)

    def discard(self) -> None:
        """Give the pages of an unregistered host table back: all rows read as zero afterwards.

        ValueError for another placement, and for a table that is registered.
        """
        self.check_usable("EngramTable.discard")
        if self.placement != "host":
            raise ValueError(f"EngramTable.discard: only placement 'host' can give pages back, got {self.placement!r}")
        self._mapping.discard()
        self.rows_changed()

    def close(self) -> None:
        """Unregister and release the memory. Using the table afterwards is an error; closing again is not.

        A GPU must be done with it: synchronise the streams that read it first. Memory that outlives the table, such as
        the tensors given to ``from_tensors``, keeps the rows of overlays that are applied.
        """
        self._weight = self._scale = None
        self.overlays.clear()
        self.kept_views.clear()
        for owned in (*self.rings.values(), self.direct, *self.files, self._mapping):
            if owned is not None:
                owned.close()
        self.rings.clear()
        self.files, self.direct, self._mapping = [], None, None

    def __reduce_ex__(self, protocol):
        # Its memory may be 100 GB that a driver holds, and kernels know it by address.
        raise TypeError(
            "EngramTable: a table is not copied or pickled. Let the copy of a model read the same one by "
            "copy.deepcopy(model, {id(table): table}), save it with save_safetensors, or use placement 'shared' for "
            "other processes"
        )

    def __enter__(self) -> Self:
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
        scale_device = self._scale.device if self.format.group else device
        if device.type == "cpu":
            readable = self._weight.device.type in ("cpu", "meta") and scale_device.type == "cpu"
            need = "a table in CPU memory, with its scales"
        elif self.placement == "staged":
            readable, need = True, ""
        elif self.placement in REGISTERED:
            readable = self._mapping is not None and self._mapping.readable
            need = "a registered host table" if self.placement == "host" else "a registered (published) shared table"
            if readable and scale_device not in (torch.device("cpu"), device):
                readable, need = False, f"a table with its scales on {device} or on the host"
        else:
            readable, need = self._weight.device == device, f"a table on {device} or a registered host table"
        if not readable:
            raise ValueError(f"{where}: tensors on {device} need {need}, got {self!r} on {self._weight.device}")

    def check_usable(self, where: str) -> None:
        """Raise ValueError where the table is closed, or its memory is not in this process or no longer there.

        Kernels, and threads that stage rows, know them by address.
        """
        if self.closed:
            raise ValueError(f"{where}: the table is closed")
        if not torch.compiler.is_compiling():
            moved = self._weight.data_ptr() != self.descriptor.weight_address
            if self.descriptor.scale_address:
                moved = moved or self._scale.data_ptr() != self.descriptor.scale_address
            if moved:
                raise ValueError(
                    f"{where}: the memory of the table's rows or scales was moved or freed, as by set_, .data or "
                    "resize_ on its tensors; close it and make another"
                )
            for owned in (self._mapping, *self.files):
                if owned is not None:
                    owned.check(where)
