"""The kernel of ngram_hash: row ids of the n-grams that end at each token (formula and symbols: ops/hashing.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of
from engram_kernels.launching.launch import Launch
from engram_kernels.launching.tokens import Tokens

from .mix import history_start, look_back, mix_rows, ngram_rows
from .sequences import find_sequence, sequence_arguments

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class HashConfig:
    """Tokens, layers and columns (a power of two) that a program handles at once, whether it stores last, its warps."""

    block_t: int
    block_l: int
    block_c: int
    stores_last: bool
    num_warps: int


@lru_cache
def hash_config(num_tokens: int, columns: int, num_layers: int) -> HashConfig:
    """128 ids of an order and layer at once, four a lane of one warp; ``columns`` is the most that an order has.

    V4.1 hashes 16 tokens so, and reads their windows once for both layers: 15 warp instructions a token and layer, 20
    of packed sequences. With 32 tokens on four warps, one id a lane, it took 23, a program per layer with all orders at
    once 97. At 58 to 62 registers a multiprocessor holds the 32 programs that it can hold at most.
    Up to 16 tokens come one a program: 270 instructions rather than 490 one after the other. No load of theirs stands
    behind a store, past which the compiler moves none: 2 round trips to memory rather than 9, for 20 registers.
    """
    block_c = next_power_of_2(columns)
    block_l = next(count for count in (4, 3, 2, 1) if num_layers % count == 0)
    few = num_tokens <= 16
    block_t = 1 if few else max(1, min(16, 128 // block_c))
    return HashConfig(block_t, block_l, block_c, few, max(1, min(4, block_c // 128)))


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "ngram_hash_kernel": dict(sm_80=(72, 512), sm_90=(72, 512), sm_100=(72, 512), gfx942=(56, 512)),
}


@triton.jit
def store_row_ids(
    out_ptr,
    row,
    token,
    layer,
    column,
    mask,
    num_tokens,
    key_stride,
    NUM_LAYERS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
):
    """Row ids of one layer to ``[T, L, C]``; with ``key_stride`` keys to ``[L, T, C]``."""
    offs_out = (token.to(tl.int64) * NUM_LAYERS + layer) * NUM_COLUMNS + column
    if key_stride is not None:
        row += layer.to(tl.int64) * key_stride
        offs_out = (layer.to(tl.int64) * num_tokens + token) * NUM_COLUMNS + column
    tl.store(out_ptr + offs_out, row.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_seqs",
        "search_steps",
        "seq_len",
        "num_slots",
        "vocab_size",
        "pad",
        "eos",
        "key_stride",
    ]
)
def ngram_hash_kernel(
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
    out_ptr,
    num_tokens,
    num_seqs,
    search_steps,
    seq_len,
    num_slots,
    vocab_size,
    pad,
    eos,
    key_stride,
    NUM_LAYERS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STORES_LAST: tl.constexpr,
):
    """Row ids of BLOCK_T tokens in all columns of BLOCK_L layers; with ``key_stride`` keys to sort by, ``[L, T, C]``.

    HEADS has the columns of each order from 2 to N; it is None where columns don't come in that order.
    Grid (cdiv(T, BLOCK_T), L / BLOCK_L). Relies on T < 2^31 and on contiguous arguments.
    """
    tokens = (token_ids_ptr, cu_seqlens_ptr, history_ptr, dead_ptr, slots_ptr, num_slots)
    sequences = (num_seqs, search_steps, seq_len)
    vocabulary = (token_map_ptr, vocab_size, pad, eos)
    parameters = (orders_ptr, primes_ptr, offsets_ptr, reciprocals_ptr)
    first_layer = 0
    if BLOCK_L < NUM_LAYERS:
        first_layer = tl.program_id(1) * BLOCK_L
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask_token = token < num_tokens
    follow_predecessor()
    if HEADS is None:
        tl.static_assert(BLOCK_L == 1)
        row = ngram_rows(
            token,
            mask_token,
            column,
            column < NUM_COLUMNS,
            first_layer,
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
        mask = mask_token & (column < NUM_COLUMNS)
        store_row_ids(out_ptr, row, token, first_layer, column, mask, num_tokens, key_stride, NUM_LAYERS, NUM_COLUMNS)
    else:
        # A mix grows by one token for each order, and an order's rows are ready with it: nothing is hashed twice.
        seq, start, bad = find_sequence(token, cu_seqlens_ptr, sequences)
        past = history_start(token, mask_token, seq, start, tokens, MAX_NGRAM)
        blocked = token < 0
        head, mixes, rows, columns = column, (), (), ()
        for _ in tl.static_range(BLOCK_L):
            mixes = mixes + ((token * 0).to(tl.int64),)
        for shift in tl.static_range(MAX_NGRAM):
            value, blocked, invalid = look_back(
                token, mask_token, past, start, blocked, tokens, vocabulary, shift, MAX_NGRAM, HAS_EOS
            )
            bad = bad | invalid
            grown = ()
            for index in tl.static_range(BLOCK_L):
                layer = first_layer + index
                mix = mixes[index] ^ (value * tl.load(multipliers_ptr + layer * MAX_NGRAM + shift))
                grown = grown + (mix,)
                if shift > 0:
                    # An invalid id makes its column -1; its mix must stay within the reciprocal's range.
                    offs_param = layer * NUM_COLUMNS + column
                    mask_head = head < HEADS[shift - 1]
                    row = mix_rows(tl.where(bad, 0, mix), offs_param, mask_head, parameters, NON_NEGATIVE)
                    rows, columns = rows + (tl.where(bad, -1, row),), columns + (column,)
                    if not STORES_LAST or (shift == MAX_NGRAM - 1 and index == BLOCK_L - 1):
                        for entry in tl.static_range(
                            0 if STORES_LAST else (shift - 1) * BLOCK_L + index, (shift - 1) * BLOCK_L + index + 1
                        ):
                            store_row_ids(
                                out_ptr,
                                rows[entry],
                                token,
                                first_layer + entry % BLOCK_L,
                                columns[entry],
                                mask_token & (head < HEADS[entry // BLOCK_L]),
                                num_tokens,
                                key_stride,
                                NUM_LAYERS,
                                NUM_COLUMNS,
                            )
            mixes = grown
            if shift > 0:
                column += HEADS[shift - 1]


def hash_arguments(tokens: Tokens, plan: HashPlan) -> dict:
    """What every hashing kernel is told of plan and layout; its tokens, output and tiles are left."""
    return dict(
        token_map_ptr=plan.token_map,
        multipliers_ptr=plan.multipliers,
        primes_ptr=plan.primes,
        offsets_ptr=plan.offsets,
        reciprocals_ptr=plan.reciprocals,
        orders_ptr=plan.orders,
        num_tokens=tokens.token_ids.numel(),
        **sequence_arguments(tokens.token_ids.shape, tokens.cu_seqlens),
        num_slots=None if tokens.slots is None else len(tokens.history),
        vocab_size=_INT64_MAX if plan.vocab_size is None else plan.vocab_size,
        pad=plan.pad,
        eos=-1 if plan.eos is None else plan.eos,
        NUM_LAYERS=plan.primes.shape[0],
        NUM_COLUMNS=plan.primes.shape[1],
        MAX_NGRAM=plan.max_ngram,
        HAS_EOS=plan.eos is not None,
        NON_NEGATIVE=plan.non_negative,
    )


def prepare_ngram_hash(tokens: Tokens, plan: HashPlan, key_stride: int | None = None) -> Callable[..., None]:
    """The launch for tokens such as these, of (tokens, out): all layers and orders.

    It writes row ids, or with ``key_stride`` the keys of row_kernels/order.py, to ``out``.
    """
    num_tokens = tokens.token_ids.numel()
    if num_tokens == 0:
        return lambda *_: None
    num_layers, num_columns = plan.primes.shape
    ordered = plan.heads is not None
    config = hash_config(num_tokens, max(plan.heads) if ordered else num_columns, num_layers if ordered else 1)
    options = dict(
        hash_arguments(tokens, plan),
        key_stride=key_stride,
        HEADS=tuple(plan.heads) if ordered else None,  # registered ops hand on a list
        BLOCK_T=config.block_t,
        BLOCK_L=config.block_l,
        BLOCK_C=config.block_c,
        STORES_LAST=config.stores_last,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    grid = (cdiv(num_tokens, config.block_t), num_layers // config.block_l)
    start = Launch(ngram_hash_kernel, grid, options)

    def launch(tokens: Tokens, out):
        with on_device_of(out):
            start(*tokens, out)

    return launch
