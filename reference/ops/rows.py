"""Rows of a table by id, dequantised in float32 and rounded once.

    dense         row
    e4m3_ue8m0    row * 2^(scale byte - 127), one byte per 32 elements; byte 255 is NaN
    e4m3          row * scale, one float32 for the table
    mxfp4         e2m1 row * 2^(scale byte - 127), one byte per 32 elements
    nvfp4         (e2m1 row * e4m3 scale) * scale: one byte per 16 elements, one float32 for the table

The first product of nvfp4 is exact in float32. C columns, R elements a row. An id outside the table, -1 among them,
reads as a row of zeros.
"""

import torch

SCALE_DTYPES = {"ue8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def lookup(table, row_ids, *, out=None, out_dtype=None, out_format="values", programs=None, order=None):
    """Rows ``[..., C, R]`` for ids ``[..., C]``; arguments as ``engram_kernels.lookup``."""
    flat = row_ids.reshape(-1)
    outside = (flat < 0) | (flat >= table.rows)
    ids = flat.masked_fill(outside, 0)

    def gather(stored):
        # index_select copies whole rows, where indexing goes element by element; of bytes, since PyTorch does little
        # with fp8 tensors. Zeros come eight at a time where that is possible.
        rows = stored.view(torch.uint8).index_select(0, ids)
        words = rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
        words.masked_fill_(outside[:, None], 0)
        return rows.view(*row_ids.shape, rows.shape[1])

    rows = gather(table.weight).view(table.format.dtype)
    scales = gather(table.scale) if table.format.group else table.scale
    if out_format == "storage":
        return (rows, scales) if out is None else _into(out, (rows, scales), table.format)
    values = dequantise(rows, scales, table.format, table.own_scale)
    if table.format.table_scale:  # a missing row is zero even where that is infinite or negative
        values = values.masked_fill_(outside.view(row_ids.shape)[..., None], 0)
    values = values.to(out_dtype or table.default_out_dtype)
    return values if out is None else out.copy_(values)


def dequantise(rows, scales, row_format, own_scale=None):
    """Values ``[..., R]`` of stored rows in float32 (in their own type where dense).

    scales: bytes of groups ``[..., R / G]``, where the format has them. own_scale: the table's, where it has one.
    """
    if not row_format.scaled:
        return rows
    values = unpack_e2m1(rows) if row_format.packed > 1 else rows.to(torch.float32)
    if row_format.group:
        scales = scales.view(SCALE_DTYPES[row_format.group_scale]).to(torch.float32)
        values = (values.unflatten(-1, (-1, row_format.group)) * scales[..., None]).flatten(-2)
    if row_format.table_scale:
        values = values * torch.tensor(own_scale, dtype=torch.float32, device=values.device)
    return values


def unpack_e2m1(packed):
    """float32 ``[..., 2 n]`` of e2m1 pairs ``[..., n]``, uint8; the low half of a byte is the even element."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    return torch.cat([values, -values])[codes.int()]


def _into(out, storage, row_format):
    """Copy rows, and scales where they belong to rows, into the pair the caller gave."""
    out[0].view(torch.uint8).copy_(storage[0].view(torch.uint8))
    if row_format.group:
        out[1].view(torch.uint8).copy_(storage[1])
        return out
    return out[0], storage[1]
