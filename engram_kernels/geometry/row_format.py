"""Storage formats of table rows: element type, bytes per row, and how a row is scaled.

    format        an element               scales
    float32, bfloat16, float16             none
    e4m3          one byte                 one float32 for the whole table (Qwen3.8-Flash-Next)
    e4m3_ue8m0    one byte                 one ue8m0 byte per 32 elements (DeepSeek-V4.1)
    mxfp4         e2m1, two in a byte      one ue8m0 byte per 32 elements (OCP MX)
    nvfp4         e2m1, two in a byte      one e4m3 byte per 16 elements, and one float32 for the whole table

A row is R elements. ue8m0: byte s means 2^(s-127), 255 is NaN. e4m3: bytes 0x7F and 0xFF are NaN. e2m1: a sign and one
of 0, 0.5, 1, 1.5, 2, 3, 4, 6; the low half of a byte is the even element.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

UE8M0_GROUP = 32  # elements that share one ue8m0 byte
NVFP4_GROUP = 16
ROW_ALIGNMENT = 16  # bytes; the width of one vector load
MAX_ROW_WIDTH = 1024  # elements
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: What bytes of scales are called in torch, by what they are.
SCALE_DTYPES = {"ue8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class RowFormat:
    """One storage format."""

    name: str
    dtype: torch.dtype  #: of what is stored; uint8 where it packs elements
    packed: int = 1  #: elements in one of ``dtype``
    group: int = 0  #: elements that share one scale byte; 0 for none
    group_scale: str | None = None  #: what that byte is, a key of SCALE_DTYPES
    table_scale: bool = False  #: whether one float32 scales the whole table

    @property
    def scaled(self) -> bool:
        """Whether rows are codes that scales make values of; dense rows are values."""
        return bool(self.group or self.table_scale)

    def row_items(self, width: int) -> int:
        """Elements of ``dtype`` that hold one row of ``width`` elements."""
        return width // self.packed

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of ``width`` elements, scales not counted."""
        return self.row_items(width) * self.dtype.itemsize

    def scale_bytes(self, width: int) -> int:
        """Bytes of one row's own scales; 0 where the format has none per row."""
        return width // self.group if self.group else 0

    def stored_bytes(self, width: int) -> int:
        """Bytes of one row with its own scales."""
        return self.row_bytes(width) + self.scale_bytes(width)

    def width_of(self, weight: torch.Tensor) -> int:
        """Elements R of the rows that ``weight [rows, items]`` holds."""
        return weight.shape[1] * self.packed

    def check_width(self, width: int, where: str) -> None:
        """Raise ValueError unless a row of ``width`` elements can be read in 16-byte loads."""
        if not 0 < width <= MAX_ROW_WIDTH:
            raise ValueError(f"{where}: row width must be between 1 and {MAX_ROW_WIDTH} elements, got {width}")
        if width % self.packed or self.row_bytes(width) % ROW_ALIGNMENT:
            raise ValueError(
                f"{where}: bytes of a row must be a multiple of {ROW_ALIGNMENT}, "
                f"got {width} x {self.name} = {width * self.dtype.itemsize / self.packed:g}"
            )
        if self.group and width % self.group:
            raise ValueError(f"{where}: {self.name} needs a row width divisible by {self.group}, got {width}")


FORMATS = {
    entry.name: entry
    for entry in (
        RowFormat("float32", torch.float32),
        RowFormat("bfloat16", torch.bfloat16),
        RowFormat("float16", torch.float16),
        RowFormat("e4m3_ue8m0", torch.float8_e4m3fn, group=UE8M0_GROUP, group_scale="ue8m0"),
        RowFormat("e4m3", torch.float8_e4m3fn, table_scale=True),
        RowFormat("nvfp4", torch.uint8, packed=2, group=NVFP4_GROUP, group_scale="e4m3", table_scale=True),
        RowFormat("mxfp4", torch.uint8, packed=2, group=UE8M0_GROUP, group_scale="ue8m0"),
        # For conformance tests against float64 models. The references read it; kernels refuse it.
        RowFormat("float64", torch.float64),
    )
}


def row_format(name: str, where: str) -> RowFormat:
    """The format called ``name``; ValueError naming the choices otherwise."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{where}: format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def check_content(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise ValueError for a tensor on the meta device, and for one whose storage was freed or shrunk."""
    if tensor.is_meta:
        raise ValueError(f"{where}: {name} must hold numbers, and a tensor on the meta device has none")
    check_memory(tensor, name, where)


