"""The table of one Engram layer: rows in a storage format, in the memory of a placement (tables/placement.py)."""

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engram_kernels.checkpoints.files import Checkpoint, Paths
from engram_kernels.checkpoints.parallel import THREADS, Progress, check_threads
from engram_kernels.checkpoints.validate import select_table, table_digest
from engram_kernels.geometry.choices import FormatName, Placement, ScalePlacement
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import (
    AnyOf,
    Device,
    Each,
    Flag,
    Function,
    Instance,
    Keyed,
    Number,
    OneOf,
    Optional,
    Tensor,
    Text,
    Whole,
    takes,
)
from engram_kernels.geometry.kinds import Path as PathKind
from engram_kernels.geometry.row_format import (
    check_content,
    check_memory,
    checked_scale,
    format_of,
)

from .files import check_room, direct_table, fill_table, map_table, save_table
from .memory import allocation as table_memory
from .memory.direct import LEAST
from .memory.kept import attach_or_load
from .memory.mapped_files import MappedFile
from .placement import PLACEMENTS, REGISTERED, check_geometry, check_placement
from .sharing import GEOMETRY, SharedRows

_PLACING = dict(
    placement=OneOf(*PLACEMENTS),
    scales=Optional(OneOf("device")),
    device=Optional(Device()),
    name=Optional(Text()),
    keep=Flag(),
    progress=Optional(Function()),
)

PATHS = AnyOf(PathKind(), Each(PathKind()))
PATHS.expected = "a file, a folder, an index or a list of them"
LOAD_KINDS = dict(paths=PATHS, prefix=Optional(Text()), threads=Whole(1), progress=Optional(Function()))
SAVE_KINDS = dict(
    path=PathKind(), prefix=Text(), shard_bytes=Optional(Whole(1)), metadata=Optional(Keyed(Text(), Text()))
)
#: Of EngramTable.empty's options, and of those that loading has besides.
_DEFAULTS = dict(scale=1.0, scales=None, device=None, name=None, keep=False, progress=None, digest="", backed=True)


