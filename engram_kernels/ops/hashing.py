"""Row ids of the n-grams that end at each token.

    mix_n = XOR over s < n of id[t-s] * multipliers[l, s]           (wrapping int64)
    row   = floor_mod(mix_n, primes[l, c]) + offsets[l, c]          (column c is of order n)

T tokens, B sequences, L layers, C columns, N the longest n-gram. Source: arXiv 2601.07372, section 2.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from engram_kernels import reference
from engram_kernels.geometry.plan import PLAN_SCHEMA, HashPlan
from engram_kernels.launching.checks import check_out, check_token_values, check_tokens, is_kernel_device
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of
from engram_kernels.launching.prepared import form_of
from engram_kernels.ops.hash_kernels.mix import look_back, mix_rows, ngram_rows
from engram_kernels.ops.hash_kernels.sequences import find_sequence, sequence_arguments


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
    do_not_specialize=["num_tokens", "num_seqs", "search_steps", "seq_len", "vocab_size", "pad", "eos", "key_stride"]
)
def ngram_hash_kernel(
    token_ids_ptr,
    cu_seqlens_ptr,
    history_ptr,
    dead_ptr,
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
    first_layer = 0
    if BLOCK_L < NUM_LAYERS:
        first_layer = tl.program_id(1) * BLOCK_L
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask_token = token < num_tokens
    if HEADS is None:
        tl.static_assert(BLOCK_L == 1)
        row = ngram_rows(
            token,
            mask_token,
            column,
            column < NUM_COLUMNS,
            first_layer,
            token_ids_ptr,
            cu_seqlens_ptr,
            history_ptr,
            dead_ptr,
            token_map_ptr,
            multipliers_ptr,
            primes_ptr,
            offsets_ptr,
            reciprocals_ptr,
            orders_ptr,
            num_seqs,
            search_steps,
            seq_len,
            NUM_COLUMNS,
            vocab_size,
            pad,
            eos,
            MAX_NGRAM,
            HAS_EOS,
            NON_NEGATIVE,
        )
        mask = mask_token & (column < NUM_COLUMNS)
        store_row_ids(out_ptr, row, token, first_layer, column, mask, num_tokens, key_stride, NUM_LAYERS, NUM_COLUMNS)
    else:
        # A mix grows by one token for each order, and an order's rows are ready with it: nothing is hashed twice.
        seq, start, bad = find_sequence(token, cu_seqlens_ptr, num_seqs, search_steps, seq_len)
        blocked = token < 0
        head, mixes, rows, columns = column, (), (), ()
        for _ in tl.static_range(BLOCK_L):
            mixes = mixes + ((token * 0).to(tl.int64),)
        for shift in tl.static_range(MAX_NGRAM):
            value, blocked, invalid = look_back(
                token,
                mask_token,
                seq,
                start,
                blocked,
                token_ids_ptr,
                history_ptr,
                dead_ptr,
                token_map_ptr,
                vocab_size,
                pad,
                eos,
                shift,
                MAX_NGRAM,
                HAS_EOS,
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
                    row = mix_rows(
                        tl.where(bad, 0, mix),
                        offs_param,
                        mask_head,
                        primes_ptr,
                        offsets_ptr,
                        reciprocals_ptr,
                        NON_NEGATIVE,
                    )
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


def hash_arguments(token_ids, plan: HashPlan, cu_seqlens) -> dict:
    """What every hashing kernel is told of plan and layout; its tokens, output and tiles are left."""
    return dict(plan.kernel_arguments, num_tokens=token_ids.numel(), **sequence_arguments(token_ids.shape, cu_seqlens))


def prepare_ngram_hash(token_ids, plan: HashPlan, cu_seqlens, key_stride: int | None = None) -> Callable[..., None]:
    """The launch for tensors such as these, of (token_ids, cu_seqlens, history, dead, out): all layers and orders.

    It writes row ids, or with ``key_stride`` the keys of ops/row_kernels/order.py, to ``out``.
    """
    num_tokens = token_ids.numel()
    if num_tokens == 0:
        return lambda *_: None
    num_layers, num_columns = plan.primes.shape
    ordered = plan.heads is not None
    config = hash_config(num_tokens, max(plan.heads) if ordered else num_columns, num_layers if ordered else 1)
    options = dict(
        hash_arguments(token_ids, plan, cu_seqlens),
        key_stride=key_stride,
        HEADS=tuple(plan.heads) if ordered else None,  # registered ops hand on a list
        BLOCK_T=config.block_t,
        BLOCK_L=config.block_l,
        BLOCK_C=config.block_c,
        STORES_LAST=config.stores_last,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        grid=(cdiv(num_tokens, config.block_t), num_layers // config.block_l),
        warmup=False,
    )

    def launch(token_ids, cu_seqlens, history, dead, out):
        with on_device_of(token_ids):
            ngram_hash_kernel.run(token_ids, cu_seqlens, history, dead, out_ptr=out, **options)

    return launch


def launch_ngram_hash(token_ids, plan: HashPlan, cu_seqlens, history, dead, out, key_stride: int | None = None) -> None:
    """One launch, of :func:`prepare_ngram_hash`."""
    prepare_ngram_hash(token_ids, plan, cu_seqlens, key_stride)(token_ids, cu_seqlens, history, dead, out)


@torch.library.custom_op(
    "engram::ngram_hash",
    mutates_args=(),
    schema=f"(Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, {PLAN_SCHEMA}) -> Tensor",
)
def ngram_hash_op(token_ids, cu_seqlens, history, dead, *plan_parts):
    """:func:`ngram_hash` for torch.compile."""
    plan = HashPlan(*plan_parts)
    out = make_hash_out(token_ids, plan)
    launch_ngram_hash(token_ids, plan, cu_seqlens, history, dead, out)
    return out


@ngram_hash_op.register_fake
def _(token_ids, cu_seqlens, history, dead, *plan_parts):
    return make_hash_out(token_ids, HashPlan(*plan_parts))


@torch.library.custom_op(
    "engram::ngram_hash_out",
    mutates_args=("out",),
    schema="(Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, Tensor(a!) out, "
    f"{PLAN_SCHEMA}) -> ()",
)
def ngram_hash_out_op(token_ids, cu_seqlens, history, dead, out, *plan_parts):
    """:func:`ngram_hash` for torch.compile, into ``out``."""
    launch_ngram_hash(token_ids, HashPlan(*plan_parts), cu_seqlens, history, dead, out)


@ngram_hash_out_op.register_fake
def _(*_):
    return None


def make_hash_out(token_ids, plan: HashPlan) -> torch.Tensor:
    """A new tensor for the row ids of ``token_ids``."""
    return torch.empty((*token_ids.shape, *plan.primes.shape), dtype=plan.index_dtype, device=token_ids.device)


def ngram_hash(
    token_ids: torch.Tensor,
    plan: HashPlan,
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row ids ``[T, L, C]`` (``[B, S, L, C]``), offsets included; int32, or int64 for layers of 2^31 rows or more.

    token_ids: raw ids, int32 or int64, ``[T]`` packed or ``[B, S]`` with each row a sequence; contiguous.
    plan: the model's :class:`HashPlan`, on the device of token_ids.
    cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and the last ends; None for one sequence. Tokens at or
    beyond ``cu_seqlens[B]`` are padding.
    history: ``[B, N - 1]`` raw ids before each sequence's first token here, oldest first, -1 for none.
    dead: bool ``[T]`` (``[B, S]``), tokens that take no part in an n-gram and block what is older.
    out: a contiguous tensor to write to.

    A look-back that is blocked reads as the pad id (the EOS in the "eos" dialect). An invalid id raises ValueError on
    the CPU; in a kernel the columns that read it get -1, as do padding tokens.
    """
    where, launch = "ngram_hash", None
    if not torch.compiler.is_compiling() and isinstance(plan, HashPlan):
        form = (where, form_of(token_ids, cu_seqlens, history, dead, out))
        launch = plan.prepared.launch(form)
    if launch is None:
        check_tokens(where, token_ids, plan, cu_seqlens, history, dead)
        shape = (*token_ids.shape, *plan.primes.shape)
        check_out(where, out, shape, plan.index_dtype, token_ids.device)
    check_token_values(where, token_ids, plan, cu_seqlens, history, dead)
    if launch is None:
        if not is_kernel_device(token_ids):
            return reference.ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history, dead=dead, out=out)
        if torch.compiler.is_compiling():
            if out is None:
                return ngram_hash_op(token_ids, cu_seqlens, history, dead, *plan.parts())
            ngram_hash_out_op(token_ids, cu_seqlens, history, dead, out, *plan.parts())
            return out
        launch = plan.prepared.keep(form, prepare_ngram_hash(token_ids, plan, cu_seqlens))
    if out is None:
        out = make_hash_out(token_ids, plan)
    launch(token_ids, cu_seqlens, history, dead, out)
    return out
