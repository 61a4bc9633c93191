"""Row-wise optimizer steps in place: the rows that have a gradient, their state, and nothing else.

Per distinct row, with g its gradient times ``factor``, in float32:

    Adagrad   s += mean(g^2)                                      one number a row
              row = (1 - lr * decay) * row - lr * g / (sqrt(s) + eps)
    Adam      t += 1,  m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v)
              row = (1 - lr * decay) * row - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

t counts the row's own steps. Tables and states are read and written where they are, over UVA where that is the host.
A row belongs to one program, which reads all rows and states of a block before it writes any of them: of data smaller
than a tile every warp loads a copy and one warp stores, and no warp may load what another has stored. Rounding and
sources: reference/training/update.py. R elements a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of, processors
from engram_kernels.reference.training import update as reference
from engram_kernels.tables.gradient import RowGradient

from .state import StateArray, per_element, per_row


@dataclass(frozen=True)
class UpdateConfig:
    """Rows per block of a program, elements of a row (a power of two), and warps."""

    block_rows: int
    block_r: int
    num_warps: int


def update_config(width: int, arrays: int) -> UpdateConfig:
    """Tiles of 2,048 elements, of 1,024 where moments are loaded too: either way 8 to 12 KiB in flight a program."""
    block_r, tile = next_power_of_2(width), 2048 if arrays == 1 else 1024
    return UpdateConfig(max(1, min(16, tile // block_r)), block_r, 4)


POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "row_adagrad_kernel": dict(sm_80=(96, 0), sm_90=(80, 0), sm_100=(80, 0), gfx942=(72, 0)),
    "row_adam_kernel": dict(sm_80=(72, 4096), sm_90=(72, 4096), sm_100=(72, 4096), gfx942=(64, 4096)),
}


@triton.jit
def random_bits(seed, counter):
    """SplitMix64 started at ``seed``, at int64 ``counter``."""
    state = (seed + (counter + 1) * -7046029254386353131).to(tl.uint64, bitcast=True)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def round_stochastic(value, bits):
    """float32 to bfloat16, up or down in magnitude with the probability that keeps the mean."""
    raised = value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF).to(tl.uint32)
    rounded = (raised >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    # Not finite: the sum of bits could carry infinity into NaN.
    return tl.where(tl.abs(value) < float("inf"), rounded, value.to(tl.bfloat16))


@triton.jit
def one_minus_power(steps, log_beta):
    """``1 - beta^steps``, by its series where the difference would cancel."""
    x = steps.to(tl.float32) * log_beta
    series = -x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return tl.where(x > -0.125, series, 1.0 - tl.exp(x))


@triton.jit
def gradient_rows(
    block,
    ids_ptr,
    values_ptr,
    squares_ptr,
    count,
    factor,
    skipped_ptr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Of BLOCK_ROWS distinct rows: ids ``[BLOCK_ROWS, 1]``, which of them move, their gradients and sums of squares."""
    place = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    taken = place < count
    row = tl.load(ids_ptr + place, mask=taken, other=0)
    square = tl.load(squares_ptr + place, mask=taken, other=0) * (factor * factor)
    finite = tl.abs(square) < float("inf")
    tl.atomic_add(skipped_ptr + place * 0, 1, mask=taken & ~finite, sem="relaxed")
    moves = taken & finite
    gradient = tl.load(values_ptr + place * WIDTH + offs_r, mask=moves & (offs_r < WIDTH), other=0) * factor
    return row, moves, gradient, square


@triton.jit
def decayed_rows(weight_ptr, row, keep, mask, offs_r, WIDTH: tl.constexpr):
    """Pointers to the table's rows, and these times ``keep``, float32."""
    weight_row = weight_ptr + row * WIDTH + offs_r
    return weight_row, tl.load(weight_row, mask=mask, other=0).to(tl.float32) * keep


