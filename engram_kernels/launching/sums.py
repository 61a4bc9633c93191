"""Sums inside a kernel whose order is written here, not left to a layout.

``tl.sum`` adds what a thread holds, then over lanes, then over warps, so that its order follows the layout that Triton
gave the tensor, which differs between variants of one kernel. A sum of two has one order, since addition commutes.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _halvings(n):
    return n.bit_length() - 1


@triton.constexpr_function
def _product(numbers):
    product = 1
    for number in numbers:
        product *= number
    return product


@triton.constexpr_function
def _without(shape, axis):
    return list(shape[:axis]) + list(shape[axis + 1 :])


@triton.jit
def ordered_sum(x, axis: tl.constexpr):
    """Sum of ``x`` over ``axis``: neighbours in pairs, then these sums in pairs, and so on, in any layout.

    Lanes and warps meet as often as in ``tl.sum`` over the axis; two warps of four wait once more.
    """
    BEFORE: tl.constexpr = _product(x.shape[:axis])
    AFTER: tl.constexpr = _product(x.shape[axis + 1 :])
    total = x
    for _ in tl.static_range(_halvings(x.shape[axis])):
        pairs = tl.reshape(total, [BEFORE, total.numel // (2 * BEFORE * AFTER), 2, AFTER])
        total = tl.sum(pairs, axis=2)
    if len(x.shape) == 1:
        return tl.sum(tl.reshape(total, [1]), axis=0)  # a scalar, where reshape gives none
    return tl.reshape(total, _without(x.shape, axis))
