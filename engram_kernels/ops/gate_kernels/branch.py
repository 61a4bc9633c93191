"""The gate of each token and branch inside a kernel, and what every kernel that reads hidden states row by row shares.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))

in float32. The scales of hidden and key are rsqrt(mean(x^2) + eps). T tokens, H branches, D hidden size.
"""

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from engram_kernels.launching.device import cdiv, next_power_of_2
from engram_kernels.launching.sums import ordered_sum


@dataclass(frozen=True)
class GateConfig:
    """Elements of D that a program adds up at once in its branch, its warps, and programs of each branch.

    keep: whether a thread holds its part of a whole row of norms and of hidden states in registers.
    """

    block_d: int
    num_warps: int
    programs: int
    keep: bool


@lru_cache
def gate_config(hidden_size: int, num_tokens: int, branches: int, processors: int, warp: int = 32) -> GateConfig:
    """A program takes one branch, and one token after the other: 8 elements a thread at once, all warps along D.

    block_d is that of the sums over D, whose order it fixes, so it depends on D alone: the greatest divisor of D that
    is a power of two of 256 to 1,024, else as much as D needs, and at least a warp of 64: an element that two threads
    hold could be read by one after the other has written it in place. Up to 64 elements a thread (D = 8,192) stay in
    registers: the product of both norms, which tokens share, and hidden, which is read once. At D = 5,120 that leaves
    three programs of four warps on a multiprocessor of an H100, with 90 KB on their way at once where 72 KB saturate
    the link and 32 its memory. As many programs take all tokens in turn; more would load norms more often.
    """
    divisor = hidden_size & -hidden_size
    block_d = max(64, min(1024, divisor if divisor >= 256 else next_power_of_2(hidden_size)))
    num_warps = max(1, block_d // (8 * warp))
    programs = max(1, min(num_tokens, cdiv(3 * processors * max(1, 128 // (num_warps * warp)), branches)))
    return GateConfig(block_d, num_warps, programs, hidden_size <= 64 * warp * num_warps)


@triton.jit
def token_rows(base_ptr, token, branch, stride_t, stride_h, ALIGNED: tl.constexpr):
    """Pointers to the rows of tokens and branches, int64 both, which broadcast against each other.

    ALIGNED: the launcher found every row at a multiple of 16 bytes. Triton itself takes that from a stride only where
    it is a multiple of 16 elements.
    """
    stride_t, stride_h = tl.cast(stride_t, tl.int64), tl.cast(stride_h, tl.int64)
    if ALIGNED:
        VECTOR: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
        stride_t, stride_h = tl.multiple_of(stride_t, VECTOR), tl.multiple_of(stride_h, VECTOR)
    return base_ptr + (token * stride_t + branch * stride_h)


@triton.jit
def gate_of(d, clamp, COPYSIGN: tl.constexpr):
    """The gate of ``d``, and the square root in it."""
    magnitude = tl.abs(d)
    # Not tl.maximum, which drops NaN on NVIDIA hardware.
    root = tl.sqrt(tl.where(magnitude < clamp, clamp, magnitude))
    if COPYSIGN:
        logit = tl.where(d < 0, -root, root)
    else:
        logit = tl.where(d < 0, -root, tl.where(d == 0, 0.0, root))
    return 1.0 / (1.0 + tl.exp(-logit)), root


@triton.jit
def widen(x):
    """``x`` as float32. Of bfloat16 by its bits: a cast costs ptxas two instructions for every other element."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def row_part(row_ptr, begin, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D elements of a row from ``begin``, zeros behind its end."""
    offs_d = begin + tl.arange(0, BLOCK_D)
    if HIDDEN_SIZE % BLOCK_D == 0:
        return tl.load(row_ptr + offs_d)
    else:
        return tl.load(row_ptr + offs_d, mask=offs_d < HIDDEN_SIZE, other=0)


@triton.jit
def store_part(row_ptr, begin, part, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D elements of a row from ``begin``, rounded to its type."""
    offs_d = begin + tl.arange(0, BLOCK_D)
    part = part.to(row_ptr.dtype.element_ty)
    if HIDDEN_SIZE % BLOCK_D == 0:
        tl.store(row_ptr + offs_d, part)
    else:
        tl.store(row_ptr + offs_d, part, mask=offs_d < HIDDEN_SIZE)


@triton.jit
def norm_part(norm_rows, begin, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The product of both norms, float32, BLOCK_D elements from ``begin``."""
    query_norm = row_part(norm_rows[0], begin, HIDDEN_SIZE, BLOCK_D)
    return widen(query_norm) * widen(row_part(norm_rows[1], begin, HIDDEN_SIZE, BLOCK_D))


@triton.jit
def row_parts(row_ptr, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, KEEP: tl.constexpr):
    """All parts of a row with KEEP, which are on their way at once then; else none."""
    parts = ()
    if KEEP:
        for begin in tl.static_range(0, HIDDEN_SIZE, BLOCK_D):
            parts = parts + (row_part(row_ptr, begin, HIDDEN_SIZE, BLOCK_D),)
    return parts


@triton.jit
def norm_parts(norm_rows, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, KEEP: tl.constexpr):
    """All parts of the product of both norms with KEEP, else none."""
    parts = ()
    if KEEP:
        for begin in tl.static_range(0, HIDDEN_SIZE, BLOCK_D):
            parts = parts + (norm_part(norm_rows, begin, HIDDEN_SIZE, BLOCK_D),)
    return parts


@triton.jit
def overflown_dot(
    rows,
    norm_rows,
    hidden_scale,
    key_scale,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The dot product of the normed rows where the squares of one exceed float32, whose scale is 0 then.

    Scaled first, as the formula has it, a finite row is a row of zeros, not infinity times zero. Few elements a thread,
    and an end that the compiler does not know (the grid has one dimension), since it unrolls what it knows: what hardly
    ever runs must take no registers from what does.
    """
    TILE: tl.constexpr = max(64, BLOCK_D // 4)
    dot = tl.zeros([TILE], tl.float32)
    for begin in range(0, HIDDEN_SIZE * tl.num_programs(1), TILE):
        hidden = widen(row_part(rows[0], begin, HIDDEN_SIZE, TILE)) * hidden_scale
        key = widen(row_part(rows[1], begin, HIDDEN_SIZE, TILE)) * key_scale
        dot = tl.fma(hidden * key, norm_part(norm_rows, begin, HIDDEN_SIZE, TILE), dot)
    return ordered_sum(dot, 0)


@triton.jit
def add_part(hidden_square, key_square, product, hidden, key, norm):
    """What a part of a row adds to the sums of :func:`branch_sums`."""
    hidden, key = widen(hidden), widen(key)
    return (
        tl.fma(hidden, hidden, hidden_square),
        tl.fma(key, key, key_square),
        tl.fma(hidden * key, norm, product),
    )


@triton.jit
def branch_sums(
    rows,
    norm_rows,
    hidden_parts,
    norms,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Squares of hidden and of key and their normed product, of one token in one branch, to be summed ``[BLOCK_D]``."""
    hidden_square = tl.zeros([BLOCK_D], tl.float32)
    key_square, product = hidden_square, hidden_square
    if KEEP:
        key_parts = row_parts(rows[1], HIDDEN_SIZE, BLOCK_D, KEEP)
        for part in tl.static_range((HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D):
            hidden_square, key_square, product = add_part(
                hidden_square, key_square, product, hidden_parts[part], key_parts[part], norms[part]
            )
    else:
        for begin in range(0, HIDDEN_SIZE, BLOCK_D):
            hidden_square, key_square, product = add_part(
                hidden_square,
                key_square,
                product,
                row_part(rows[0], begin, HIDDEN_SIZE, BLOCK_D),
                row_part(rows[1], begin, HIDDEN_SIZE, BLOCK_D),
                norm_part(norm_rows, begin, HIDDEN_SIZE, BLOCK_D),
            )
    return hidden_square, key_square, product


@triton.jit
def branch_gate(
    rows,
    norm_rows,
    hidden_parts,
    norms,
    eps,
    clamp,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The gate of one token in one branch, with d and the scales of hidden and key, float32 scalars.

    rows: pointers to hidden and key. norm_rows: to the weights of both norms. hidden_parts, norms: what
    :func:`row_parts` and :func:`norm_parts` keep of these.
    """
    sums = branch_sums(rows, norm_rows, hidden_parts, norms, HIDDEN_SIZE, BLOCK_D, KEEP)
    MEAN: tl.constexpr = 1.0 / HIDDEN_SIZE
    hidden_scale = tl.rsqrt(tl.fma(ordered_sum(sums[0], 0), MEAN, eps))
    key_scale = tl.rsqrt(tl.fma(ordered_sum(sums[1], 0), MEAN, eps))
    if (hidden_scale == 0) | (key_scale == 0):
        dot = overflown_dot(rows, norm_rows, hidden_scale, key_scale, HIDDEN_SIZE, BLOCK_D)
    else:
        dot = ordered_sum(sums[2], 0) * (hidden_scale * key_scale)
    d = dot * (HIDDEN_SIZE**-0.5)
    gate, _ = gate_of(d, clamp, COPYSIGN)
    return gate, d, hidden_scale, key_scale


@triton.jit
def store_scalars(scalars_ptr, token, branch, d, hidden_scale, key_scale, NUM_BRANCHES: tl.constexpr):
    """What the backward pass needs of a token in a branch, into ``[T, 3, H]``: d and the scales of hidden and key."""
    scalars = scalars_ptr + token * (3 * NUM_BRANCHES) + branch
    tl.store(scalars, d)
    tl.store(scalars + NUM_BRANCHES, hidden_scale)
    tl.store(scalars + 2 * NUM_BRANCHES, key_scale)
