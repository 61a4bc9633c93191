"""The kernel of lookup: rows by id, in any order of reading. Formats are explained in ops/rows.py."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, on_device_of, processors
from engram_kernels.launching.launch import Launch
from engram_kernels.tables.view import TableView

from .arguments import two_dimensional
from .copy import copy_rows, row_constants, rows_config
from .order import launch_copy_duplicates, scale_words
from .output import Reading, kernel_out

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
# No tile goes through shared memory: ids and scales do, which take 1 KiB, where a tile would take 8 KiB.
CEILINGS = {
    "lookup_kernel": dict(sm_80=(88, 1024), sm_90=(80, 1024), sm_100=(80, 1024), gfx942=(72, 1024)),
}


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_entry", "first_key"])
def lookup_kernel(
    row_ids_ptr,
    places_ptr,
    table_ptr,
    out_ptr,
    out_scale_ptr,
    num_rows,
    num_columns,
    first_entry,
    first_key,
    stride_ids_t,
    stride_ids_c,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_MAJOR: tl.constexpr,
):
    """Rows of ids ``[T, C]`` (C None for one column) of any strides, BLOCK_ROWS at a time; with HEAD_MAJOR by column.

    With ``places_ptr`` the ids are sorted keys, of which entries from ``first_entry`` on are read: the row ``key -
    first_key`` of the first of each run, for the output's row ``place``.
    Persistent grid: program p takes steps p, p + programs, and so on. Relies on T * C < 2^31.
    """
    follow_predecessor()
    table = (tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3))
    num_steps = (num_rows - 1) // BLOCK_ROWS + 1  # not tl.cdiv, whose sum wraps for the last T * C below 2^31
    if HEAD_MAJOR:
        num_tokens = num_rows // num_columns
        column_steps = (num_tokens - 1) // BLOCK_ROWS + 1
        num_steps = num_columns * column_steps
    for step in range(tl.program_id(0), num_steps, tl.num_programs(0)):
        local = tl.arange(0, BLOCK_ROWS)
        left = num_rows - step * BLOCK_ROWS
        mask_row = local < left
        # Offsets from a step's first row, so that the tile's addresses are one sum and constants.
        first_row, out_row = (num_rows - left).to(tl.int64), local
        if places_ptr is not None:
            entry = first_entry + step * BLOCK_ROWS + local
            key = tl.load(row_ids_ptr + entry, mask=mask_row, other=0)
            before = tl.load(row_ids_ptr + entry - 1, mask=mask_row & (entry > 0), other=0)
            # Of every entry: with 32 rows a step Triton 3.6 does not compile a load whose mask comes from another load.
            out_row = tl.load(places_ptr + entry, mask=mask_row, other=0)
            mask_row = mask_row & ((entry == 0) | (key != before))
            first_row -= first_row
            row = key.to(tl.int64) - first_key
        else:
            if num_columns is None:
                ids = row_ids_ptr + first_row * stride_ids_t + local * stride_ids_t
            else:
                if HEAD_MAJOR:
                    column = step // column_steps
                    first_token = (step - column * column_steps) * BLOCK_ROWS
                    token = first_token + local
                    mask_row = local < num_tokens - first_token
                    first_row = first_token.to(tl.int64) * num_columns + column
                    out_row = local.to(tl.int64) * num_columns
                else:
                    index = step * BLOCK_ROWS + local
                    token, column = index // num_columns, index % num_columns
                offs_t, offs_c = token.to(tl.int64), column.to(tl.int64)
                ids = row_ids_ptr + offs_t * stride_ids_t + offs_c * stride_ids_c
            row = tl.load(ids, mask=mask_row, other=-1)
        copy_rows(
            row,
            out_row,
            mask_row,
            table,
            (
                out_ptr + first_row * WIDTH,
                None if out_scale_ptr is None else out_scale_ptr + first_row * (WIDTH // GROUP),
            ),
            (WIDTH, ELEMENT, SCALING, STORAGE, GROUP, CHUNK),
        )


def prepare_lookup(row_ids: torch.Tensor, view: TableView, reading: Reading) -> Callable[..., None]:
    """The launch for ids such as these, of (row_ids, out); ``[..., C]`` whose leading dimensions view as one.

    One launch, or those of :func:`launch_sorted`.
    """
    num_rows = row_ids.numel()
    if num_rows == 0:
        return lambda *_: None
    if reading.order == "address":
        return lambda row_ids, out: launch_sorted(two_dimensional(row_ids, False).reshape(1, -1), 0, view, out, reading)
    ids = two_dimensional(row_ids, reading.order == "head")
    num_columns = ids.shape[1] if ids.shape[1] > 1 else None
    options = dict(num_rows=num_rows, num_columns=num_columns, first_entry=0, first_key=0)
    options |= dict(stride_ids_t=ids.stride(0), stride_ids_c=ids.stride(1))
    options |= dict(HEAD_MAJOR=reading.order == "head" and num_columns is not None)
    grid, fixed = _tiles(view, reading, num_rows)
    options |= dict(places_ptr=None, table_ptr=view.descriptors, **fixed)
    start = Launch(lookup_kernel, grid, options)

    def launch(row_ids, out):
        with on_device_of(row_ids):
            start(row_ids, *kernel_out(out, view, reading.storage))

    return launch


def launch_sorted(keys, key_stride: int, view: TableView, out, reading: Reading) -> None:
    """Rows by keys ``[L, rows]`` in the order of the output's: a sort, a launch a layer, and one for duplicates."""
    num_layers, num_rows = keys.shape
    keys, places = torch.sort(keys.view(-1))
    out_ptr, out_scale_ptr = kernel_out(out, view, reading.storage)
    options = dict(num_rows=num_rows, num_columns=None, stride_ids_t=0, stride_ids_c=0, HEAD_MAJOR=False)
    grid, fixed = _tiles(view, reading, num_rows)
    options |= dict(fixed, out_ptr=out_ptr, out_scale_ptr=out_scale_ptr)
    with on_device_of(keys):
        for layer in range(num_layers):
            options |= dict(first_entry=layer * num_rows, first_key=layer * key_stride)
            lookup_kernel[grid](keys, places, view.descriptors[layer], **options, **dependent_options())
    for part in (out_ptr, None if out_scale_ptr is None else scale_words(out_scale_ptr)):
        if part is not None:
            launch_copy_duplicates(keys, places, part, reading.programs or 8 * processors(keys.device))


def _tiles(view: TableView, reading: Reading, num_rows: int) -> tuple[tuple[int, ...], dict]:
    """The grid, and what lookup_kernel is told of tables and tiles."""
    itemsize = FORMATS[view.format].dtype.itemsize
    config = rows_config(view.width, itemsize, num_rows, processors(view.descriptors.device), view.memory)
    grid = (min(reading.programs or config.programs, cdiv(num_rows, config.block_rows)),)
    constants = row_constants(view, reading.storage, config)
    return grid, dict(constants, num_warps=config.num_warps, enable_fp_fusion=False)