class EngramTable(SharedRows):
    """Rows of one layer. Make one with :meth:`empty`, :meth:`from_tensors`, :meth:`from_safetensors`, :meth:`attach`.

    weight: ``[rows, width]`` in the format's dtype; uint8 ``[rows, width / 2]`` for ``nvfp4`` and ``mxfp4``.
    scale: uint8 ``[rows, width / G]`` where G elements share a scale (32 for ``e4m3_ue8m0`` and ``mxfp4``, 16 for
    ``nvfp4``), a float32 scalar on the CPU for ``e4m3``, else None.
    own_scale: the one of the whole table, a float, for ``e4m3`` and ``nvfp4``, fixed at construction; else None.
    format, placement, mapping, scales: what the functions above found out.
    A table is no module and no parameter: its rows are in no state_dict. :meth:`save_safetensors` saves them, or
    :func:`save_training` with the rest of a run. Using a closed table is a ValueError.
    """

    @classmethod
    @takes(scale=AnyOf(Number(), Tensor()), **GEOMETRY, **_PLACING)
    def empty(
        cls,
        rows: int,
        width: int,
        format: FormatName,
        *,
        placement: Placement,
        scale: float = 1.0,
        scales: ScalePlacement | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> "EngramTable":
        """A table of ``rows`` x ``width`` elements whose content is undefined (zero for "host", "shared" and "staged").

        format: a name of ``FORMATS`` in geometry/row_format.py. scale: the table's own, for formats "e4m3" and "nvfp4".
        scales: "device" keeps the scales of groups in GPU memory, with placement "host" or "shared".
        device: the GPU of placement "device"; None is the current one.
        name: of placement "shared", under which other processes :meth:`attach` once this one calls :meth:`publish`;
        FileExistsError where a table has it. keep: once published it stays until :meth:`free`, also where no process
        has it any more (docs/host_memory.md).
        progress: called with (bytes done, all) while the pages of placement "host" or "shared" are faulted in.
        ValueError where a row is no multiple of 16 bytes, or format, placement, scales, device and name do not go
        together; RuntimeError where the machine does not give the memory.
        """
        options = dict(scale=scale, scales=scales, device=device, name=name, keep=keep, progress=progress)
        return cls._new(rows, width, format, placement=placement, **options)

    @classmethod
    def _new(cls, rows: int, width: int, format: FormatName, *, placement: Placement, **options) -> "EngramTable":
        """As :meth:`empty`. digest: of what is to fill a shared table, whose memory comes then with backed=False."""
        where, given = "EngramTable.empty", _DEFAULTS | options
        fmt = check_geometry(where, rows, width, format)
        placing = (given[name] for name in ("device", "name", "scales", "keep"))
        given["device"] = check_placement(where, placement, fmt, *placing)
        given["scale"] = float(checked_scale(given["scale"], where)) if fmt.table_scale else 1.0
        memory = table_memory.allocate(rows, width, fmt, placement=placement, **given)
        return cls(*memory[:2], fmt, placement, memory.mapping, given["scales"], memory.own_scale)

    @classmethod
    @takes(
        weight=Tensor(),
        scale=Optional(AnyOf(Number(), Tensor())),
        own_scale=Optional(AnyOf(Number(), Tensor())),
        **_PLACING,
    )
    def from_tensors(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | float | None = None,
        *,
        placement: Placement,
        own_scale: torch.Tensor | float | None = None,
        scales: ScalePlacement | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> "EngramTable":
        """A table with the rows of ``weight [rows, width]``, contiguous; the dtype and ``scale`` tell the format.

        float8_e4m3fn takes ``scale``: uint8 or float8_e8m0fnu ``[rows, R / 32]``, or one float. uint8 or
        float4_e2m1fn_x2 ``[rows, R / 2]`` is mxfp4 with ``scale`` uint8 or float8_e8m0fnu ``[rows, R / 32]``, and nvfp4
        with ``scale`` uint8 or float8_e4m3fn ``[rows, R / 16]`` and ``own_scale``, one float (``weight_scale_2``).
        placement: "cpu" and "staged" share the tensors' memory, which may be a mapped file; "device" does where they
        are on that device; "host" and "shared" copy, and "shared" is published then.
        scales: "device" keeps the scales of groups in GPU memory. device: the GPU of placement "device".
        name: of placement "shared". keep: the table stays until :meth:`free`. progress: called with (bytes done, all).
        ValueError where tensors, scales and placement do not fit each other, or a row is no multiple of 16 bytes.
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
        check_memory(weight, "weight", where)
        fmt, scale, own_scale = format_of(weight, scale, where, own_scale)
        width = fmt.width_of(weight)
        fmt.check_width(width, where)
        if weight.dtype != fmt.dtype:
            weight = weight.view(fmt.dtype)
        device = check_placement(where, placement, fmt, device, name, scales, keep)
        if placement in REGISTERED:
            check_content(weight, "weight", where)

            def copy(table: "EngramTable") -> None:
                table._mapping.copy(table.weight, weight)
                if fmt.group:
                    table._mapping.copy(table.scale, scale)

            value = 1.0 if own_scale is None else own_scale
            options = dict(placement=placement, scale=value, scales=scales, name=name, keep=keep, progress=progress)
            return cls._filled(copy, len(weight), width, fmt.name, **options)
        if placement != "device" and weight.device.type != "cpu":
            raise ValueError(f"{where}: placement {placement!r} needs a weight on the CPU, got {weight.device}")
        if fmt.group:
            scale = scale.to(device).detach()
        # Tensors of its own over that memory: what set_() or .data makes of the caller's is no matter then.
        both = fmt.group and fmt.table_scale
        table = cls(weight.to(device).detach(), scale, fmt, placement, own_scale=own_scale if both else None)
        if placement != "device":
            tensors = [weight, scale] if fmt.group else [weight]
            table.files = [file for tensor in tensors if (file := MappedFile.behind(tensor))]
        return table

    @classmethod
    @takes(
        placement=_PLACING["placement"],
        config=Optional(Instance(EngramConfig)),
        layer=Optional(Whole(0)),
        mapped=Flag(),
        memory_bytes=Optional(Whole(LEAST)),
        keep=Flag(),
        **LOAD_KINDS,
    )
    def from_safetensors(
        cls,
        paths: Paths,
        *,
        placement: Placement,
        config: EngramConfig | None = None,
        layer: int | None = None,
        prefix: str | None = None,
        mapped: bool = False,
        memory_bytes: int | None = None,
        keep: bool = False,
        threads: int = THREADS,
        progress: Progress | None = None,
        **options,
    ) -> "EngramTable":
        """A table from a checkpoint's files, in the format they hold. Needs the extra ``hf``.

        paths: a file, a list of files, a folder (its index, or all its files), or an index (``*.index.json``).
        layer: the model layer whose table is meant, by DeepSeek-V4.1's or Qwen's names; prefix: what comes before
        ``weight`` (or ``shard_0.weight``) in the names, whatever they are. Neither is needed where there is one table.
        config: rows and width must be those of its layer.

        Names, dtypes, shapes and row counts are checked before memory is asked for. Rows are then read straight into
        it, ``threads`` chunks of the files at once, with progress(bytes done, bytes in all). ValueError names the file
        and tensor that does not fit; on any error the memory is released.
        mapped: True reads rows where they lie in the file instead, for placement "cpu" and "staged"; nothing is loaded.
        memory_bytes: with mapped=True, what rows may take of memory, 64 MiB at least besides the scales, which are
        loaded: rows are read past the page cache as they are asked for, many at once, and those asked for most are
        kept (docs/larger_than_memory.md). Parts may lie in several files. Such a table is not written to, and has no
        ``weight``.
        keep: with placement "shared" and a name, the one line of every process and of every start: where a kept table
        of that name was made from the same files it is attached in milliseconds, and no row is read; else one process
        loads it, and keeps it until :meth:`free`, while others wait as long as that one lives. ValueError where it is
        of another :attr:`digest`, FileExistsError where it is not kept. The attached table is not written to.
        options: of :meth:`empty`: scales, device, name.
        """
        where = "EngramTable.from_safetensors"
        if memory_bytes is not None and not mapped:
            raise ValueError(f"{where}: memory_bytes is for mapped=True, got {memory_bytes} without it")
        check_threads(threads, where)
        with Checkpoint(paths, where) as checkpoint:
            stored = select_table(checkpoint, config, layer, prefix)
            if mapped:
                if placement not in ("cpu", "staged"):
                    raise ValueError(
                        f"{where}: mapped=True needs placement 'cpu' or 'staged', whose rows a CPU reads, "
                        f"got {placement!r}"
                    )
                options |= dict(keep=keep)
                if memory_bytes is None:
                    table = cls.from_tensors(**map_table(checkpoint, stored), placement=placement, **options)
                else:
                    options |= dict(reading=dict(threads=threads, progress=progress))
                    table = cls._read_directly(checkpoint, stored, memory_bytes, placement, **options)
                table.token_map = stored.token_map
                return table
            digest = table_digest(checkpoint, stored) if placement == "shared" else ""

            def read(table: "EngramTable") -> None:
                table.token_map = stored.token_map
                fill_table(table, checkpoint, stored, new=True, threads=threads, progress=progress)

            def load() -> "EngramTable":
                way_out = "free memory, or read it where it lies (placement='cpu', mapped=True)"
                check_room(stored.name, stored.nbytes, placement, where, way_out)
                given = options if stored.scale is None else options | dict(scale=stored.scale)
                given |= dict(placement=placement, keep=keep, digest=digest, backed=False)
                return cls._filled(read, stored.rows, stored.width, stored.format.name, **given)

            if not keep:
                return load()
            given = dict(device=None, name=None, scales=None) | options
            check_placement(where, placement, stored.format, **given, keep=True)
            found = dict(scale=stored.scale, scales=given["scales"], digest=digest, kept=True, where=where)
            shape = stored.rows, stored.width, stored.format
            table = attach_or_load(lambda: cls._attached(given["name"], *shape, timeout=None, **found), load)
            table.token_map = stored.token_map
            return table

    @classmethod
    def _read_directly(
        cls, checkpoint: Checkpoint, stored, memory_bytes: int, placement: Placement, reading, **options
    ) -> "EngramTable":
        """A table whose rows are read past the page cache as they are asked for; no tensor has all of them."""
        fmt = stored.format
        given = dict(device=None, name=None, scales=None, keep=False) | options
        check_placement(checkpoint.where, placement, fmt, **given)
        direct, scale = direct_table(checkpoint, stored, memory_bytes, **reading)
        weight = torch.empty(stored.rows, fmt.row_items(stored.width), dtype=fmt.dtype, device="meta")
        both = fmt.group and fmt.table_scale
        table = cls(weight, scale, fmt, placement, own_scale=stored.scale if both else None)
        table.direct, table.files = direct, direct.files
        return table

    @classmethod
    def _filled(cls, fill: Callable[["EngramTable"], None], *shape, placement: Placement, **options) -> "EngramTable":
        """A new table that ``fill`` has written to, published where it is shared; closed again where that fails."""
        table = cls._new(*shape, placement=placement, **options)
        try:
            fill(table)
            if placement == "shared":
                table.publish()
        except BaseException as error:
            # Frames that the error keeps alive hold views of the memory, and would keep it as well.
            traceback.clear_frames(error.__traceback__)
            table.close()
            raise
        return table

    @takes(**SAVE_KINDS, progress=Optional(Function()))
    def save_safetensors(
        self,
        path: str | os.PathLike,
        *,
        prefix: str = "",
        shard_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write the table as ``path`` (``*.safetensors``, or a folder); returns what :meth:`from_safetensors` takes.

        prefix: the tensors are ``{prefix}weight`` and ``{prefix}scale`` (``weight_scale`` for the table's own; for
        nvfp4 ``weight_scale`` and ``weight_scale_2``).
        shard_bytes: files of more are split, into tensors ``{prefix}shard_{k}.weight``, with an index.
        metadata: texts for the files' headers. progress: called with (bytes done, all).

        A table there is replaced at once and as a whole; until then it stays what it was, also where saving fails or is
        killed (OSError). ValueError where files hold anything else: they are never replaced. Rows of overlays that are
        applied are saved, as lookups read them: remove an overlay first to save without it.
        """
        self.wait_for_steps()
        writing = dict(prefix=prefix, shard_bytes=shard_bytes, metadata=metadata)
        return save_table(self, path, "EngramTable.save_safetensors", progress, **writing)
