"""Storage formats of table rows: element type, bytes per row, and how a row is scaled.

A row is R elements. Dense formats hold them as they are. The two fp8 formats hold e4m3 bytes and a scale:
``e4m3_ue8m0`` one exponent byte per 32 elements (byte s means 2^(s-127), 255 is NaN), as in DeepSeek-V4.1;
``e4m3`` one float32 for the whole table, as in Qwen3.8-Flash-Next.
"""

from dataclasses import dataclass

import torch

SCALE_GROUP = 32  # elements that share one ue8m0 byte
ROW_ALIGNMENT = 16  # bytes; the width of one vector load
MAX_ROW_WIDTH = 1024  # elements
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class RowFormat:
    """One storage format. ``scaling`` is "none", "group" (ue8m0 bytes) or "table" (one float32)."""

    name: str
    dtype: torch.dtype
    scaling: str = "none"

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of ``width`` elements, scales not counted."""
        return width * self.dtype.itemsize

    def scale_bytes(self, width: int) -> int:
        """Bytes of one row's own scales; 0 where the format has none per row."""
        return width // SCALE_GROUP if self.scaling == "group" else 0

    def check_width(self, width: int, where: str) -> None:
        """Raise ValueError unless a row of ``width`` elements can be read in 16-byte loads."""
        if not 0 < width <= MAX_ROW_WIDTH:
            raise ValueError(f"{where}: row width must be between 1 and {MAX_ROW_WIDTH} elements, got {width}")
        if self.row_bytes(width) % ROW_ALIGNMENT:
            raise ValueError(
                f"{where}: bytes of a row must be a multiple of {ROW_ALIGNMENT}, "
                f"got {width} x {self.name} = {self.row_bytes(width)}"
            )
        if self.scaling == "group" and width % SCALE_GROUP:
            raise ValueError(f"{where}: {self.name} needs a row width divisible by {SCALE_GROUP}, got {width}")


FORMATS = {
    entry.name: entry
    for entry in (
        RowFormat("float32", torch.float32),
        RowFormat("bfloat16", torch.bfloat16),
        RowFormat("float16", torch.float16),
        RowFormat("e4m3_ue8m0", torch.float8_e4m3fn, "group"),
        RowFormat("e4m3", torch.float8_e4m3fn, "table"),
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


def format_of(weight: torch.Tensor, scale, where: str) -> tuple[RowFormat, torch.Tensor | None]:
    """The format of a weight and its scale, and the scale as tables keep it."""
    if isinstance(scale, torch.Tensor):
        check_content(scale, "scale", where)
    if weight.dtype != torch.float8_e4m3fn:
        if weight.dtype not in {fmt.dtype for fmt in FORMATS.values()}:
            raise TypeError(
                f"{where}: weight must be float32, bfloat16, float16, float8_e4m3fn or float64, got {weight.dtype}"
            )
        if scale is not None:
            raise ValueError(f"{where}: a {weight.dtype} weight takes no scale, got one")
        return FORMATS[str(weight.dtype).removeprefix("torch.")], None
    # One element of a float type is the table's scale; a single byte would be an exponent, for one row of one group.
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if number or (isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.dtype in _SCALE_DTYPES):
        return FORMATS["e4m3"], checked_scale(scale, where)
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
