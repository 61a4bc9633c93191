"""The step of reference/training/sinkhorn.py by kernels: momentum balanced over rows and columns, by rows touched.

    row_moves_kernel       rows before they are read: what their momentum has moved them since, from the scales kept
    row_momentum_kernel    momentum and update of each row with a gradient, and their norms
    row_balance_kernel     rows normalised, and then the sums of squares of columns; once for each balancing of these
    row_balanced_kernel    the last balancing of rows, and the move

M distinct rows of R elements have a gradient. A step moves 16 R + 2 weights of bytes for each of them, and reads its
update ``(K + 1) / 2`` times more, 4 R bytes each, whatever the size of the table. Partial sums of columns are added in
the order of programs, whose number the device and M give.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of, processors, takes_kernels
from engram_kernels.launching.sums import ordered_sum
from engram_kernels.reference.training import sinkhorn as reference
from engram_kernels.reference.training.sinkhorn import SinkhornState, account, column_scales
from engram_kernels.tables.gradient import RowGradient

from .state import StateArray, per_element, per_row
from .update import POINTEE, Rule, gradient_rows, store_rows


@dataclass(frozen=True)
class BalanceConfig:
    """Rows per block of a program, elements of a row (a power of two), and warps."""

    block_rows: int
    block_r: int
    num_warps: int


def balance_config(width: int) -> BalanceConfig:
    """Tiles of 1,024 elements, as for Adam: two arrays are loaded at once, 8 KiB in flight a program."""
    block_r = next_power_of_2(width)
    return BalanceConfig(max(1, min(16, 1024 // block_r)), block_r, 4)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "row_moves_kernel": dict(sm_80=(96, 2048), sm_90=(96, 2048), sm_100=(96, 2048), gfx942=(96, 2048)),
    "row_momentum_kernel": dict(sm_80=(96, 4096), sm_90=(96, 4096), sm_100=(96, 4096), gfx942=(96, 4096)),
    "row_balance_kernel": dict(sm_80=(96, 8192), sm_90=(96, 8192), sm_100=(96, 8192), gfx942=(96, 8192)),
    "row_balanced_kernel": dict(sm_80=(96, 4096), sm_90=(96, 4096), sm_100=(96, 4096), gfx942=(96, 4096)),
}


@triton.jit
def row_norms(x):
    """Euclidean norms ``[rows, 1]`` of ``x [rows, R]``."""
    return tl.sqrt(ordered_sum(x * x, axis=1))[:, None]


@triton.jit(
    do_not_specialize=[
        "num_ids", "clock", "num_table_rows", "seed", "weight_address", "momentum_address", "taken_address"
    ]
)  # fmt: skip
def row_moves_kernel(
    ids_ptr,
    num_ids,
    columns_ptr,
    rates_ptr,
    thresholds_ptr,
    decays_ptr,
    weight_address,
    momentum_address,
    taken_address,
    clock,
    num_table_rows,
    seed,
    eps,
    ELEMENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What momentum alone has moved rows by since they last took their moves, one row at a time; -1 is no row.

    Persistent grid: program p takes entries p, p + programs, and so on. One warp, since each of the steps gone by ends
    in a sum over the row. Relies on distinct ids within the table, on addresses that are multiples of 16, and on a
    width whose bytes are.
    """
    eps = tl.cast(eps, tl.float32)
    weight_ptr = tl.multiple_of(weight_address.to(tl.int64).to(tl.pointer_type(ELEMENT)), 16)
    momentum_ptr = tl.multiple_of(momentum_address.to(tl.int64).to(tl.pointer_type(tl.float32)), 16)
    taken_ptr = tl.multiple_of(taken_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 4)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    follow_predecessor()
    for entry in range(tl.program_id(0), num_ids, tl.num_programs(0)):
        row = tl.load(ids_ptr + entry).to(tl.int64)
        taken = tl.load(taken_ptr + row, mask=row >= 0, other=0)
        passed = tl.where(taken > 0, clock - taken, 0)
        if passed > 0:
            mask = offs_r < WIDTH
            momentum_row = momentum_ptr + row * WIDTH + offs_r
            before = tl.load(momentum_row, mask=mask, other=0)
            norm = row_norms(before)
            direction = tl.where(norm > 0, 1 / norm, 0) * before
            moved = tl.zeros([1, BLOCK_R], tl.float32)
            for step in range(taken + 1, taken + tl.minimum(passed, STEPS) + 1):
                slot = step % STEPS
                due = tl.load(decays_ptr + step - taken + 1) * norm > tl.load(thresholds_ptr + slot)
                turned = direction * tl.load(columns_ptr + slot * WIDTH + offs_r, mask=mask, other=0)
                turned = turned / (row_norms(turned) + eps)
                moved += tl.where(due, tl.load(rates_ptr + slot), 0) * turned
            weight_row = weight_ptr + row * WIDTH + offs_r
            value = tl.load(weight_row, mask=mask, other=0).to(tl.float32) - moved
            rows = row + tl.zeros([1, 1], tl.int64)
            tl.debug_barrier()  # of narrow rows every thread has loaded a copy, of which one stores the new row
            store_rows(
                weight_row, value, rows, mask, seed, clock.to(tl.int64), num_table_rows, STOCHASTIC, WIDTH, offs_r
            )
            left = tl.load(decays_ptr + tl.minimum(passed, STEPS))
            tl.store(momentum_row, before * tl.where(passed <= STEPS, left, 0), mask=mask)
            tl.store(taken_ptr + row, clock)


