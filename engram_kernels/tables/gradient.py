"""Gradient of a lookup with respect to the table: one sum per distinct row, never a dense table.

    values[j] = sum of grad[i] over all i with row_ids[i] == ids[j]

in float32. M = the number of ids, R elements a row. The ids are sorted on the device (stable), equal ones are a
segment, and a segment is summed by one program in a fixed order, every n-th entry and then these sums in pairs, where
the reference adds one after the other: same input, same bits, no atomics. Results have M entries, of which the first
``count`` are used; the count stays on the device, so that the host waits for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engram_kernels.launching.checks import check_tensor
from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import is_kernel_device, next_power_of_2, on_device_of, processors
from engram_kernels.launching.sums import ordered_sum
from engram_kernels.reference.tables import gradient as reference

GRAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SegmentConfig:
    """Entries of a segment that are added at once, elements of a row (a power of two), and warps."""

    block_n: int
    block_r: int
    num_warps: int


def segment_config(width: int) -> SegmentConfig:
    """Tiles of 2,048 elements: most segments of text are one or two entries, a frequent bigram's are hundreds."""
    block_r = next_power_of_2(width)
    return SegmentConfig(max(2, min(8, 2048 // block_r)), block_r, 4)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "row_gradient_kernel": dict(sm_80=(56, 2048), sm_90=(48, 2048), sm_100=(56, 2048), gfx942=(48, 4096)),
}


@triton.jit
def row_gradient_kernel(
    grad_ptr,
    sorted_ids_ptr,
    order_ptr,
    starts_ptr,
    counts_ptr,
    ids_ptr,
    values_ptr,
    squares_ptr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums of whole segments, one after the other: their id, their values and the sum of the values' squares.

    Persistent grid: program p takes segments p, p + programs, and so on. ``counts`` holds the number of segments and of
    entries in them. Relies on M < 2^31 and on a dense grad ``[M, R]``.
    """
    follow_predecessor()
    num_segments, num_entries = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    mask_r = offs_r < WIDTH
    for segment in range(tl.program_id(0), num_segments, tl.num_programs(0)):
        start = tl.load(starts_ptr + segment)
        end = tl.load(starts_ptr + segment + 1, mask=segment + 1 < num_segments, other=0)
        end = tl.where(segment + 1 < num_segments, end, num_entries)
        total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for begin in range(start, end, BLOCK_N):
            entry = begin + tl.arange(0, BLOCK_N)
            place = tl.load(order_ptr + entry, mask=entry < end, other=0).to(tl.int64)
            mask = (entry < end)[:, None] & mask_r
            total += tl.load(grad_ptr + place[:, None] * WIDTH + offs_r, mask=mask, other=0).to(tl.float32)
        value = ordered_sum(total, axis=0)[None, :]
        row = (segment + tl.arange(0, 1)).to(tl.int64)
        tl.store(values_ptr + row[:, None] * WIDTH + offs_r, value, mask=mask_r)
        tl.store(squares_ptr + row, ordered_sum(value * value, axis=1))
        tl.store(ids_ptr + row, tl.load(sorted_ids_ptr + start + tl.arange(0, 1)).to(tl.int64))


def launch_row_gradient(grad, sorted_ids, order, starts, counts, ids, values, squares) -> None:
    """One launch over the segments that :func:`segments` found; ``grad [M, R]`` dense."""
    num_entries, width = grad.shape
    config = segment_config(width)
    with on_device_of(grad):
        row_gradient_kernel[(min(8 * processors(grad.device), num_entries),)](
            grad,
            sorted_ids,
            order,
            starts,
            counts,
            ids,
            values,
            squares,
            WIDTH=width,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
        )


def segments(row_ids: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Equal ids next to each other: ``(sorted ids [M], order [M], starts [M + 2], counts [2])``, on the ids' device.

    order: the index in ``row_ids [M]`` of each sorted id. starts: int32, where each segment begins, as far as
    there are segments. counts: int32, the number of segments and of the entries in them; ids outside the table come
    last and are in none.
    """
    # A key of 32 bits sorts in half the passes.
    dtype = torch.int32 if num_rows < 2**31 else torch.int64
    inside = (row_ids >= 0) & (row_ids < num_rows)
    sorted_ids, order = torch.where(inside, row_ids, num_rows).to(dtype).sort(stable=True)
    first = sorted_ids < num_rows
    counts = torch.empty(2, dtype=torch.int32, device=row_ids.device)
    counts[1] = first.sum()
    first[1:] &= sorted_ids[1:] != sorted_ids[:-1]
    counts[0] = first.sum()
    place = torch.arange(len(row_ids), dtype=torch.int32, device=row_ids.device)
    # Ids that begin no segment all write to the last entry, which nothing reads.
    segment = torch.where(first, first.cumsum(0) - 1, len(row_ids) + 1)
    starts = torch.empty(len(row_ids) + 2, dtype=torch.int32, device=row_ids.device)
    return sorted_ids, order, starts.scatter_(0, segment, place), counts


@dataclass(frozen=True)
class RowGradient:
    """What a backward pass leaves in ``table.row_grad``: M entries, of which the first ``count`` are used."""

    ids: torch.Tensor  #: int64 ``[M]``, distinct rows, ascending; -1 beyond them
    values: torch.Tensor  #: float32 ``[M, R]``, their gradients; undefined beyond them
    squares: torch.Tensor  #: float32 ``[M]``, each row's sum of squares; 0 beyond them
    count: torch.Tensor  #: int32 ``[1]``, on the device
    num_rows: int  #: rows of the table

    def norm(self, order: float = 2.0) -> torch.Tensor:
        """The vector norm of all rows' elements, a scalar on the device; order: above 0, infinity too."""
        return self.squares.sum().sqrt() if order == 2 else torch.linalg.vector_norm(self._used_values(), order)

    def clamp_(self, low: float | None, high: float | None, factor: torch.Tensor) -> None:
        """Make this the gradient times a scalar tensor with every element within low..high, in place."""
        self.values.mul_(factor).clamp_(low, high)
        torch.sum(self._used_values().square(), 1, out=self.squares)

    def times(self, factor: torch.Tensor) -> "RowGradient":
        """The gradient times a scalar tensor; equal bits where that is 1."""
        return replace(self, values=self.values * factor, squares=self.squares * (factor * factor))

    def plus(self, other: "RowGradient") -> "RowGradient":
        """The sum of two gradients of one table; it has as many entries as both."""
        return row_gradient(torch.cat([self.ids, other.ids]), torch.cat([self.values, other.values]), self.num_rows)

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """``sums [n]`` over rows of this gradient, added over the ranks that hold rows of the same table."""
        return sums

    def _used_values(self) -> torch.Tensor:
        """The values, and zeros beyond them."""
        return self.values.masked_fill(self.ids[:, None] < 0, 0)

    def to_sparse_coo(self) -> torch.Tensor:
        """A coalesced sparse COO tensor ``[rows, R]``, for other optimizers. Waits for the device to know its size.

        It shares the values' memory, and knows nothing of what has scaled the table's anchor.
        """
        count = int(self.count)
        shape = (self.num_rows, self.values.shape[1])
        sparse = torch.sparse_coo_tensor(self.ids[None, :count], self.values[:count], shape, check_invariants=False)
        return sparse._coalesced_(True)


def row_gradient(row_ids: torch.Tensor, grad: torch.Tensor, num_rows: int) -> RowGradient:
    """The gradient of a table of ``num_rows`` rows whose rows ``row_ids [...]`` have gradients ``grad [..., R]``.

    row_ids: int32 or int64, any strides. grad: bfloat16, float16 or float32 (float64 on the CPU), any strides; one that
    is not dense is copied. An id outside the table counts nowhere.
    """
    check_tensor("row_gradient", "row_ids", row_ids, dtypes=(torch.int32, torch.int64), contiguous=False)
    shape = (*row_ids.shape, grad.shape[-1])
    check_tensor("row_gradient", "grad", grad, dtypes=GRAD_DTYPES, shape=shape, device=row_ids.device, contiguous=False)
    if row_ids.numel() >= 2**31 - 2:
        raise ValueError(f"row_gradient: row_ids must be below 2^31 - 2 ids, got {row_ids.numel()}")
    if not is_kernel_device(row_ids) or grad.dtype == torch.float64 or not row_ids.numel():
        return RowGradient(*reference.row_gradient(row_ids, grad, num_rows), num_rows)
    flat, grad = row_ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).contiguous()
    found = segments(flat, num_rows)
    ids = torch.full(flat.shape, -1, dtype=torch.int64, device=flat.device)
    values = torch.empty(grad.shape, dtype=torch.float32, device=flat.device)
    squares = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
    launch_row_gradient(grad, *found, ids, values, squares)
    return RowGradient(ids, values, squares, found[3][:1], num_rows)


class _Recorded(torch.autograd.Function):
    """Rows as they are; in the backward pass their gradient goes to the tables that they came from."""

    @staticmethod
    def forward(ctx, rows, tables, row_ids, *tensors):
        ctx.tables, ctx.row_ids = tables, row_ids
        ctx.save_for_backward(*tensors[len(tables) :])  # behind the anchors
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        for table, (ids, part) in zip(ctx.tables, ctx.row_ids(grad, *ctx.saved_tensors), strict=True):
            if table.requires_row_grad:
                table.accumulate_row_grad(ids, part)
        return (None,) * len(ctx.needs_input_grad)


def record_rows(
    rows: torch.Tensor,
    tables: Sequence,
    row_ids: Callable[..., Sequence[tuple[torch.Tensor, torch.Tensor]]],
    *saved: torch.Tensor,
) -> torch.Tensor:
    """``rows`` as a tensor that autograd follows back to ``tables``.

    row_ids: ``(grad of rows, *saved) -> (row ids, their gradient)`` for each table, called in the backward pass.
    Under torch.compile the graph breaks here: a table is no tensor that a compiled graph could hand a gradient to.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    return _Recorded.apply(rows, tuple(tables), row_ids, *(table.anchor for table in tables), *saved)


def records_rows(tables, out_format: str) -> bool:
    """Whether autograd is to follow values read from ``tables``."""
    return out_format == "values" and torch.is_grad_enabled() and any(table.requires_row_grad for table in tables)


def check_recordable(where: str, out) -> None:
    """Raise where ``out`` is given while autograd is to follow the result."""
    if out is not None:
        raise ValueError(f"{where}: out must be None for a trainable table, whose rows autograd follows")