def check_memory(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise ValueError where a tensor reaches beyond its storage, which was freed or shrunk: reading it is a fault."""
    if tensor.layout != torch.strided or not tensor.numel():
        return
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    elements = tensor.storage_offset() + 1 + sum((size - 1) * stride for size, stride in extents)
    if (have := tensor.untyped_storage().nbytes()) < (need := elements * tensor.itemsize):
        raise ValueError(
            f"{where}: {name} must have memory of {need} bytes, got {have}: its storage was freed or shrunk"
        )


def checked_scale(scale: torch.Tensor | float, where: str) -> torch.Tensor:
    """The scale of a whole table as a float32 scalar on the CPU; ValueError unless it is positive and finite there."""
    try:
        given = float(scale)
    except OverflowError:  # an int beyond every float
        given = float("inf")
    value = torch.tensor(given, dtype=torch.float32, device="cpu")
    if not 0 < value < float("inf"):
        note = f", which is {float(value)} in float32" if 0 < given < float("inf") else ""
        raise ValueError(f"{where}: the table's scale must be a positive number, got {given}{note}")
    return value


class Stored(NamedTuple):
    """What tensors hold: a format, scales of groups or the table's as tables keep them, and the table's as a number."""

    format: RowFormat
    scale: torch.Tensor | None
    own_scale: float | None


def format_of(weight: torch.Tensor, scale, where: str, own_scale=None) -> Stored:
    """The format of a weight and its scales.

    ``own_scale`` comes beside scales of groups, for nvfp4; ``scale`` is a lone one of a table, or scales of groups.
    """
    for name, given in (("scale", scale), ("own_scale", own_scale)):
        if isinstance(given, torch.Tensor):
            check_content(given, name, where)
    fmt = _format_of_weight(weight, scale, where)
    if (own_scale is None) == (fmt.table_scale and fmt.group > 0):
        need = "one float32 for the table" if own_scale is None else f"None for {fmt.name}"
        raise ValueError(f"{where}: own_scale must be {need}, got {own_scale}")
    if not fmt.group:
        kept = checked_scale(scale, where) if fmt.table_scale else None
        return Stored(fmt, kept, None if kept is None else float(kept))
    expected = [weight.shape[0], fmt.scale_bytes(fmt.width_of(weight))]
    fits = isinstance(scale, torch.Tensor) and scale.dtype in (torch.uint8, SCALE_DTYPES[fmt.group_scale])
    if not fits or list(scale.shape) != expected or not scale.is_contiguous():
        got = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, torch.Tensor) else repr(scale)
        one = "one float, or " if fmt.dtype == torch.float8_e4m3fn else ""
        dtype = str(SCALE_DTYPES[fmt.group_scale]).removeprefix("torch.")
        raise ValueError(
            f"{where}: scale of a {str(weight.dtype).removeprefix('torch.')} weight must be {one}uint8 or {dtype} "
            f"{expected}, contiguous, got {got}"
        )
    own = None if own_scale is None else float(_one_scale(own_scale, where))
    return Stored(fmt, scale.view(torch.uint8), own)


def _format_of_weight(weight: torch.Tensor, scale, where: str) -> RowFormat:
    """The format that dtypes and the shape of ``scale`` tell."""
    if weight.dtype in (torch.uint8, torch.float4_e2m1fn_x2):
        # Scales of 16 are e4m3 and those of 32 are ue8m0; as uint8 their number tells.
        by_dtype = {torch.float8_e4m3fn: "nvfp4", torch.float8_e8m0fnu: "mxfp4"}
        few = (
            isinstance(scale, torch.Tensor) and scale.dim() == 2 and scale.shape[1] * UE8M0_GROUP == 2 * weight.shape[1]
        )
        return FORMATS[by_dtype.get(getattr(scale, "dtype", None), "mxfp4" if few else "nvfp4")]
    if weight.dtype == torch.float8_e4m3fn:
        return FORMATS["e4m3" if _is_one_scale(scale) else "e4m3_ue8m0"]
    if weight.dtype not in {fmt.dtype for fmt in FORMATS.values()}:
        raise TypeError(
            f"{where}: weight must be float32, bfloat16, float16, float8_e4m3fn, uint8 (packed e2m1) or float64, got "
            f"{weight.dtype}"
        )
    if scale is not None:
        raise ValueError(f"{where}: a {weight.dtype} weight takes no scale, got one")
    return FORMATS[str(weight.dtype).removeprefix("torch.")]


def _is_one_scale(scale) -> bool:
    """One element of a float type is a table's scale; a single byte would be one group's."""
    if isinstance(scale, torch.Tensor):
        return scale.numel() == 1 and scale.dtype in _SCALE_DTYPES
    return isinstance(scale, (int, float)) and not isinstance(scale, bool)


def _one_scale(scale, where: str) -> torch.Tensor:
    if not _is_one_scale(scale):
        got = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, torch.Tensor) else repr(scale)
        raise ValueError(f"{where}: own_scale must be one float, got {got}")
    return checked_scale(scale, where)
