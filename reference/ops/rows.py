"""Rows of a table by id, dequantised in float32 and rounded once.

    dense         row
    e4m3_ue8m0    row * 2^(scale byte - 127), one byte per 32 elements; byte 255 is NaN
    e4m3          row * scale, one float32 for the table

C columns, R elements a row. An id outside the table, -1 among them, reads as a row of zeros.
"""

import torch

SCALE_GROUP = 32


def lookup(table, row_ids, *, out=None, out_dtype=None, out_format="values", programs=None, order=None):
    """Rows ``[..., C, R]`` for ids ``[..., C]``; arguments as ``engram_kernels.lookup``."""
    inside = (row_ids >= 0) & (row_ids < table.rows)
    ids = torch.where(inside, row_ids, 0).long()
    # A gather in bytes: PyTorch indexes few operations on fp8 tensors.
    rows = table.weight.view(torch.uint8)[ids].masked_fill(~inside[..., None], 0).view(table.format.dtype)
    scales = table.scale
    if table.format.scaling == "group":
        scales = scales.view(torch.uint8)[ids].masked_fill(~inside[..., None], 0)
    if out_format == "storage":
        return (rows, scales) if out is None else _into(out, (rows, scales), table.format)
    # A missing row is zero even where the table's scale is infinite.
    values = dequantise(rows, scales, table.format).masked_fill(~inside[..., None], 0)
    values = values.to(out_dtype or table.default_out_dtype)
    return values if out is None else out.copy_(values)


def dequantise(rows, scales, row_format):
    """Values of ``rows`` in float32 (in their own type where dense)."""
    if row_format.scaling == "none":
        return rows
    values = rows.to(torch.float32)
    if row_format.scaling == "table":
        return values * scales
    groups = values.unflatten(-1, (-1, SCALE_GROUP))
    return (groups * scales.view(torch.float8_e8m0fnu).to(torch.float32)[..., None]).flatten(-2)


def _into(out, storage, row_format):
    """Copy rows, and scales where they belong to rows, into the pair the caller gave."""
    out[0].view(torch.uint8).copy_(storage[0].view(torch.uint8))
    if row_format.scaling == "group":
        out[1].view(torch.uint8).copy_(storage[1])
        return out
    return out[0], storage[1]
