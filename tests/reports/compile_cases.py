"""Launches that the compile lane compiles: each kernel with the arguments its launcher really passes, by model.

A case is a function without arguments; what it launches is compiled for the target in force. Tensors are empty and on
the CPU: only their dtypes, alignment and strides matter.
"""

from functools import cache, partial
from unittest import mock

import torch

from engram_kernels import EngramConfig, EngramTable, HashPlan, NgramCache, split_kv
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops.conv_kernels.backward import make_conv_gradients
from engram_kernels.ops.conv_kernels.slots import ConvSlots
from engram_kernels.ops.gate_kernels.gradients import make_gate_gradients
from engram_kernels.serving.history import launch_commit_history
from engram_kernels.tables.editing.exchange import StoredRows, launch_exchange_rows
from engram_kernels.tables.gradient import RowGradient, launch_row_gradient
from engram_kernels.tables.view import view_tables
from engram_kernels.training.sinkhorn import launch_row_sinkhorn, sinkhorn_rule
from engram_kernels.training.update import launch_row_update
from tests.support.launches import (
    forget_launches,
    launch_cached_lookup,
    launch_copy_tokens,
    launch_gate_backward,
    launch_gate_conv_backward,
    launch_gate_conv_residual,
    launch_gate_residual,
    launch_hash_lookup,
    launch_lookup,
    launch_ngram_hash,
)

TOKENS = 2048
SLOTS = torch.empty(8, dtype=torch.int32)
CPU = torch.device("cpu")


@cache
def plan(model):
    """The model's plan; DeepSeek's with a stand-in for the token map, of which only the type reaches a kernel."""
    config = getattr(EngramConfig, model)()
    if config.window == "eos":
        return HashPlan.build(config)
    return HashPlan.build(config, torch.arange(config.raw_vocab_size) % (config.vocab_size or config.raw_vocab_size))


def overflowing(model):
    """The same plan under multipliers whose products wrap: the floored remainder."""
    whole = plan(model)
    options = dict(pad=whole.pad, eos=whole.eos, vocab_size=whole.vocab_size)
    return HashPlan.from_parts(whole.multipliers + 2**61, whole.primes, **options)


def table(model, row_format=None):
    """Of the model's width, in its own format or another."""
    config = getattr(EngramConfig, model)()
    return EngramTable.empty(64, config.row_width, row_format or config.format, placement="cpu")


def tokens(full):
    """Token ids alone, or with cu_seqlens, history of 3 and dead tokens."""
    ids = torch.empty(TOKENS, dtype=torch.int32)
    if not full:
        return ids, None, None, None
    return ids, torch.empty(9, dtype=torch.int32), torch.empty(8, 3, dtype=torch.int32), torch.empty(TOKENS).bool()


def hash_case(chosen, full=False, slots=None):
    ids, *rest = tokens(full)
    out = torch.empty(TOKENS, *chosen.primes.shape, dtype=chosen.index_dtype)
    return launch_ngram_hash(ids, chosen, *rest, out, slots=slots)


def row_out(rows, shape, storage):
    if not storage:
        return torch.empty(*shape, rows.width, dtype=torch.bfloat16)
    fmt, width = rows.format, rows.width
    scales = torch.empty(*shape, fmt.scale_bytes(width), dtype=torch.uint8) if fmt.group else None
    return torch.empty(*shape, fmt.row_items(width), dtype=fmt.dtype), scales


def lookup_case(rows, columns, storage=False, order="direct"):
    ids = torch.empty(TOKENS, columns, dtype=torch.int32)
    launch_lookup(ids, view_tables((rows,), CPU), row_out(rows, ids.shape, storage), storage, None, order)


def hash_lookup_case(model, full=False, storage=False, order="direct", slots=None, row_format=None):
    chosen, rows = plan(model), table(model, row_format)
    if order == "address":  # each layer is a launch of its own, of the same kernel
        chosen = chosen.select(layers=[0])
    ids, *rest = tokens(full)
    out = row_out(rows, (chosen.primes.shape[0], TOKENS, chosen.primes.shape[1]), storage)
    view = view_tables([rows] * chosen.primes.shape[0], CPU)
    launch_hash_lookup(ids, chosen, view, *rest, out, storage, None, order, slots)


