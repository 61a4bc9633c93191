"""Rows from one storage format into another: float32 in between, rounded once to nearest, ties to even.

    e4m3_ue8m0    per 32 values 2^e, the smallest power of two with max |x| <= 448 * 2^e; row = e4m3(x / 2^e), where the
                  division is exact. The byte e + 127 is at least 1: some readers take byte 0 for 0. A group of zeros
                  has e = 0
    e4m3          row = e4m3(x / scale), divided in float32; what exceeds 448 becomes 448
    mxfp4         per 32 values 2^e of least squared error; row = e2m1(x / 2^e), what exceeds 6 becomes 6
    nvfp4         per 16 values an e4m3 s of least squared error; row = e2m1(x / (s * scale)), divided in float32
    dense         the cast; what exceeds float16 becomes infinite

Of four bits there are few levels, and the scale that takes a group's greatest value to 6 is often not the best: the
greatest may fit 4 better, or be cut. ``nearest`` takes that one all the same (for mxfp4 the smallest 2^e that cuts
nothing; for nvfp4 e4m3(max / 6 / scale)); it is the start of the search, which looks at the scales around it. What both
cost is measured (``python -m bench formats``). A squared error is summed in float32, in halves, so that a row's bits do
not depend on how many are encoded together.

NaN stays NaN in fp8, and takes no part in a group's maximum. fp8 has no infinity and four bits have no NaN either: one
is an error.
"""

import math

import torch

from engram_kernels.geometry.row_format import RowFormat
from engram_kernels.reference.ops.rows import E2M1_VALUES, dequantise

E4M3_MAX = 448.0
E2M1_MAX = E2M1_VALUES[-1]
#: The greatest value of a format with a table's scale, in units of that scale.
MOST = {"e4m3": E4M3_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}
_EXPONENT_BIAS = 127
_LEAST_BYTE = 1
#: Elements of four bits that are encoded together: all that is made of them stays in a core's cache.
_BLOCK = 1 << 16
#: Scale bytes that the search tries, from the one of ``nearest``: of ue8m0, factors of two; of e4m3, 6 % to 12 % each.
#: (Of Gaussian rows 1 in 250 would take 2, none -3, and -2, 7 are worth less than 0.01 dB each.)
_TRIED = {"ue8m0": (0, -1, 1), "e4m3": (0, -1, 1, 3, 4, 5, 6)}
_GREATEST_BYTE = {"ue8m0": 254, "e4m3": 0x7E}


def decode_rows(
    rows: torch.Tensor, scales: torch.Tensor | None, format: RowFormat, own_scale: float | None = None
) -> torch.Tensor:
    """Values float32 ``[n, R]`` of stored rows. scales: uint8 bytes of groups. own_scale: the table's."""
    return dequantise(rows, scales, format, own_scale).to(torch.float32)


def encode_rows(
    values: torch.Tensor, format: RowFormat, where: str, *, scale: float | None = None, nearest: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, scale bytes of groups or None) of float32 ``values [n, R]``.

    scale: the table's own, for "e4m3" and "nvfp4". nearest: of four bits, without a search for better scales.
    """
    if not format.scaled:
        return values.to(format.dtype), None
    groups = values.unflatten(-1, (-1, format.group or values.shape[-1]))
    maxima = greatest(groups)
    _check_finite(values, maxima, format, where)
    if format.packed > 1:
        return _encode_e2m1(groups, maxima, format, scale, nearest)
    if format.table_scale:
        # torch's cast saturates since 2.12; before, what rounds beyond 448 became NaN.
        divisor = torch.tensor(scale, dtype=torch.float32, device=values.device)
        return (values / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(format.dtype), None
    exponents = _group_exponents(maxima, E4M3_MAX)
    # Every 2^-e is a normal float32, and the product exact but for what is far below e4m3's smallest step.
    factors = torch.ldexp(torch.ones_like(maxima), -exponents)
    rows = (groups * factors[..., None]).flatten(-2).to(format.dtype)
    return rows, (exponents + _EXPONENT_BIAS).to(torch.uint8)


def greatest(values: torch.Tensor) -> torch.Tensor:
    """The greatest magnitude along the last dimension, NaN left out."""
    return values.abs().nan_to_num_(nan=0.0, posinf=float("inf")).amax(-1)


def overflows(values: torch.Tensor, rows: torch.Tensor, format: RowFormat, scale: float | None) -> int:
    """How many ``values`` became infinite in ``rows`` (float16), or exceed what the table's own ``scale`` reaches."""
    if format.table_scale:
        # A measured scale is rounded, and may leave the greatest value a last bit above the limit.
        return int((values.abs() > MOST[format.name] * (1 + 2**-20) * scale).sum())
    if format.name == "float16":
        return int(torch.isinf(rows).sum() - torch.isinf(values).sum())
    return 0


def table_scale(magnitude: float, format: RowFormat) -> float:
    """The scale that takes ``magnitude`` to the greatest value of ``format``, in float32; 1 for a table of zeros."""
    return float(torch.tensor(magnitude, dtype=torch.float32, device="cpu") / MOST[format.name]) or 1.0


