"""What verify counts in a chunk of rows, against a count without shortcuts."""

import pytest
import torch

from engram_kernels.checkpoints.verify import scale_bytes, tally
from engram_kernels.geometry.row_format import FORMATS


def plain_tally(rows, scales, first, format):
    """Of rows and scales as bytes, one row at a time."""
    nan = infinite = 0
    if format.packed == 1 and not format.scaled:
        values = rows.view(format.dtype)
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    elif format.packed == 1:
        nan = sum(byte & 0x7F == 0x7F for byte in rows.flatten().tolist())
    codes = [byte & 0x7F if format.group_scale == "e4m3" else byte for byte in scales.flatten().tolist()]
    zero = [not row.any() for row in rows]
    runs, begin = [(0, first)], 0
    for number, is_zero in enumerate([*zero, False]):
        if not is_zero:
            runs.append((number - begin, first + begin))
            begin = number + 1
    longest = max(runs, key=lambda run: run[0])
    head = zero.index(False) if False in zero else len(zero)
    tail = zero[::-1].index(False) if False in zero else len(zero)
    counts = nan, infinite, codes.count(0x7F if format.group_scale == "e4m3" else 0xFF), codes.count(0), sum(zero)
    return len(rows), counts, head, tail, longest


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("zeros", ["none", "words", "rows", "runs", "all"])
def test_a_chunk_is_counted_as_without_shortcuts(name, zeros):
    format, random = FORMATS[name], torch.Generator().manual_seed(3)
    size = format.row_bytes(64)
    rows = torch.randint(1, 0x70, (50, size), dtype=torch.uint8, generator=random)
    scales = torch.randint(1, 0x70, (50, format.scale_bytes(64)), dtype=torch.uint8, generator=random)
    if zeros == "words":  # a row may begin with zeros
        rows[3, :8], rows[9, : size - 1], rows[20, 8:] = 0, 0, 0
    elif zeros == "rows":
        rows[[0, 7, 49]] = 0
        rows[8, :16] = 0
    elif zeros == "runs":
        rows[:5], rows[10:31], rows[48:] = 0, 0, 0
    elif zeros == "all":
        rows[:] = 0
    if zeros in ("words", "runs"):
        rows[40, 0:8], rows[41, 8:16] = 0x7F, 0xFF  # NaN of every format that has one
        if scales.numel():
            scales[5, 0], scales[6, 0], scales[7, 1], scales[8, 1] = 0, 0xFF, 0x7F, 0x80
    count, counts, head, tail, longest = plain_tally(rows.clone(), scales, 1000, format)
    assert scale_bytes(scales, format) == counts[2:4]
    found = tally(rows, 1000, format)
    assert found[:4] == (count, (*counts[:2], counts[4]), head, tail) and found.longest[0] == longest[0]
    assert found.longest == longest or not longest[0]
    assert zeros != "none" or not any(counts)