def cached_case(chosen, width, row_format, full=False, storage=False, order="direct", ways=8):
    """With tables of as many rows as the plan has, of which none is ever touched."""
    layers = [EngramTable.empty(max(chosen.rows_per_layer), width, row_format, placement="host")]
    cache = NgramCache(chosen, layers * chosen.primes.shape[0], entries=64, ways=ways)
    ids, *rest = tokens(full)
    out = row_out(layers[0], (chosen.primes.shape[0], TOKENS, chosen.primes.shape[1]), storage)
    launch_cached_lookup(cache, view_tables(cache.tables, CPU), storage, None, order, ids, *rest, out)


def cached_lookup_case(model, row_format=None, **options):
    config = getattr(EngramConfig, model)()
    cached_case(plan(model), config.row_width, row_format or config.format, **options)


def small_cached_case(width, row_format, wrapping=False, **options):
    """Two layers, orders 2 and 3, two heads, as tests have them; products that overflow with ``wrapping``."""
    multipliers = torch.tensor([[3, 5, 7], [11, 13, 17]]) + (2**61 if wrapping else 0)
    chosen = HashPlan.from_parts(multipliers, torch.tensor([[101, 103, 107, 109]] * 2), pad=0, vocab_size=40)
    cached_case(chosen, width, row_format, **options)


def gate_inputs(branches, width, dtype):
    """hidden, key and value as views of one kv, and norms in the same dtype."""
    hidden = torch.empty(TOKENS, branches, width, dtype=dtype)
    kv = torch.empty(TOKENS, (branches + 1) * width, dtype=dtype)
    norm = torch.empty(branches, width, dtype=dtype)
    return hidden, *split_kv(kv, branches, width), norm, norm


def gate_case(branches, width, dtype, mask=False):
    mask = torch.empty(TOKENS).bool() if mask else None
    inputs = gate_inputs(branches, width, dtype)
    launch_gate_residual(*inputs, 1e-6, 1e-6, mask, "copysign", True, torch.empty_like(inputs[0]))


def conv_case(branches, width, dtype, full=False):
    inputs = gate_inputs(branches, width, dtype)
    cu = torch.empty(9, dtype=torch.int32) if full else None
    mask = torch.empty(TOKENS).bool() if full else None
    state = (torch.empty(8, 9, width, dtype=dtype), torch.empty(8, 9, branches)) if full else (None, None)
    weight = torch.empty(branches, width, 4, dtype=dtype)
    options = (3, 1e-6, 1e-5, 1e-6, mask, "sign", True, cu, *state)
    launch_gate_conv_residual(*inputs, inputs[3], weight, *options, torch.empty_like(inputs[0]), *state)


