"""The table of one Engram layer: rows in a storage format, in the memory of a placement.

    placement   memory                                                  read by
    device      GPU memory                                              kernels, ordinary loads
    host        exact-size mapping, registered with the driver          kernels, over UVA
    cpu         ordinary memory                                         the reference

Without a GPU a host table is mapped but not registered: the reference reads it, and only written pages cost memory.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .host_memory import HostMapping, RuntimeDriver
from .row_format import FORMATS, ROW_ALIGNMENT, SCALE_GROUP, RowFormat, row_format

if TYPE_CHECKING:
    from .config import EngramConfig
    from .file_mapping import FileMapping
    from .safetensors_file import Paths

PLACEMENTS = ("device", "host", "cpu")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class EngramTable:
    """Rows of one layer. Make one with :meth:`empty`, :meth:`from_tensors` or :meth:`from_safetensors`.

    weight: ``[rows, width]`` in the format's dtype. scale: uint8 ``[rows, width / 32]`` for ``e4m3_ue8m0``, a float32
    scalar on the CPU for ``e4m3`` (fixed at construction), else None.
    """

    _files: "Sequence[FileMapping]" = ()  # what a mapped table lies in

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        format: RowFormat,
        placement: str,
        mappings: tuple[HostMapping, ...] = (),
    ):
        self._weight, self._scale, self._mappings = weight, scale, mappings
        self.format, self.placement = format, placement
        self.rows, self.width = weight.shape
        scale_bits = 0
        if format.scaling == "table":
            scale_bits = struct.unpack("<i", struct.pack("<f", float(scale)))[0]
        scale_address = scale.data_ptr() if format.scaling == "group" else 0
        self._descriptor = (weight.data_ptr(), scale_address, self.rows, scale_bits)
        #: Rows start at multiples of 16 bytes and scales at multiples of 8, as the kernels' loads need.
        self.aligned = weight.data_ptr() % ROW_ALIGNMENT == 0 and scale_address % 8 == 0
        self._kept_descriptors: dict[tuple, torch.Tensor] = {}

    @classmethod
    def empty(
        cls,
        rows: int,
        width: int,
        format: str,
        *,
        placement: str,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> "EngramTable":
        """A table of ``rows`` x ``width`` elements whose content is undefined (zero for placement "host").

        format: a name of ``row_format.FORMATS``. scale: the table's scale, for format "e4m3".
        device: the GPU of placement "device"; None is the current one.
        """
        where = "EngramTable.empty"
        fmt = row_format(format, where)
        fmt.check_width(width, where)
        if rows < 1:
            raise ValueError(f"{where}: rows must be at least 1, got {rows}")
        device = _checked_placement(placement, device, fmt, where)
        mappings: list[HostMapping] = []

        def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
            if placement != "host":
                return torch.empty(rows, elements, dtype=dtype, device=device)
            driver = RuntimeDriver() if torch.cuda.is_available() else None
            mappings.append(HostMapping(rows * elements * dtype.itemsize, driver))
            return mappings[-1].bytes.view(dtype).view(rows, elements)

        weight = allocate(width, fmt.dtype)
        scales = None
        if fmt.scaling == "group":
            scales = allocate(width // SCALE_GROUP, torch.uint8)
        elif fmt.scaling == "table":
            scales = torch.tensor(float(scale), dtype=torch.float32)
        return cls(weight, scales, fmt, placement, tuple(mappings))

    @classmethod
    def from_tensors(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | float | None = None,
        *,
        placement: str,
        device: torch.device | str | None = None,
    ) -> "EngramTable":
        """A table with the rows of ``weight [rows, width]``, contiguous; the dtype and ``scale`` tell the format.

        float8_e4m3fn takes ``scale``: uint8 or float8_e8m0fnu ``[rows, width / 32]``, or one float.
        Placement "cpu" shares the tensors' memory, "device" does where they are on that device, "host" copies.
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
        fmt, scale = _format_of(weight, scale, where)
        fmt.check_width(weight.shape[1], where)
        device = _checked_placement(placement, device, fmt, where)
        if placement == "host":
            value = float(scale) if fmt.scaling == "table" else 1.0
            table = cls.empty(*weight.shape, fmt.name, placement=placement, scale=value)
            table._weight.view(torch.uint8).copy_(weight.view(torch.uint8))
            if fmt.scaling == "group":
                table._scale.copy_(scale)
            return table
        if placement == "cpu" and weight.device.type != "cpu":
            raise ValueError(f"{where}: placement 'cpu' needs a weight on the CPU, got {weight.device}")
        if fmt.scaling == "group":
            scale = scale.to(device)
        return cls(weight.to(device), scale, fmt, placement)

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
        mapped: True reads rows where they lie in the file instead, for placement "cpu"; nothing is loaded.
        options: as for :meth:`empty`, such as ``device``.
        """
        from .table_loading import load_table

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
        from .table_saving import save_table

        return save_table(self, path, prefix=prefix, shard_bytes=shard_bytes, metadata=metadata, progress=progress)

    @property
    def weight(self) -> torch.Tensor:
        self._check_open()
        return self._weight

    @property
    def scale(self) -> torch.Tensor | None:
        self._check_open()
        return self._scale

    @property
    def closed(self) -> bool:
        return self._weight is None

    @property
    def mapped(self) -> bool:
        """Whether rows are read where they lie in a file."""
        return bool(self._files)

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
        self._check_open()
        if self.placement != "host":
            raise ValueError(f"EngramTable.discard: only placement 'host' can give pages back, got {self.placement!r}")
        for mapping in self._mappings:
            mapping.discard()

    def close(self) -> None:
        """Unregister and release the memory. Using the table afterwards is an error; closing again is not.

        A GPU must be done with it: synchronise the streams that read it first.
        """
        self._weight = self._scale = None
        self._kept_descriptors.clear()
        for mapping in self._mappings:
            mapping.close()
        self._mappings = self._files = ()

    def __enter__(self) -> "EngramTable":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{self.nbytes / 2**30:.2f} GiB" if self.nbytes >= 2**30 else f"{self.nbytes:,} bytes"
        state = "closed" if self.closed else size
        return f"EngramTable({self.rows:,} x {self.width} {self.format.name}, {self.placement}, {state})"

    def watch(self, files: "Sequence[FileMapping]") -> None:
        """Have every op check that ``files``, which the rows lie in, are still as long as they were."""
        self._files = tuple(files)

    def check_readable_on(self, device: torch.device, where: str) -> None:
        """Raise ValueError unless an op on ``device`` can read this table."""
        if self.closed:
            raise ValueError(f"{where}: the table is closed")
        for file in self._files:
            file.check(where)
        if device.type == "cpu":
            readable, need = self._weight.device.type == "cpu", "a table in CPU memory (placement 'cpu' or 'host')"
        elif self.placement == "host":
            readable, need = all(mapping.registered for mapping in self._mappings), "a registered host table"
        else:
            readable, need = self._weight.device == device, f"a table on {device} or a registered host table"
        if not readable:
            raise ValueError(f"{where}: tensors on {device} need {need}, got {self!r} on {self._weight.device}")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("EngramTable: the table is closed")


class TableView(NamedTuple):
    """What a launch knows of tables: tensors and constants, so that registered ops can take it apart."""

    descriptors: torch.Tensor  #: int64 ``[L, 4]`` on the device: address of rows, of scales, rows, bits of the scale
    format: str
    width: int
    placement: str


def view_tables(tables: Sequence[EngramTable], device: torch.device) -> TableView:
    """The view of tables of one format and width, for launches on ``device``.

    The descriptors are kept, by value, on the first table: only the first call with these tables copies to the device.
    """
    first = tables[0]
    key = (device, *(table._descriptor for table in tables))
    if key not in first._kept_descriptors:
        first._kept_descriptors[key] = torch.tensor(key[1:], dtype=torch.int64).to(device)
    return TableView(first._kept_descriptors[key], first.format.name, first.width, first.placement)


def _checked_placement(placement: str, device, fmt: RowFormat, where: str) -> torch.device:
    if placement not in PLACEMENTS:
        raise ValueError(f"{where}: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if placement != "device":
        if device is not None:
            raise ValueError(f"{where}: device is for placement 'device', got {device} with {placement!r}")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{where}: placement 'device' needs a GPU, and torch finds none")
    if fmt.name == "float64":
        raise ValueError(f"{where}: kernels read no float64 rows; use placement 'cpu', got 'device'")
    device = torch.device(device or "cuda")
    return torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)


def _format_of(weight: torch.Tensor, scale, where: str) -> tuple[RowFormat, torch.Tensor | None]:
    """The format of a weight and its scale, and the scale as tables keep it."""
    if weight.dtype != torch.float8_e4m3fn:
        if weight.dtype not in {fmt.dtype for fmt in FORMATS.values()}:
            raise TypeError(
                f"{where}: weight must be float32, bfloat16, float16, float8_e4m3fn or float64, got {weight.dtype}"
            )
        if scale is not None:
            raise ValueError(f"{where}: a {weight.dtype} weight takes no scale, got one")
        return FORMATS[str(weight.dtype).removeprefix("torch.")], None
    # One element of a float type is the table's scale; a single byte would be an exponent, for one row of one group.
    if isinstance(scale, (int, float)) or (
        isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.dtype in _SCALE_DTYPES
    ):
        return FORMATS["e4m3"], torch.tensor(float(scale), dtype=torch.float32)
    expected = [weight.shape[0], weight.shape[1] // SCALE_GROUP]
    if (
        not isinstance(scale, torch.Tensor)
        or scale.dtype not in (torch.uint8, torch.float8_e8m0fnu)
        or list(scale.shape) != expected
        or not scale.is_contiguous()
    ):
        got = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, torch.Tensor) else repr(scale)
        raise ValueError(
            f"{where}: scale of a float8_e4m3fn weight must be one float, or uint8 or float8_e8m0fnu {expected}, "
            f"contiguous, got {got}"
        )
    return FORMATS["e4m3_ue8m0"], scale.view(torch.uint8)
