"""Tables for tests: every byte pattern the format has, NaN, subnormals and infinite products among them."""

import numpy as np
import torch

from engram_kernels import EngramTable
from engram_kernels.geometry.row_format import FORMATS

from . import oracles

TABLE_SCALE = 0.37


def place(weight, scale, device, placement=None, own_scale=None):
    """A table that ops on ``device`` can read: on it, or where ``placement`` says. own_scale: TABLE_SCALE of nvfp4."""
    placement = placement or ("cpu" if device.type == "cpu" else "device")
    if placement == "device":
        weight, scale = weight.to(device), scale.to(device) if isinstance(scale, torch.Tensor) else scale
    own = own_scale_of(weight, scale) if own_scale is None else dict(own_scale=own_scale)
    return EngramTable.from_tensors(weight, scale, placement=placement, **own)


def cpu_table(rows, width, form, seed=0, **options):
    """An EngramTable of :func:`random_parts`."""
    parts = random_parts(rows, width, form, seed)
    return EngramTable.from_tensors(*parts, **own_scale_of(*parts), **(dict(placement="cpu") | options))


def own_scale_of(weight, scale) -> dict:
    """What from_tensors takes besides the parts of :func:`random_parts`."""
    return dict(own_scale=TABLE_SCALE) if is_nvfp4(weight, scale) else {}


def is_nvfp4(weight, scale) -> bool:
    return weight.dtype == torch.uint8 and scale.shape[1] * 16 == weight.shape[1] * 2


def random_parts(rows, width, name, seed=0) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """(weight, scale) on the CPU. Scaled rows hold every byte; ue8m0 scales are mostly moderate, some extreme.

    Scales of groups are uint8; the table's own of nvfp4 is TABLE_SCALE.
    """
    generator = torch.Generator().manual_seed(seed + rows * 2000 + width)
    fmt = FORMATS[name]
    if not fmt.scaled:
        return torch.randn(rows, width, generator=generator).to(fmt.dtype), None
    weight = torch.randint(0, 256, (rows, fmt.row_items(width)), generator=generator, dtype=torch.uint8).view(fmt.dtype)
    if not fmt.group:
        return weight, TABLE_SCALE * (seed + 1)
    some, extremes = (110, 140), [0, 1, 255, 254, 127]
    if fmt.group_scale == "e4m3":
        some, extremes = (0, 256), [0, 1, 255, 254, 127, 128, 126]
    scale = torch.randint(*some, (rows, fmt.scale_bytes(width)), generator=generator, dtype=torch.uint8)
    extreme = scale.view(-1)[:: max(1, scale.numel() // 7)]
    extreme.copy_(torch.tensor(extremes, dtype=torch.uint8).repeat(len(extreme))[: len(extreme)])
    return weight, scale


def expected_values(weight, scale, ids):
    """Rows ``ids`` in float64, by the oracle; zeros outside the table."""
    if weight.dtype == torch.float8_e4m3fn:
        scales = scale.numpy() if isinstance(scale, torch.Tensor) else float(np.float32(scale))
        return oracles.fp8_rows(weight.view(torch.uint8).numpy(), scales, ids.numpy())
    if weight.dtype == torch.uint8:
        own = float(np.float32(TABLE_SCALE)) if is_nvfp4(weight, scale) else None
        return oracles.fp4_rows(weight.numpy(), scale.numpy(), own, ids.numpy())
    values = weight.double()[ids.clamp(0, len(weight) - 1).long()]
    return values.masked_fill(((ids < 0) | (ids >= len(weight)))[..., None], 0).numpy()


def rounded(values, dtype):
    """float64 values through one float32 product (exact here but for the table scale) to ``dtype``."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(values.astype(np.float32)).to(dtype)


def same_bits(result, expected, *, truncated):
    """Equal, NaN equal to NaN. ``truncated``: bfloat16 by the interpreter, which cuts where hardware rounds and
    converts subnormals wrongly; equal to one ulp then, subnormals left to the float32 cases.
    """
    result, expected = result.cpu(), expected.cpu()
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    nan = torch.isnan(expected.float())
    if not torch.equal(torch.isnan(result.float()), nan):
        return False
    if not truncated:
        return torch.equal(result.masked_fill(nan, 0), expected.masked_fill(nan, 0))
    # Sign and magnitude: neighbours differ by one in their bits, and truncation only lowers the magnitude.
    normal = ~nan & (expected.float().abs() >= 2.0**-126)
    bits, wanted = (x[normal].view(torch.int16).int() for x in (result, expected))
    return bool(((wanted - bits == 0) | (wanted - bits == 1)).all())