@triton.jit(do_not_specialize=["num_entries", "momentum_address"])
def row_momentum_kernel(
    ids_ptr,
    values_ptr,
    squares_ptr,
    count_ptr,
    factor_ptr,
    skipped_ptr,
    updates_ptr,
    norms_ptr,
    num_entries,
    momentum_address,
    keep,
    rate,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Momentum and update of BLOCK_ROWS distinct rows at a time, and norms of momentum before, after, and of update.

    Norms are three of ``num_entries``, and are written for rows that take the step alone. Persistent grid, as above.
    """
    keep, rate = tl.cast(keep, tl.float32), tl.cast(rate, tl.float32)
    momentum_ptr = tl.multiple_of(momentum_address.to(tl.int64).to(tl.pointer_type(tl.float32)), 16)
    follow_predecessor()
    count, factor = tl.load(count_ptr), tl.load(factor_ptr)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
        row, moves, gradient, _ = gradient_rows(
            block, ids_ptr, values_ptr, squares_ptr, count, factor, skipped_ptr, WIDTH, BLOCK_ROWS, BLOCK_R
        )
        mask = moves & (offs_r < WIDTH)
        momentum_row = momentum_ptr + row * WIDTH + offs_r
        before = tl.load(momentum_row, mask=mask, other=0)
        after = keep * before + rate * gradient
        update = keep * after + rate * gradient
        place = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        tl.debug_barrier()  # of narrow rows every warp has loaded the momentum, of which one stores the new one
        tl.store(momentum_row, after, mask=mask)
        tl.store(updates_ptr + place * WIDTH + offs_r, update, mask=mask)
        tl.store(norms_ptr + place, row_norms(before), mask=moves)
        tl.store(norms_ptr + num_entries + place, row_norms(after), mask=moves)
        tl.store(norms_ptr + 2 * num_entries.to(tl.int64) + place, row_norms(update), mask=moves)


@triton.jit
def scaled_rows(
    block,
    updates_ptr,
    norms_ptr,
    columns,
    limit,
    count,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Of BLOCK_ROWS rows: their places, which of them move, and their updates times the columns' scales."""
    place = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    live = tl.load(norms_ptr + place, mask=place < count, other=-1) > limit
    update = tl.load(updates_ptr + place * WIDTH + offs_r, mask=live & (offs_r < WIDTH), other=0)
    return place, live, update * columns


@triton.jit
def row_balance_kernel(
    updates_ptr,
    norms_ptr,
    columns_ptr,
    limit_ptr,
    count_ptr,
    squares_ptr,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Normalise rows, whose scales so far cancel, and leave each program's sums of squares of the columns then.

    Persistent grid: program p takes blocks p, p + programs, and so on.
    """
    eps = tl.cast(eps, tl.float32)
    follow_predecessor()
    count, limit = tl.load(count_ptr), tl.load(limit_ptr)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    columns = tl.load(columns_ptr + offs_r, mask=offs_r < WIDTH, other=0)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_R], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
        _, _, scaled = scaled_rows(block, updates_ptr, norms_ptr, columns, limit, count, WIDTH, BLOCK_ROWS, BLOCK_R)
        scaled = scaled / (row_norms(scaled) + eps)
        squares += scaled * scaled
    total = ordered_sum(squares, axis=0)[None, :]
    tl.store(squares_ptr + tl.program_id(0) * WIDTH + offs_r, total, mask=offs_r < WIDTH)


@triton.jit(do_not_specialize=["clock", "num_table_rows", "seed", "weight_address", "taken_address"])
def row_balanced_kernel(
    ids_ptr,
    updates_ptr,
    norms_ptr,
    columns_ptr,
    limit_ptr,
    count_ptr,
    weight_address,
    taken_address,
    clock,
    num_table_rows,
    seed,
    move,
    eps,
    ELEMENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Normalise rows once more and move them by ``move``, BLOCK_ROWS at a time; those at rest have taken the step too.

    Persistent grid: program p takes blocks p, p + programs, and so on. Relies on distinct ids within the table.
    """
    eps, move = tl.cast(eps, tl.float32), tl.cast(move, tl.float32)
    weight_ptr = tl.multiple_of(weight_address.to(tl.int64).to(tl.pointer_type(ELEMENT)), 16)
    taken_ptr = tl.multiple_of(taken_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 4)
    follow_predecessor()
    count, limit = tl.load(count_ptr), tl.load(limit_ptr)
    clock64 = clock.to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    columns = tl.load(columns_ptr + offs_r, mask=offs_r < WIDTH, other=0)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
        place, live, scaled = scaled_rows(
            block, updates_ptr, norms_ptr, columns, limit, count, WIDTH, BLOCK_ROWS, BLOCK_R
        )
        steps = tl.load(norms_ptr + place, mask=place < count, other=-1) >= 0
        row = tl.load(ids_ptr + place, mask=steps, other=0)
        mask = live & (offs_r < WIDTH)
        weight_row = weight_ptr + row * WIDTH + offs_r
        value = tl.load(weight_row, mask=mask, other=0).to(tl.float32) + move * (scaled / (row_norms(scaled) + eps))
        tl.debug_barrier()  # of narrow rows every warp has loaded the row, of which one stores the new one
        store_rows(weight_row, value, row, mask, seed, clock64, num_table_rows, STOCHASTIC, WIDTH, offs_r)
        tl.store(taken_ptr + row, clock + tl.zeros([BLOCK_ROWS, 1], tl.int32), mask=steps)


def launch_row_sinkhorn(
    weight, state, gradient: RowGradient, factor, skipped, *, balancings, eps, seed, lr, momentum, **options
) -> None:
    """The step of ``reference.row_sinkhorn``, by kernels; rows left out are added to ``skipped``."""
    state, entries, width = SinkhornState(*state), len(gradient.ids), weight.shape[1]
    launch_row_moves(weight, state, gradient.ids, momentum=momentum, eps=eps, seed=seed)
    state.clock.add_(1)
    clock, slot = int(state.clock), int(state.clock) % len(state.rates)
    config = balance_config(width)
    programs = max(1, min(8 * processors(factor.device), cdiv(entries, config.block_rows)))
    tiles = dict(WIDTH=width, BLOCK_ROWS=config.block_rows, BLOCK_R=config.block_r, num_warps=config.num_warps)
    tiles |= dict(count_ptr=gradient.count, enable_fp_fusion=False)
    updates, norms = torch.empty_like(gradient.values), gradient.values.new_full((3, entries), -1)
    with on_device_of(factor):
        tiles |= dependent_options()
        row_momentum_kernel[(programs,)](
            ids_ptr=gradient.ids,
            values_ptr=gradient.values,
            squares_ptr=gradient.squares,
            factor_ptr=factor,
            skipped_ptr=skipped,
            updates_ptr=updates,
            norms_ptr=norms,
            num_entries=entries,
            momentum_address=state.momentum.data_ptr(),
            keep=momentum,
            rate=1 - momentum,
            **tiles,
        )
        sums = norms.clamp(min=0).sum(1, dtype=torch.float64)
        totals = gradient.over_ranks(torch.cat([sums, sums.new_tensor([len(weight)])]))
        limit = account(state, totals, momentum, options["threshold"])[None]
        rows = dict(updates_ptr=updates, norms_ptr=norms[2], limit_ptr=limit, eps=eps, **tiles)
        squares = columns = updates.new_ones(width)
        partial = updates.new_empty(programs, width)
        for _ in range(balancings // 2):
            row_balance_kernel[(programs,)](squares_ptr=partial, columns_ptr=columns, **rows)
            squares = gradient.over_ranks(partial.sum(0))
            columns = column_scales(columns, squares, eps)
        # Where nothing moved the scales stay.
        columns = torch.where(squares.any(), columns, state.columns[(clock - 1) % len(state.rates)])
        rate = lr * options["update_rms"] * math.sqrt(width)
        row_balanced_kernel[(programs,)](
            ids_ptr=gradient.ids,
            columns_ptr=columns,
            taken_address=state.taken.data_ptr(),
            clock=clock,
            move=-rate,
            **_rounding(weight, seed),
            **rows,
        )
        state.columns[slot], state.rates[slot], state.thresholds[slot] = columns, rate, limit[0]


def launch_row_moves(weight, state: SinkhornState, ids, *, momentum, eps, seed) -> None:
    """``reference.take_moves`` in one launch. ids: int64 ``[n]``, distinct; -1 is no row."""
    steps = len(state.rates)
    with on_device_of(ids):
        row_moves_kernel[(max(1, min(32 * processors(ids.device), len(ids))),)](
            ids_ptr=ids,
            num_ids=len(ids),
            columns_ptr=state.columns,
            rates_ptr=state.rates,
            thresholds_ptr=state.thresholds,
            decays_ptr=reference.decays(momentum, steps, torch.float32, ids.device),
            momentum_address=state.momentum.data_ptr(),
            taken_address=state.taken.data_ptr(),
            clock=int(state.clock),
            eps=eps,
            STEPS=steps,
            WIDTH=weight.shape[1],
            BLOCK_R=next_power_of_2(weight.shape[1]),
            num_warps=1,
            enable_fp_fusion=False,
            **dependent_options(),
            **_rounding(weight, seed),
        )


def _rounding(weight, seed) -> dict:
    """What a kernel that stores rows is told of the table."""
    return dict(
        weight_address=weight.data_ptr(),
        num_table_rows=len(weight),
        seed=seed or 0,
        ELEMENT=POINTEE[weight.dtype],
        STOCHASTIC=seed is not None and weight.dtype == torch.bfloat16,
    )


def take_moves(weight, state: Mapping[str, torch.Tensor], ids, **options) -> None:
    """``reference.take_moves`` on the device of ``ids [n]``, int64, distinct; -1 is no row."""
    if not len(ids):
        return
    if takes_kernels(ids.device) and weight.dtype != torch.float64:
        launch_row_moves(weight, SinkhornState(**state), ids, **options)
    else:
        reference.take_moves(weight, SinkhornState(**state), ids[ids >= 0], **options)


def sinkhorn_rule(momentum: float) -> Rule:
    """The rule for one ``momentum``, which says how many steps are kept."""
    steps = reference.steps_remembered(momentum)

    def step_numbers(rows: int, width: int) -> tuple[int, ...]:
        return (steps,)

    state = (
        StateArray("momentum", torch.float32, per_element),
        StateArray("taken", torch.int32, per_row),
        StateArray("columns", torch.float32, lambda rows, width: (steps, width), "steps"),
        StateArray("rates", torch.float32, step_numbers, "steps"),
        StateArray("thresholds", torch.float32, step_numbers, "steps"),
        StateArray("total", torch.float64, lambda rows, width: (1,), "steps"),
        StateArray("clock", torch.int64, lambda rows, width: (1,), "cpu"),
    )
    return Rule(state, reference.row_sinkhorn, launch_row_sinkhorn)