def _check_finite(values: torch.Tensor, maxima: torch.Tensor, format: RowFormat, where: str) -> None:
    missing = {"infinity": torch.isinf(maxima).any(-1)}
    if format.packed > 1:
        missing["NaN"] = torch.isnan(values).any(-1)
    for name, found in missing.items():
        if found.any():
            row = int(found.nonzero()[0])
            raise ValueError(f"{where}: {format.name} has no {name}, and row {row} of these {len(values)} holds one")


def _encode_e2m1(groups, maxima, format: RowFormat, scale: float | None, nearest: bool):
    """(uint8 ``[n, R / 2]``, scale bytes ``[n, groups]``) of ``groups [n, groups, G]``."""
    steps = (0,) if nearest else _TRIED[format.group_scale]
    flat, first = groups.flatten(0, 1), _nearest_byte(maxima.flatten(), format, scale)
    some = max(1, _BLOCK // format.group)
    blocks = zip(flat.split(some), first.split(some), strict=True)
    # Of no groups there is a block too, of none.
    codes, scales = zip(*(_encode_block(*block, steps, format, scale) for block in blocks), strict=True)
    count, number, size = groups.shape
    return torch.cat(codes).view(count, number * size // 2), torch.cat(scales).view(count, number)


def _encode_block(groups, first, steps, format: RowFormat, scale: float | None):
    """(codes ``[n, G / 2]``, scale bytes ``[n]``) of ``groups [n, G]``, by the best of the bytes ``first + steps``."""
    # Element by element, so that what is done to each group is the same whatever stands beside it.
    magnitudes = groups.abs().T.contiguous()
    best, least, rounded = first, None, None
    for step in steps:
        byte = (first + step).clamp_(_LEAST_BYTE, _GREATEST_BYTE[format.group_scale])
        factor = _factor(byte, format, scale)
        tried = _round_e2m1(magnitudes / factor)
        if len(steps) == 1:
            best, rounded = byte, tried
            break
        squares = (tried * factor).sub_(magnitudes).square_()
        while len(squares) > 1:  # G is a power of two
            squares = squares[: len(squares) // 2] + squares[len(squares) // 2 :]
        error = squares[0]
        if rounded is None:
            best, least, rounded = byte, error, tried
            continue
        better = error < least
        best, least = torch.where(better, byte, best), torch.where(better, error, least)
        rounded = torch.where(better, tried, rounded)
    # 0, 0.5, .. 2 are codes 0 to 4, then 3, 4, 6 are 5, 6, 7.
    codes = torch.where(rounded <= 2, 2 * rounded, torch.where(rounded <= 4, rounded + 2, rounded / 2 + 4))
    codes = codes.to(torch.uint8) | (torch.signbit(groups).T.to(torch.uint8) << 3)
    return (codes[::2] | (codes[1::2] << 4)).T.contiguous(), best.to(torch.uint8)


def _nearest_byte(maxima: torch.Tensor, format: RowFormat, scale: float | None) -> torch.Tensor:
    """int32 scale byte by which each group's greatest value is about 6, and of ue8m0 no more."""
    if format.group_scale == "ue8m0":
        return _group_exponents(maxima, E2M1_MAX) + _EXPONENT_BIAS
    wanted = (maxima / E2M1_MAX / torch.tensor(scale, dtype=torch.float32, device=maxima.device)).clamp_(max=E4M3_MAX)
    return wanted.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32).clamp_(min=_LEAST_BYTE)


def _factor(byte: torch.Tensor, format: RowFormat, scale: float | None) -> torch.Tensor:
    """float32 by which codes of a group with this scale byte are multiplied."""
    if format.group_scale == "ue8m0":
        return torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte - _EXPONENT_BIAS)
    own = torch.tensor(scale, dtype=torch.float32, device=byte.device)
    return byte.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32) * own


def _round_e2m1(magnitudes: torch.Tensor) -> torch.Tensor:
    """In place the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, of two that are as near the one with an even code."""
    magnitudes.clamp_(max=E2M1_MAX)
    # Numbers from a power of two on, and those below 1, are half of it apart. 1.5 * 2^23 of such steps has that as its
    # last bit: a sum is rounded to it, ties to even.
    power = (magnitudes.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1, 4)
    return magnitudes.add_(power.mul_(1.5 * 2**22)).sub_(power)


def _group_exponents(maxima: torch.Tensor, most: float) -> torch.Tensor:
    """int32 e of each group: the smallest with ``maxima <= most * 2^e``, where most is 448 or 6."""
    # max = m * 2^k with m in [0.5, 1), and 448 * 2^e = 0.875 * 2^(e + 9), 6 * 2^e = 0.75 * 2^(e + 3).
    limit, power = math.frexp(most)
    mantissa, exponent = torch.frexp(maxima)
    found = exponent - torch.where(mantissa <= limit, power, power - 1)
    return torch.where(maxima == 0, 0, found.clamp(min=_LEAST_BYTE - _EXPONENT_BIAS)).to(torch.int32)
