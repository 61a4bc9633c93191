"""The launches of hash_lookup: rows are hashed and copied by one kernel, or hashed, sorted and copied.

Row ids are computed where they are used and never written (formulas in ops/hashing.py and ops/rows.py). T tokens, L
layers, C columns, R elements a row.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import cdiv, on_device_of, processors
from engram_kernels.launching.launch import Launch
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops.hash_kernels.mix import ngram_rows
from engram_kernels.ops.hash_kernels.row_ids import hash_arguments, prepare_ngram_hash
from engram_kernels.tables.view import TableView

from .by_id import launch_sorted
from .copy import RowsConfig, copy_rows, row_constants, rows_config
from .order import key_range
from .output import Reading, kernel_out

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "hash_lookup_kernel": dict(sm_80=(80, 1024), sm_90=(80, 1024), sm_100=(80, 1024), gfx942=(80, 1024)),
}


def hash_rows_config(view: TableView, num_rows: int, programs: int | None) -> tuple[RowsConfig, int]:
    """The configuration of copying, and how many rows a program hashes at once, for ``num_rows`` of all layers.

    64, one a lane of two warps, where each program has as many: V4.1 takes 43 warp instructions a row, at 55 registers.
    Fewer rows come a step of copying at a time, so that more programs read at once: both warps hash the same 16 then,
    and a row takes 72. It took 159 where all lanes that copy a row hashed it.
    """
    itemsize = FORMATS[view.format].dtype.itemsize
    config = rows_config(view.width, itemsize, num_rows, processors(view.descriptors.device), view.memory)
    many = num_rows >= 64 * (programs or config.programs)
    return config, max(config.block_rows, 64) if many else config.block_rows


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "search_steps", "seq_len", "num_slots", "vocab_size", "pad", "eos"]
)
def hash_lookup_kernel(
    token_ids_ptr,
    cu_seqlens_ptr,
    history_ptr,
    dead_ptr,
    slots_ptr,
    token_map_ptr,
    multipliers_ptr,
    primes_ptr,
    offsets_ptr,
    reciprocals_ptr,
    orders_ptr,
    tables_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    num_seqs,
    search_steps,
    seq_len,
    num_slots,
    vocab_size,
    pad,
    eos,
    NUM_LAYERS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_MAJOR: tl.constexpr,
    BLOCK_HASH: tl.constexpr,
    ROW_ID: tl.constexpr,
):
    """Hash BLOCK_HASH rows of one layer at a time and copy them by BLOCK_ROWS; column by column with HEAD_MAJOR.

    Persistent grid: program p takes steps p, p + programs, and so on. Relies on T * C < 2^31 and contiguous arguments.
    """
    tokens = (token_ids_ptr, cu_seqlens_ptr, history_ptr, dead_ptr, slots_ptr, num_slots)
    sequences = (num_seqs, search_steps, seq_len)
    vocabulary = (token_map_ptr, vocab_size, pad, eos)
    parameters = (orders_ptr, primes_ptr, offsets_ptr, reciprocals_ptr)
    num_rows = num_tokens * NUM_COLUMNS
    # Not tl.cdiv, whose sum wraps for the last T * C below 2^31.
    column_steps = (num_tokens - 1) // BLOCK_HASH + 1
    layer_steps = NUM_COLUMNS * column_steps if HEAD_MAJOR else (num_rows - 1) // BLOCK_HASH + 1
    follow_predecessor()
    for step in range(tl.program_id(0), layer_steps * NUM_LAYERS, tl.num_programs(0)):
        layer = step // layer_steps
        layer_step = step - layer * layer_steps
        if HEAD_MAJOR:
            column = layer_step // column_steps
            first = (layer_step - column * column_steps) * BLOCK_HASH
            token, left = first + tl.arange(0, BLOCK_HASH), num_tokens - first
            mask_row, mask_column = tl.arange(0, BLOCK_HASH) < left, column < NUM_COLUMNS
            first_row = (layer.to(tl.int64) * num_tokens + first) * NUM_COLUMNS + column
        else:
            first = layer_step * BLOCK_HASH
            index, left = first + tl.arange(0, BLOCK_HASH), num_rows - first
            mask_row = tl.arange(0, BLOCK_HASH) < left
            token, column, mask_column = index // NUM_COLUMNS, index % NUM_COLUMNS, mask_row
            first_row = layer.to(tl.int64) * num_rows + first
        row = ngram_rows(
            token,
            mask_row,
            column,
            mask_column,
            layer,
            tokens,
            sequences,
            vocabulary,
            multipliers_ptr,
            parameters,
            NUM_COLUMNS,
            MAX_NGRAM,
            HAS_EOS,
            NON_NEGATIVE,
        )
        table_ptr = tables_ptr + layer * 4
        table = (tl.load(table_ptr), tl.load(table_ptr + 1), None, tl.load(table_ptr + 3))
        hashed = tl.where(row < tl.load(table_ptr + 2), row, -1).to(ROW_ID)
        local = tl.arange(0, BLOCK_ROWS)
        # Offsets from the first of the rows that are copied, so that the tile's addresses are one sum and constants.
        out_row = local.to(tl.int64) * NUM_COLUMNS if HEAD_MAJOR else local
        # A column may be much shorter than what is hashed at once.
        end = tl.minimum(left, BLOCK_HASH) if HEAD_MAJOR else BLOCK_HASH
        for begin in range(0, end, BLOCK_ROWS):
            begin_row = first_row + (begin * NUM_COLUMNS if HEAD_MAJOR else begin)
            copy_rows(
                hashed if BLOCK_HASH == BLOCK_ROWS else tl.gather(hashed, begin + local, 0),
                out_row,
                local < left - begin,
                table,
                (
                    out_ptr + begin_row * WIDTH,
                    None if out_scale_ptr is None else out_scale_ptr + begin_row * (WIDTH // GROUP),
                ),
                (WIDTH, ELEMENT, SCALING, STORAGE, GROUP, CHUNK),
            )


def prepare_hash_lookup(tokens: Tokens, plan: HashPlan, view: TableView, reading: Reading) -> Callable[..., None]:
    """The launch for tokens such as these, of (tokens, out): all layers at once.

    In address order there is one that hashes, and those of :func:`launch_sorted`.
    """
    num_layers, num_columns = plan.primes.shape
    num_tokens = tokens.token_ids.numel()
    num_rows = num_tokens * num_columns
    if num_rows == 0:
        return lambda *_: None
    if reading.order == "address":
        return _prepare_sorted(tokens, plan, view, reading)
    config, block_hash = hash_rows_config(view, num_layers * num_rows, reading.programs)
    by_head = reading.order == "head"
    steps = num_layers * (num_columns * cdiv(num_tokens, block_hash) if by_head else cdiv(num_rows, block_hash))
    # A layer's or a column's last step may be part of one: few tokens have more steps than their rows would fill, and
    # two of them in one program double the wait.
    programs = hash_rows_config(view, steps * block_hash, reading.programs)[0].programs
    options = dict(
        hash_arguments(tokens, plan),
        tables_ptr=view.descriptors,
        **row_constants(view, reading.storage, config),
        HEAD_MAJOR=by_head,
        BLOCK_HASH=block_hash,
        ROW_ID=tl.int32 if plan.index_dtype == torch.int32 else tl.int64,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    grid = (min(reading.programs or programs, steps),)
    start = Launch(hash_lookup_kernel, grid, options)

    def launch(tokens: Tokens, out):
        out_ptr, out_scale_ptr = kernel_out(out, view, reading.storage)
        with on_device_of(out_ptr):
            start(*tokens, out_ptr, out_scale_ptr)

    return launch


def _prepare_sorted(tokens: Tokens, plan: HashPlan, view: TableView, reading: Reading) -> Callable[..., None]:
    num_layers, num_columns = plan.primes.shape
    num_rows, device = tokens.token_ids.numel() * num_columns, tokens.token_ids.device
    dtype, key_stride = key_range(num_layers, max(plan.rows_per_layer))
    launch_hash = prepare_ngram_hash(tokens, plan, key_stride)

    def launch(tokens: Tokens, out):
        keys = torch.empty(num_layers, num_rows, dtype=dtype, device=device)
        launch_hash(tokens, keys)
        launch_sorted(keys, key_stride, view, out, reading)

    return launch