def conv_slots_case(branches, width, dtype):
    """The state of 8 sequences in 64 slots of two windows and 8 drafts."""
    inputs = gate_inputs(branches, width, dtype)
    cu, mask = torch.empty(9, dtype=torch.int32), torch.empty(TOKENS).bool()
    cursor, slots = torch.empty(64, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    ring = ConvSlots(torch.empty(64, 26, width, dtype=dtype), torch.empty(64, 26, branches), cursor, slots)
    weight = torch.empty(branches, width, 4, dtype=dtype)
    options = (3, 1e-6, 1e-5, 1e-6, mask, "sign", True, cu, None, None)
    launch_gate_conv_residual(*inputs, inputs[3], weight, *options, torch.empty_like(inputs[0]), None, None, ring=ring)


def few(case, tokens=8):
    """The case with so many tokens."""

    def with_few():
        with mock.patch(f"{__name__}.TOKENS", tokens):
            case()

    return with_few


def history_case(ring):
    """History of three ids for 8 sequences in 64 slots, with the cursor of a convolution or without."""
    forget_launches()  # commits are kept, and may be another target's
    history, slots = torch.empty(64, 3, dtype=torch.int64), torch.empty(8, dtype=torch.int32)
    copies = (torch.empty(TOKENS).long(), torch.empty(9, dtype=torch.int32), torch.empty(8, 3).long())
    ids, ends, _, dead = tokens(True)
    launch_copy_tokens(Tokens(ids, ends, history, dead, slots), Tokens(*copies, torch.empty(TOKENS).bool()))
    cursor, options = (torch.empty(64, dtype=torch.int32), (26, 9)) if ring else (None, (0, 0))
    launch_commit_history(history, cursor, slots, *tokens(True)[:2], tokens(True)[3], slots, *options, None)


def gate_backward_case(branches, width, dtype, mask=False):
    """All gradients, from a gradient as dense as hidden."""
    inputs, mask = gate_inputs(branches, width, dtype), torch.empty(TOKENS).bool() if mask else None
    gradients = make_gate_gradients(inputs[0], *inputs[3:], [True] * 5)
    scalars = torch.empty(TOKENS, 3, branches)
    options = (1e-6, mask, "copysign", True, [True] * 5, gradients)
    launch_gate_backward(torch.empty_like(inputs[0]), *inputs, scalars, *options)


def conv_backward_case(branches, width, dtype, full=False):
    inputs = (*gate_inputs(branches, width, dtype), torch.empty(branches, width, dtype=dtype))
    weight = torch.empty(branches, width, 4, dtype=dtype)
    mask, cu = (torch.empty(TOKENS).bool(), torch.empty(9, dtype=torch.int32)) if full else (None, None)
    recorded = torch.empty(TOKENS, branches), torch.empty(TOKENS, branches), torch.empty(TOKENS, 3, branches)
    gradients = make_conv_gradients(inputs[0], *inputs[3:], weight, [True] * 7)
    options = (3, 1e-5, 1e-6, mask, "sign", True, cu, [True] * 7, gradients)
    launch_gate_conv_backward(torch.empty_like(inputs[0]), *inputs, weight, *recorded, *options)


def row_gradient_case(width, dtype):
    entries = 16 * TOKENS
    int64, int32, float32 = (partial(torch.empty, dtype=each) for each in (torch.int64, torch.int32, torch.float32))
    grad = torch.empty(entries, width, dtype=dtype)
    found = int32(entries), int64(entries), int32(entries + 2), int32(2)
    launch_row_gradient(grad, *found, int64(entries), float32(entries, width), float32(entries))


def update_case(width, dtype, adam):
    """The gradient of 16 rows a token; a table and its state of 64 rows."""
    entries = 16 * TOKENS
    ids, count = torch.empty(entries, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
    gradient = RowGradient(ids, torch.empty(entries, width), torch.empty(entries), count, 64)
    state = [torch.empty(64, width)] * 2 + [torch.empty(64, dtype=torch.int32)] if adam else [torch.empty(64)]
    options = dict(lr=1e-3, eps=1e-8, weight_decay=0.0, seed=0, step=7) | (dict(betas=(0.9, 0.999)) if adam else {})
    launch_row_update(torch.empty(64, width, dtype=dtype), state, gradient, torch.empty(1), count, **options)


def sinkhorn_case(width, dtype):
    """A step with moves that were put off, over the same."""
    entries = 16 * TOKENS
    ids, count = torch.empty(entries, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
    gradient = RowGradient(ids, torch.empty(entries, width), torch.empty(entries), count, 64)
    arrays = sinkhorn_rule(0.95).state
    state = [torch.zeros(each.shape(64, width), dtype=each.dtype) for each in arrays]
    options = dict(lr=1e-3, momentum=0.95, update_rms=0.18, threshold=1e-3, balancings=3, eps=1e-20, seed=0, step=7)
    launch_row_sinkhorn(torch.empty(64, width, dtype=dtype), state, gradient, torch.empty(1), count, **options)


def exchange_case(rows):
    """As many rows as there are tokens, for any of the table."""
    fmt, width, uint8 = rows.format, rows.width, partial(torch.empty, dtype=torch.uint8)
    scales = uint8(TOKENS, fmt.scale_bytes(width)) if fmt.group else None
    stored = StoredRows(torch.empty(TOKENS, dtype=torch.int64), uint8(TOKENS, fmt.row_bytes(width)), scales)
    launch_exchange_rows(rows.weight, rows.scale, stored)


V41, PAPER, QWEN = "deepseek_v41_flash", "engram_27b", "qwen38_flash_next"
PRESETS = {"v41": V41, "27b": PAPER, "40b": "engram_40b", "demo": "deepseek_demo", "qwen": QWEN}

CASES = {
    "hash/v41": lambda: hash_case(plan(V41)),
    "hash/v41-packed": lambda: hash_case(plan(V41), full=True),
    "hash/v41-slots": lambda: hash_case(plan(V41), full=True, slots=SLOTS),
    "hash/v41-few": few(lambda: hash_case(plan(V41))),
    "hash/v41-packed-few": few(lambda: hash_case(plan(V41), full=True)),
    "hash/v41-packed-columns": lambda: hash_case(plan(V41).select(columns=range(1, 24, 5)), full=True),
    "hash/v41-unordered": lambda: hash_case(plan(V41).select(columns=range(23, -1, -1))),
    "hash/qwen": lambda: hash_case(plan(QWEN)),
    "hash/qwen-overflow": lambda: hash_case(overflowing(QWEN)),
    "lookup/v41": lambda: lookup_case(table(V41), 24),
    "lookup/v41-storage": lambda: lookup_case(table(V41), 24, storage=True),
    "lookup/v41-head": lambda: lookup_case(table(V41), 24, order="head"),
    "lookup/v41-storage-address": lambda: lookup_case(table(V41), 24, storage=True, order="address"),
    "lookup/27b": lambda: lookup_case(table(PAPER), 16),
    "lookup/qwen": lambda: lookup_case(table(QWEN), 16),
    "lookup/float32-1024": lambda: lookup_case(EngramTable.empty(64, 1024, "float32", placement="cpu"), 16),
    "lookup/v41-nvfp4": lambda: lookup_case(table(V41, "nvfp4"), 24),
    "lookup/v41-nvfp4-storage": lambda: lookup_case(table(V41, "nvfp4"), 24, storage=True),
    "lookup/v41-mxfp4": lambda: lookup_case(table(V41, "mxfp4"), 24),
    "lookup/qwen-nvfp4": lambda: lookup_case(table(QWEN, "nvfp4"), 16),
    "lookup/qwen-nvfp4-storage": lambda: lookup_case(table(QWEN, "nvfp4"), 16, storage=True),
    "hash_lookup/v41": lambda: hash_lookup_case(V41),
    "hash_lookup/v41-few": few(lambda: hash_lookup_case(V41), tokens=1),
    "hash_lookup/v41-packed-head-few": few(lambda: hash_lookup_case(V41, full=True, order="head"), tokens=1),
    "hash_lookup/v41-packed": lambda: hash_lookup_case(V41, full=True),
    "hash_lookup/v41-slots-few": few(lambda: hash_lookup_case(V41, full=True, slots=SLOTS)),
    "hash_lookup/v41-storage": lambda: hash_lookup_case(V41, storage=True),
    "hash_lookup/v41-head": lambda: hash_lookup_case(V41, order="head"),
    "hash_lookup/v41-address": lambda: hash_lookup_case(V41, order="address"),
    "hash_lookup/27b": lambda: hash_lookup_case(PAPER),
    "hash_lookup/qwen": lambda: hash_lookup_case(QWEN),
    "hash_lookup/v41-nvfp4": lambda: hash_lookup_case(V41, row_format="nvfp4"),
    "hash_lookup/v41-nvfp4-few": few(lambda: hash_lookup_case(V41, row_format="nvfp4"), tokens=1),
    "hash_lookup/v41-mxfp4-head": lambda: hash_lookup_case(V41, row_format="mxfp4", order="head"),
    "cached_lookup/v41-nvfp4": lambda: cached_lookup_case(V41, "nvfp4"),
    "cached_lookup/v41-nvfp4-head-storage": lambda: cached_lookup_case(V41, "nvfp4", order="head", storage=True),
    "cached_lookup/v41-mxfp4-head": lambda: cached_lookup_case(V41, "mxfp4", order="head"),
    "cached_lookup/v41-packed": lambda: cached_lookup_case(V41, full=True, order="head"),
    "cached_lookup/v41-storage": lambda: cached_lookup_case(V41, storage=True),
    **{f"cached_lookup/{name}": partial(cached_lookup_case, model) for name, model in PRESETS.items()},
    **{
        f"cached_lookup/{name}-head-storage": partial(cached_lookup_case, model, order="head", storage=True)
        for name, model in PRESETS.items()
    },
    # What the tests use: 32 rows a step, groups of rows with no power of two, one way and the most, wrapping mixes.
    "cached_lookup/e4m3_ue8m0-32": lambda: small_cached_case(32, "e4m3_ue8m0", ways=2),
    "cached_lookup/e4m3_ue8m0-96-overflow-head": lambda: small_cached_case(96, "e4m3_ue8m0", True, order="head"),
    "cached_lookup/e4m3_ue8m0-64-storage": lambda: small_cached_case(64, "e4m3_ue8m0", storage=True, ways=4),
    "cached_lookup/e4m3-16-overflow": lambda: small_cached_case(16, "e4m3", wrapping=True, ways=1),
    "cached_lookup/e4m3-128-head": lambda: small_cached_case(128, "e4m3", order="head"),
    "cached_lookup/nvfp4-32-overflow": lambda: small_cached_case(32, "nvfp4", wrapping=True, ways=2),
    "cached_lookup/mxfp4-96-storage": lambda: small_cached_case(96, "mxfp4", storage=True, ways=4),
    "cached_lookup/bfloat16-64-head": lambda: small_cached_case(64, "bfloat16", order="head", ways=2),
    "cached_lookup/float16-80": lambda: small_cached_case(80, "float16", ways=4),
    "cached_lookup/float32-4": lambda: small_cached_case(4, "float32", ways=32),
    "gate/v41": lambda: gate_case(4, 5120, torch.bfloat16),
    "gate/v41-masked": lambda: gate_case(4, 5120, torch.bfloat16, mask=True),
    "gate/27b": lambda: gate_case(4, 2560, torch.bfloat16),
    "gate/v41-few": few(lambda: gate_case(4, 5120, torch.bfloat16)),
    "gate/float32-8x16384-few": few(lambda: gate_case(8, 16_384, torch.float32)),
    "gate/float32-1x1000": lambda: gate_case(1, 1000, torch.float32),
    "gate/8x2560": lambda: gate_case(8, 2560, torch.bfloat16),
    "gate_backward/v41-masked": lambda: gate_backward_case(4, 5120, torch.bfloat16, mask=True),
    "gate_backward/float32-1x1000": lambda: gate_backward_case(1, 1000, torch.float32),
    "gate_conv_backward/27b-packed": lambda: conv_backward_case(4, 2560, torch.bfloat16, full=True),
    "exchange_rows/v41": lambda: exchange_case(table(V41)),
    "exchange_rows/v41-nvfp4": lambda: exchange_case(table(V41, "nvfp4")),
    "exchange_rows/27b": lambda: exchange_case(table(PAPER)),
    "exchange_rows/qwen": lambda: exchange_case(table(QWEN)),
    "exchange_rows/float32-1024": lambda: exchange_case(EngramTable.empty(64, 1024, "float32", placement="cpu")),
    "row_gradient/27b": lambda: row_gradient_case(80, torch.bfloat16),
    "row_gradient/float32-1024": lambda: row_gradient_case(1024, torch.float32),
    "row_adagrad/27b": lambda: update_case(80, torch.bfloat16, adam=False),
    "row_adam/27b": lambda: update_case(80, torch.bfloat16, adam=True),
    "row_adam/float32-256": lambda: update_case(256, torch.float32, adam=True),
    "row_sinkhorn/27b": lambda: sinkhorn_case(80, torch.bfloat16),
    "row_sinkhorn/float32-256": lambda: sinkhorn_case(256, torch.float32),
    "gate_conv/27b": lambda: conv_case(4, 2560, torch.bfloat16),
    "gate_conv/27b-few": few(lambda: conv_case(4, 2560, torch.bfloat16)),
    "gate_conv/27b-packed-state": lambda: conv_case(4, 2560, torch.bfloat16, full=True),
    "gate_conv/27b-packed-slots": lambda: conv_slots_case(4, 2560, torch.bfloat16),
    "gate_conv/27b-packed-slots-few": few(lambda: conv_slots_case(4, 2560, torch.bfloat16)),
    "history/v41-packed": lambda: history_case(ring=False),
    "history/27b-packed": lambda: history_case(ring=True),
}
