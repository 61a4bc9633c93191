"""Where a table's rows and scales are, and which combinations make sense.

    placement   memory                                                  read by
    device      GPU memory                                              kernels, ordinary loads
    host        exact-size mapping, registered with the driver          kernels, over UVA
    shared      one mapping for all processes of a node, registered     kernels, over UVA
    staged      ordinary memory or a mapped file                        CPU threads, which copy what a kernel reads;
                                                                        kernels, where a GPU reads all host memory
    cpu         ordinary memory or a mapped file                        the reference

Without a GPU host and shared tables are mapped but not registered: the reference reads them.
"""

import torch

from engram_kernels.geometry.kinds import describe
from engram_kernels.geometry.row_format import FORMATS, RowFormat, row_format

PLACEMENTS = ("device", "host", "shared", "staged", "cpu")
#: Placements whose memory a GPU reads where it is.
REGISTERED = ("host", "shared")
GROUPED = tuple(name for name, fmt in FORMATS.items() if fmt.group)


def check_geometry(where: str, rows: int, width: int, format: str) -> RowFormat:
    """The format of that name; ValueError where there cannot be a table of these."""
    fmt = row_format(format, where)
    fmt.check_width(width, where)
    if rows < 1:
        raise ValueError(f"{where}: rows must be at least 1, got {rows}")
    return fmt


def check_placement(
    where: str,
    placement: str,
    fmt: RowFormat,
    device: torch.device | str | None,
    name: str | None,
    scales: str | None,
    keep: bool,
) -> torch.device:
    """Raise ValueError unless the options go together; the device of the rows."""
    if placement not in PLACEMENTS:
        raise ValueError(f"{where}: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if (name is not None) != (placement == "shared"):
        raise ValueError(f"{where}: placement 'shared' needs a name, and no other takes one, got {name!r}")
    if keep and placement != "shared":
        raise ValueError(f"{where}: keep=True is for placement 'shared', got {placement!r}")
    check_scales(where, placement, fmt, scales)
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


def check_scales(where: str, placement: str, fmt: RowFormat, scales: str | None) -> None:
    """Raise ValueError unless ``scales`` is None (with the rows) or "device", where that is something else."""
    if scales is None:
        return
    if scales != "device":
        raise ValueError(f"{where}: scales must be None (with the rows) or 'device', got {scales!r}")
    if placement not in REGISTERED or not fmt.group:
        raise ValueError(
            f"{where}: scales='device' is for formats with scales of groups ({', '.join(GROUPED)}) in placement 'host' "
            f"or 'shared', got {fmt.name} in {placement!r}"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"{where}: scales='device' needs a GPU, and torch finds none")


def check_storage(weight: torch.Tensor, scale: torch.Tensor | None, format: RowFormat, own_scale: float | None) -> None:
    """Raise ValueError unless these are rows and scales of ``format``."""
    if weight.dim() != 2 or weight.dtype != format.dtype or not weight.is_contiguous() or not weight.numel():
        raise ValueError(
            f"EngramTable: weight must be contiguous {format.dtype} [rows, width], not empty, got {describe(weight)}"
        )
    width = format.width_of(weight)
    format.check_width(width, "EngramTable")
    expected = (torch.float32, []) if format.table_scale else None
    if format.group:
        expected = torch.uint8, [len(weight), format.scale_bytes(width)]
    if expected != (None if scale is None else (scale.dtype, list(scale.shape))):
        kind = "None" if expected is None else f"{expected[0]} {expected[1]}"
        raise ValueError(f"EngramTable: scale must be {kind} for {format.name}, got {describe(scale)}")
    if (own_scale is not None) != (format.group > 0 and format.table_scale):
        kind = "None" if own_scale is not None else "a number"
        raise ValueError(f"EngramTable: own_scale must be {kind} for {format.name}, got {own_scale}")
