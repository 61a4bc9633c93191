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

from . import reference
from .arguments import check_out, check_token_values, check_tokens, is_kernel_device
from .launch import cdiv, next_power_of_2, on_device_of
from .plan import PLAN_SCHEMA, HashPlan
from .prepared import form_of
from .sequences import find_sequence, sequence_arguments


@dataclass(frozen=True)
class HashConfig:
    """Tokens and columns (a power of two) per program, and its warps."""

    block_t: int
    block_c: int
    num_warps: int


@lru_cache
def hash_config(num_tokens: int, columns: int) -> HashConfig:
    """At most 512 ids a program, four a thread (V4.1: 16 tokens x 32 columns); for a few tokens one warp."""
    block_c = next_power_of_2(columns)
    if num_tokens > 4 and columns > 1:
        return HashConfig(max(1, min(16, 512 // block_c)), block_c, 4)
    return HashConfig(max(1, min(4, 512 // block_c)), block_c, 1)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "ngram_hash_kernel": dict(sm_80=(48, 128), sm_90=(48, 128), sm_100=(48, 128), gfx942=(40, 128)),
}


@triton.jit
def remainder(mix, prime, reciprocals_ptr, offs_param, mask_param, NON_NEGATIVE: tl.constexpr):
    """``floor_mod(mix, prime)`` as int64.

    With 0 <= mix < 2^63 and prime < 2^31, ``umulhi(mix, floor(2^64 / prime))`` is the quotient or one less, so that the
    32-bit residue needs one correction: 11 instructions instead of about 90 for a 64-bit division.
    """
    if NON_NEGATIVE:
        reciprocal = tl.load(reciprocals_ptr + offs_param, mask=mask_param, other=0).to(tl.uint64, bitcast=True)
        quotient = tl.umulhi(mix.to(tl.uint64, bitcast=True), reciprocal).to(tl.uint32)
        divisor = prime.to(tl.uint32)
        residue = mix.to(tl.uint32) - quotient * divisor
        return tl.where(residue >= divisor, residue - divisor, residue).to(tl.int64)
    else:
        truncated = mix % prime  # takes the sign of mix
        return tl.where(truncated < 0, truncated + prime, truncated)


@triton.jit
def mix_rows(mix, offs_param, mask_param, primes_ptr, offsets_ptr, reciprocals_ptr, NON_NEGATIVE: tl.constexpr):
    """Row ids, int64, of mixes in the columns whose parameters are at ``offs_param``."""
    prime = tl.load(primes_ptr + offs_param, mask=mask_param, other=1)
    offset = tl.load(offsets_ptr + offs_param, mask=mask_param, other=0)
    return remainder(mix, prime, reciprocals_ptr, offs_param, mask_param, NON_NEGATIVE) + offset


@triton.jit
def ngram_mix(
    token,
    mask_token,
    order,
    layer,
    token_ids_ptr,
    cu_seqlens_ptr,
    history_ptr,
    dead_ptr,
    token_map_ptr,
    multipliers_ptr,
    num_seqs,
    search_steps,
    seq_len,
    vocab_size,
    pad,
    eos,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
):
    """The mix, int64, of every (token, order) pair of one layer, and whether it has none: padding and invalid ids.

    ``token`` and ``order`` broadcast against each other.
    """
    seq, start, bad = find_sequence(token, cu_seqlens_ptr, num_seqs, search_steps, seq_len)
    blocked = token < 0
    mix = (token * 0).to(tl.int64) + (order * 0).to(tl.int64)
    for shift in tl.static_range(MAX_NGRAM):
        source = token - shift
        inside = mask_token & (source >= start) & (source >= 0)
        raw = tl.load(token_ids_ptr + source, mask=inside, other=-1).to(tl.int64)
        if shift > 0:
            if history_ptr is not None:
                slot = MAX_NGRAM - 1 + source - start
                before = mask_token & (source < start) & (slot >= 0)
                past = tl.load(history_ptr + seq.to(tl.int64) * (MAX_NGRAM - 1) + slot, mask=before, other=-1)
                raw = tl.where(inside, raw, past.to(tl.int64))
            blocked = blocked | ((raw == -1) & ~inside)
            if HAS_EOS:
                blocked = blocked | (raw == eos)
        if dead_ptr is not None:
            blocked = blocked | (tl.load(dead_ptr + source, mask=inside, other=0) != 0)
        valid = (raw >= 0) & (raw < vocab_size)
        if token_map_ptr is not None:
            raw = tl.load(token_map_ptr + raw, mask=mask_token & valid & ~blocked, other=0).to(tl.int64)
        value = tl.where(blocked, pad, raw)
        multiplier = tl.load(multipliers_ptr + layer * MAX_NGRAM + shift)
        reads = order > shift
        mix = mix ^ tl.where(reads, value * multiplier, 0)
        bad = bad | (reads & ~valid & ~blocked)
    # An invalid id makes its column -1; what it does to the mix must stay within the reciprocal's range.
    return tl.where(bad, 0, mix), bad


@triton.jit
def ngram_rows(
    token,
    mask_token,
    column,
    mask_column,
    layer,
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
    num_columns,
    vocab_size,
    pad,
    eos,
    MAX_NGRAM: tl.constexpr,
    HAS_EOS: tl.constexpr,
    NON_NEGATIVE: tl.constexpr,
):
    """Row ids, int64, of every (token, column) pair of one layer; -1 for padding and invalid ids.

    ``token`` and ``column`` broadcast against each other: ``[BLOCK_T, 1]`` and ``[1, BLOCK_C]``, both ``[BLOCK]``, or
    one column alone.
    """
    order = tl.load(orders_ptr + column, mask=mask_column, other=0)
    mix, bad = ngram_mix(
        token,
        mask_token,
        order,
        layer,
        token_ids_ptr,
        cu_seqlens_ptr,
        history_ptr,
        dead_ptr,
        token_map_ptr,
        multipliers_ptr,
        num_seqs,
        search_steps,
        seq_len,
        vocab_size,
        pad,
        eos,
        MAX_NGRAM,
        HAS_EOS,
    )
    offs_param = layer * num_columns + column
    row = mix_rows(mix, offs_param, mask_column, primes_ptr, offsets_ptr, reciprocals_ptr, NON_NEGATIVE)
    return tl.where(bad, -1, row)


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
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Row ids of BLOCK_T tokens in all columns of one layer; with ``key_stride`` keys to sort by, ``[L, T, C]``.

    Grid (cdiv(T, BLOCK_T), L). Relies on T < 2^31 and on contiguous arguments.
    """
    layer = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask_token = token < num_tokens
    mask_column = column < NUM_COLUMNS
    row = ngram_rows(
        token,
        mask_token,
        column,
        mask_column,
        layer,
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
    offs_out = (token.to(tl.int64) * NUM_LAYERS + layer) * NUM_COLUMNS + column
    if key_stride is not None:
        row += layer.to(tl.int64) * key_stride
        offs_out = (layer.to(tl.int64) * num_tokens + token) * NUM_COLUMNS + column
    tl.store(out_ptr + offs_out, row.to(out_ptr.dtype.element_ty), mask=mask_token & mask_column)


def hash_arguments(token_ids, plan: HashPlan, cu_seqlens) -> dict:
    """What every hashing kernel is told of plan and layout; its tokens, output and tiles are left."""
    return dict(plan.kernel_arguments, num_tokens=token_ids.numel(), **sequence_arguments(token_ids.shape, cu_seqlens))


def prepare_ngram_hash(token_ids, plan: HashPlan, cu_seqlens, key_stride: int | None = None) -> Callable[..., None]:
    """The launch for tensors such as these, of (token_ids, cu_seqlens, history, dead, out): all layers and orders.

    It writes row ids, or with ``key_stride`` the keys of read_order.py, to ``out``.
    """
    num_tokens = token_ids.numel()
    if num_tokens == 0:
        return lambda *_: None
    num_layers, num_columns = plan.primes.shape
    config = hash_config(num_tokens, num_columns)
    options = dict(
        hash_arguments(token_ids, plan, cu_seqlens),
        key_stride=key_stride,
        BLOCK_T=config.block_t,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        grid=(cdiv(num_tokens, config.block_t), num_layers),
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
