"""Gradient of a lookup with respect to the table: one sum per distinct row.

    values[j] = sum of grad[i] over all i with row_ids[i] == ids[j]

in float32 (float64 for float64 gradients), in the order in which the ids come. M = the number of ids, R elements a row.
An id outside the table has no gradient. Source: the transpose of ops/rows.py.
"""

import torch


def row_gradient(row_ids, grad, num_rows):
    """``(ids int64 [M], values [M, R], squares [M], count int32 [1])`` of ids ``[...]`` and grad ``[..., R]``.

    The first ``count`` ids are the distinct ones, ascending; the rest is padding: id -1, value 0. ``squares`` is each
    row's sum of squares.
    """
    flat, grad = row_ids.reshape(-1).long(), grad.reshape(-1, grad.shape[-1])
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    inside = (flat >= 0) & (flat < num_rows)
    distinct, place = torch.unique(flat[inside], return_inverse=True)
    ids = torch.full_like(flat, -1)
    ids[: len(distinct)] = distinct
    values = torch.zeros(len(flat), grad.shape[1], dtype=dtype, device=grad.device)
    values.index_add_(0, place, grad[inside].to(dtype))
    count = torch.tensor([len(distinct)], dtype=torch.int32, device=grad.device)
    return ids, values, values.square().sum(1), count
