"""Rows from one storage format into another: float32 in between, rounded once to nearest, ties to even.

    e4m3_ue8m0    per 32 values 2^e, the smallest power of two with max |x| <= 448 * 2^e; row = e4m3(x / 2^e), where the
                  division is exact. The byte e + 127 is at least 1: some readers take byte 0 for 0. A group of zeros
                  has e = 0
    e4m3          row = e4m3(x / scale), divided in float32; what exceeds 448 becomes 448
    dense         the cast; what exceeds float16 becomes infinite

NaN stays NaN, and takes no part in a group's maximum. The fp8 formats have no infinity: one is an error.
"""

import torch

from engram_kernels.geometry.row_format import SCALE_GROUP, RowFormat
from engram_kernels.reference.ops.rows import dequantise

E4M3_MAX = 448.0
_EXPONENT_BIAS = 127
_LEAST_BYTE = 1


def decode_rows(rows: torch.Tensor, scales: torch.Tensor | float | None, format: RowFormat) -> torch.Tensor:
    """Values float32 ``[n, width]`` of stored rows. scales: uint8 bytes of groups, the table's own, or None."""
    return dequantise(rows, scales, format).to(torch.float32)


def encode_rows(
    values: torch.Tensor, format: RowFormat, where: str, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, scale bytes of groups or None) of float32 ``values [n, width]``. scale: the table's own, for "e4m3"."""
    if format.scaling == "none":
        return values.to(format.dtype), None
    groups = values.unflatten(-1, (-1, SCALE_GROUP if format.scaling == "group" else values.shape[-1]))
    maxima = greatest(groups)
    if torch.isinf(maxima).any():
        row = int(torch.isinf(maxima).any(1).nonzero()[0])
        raise ValueError(f"{where}: {format.name} has no infinity, and row {row} of these {len(values)} holds one")
    if format.scaling == "table":
        # torch's cast saturates since 2.12; before, what rounds beyond 448 became NaN.
        divisor = torch.tensor(scale, dtype=torch.float32, device=values.device)
        return (values / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(format.dtype), None
    exponents = _group_exponents(maxima)
    # Every 2^-e is a normal float32, and the product exact but for what is far below e4m3's smallest step.
    factors = torch.ldexp(torch.ones_like(maxima), -exponents)
    rows = (groups * factors[..., None]).flatten(-2).to(format.dtype)
    return rows, (exponents + _EXPONENT_BIAS).to(torch.uint8)


def greatest(values: torch.Tensor) -> torch.Tensor:
    """The greatest magnitude along the last dimension, NaN left out."""
    return values.abs().nan_to_num_(nan=0.0, posinf=float("inf")).amax(-1)


def overflows(values: torch.Tensor, rows: torch.Tensor, format: RowFormat, scale: float | None) -> int:
    """How many of ``values`` became infinite in ``rows`` (float16), or 448 times the table's own ``scale`` (e4m3)."""
    if format.scaling == "table":
        # A measured scale is rounded, and may leave the greatest value a last bit above 448.
        return int((values.abs() > E4M3_MAX * (1 + 2**-20) * scale).sum())
    if format.name == "float16":
        return int(torch.isinf(rows).sum() - torch.isinf(values).sum())
    return 0


def table_scale(magnitude: float) -> float:
    """The scale that takes ``magnitude`` to 448, in float32; 1 for a table of zeros."""
    return float(torch.tensor(magnitude, dtype=torch.float32, device="cpu") / E4M3_MAX) or 1.0


def _group_exponents(maxima: torch.Tensor) -> torch.Tensor:
    """int32 e of each group: the smallest with ``maxima <= 448 * 2^e``."""
    # max = m * 2^k with m in [0.5, 1), and 448 * 2^e = 0.875 * 2^(e + 9).
    mantissa, exponent = torch.frexp(maxima)
    found = exponent - torch.where(mantissa <= 0.875, 9, 8)
    return torch.where(maxima == 0, 0, found.clamp(min=_LEAST_BYTE - _EXPONENT_BIAS)).to(torch.int32)
