"""Columns of every token times a weight each.

    out = x * weight        per token t and element d, in float32, rounded once

T tokens, D elements. To copy to reference/ops/scaling.py.
"""


def scale_columns(x, weight, *, out=None):
    """``[T, D]``; arguments as ``engram_kernels.scale_columns``."""
    result = (x * weight).to(x.dtype)
    return result if out is None else out.copy_(result)
