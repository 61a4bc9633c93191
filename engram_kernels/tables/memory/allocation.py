"""The memory of a table's rows and scales in each placement: made, or attached to; and the report on it."""

import mmap
from typing import NamedTuple

import torch

from engram_kernels.geometry.row_format import RowFormat

from .host import HostMapping, Mapping, RuntimeDriver
from .pages import HUGE_PAGE, Pages, Progress
from .report import MemoryReport, locked_limit
from .shared import SharedMapping
from .shared_protocol import Geometry

_PAGE = 4096  # the smallest; scales start at one of their own behind the rows


class TableMemory(NamedTuple):
    """Rows, their scales or the table's one, and the mapping that both lie in, where that is the table's own."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    mapping: Mapping | None = None
    own_scale: float | None = None  #: the table's, where rows have scales of groups too


def allocate(
    rows: int,
    width: int,
    fmt: RowFormat,
    *,
    placement: str,
    scale: float,
    scales: str | None,
    device: torch.device,
    name: str | None,
    keep: bool,
    digest: str,
    progress: Progress | None,
    backed: bool,
) -> TableMemory:
    """Memory for a new table; arguments checked, as for ``EngramTable.empty``.

    backed: False leaves that of a shared table to ``SharedMapping.back``.
    """
    if placement == "shared":
        nbytes, geometry = _mapped_bytes(rows, width, fmt), _geometry(rows, width, fmt, scale, digest, keep)
        mapping = SharedMapping.create(name, nbytes, geometry, _driver(), progress, backed)
        return _divide(mapping, rows, width, fmt, scale)  # scales move to the GPU when all of them are there
    if placement == "host":
        mapping = HostMapping(_mapped_bytes(rows, width, fmt, scales), _driver(), progress=progress)
        return _divide(mapping, rows, width, fmt, scale, scales)
    if placement == "staged":
        return _divide(HostMapping(_mapped_bytes(rows, width, fmt), huge=True), rows, width, fmt, scale)
    weight = _rows(rows, width, fmt, device)
    grouped = torch.empty(rows, fmt.scale_bytes(width), dtype=torch.uint8, device=device) if fmt.group else None
    return _with_scales(fmt, scale, weight, grouped)


def _rows(rows: int, width: int, fmt: RowFormat, device: torch.device) -> torch.Tensor:
    """Memory of rows; on the CPU large ones begin at a page, where files are read and written past the page cache."""
    nbytes = rows * fmt.row_bytes(width)
    if device.type == "cpu" and nbytes >= HUGE_PAGE:
        return Pages(nbytes).bytes.view(fmt.dtype).view(rows, fmt.row_items(width))
    return torch.empty(rows, fmt.row_items(width), dtype=fmt.dtype, device=device)


def attach(
    name: str,
    rows: int,
    width: int,
    fmt: RowFormat,
    *,
    scale: float | None,
    scales: str | None,
    timeout: float | None,
    digest: str = "",
    kept: bool = False,
    where: str,
) -> TableMemory:
    """The memory of a published table; arguments checked, as for ``EngramTable.attach``."""
    geometry = _geometry(rows, width, fmt, scale, digest, kept)
    mapping = SharedMapping.attach(name, _mapped_bytes(rows, width, fmt), geometry, _driver(), timeout, where)
    return _divide(mapping, rows, width, fmt, mapping.geometry.scale, scales)


def page_bytes(mapping: Mapping | None) -> int:
    """Bytes of nearly all pages of a mapping that a GPU reads; those of a huge page where none does."""
    if mapping is None or not mapping.readable:
        return HUGE_PAGE
    usage = mapping.pages.usage()
    return HUGE_PAGE if (usage.huge or 0) >= 0.9 * usage.resident else mmap.PAGESIZE


def report(placement: str, nbytes: int, tensors: list[torch.Tensor], mapping: Mapping | None) -> MemoryReport:
    """Where a table's tensors are; read back from the kernel where the mapping is the table's own."""
    device = sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
    if mapping is None:
        return MemoryReport(placement, nbytes, device, locked_limit=locked_limit())
    usage = mapping.pages.usage()
    share = None if mapping.node is None else mapping.pages.nodes().get(mapping.node, 0) / max(1, usage.resident)
    return MemoryReport(
        placement=placement,
        bytes=nbytes,
        device=device,
        resident=usage.resident,
        huge=usage.huge,
        chunks=len(mapping.registration.addresses) if mapping.registered else 0,
        link=mapping.access.link if mapping.readable else None,
        numa_node=mapping.node,
        numa_share=share,
        locked_limit=locked_limit(),
        warnings=tuple(mapping.notes),
    )


def _divide(
    mapping: Mapping, rows: int, width: int, fmt: RowFormat, scale: float, scales: str | None = None
) -> TableMemory:
    """Rows and scales in a mapping, which is closed where that fails."""
    try:
        row_bytes = rows * fmt.row_bytes(width)
        weight = mapping.bytes[:row_bytes].view(fmt.dtype).view(rows, fmt.row_items(width))
        if not fmt.group:
            return _with_scales(fmt, scale, weight, None, mapping)
        at, nbytes = -(-row_bytes // _PAGE) * _PAGE, rows * fmt.scale_bytes(width)
        mapped = mapping.bytes[at : at + nbytes].view(rows, -1) if at < mapping.nbytes else None
        if mapped is None:
            mapped = torch.empty(rows, fmt.scale_bytes(width), dtype=torch.uint8, device=_gpu())
        elif scales == "device":
            mapped = on_the_gpu(mapped, mapping)
        return _with_scales(fmt, scale, weight, mapped, mapping)
    except BaseException:
        mapping.close()
        raise


def on_the_gpu(scales: torch.Tensor, mapping: Mapping) -> torch.Tensor:
    """A copy of the scales of rows, which lie in ``mapping``, in GPU memory."""
    moved = torch.empty_like(scales, device=_gpu())
    mapping.copy(moved, scales)
    return moved


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _driver() -> RuntimeDriver | None:
    return RuntimeDriver() if torch.cuda.is_available() else None


def _geometry(rows: int, width: int, fmt: RowFormat, scale: float | None, digest: str, kept: bool) -> Geometry:
    return Geometry(rows, width, fmt.name, scale if fmt.table_scale else None, digest, kept)


def _with_scales(
    fmt: RowFormat, scale: float, weight: torch.Tensor, grouped: torch.Tensor | None, mapping: Mapping | None = None
) -> TableMemory:
    """Rows with the scales that their format has: of groups, of the table, or both."""
    if fmt.group:
        return TableMemory(weight, grouped, mapping, float(scale) if fmt.table_scale else None)
    one = torch.tensor(float(scale), dtype=torch.float32, device="cpu") if fmt.table_scale else None
    return TableMemory(weight, one, mapping)


def _mapped_bytes(rows: int, width: int, fmt: RowFormat, scales: str | None = None) -> int:
    """Bytes of a mapping for rows and, unless they lie elsewhere, scales."""
    row_bytes, scale_bytes = rows * fmt.row_bytes(width), rows * fmt.scale_bytes(width)
    return row_bytes if not scale_bytes or scales == "device" else -(-row_bytes // _PAGE) * _PAGE + scale_bytes
