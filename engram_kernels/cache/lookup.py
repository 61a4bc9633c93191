"""hash_lookup through a hot n-gram cache: hits from device memory, each missed n-gram from the table once, then kept.

G groups, one for each layer and order; S sets of W ways; T tokens, E columns of an order. What a call does to the cache
is specified by reference/cache/simulator.py. It takes these launches, one after the other on one stream:

    probe     keys of all n-grams, compared with the tags; rows of hits from the entries, zeros where there is no n-gram
    sort      of the missed keys, in which equal ones are a run and those of a set lie together, the rest behind them
    read      for each run the n-gram that reads for all, and the way that it takes, if any; rows of those n-grams from
              the tables, to the output and to the cache
    keep      tags and stamps of these ways; rows of the others from where the first ones went; the clock goes on

Rows and tags of the cache are read in the first launch alone and written in later ones, tags last, so that nobody sees
half of an entry (docs/cache.md). Sizes depend on shapes alone and the host waits for nothing, so that a CUDA graph can
hold all of it; where nothing was missed, programs of the later launches end at their first load.
"""

from dataclasses import replace

import torch
import triton
from triton.runtime import driver

from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.launching.dependent import dependent_options
from engram_kernels.launching.device import cdiv, on_device_of, processors
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops.hash_kernels.row_ids import hash_arguments
from engram_kernels.ops.row_kernels.copy import RowsConfig, row_constants, rows_config
from engram_kernels.ops.row_kernels.order import copy_config, scale_words
from engram_kernels.ops.row_kernels.output import Reading, kernel_out
from engram_kernels.tables.view import TableView

from .misses import keep_missed_kernel, read_missed_kernel
from .probe import probe_cache_kernel
from .store import CacheStore

# Registers a thread. Eight programs of the probe, of two warps each, fit a multiprocessor with 128; where it decodes
# rows it stays below that without being told. Of the read launch a multiprocessor has one program for tables on the
# host, which then takes 13 K of 64 K registers.
PROBE_REGISTERS, READ_REGISTERS = 128, 208


def tagged_config(config: RowsConfig, ways: int, most_rows: int = 32) -> RowsConfig:
    """With at most 512 tags to compare a step: with 32 sets of 32 ways the probe takes 138 registers."""
    return replace(config, block_rows=min(config.block_rows, 512 // ways, most_rows))


def given_registers(number: int) -> dict:
    """The launch option by which ptxas has ``number`` registers a thread, of NVIDIA's targets.

    Without it ptxas spills one or two values that a loop keeps, to fit more programs than are launched.
    """
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return dict(maxnreg=number)


def launch_cached_lookup(cache: CacheStore, tokens: Tokens, view: TableView, reading: Reading, out) -> None:
    """One call through ``cache`` for all layers; read orders other than "direct" go column by column."""
    plan, state, (storage, programs, order) = cache.plan, cache.state, reading
    num_groups, num_sets, ways = state.keys.shape
    num_layers, num_columns = plan.primes.shape
    num_orders = num_groups // num_layers
    num_heads = num_columns // num_orders
    num_tokens, device = tokens.token_ids.numel(), tokens.token_ids.device
    num_entries = num_groups * num_tokens
    missed, now = (torch.empty(size, dtype=torch.int64, device=device) for size in ((num_groups, num_tokens), 1))
    sources, targets = (torch.empty(num_entries, dtype=torch.int32, device=device) for _ in range(2))
    out_ptr, out_scale_ptr = kernel_out(out, view, storage)
    row_format = FORMATS[view.format]
    itemsize, decoded = row_format.dtype.itemsize, row_format.scaled and not storage
    known = hash_arguments(tokens, plan)
    columns = ("primes_ptr", "offsets_ptr", "reciprocals_ptr", "NON_NEGATIVE", "NUM_LAYERS")
    columns = {name: known[name] for name in columns}
    mixing = (
        "token_map_ptr",
        "multipliers_ptr",
        "num_seqs",
        "search_steps",
        "seq_len",
        "num_slots",
        "vocab_size",
        "pad",
        "eos",
    )
    mixing = {name: known[name] for name in (*mixing, "MAX_NGRAM", "HAS_EOS")}
    shared = dict(num_tokens=num_tokens, now_ptr=now, stamps_ptr=state.stamps)
    reading = dict(tables_ptr=view.descriptors, out_ptr=out_ptr, out_scale_ptr=out_scale_ptr, counts_ptr=state.counts)
    reading |= dict(num_sets=num_sets, NUM_HEADS=num_heads, WAYS=ways, **columns)
    with on_device_of(tokens.token_ids), cache.in_order():
        config = rows_config(view.width, itemsize, num_entries, processors(device), "device")
        # Where mixes wrap some come from the tables: with 32 rows the probe takes 162 registers.
        config = tagged_config(config, ways, 32 if plan.non_negative else 16)
        probe_cache_kernel[(programs or config.programs,)](
            token_ids_ptr=tokens.token_ids,
            cu_seqlens_ptr=tokens.cu_seqlens,
            history_ptr=tokens.history,
            dead_ptr=tokens.dead,
            slots_ptr=tokens.slots,
            missed_ptr=missed,
            keys_ptr=state.keys,
            clock_ptr=state.clock,
            entries_ptr=state.descriptor,
            **mixing,
            **reading,
            **row_constants(view, storage, config),
            **shared,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
            **({} if decoded else given_registers(PROBE_REGISTERS)),
        )
        missed, sorted_tokens = torch.sort(missed, stable=True)
        entries = dict(missed_ptr=missed, tokens_ptr=sorted_tokens, sources_ptr=sources, targets_ptr=targets)
        entries |= dict(NUM_ORDERS=num_orders, **shared)
        copies = copy_config(num_heads * out_ptr.shape[-1], out_ptr.element_size())
        words = None if out_scale_ptr is None else scale_words(out_scale_ptr)
        scale_width = 0 if words is None else num_heads * words.shape[-1]
        config = rows_config(view.width, itemsize, num_entries, processors(device), view.memory)
        config = tagged_config(config, ways)
        try:
            read_missed_kernel[(programs or config.programs,)](
                rows_ptr=state.rows,
                scales_ptr=state.scales,
                search_steps=num_tokens.bit_length(),
                **entries,
                **reading,
                **row_constants(view, storage, config),
                HEAD_MAJOR=order != "direct",
                num_warps=config.num_warps,
                enable_fp_fusion=False,
                **dependent_options(),
                **given_registers(READ_REGISTERS),
            )
            keep_missed_kernel[(min(programs or 8 * processors(device), cdiv(num_entries, copies.block_rows)),)](
                keys_ptr=state.keys,
                clock_ptr=state.clock,
                out_ptr=out_ptr,
                out_scale_ptr=words,
                lag=state.lag,
                NUM_LAYERS=num_layers,
                **entries,
                WIDTH=num_heads * out_ptr.shape[-1],
                CHUNK=copies.chunk,
                SCALE_WIDTH=scale_width,
                SCALE_CHUNK=copy_config(scale_width, 8).chunk,
                BLOCK_ROWS=copies.block_rows,
                num_warps=copies.num_warps,
                enable_fp_fusion=False,
                **dependent_options(),
            )
        except BaseException:
            state.stamps.zero_()  # ways with new rows have their old keys still
            raise