@triton.jit
def store_rows(
    weight_row, moved, row, mask, seed, step, num_table_rows, STOCHASTIC: tl.constexpr, WIDTH: tl.constexpr, offs_r
):
    """``moved``, float32, rounded once to the type of the table at ``weight_row``, the pointers to ``row``."""
    if STOCHASTIC:
        counter = (step * num_table_rows + row) * WIDTH + offs_r
        tl.store(weight_row, round_stochastic(moved, random_bits(seed, counter)), mask=mask)
    else:
        tl.store(weight_row, moved.to(weight_row.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "step", "num_table_rows", "sums_address", "weight_address"])
def row_adagrad_kernel(
    ids_ptr,
    values_ptr,
    squares_ptr,
    count_ptr,
    factor_ptr,
    skipped_ptr,
    weight_address,
    sums_address,
    num_table_rows,
    seed,
    step,
    lr,
    eps,
    keep,
    ELEMENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adagrad, BLOCK_ROWS distinct rows at a time, each with one sum of squares.

    Persistent grid: program p takes blocks p, p + programs, and so on. Relies on distinct ids within the table, on
    addresses that are multiples of 16, and on a width whose bytes are.
    """
    lr, eps, keep = tl.cast(lr, tl.float32), tl.cast(eps, tl.float32), tl.cast(keep, tl.float32)
    weight_ptr = tl.multiple_of(weight_address.to(tl.int64).to(tl.pointer_type(ELEMENT)), 16)
    sums_ptr = tl.multiple_of(sums_address.to(tl.int64).to(tl.pointer_type(tl.float32)), 4)
    follow_predecessor()
    count, factor = tl.load(count_ptr), tl.load(factor_ptr)
    step64 = step.to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
        row, moves, gradient, square = gradient_rows(
            block, ids_ptr, values_ptr, squares_ptr, count, factor, skipped_ptr, WIDTH, BLOCK_ROWS, BLOCK_R
        )
        mask = moves & (offs_r < WIDTH)
        weight_row, decayed = decayed_rows(weight_ptr, row, keep, mask, offs_r, WIDTH)
        total = tl.load(sums_ptr + row, mask=moves, other=0) + square / WIDTH
        tl.debug_barrier()  # every warp has loaded the sums, of which one stores the new ones
        tl.store(sums_ptr + row, total, mask=moves)
        moved = decayed - lr * gradient / (tl.sqrt(total) + eps)
        store_rows(weight_row, moved, row, mask, seed, step64, num_table_rows, STOCHASTIC, WIDTH, offs_r)


@triton.jit(
    do_not_specialize=[
        "seed", "step", "num_table_rows", "weight_address", "first_address", "second_address", "steps_address"
    ]
)  # fmt: skip
def row_adam_kernel(
    ids_ptr,
    values_ptr,
    squares_ptr,
    count_ptr,
    factor_ptr,
    skipped_ptr,
    weight_address,
    first_address,
    second_address,
    steps_address,
    num_table_rows,
    seed,
    step,
    lr,
    rate_1,
    rate_2,
    log_beta_1,
    log_beta_2,
    eps,
    keep,
    ELEMENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adam, BLOCK_ROWS distinct rows at a time, each with two moments per element and its own count of steps.

    Persistent grid: program p takes blocks p, p + programs, and so on. Relies on distinct ids within the table, on
    addresses that are multiples of 16, and on a width whose bytes are.
    """
    lr, eps, keep = tl.cast(lr, tl.float32), tl.cast(eps, tl.float32), tl.cast(keep, tl.float32)
    # 1 - beta and log(beta) come from the host: in float32 the difference would lose half its digits.
    rate_1, rate_2 = tl.cast(rate_1, tl.float32), tl.cast(rate_2, tl.float32)
    log_beta_1, log_beta_2 = tl.cast(log_beta_1, tl.float32), tl.cast(log_beta_2, tl.float32)
    weight_ptr = tl.multiple_of(weight_address.to(tl.int64).to(tl.pointer_type(ELEMENT)), 16)
    first_ptr = tl.multiple_of(first_address.to(tl.int64).to(tl.pointer_type(tl.float32)), 16)
    second_ptr = tl.multiple_of(second_address.to(tl.int64).to(tl.pointer_type(tl.float32)), 16)
    steps_ptr = tl.multiple_of(steps_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 4)
    follow_predecessor()
    count, factor = tl.load(count_ptr), tl.load(factor_ptr)
    step64 = step.to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
        row, moves, gradient, _ = gradient_rows(
            block, ids_ptr, values_ptr, squares_ptr, count, factor, skipped_ptr, WIDTH, BLOCK_ROWS, BLOCK_R
        )
        mask = moves & (offs_r < WIDTH)
        first_row, second_row = first_ptr + row * WIDTH + offs_r, second_ptr + row * WIDTH + offs_r
        weight_row, decayed = decayed_rows(weight_ptr, row, keep, mask, offs_r, WIDTH)
        first = tl.load(first_row, mask=mask, other=0)
        second = tl.load(second_row, mask=mask, other=0)
        steps = tl.load(steps_ptr + row, mask=moves, other=0) + 1
        first += rate_1 * (gradient - first)
        second += rate_2 * (gradient * gradient - second)
        tl.debug_barrier()  # every warp has loaded the steps, and of narrow rows the moments; one stores the new ones
        tl.store(steps_ptr + row, steps, mask=moves)
        tl.store(first_row, first, mask=mask)
        tl.store(second_row, second, mask=mask)
        mean = first / one_minus_power(steps, log_beta_1)
        scale = tl.sqrt(second / one_minus_power(steps, log_beta_2)) + eps
        moved = decayed - lr * mean / scale
        store_rows(weight_row, moved, row, mask, seed, step64, num_table_rows, STOCHASTIC, WIDTH, offs_r)


def launch_row_update(weight, state, gradient: RowGradient, factor, skipped, **options) -> None:
    """One launch, of the rule whose state this is. Adds the rows left out to ``skipped``."""
    rows, width = weight.shape
    config = update_config(width, len(state))
    grid = (min(8 * processors(factor.device), cdiv(len(gradient.ids), config.block_rows)),)
    lr, seed = options["lr"], options["seed"]
    common = dict(
        ids_ptr=gradient.ids,
        values_ptr=gradient.values,
        squares_ptr=gradient.squares,
        count_ptr=gradient.count,
        factor_ptr=factor,
        skipped_ptr=skipped,
        weight_address=weight.data_ptr(),
        num_table_rows=rows,
        seed=seed or 0,
        step=options["step"],
        lr=lr,
        eps=options["eps"],
        keep=1 - lr * options["weight_decay"],
        ELEMENT=POINTEE[weight.dtype],
        STOCHASTIC=seed is not None and weight.dtype == torch.bfloat16,
        WIDTH=width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    addresses = [tensor.data_ptr() for tensor in state]
    with on_device_of(factor):
        common |= dependent_options()
        if len(state) == len(ADAGRAD.state):
            row_adagrad_kernel[grid](**common, sums_address=addresses[0])
            return
        for i, beta in enumerate(options["betas"], 1):
            common |= {f"rate_{i}": 1 - beta, f"log_beta_{i}": math.log(beta) if beta else -math.inf}
        first, second, steps = addresses
        row_adam_kernel[grid](**common, first_address=first, second_address=second, steps_address=steps)


class Rule(NamedTuple):
    """How an optimizer moves rows: what it keeps of each, and its step in plain PyTorch."""

    state: tuple[StateArray, ...]
    reference: Callable
    launch: Callable


ADAGRAD = Rule((StateArray("sums", torch.float32, per_row),), reference.row_adagrad, launch_row_update)
ADAM = Rule(
    (
        StateArray("first", torch.float32, per_element),
        StateArray("second", torch.float32, per_element),
        StateArray("steps", torch.int32, per_row),
    ),
    reference.row_adam,
    launch_row_update,
)
