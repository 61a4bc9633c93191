"""Row ids of the n-grams that end at each token.

    mix_n = XOR over s < n of id[t-s] * multipliers[l, s]           (wrapping int64)
    row   = floor_mod(mix_n, primes[l, c]) + offsets[l, c]          (column c is of order n)

T tokens, B sequences, L layers, C columns, N the longest n-gram. Source: arXiv 2601.07372, section 2.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from engram_kernels import reference
from engram_kernels.geometry.kinds import Optional, Tensor, declares
from engram_kernels.geometry.plan import PLAN_SCHEMA, HashPlan
from engram_kernels.launching.checks import check_out
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.launching.launch import Kept, capturing
from engram_kernels.launching.overlap import memory_of_plan
from engram_kernels.launching.tokens import (
    ID_DTYPES,
    TOKEN_KINDS,
    TOKENS_SCHEMA,
    Tokens,
    check_token_values,
    check_tokens,
)

from .call import Op, form_of, registered, writes_alone
from .hash_kernels.row_ids import prepare_ngram_hash


class HashCall(NamedTuple):
    """Tokens, and the plan to hash them with."""

    tokens: Tokens
    plan: HashPlan

    @classmethod
    def of(cls, arguments) -> "HashCall":
        """The call of a registered op's arguments: tokens and parts of a plan."""
        return cls(Tokens(*arguments[:5]), known_plan(arguments[5:]))


class NgramHash(Op):
    """:func:`ngram_hash`."""

    name = "ngram_hash"
    input_names = Tokens._fields

    def signature(self, call, out):
        return form_of(*call.tokens, out)

    def owner(self, call):
        return call.plan

    def check(self, call, out):
        check_tokens(self.name, *call)
        shape = (*call.tokens.token_ids.shape, *call.plan.primes.shape)
        check_out(self.name, out, shape, call.plan.index_dtype, call.tokens.token_ids.device)
        check_token_values(self.name, *call)

    def inputs(self, call):
        return call.tokens

    def fixed(self, call):
        return memory_of_plan(call.plan)

    def repeats(self, call):
        call.plan.check_memory(self.name)
        check_token_values(self.name, *call)
        return True

    def on_kernels(self, call):
        return is_kernel_device(call.tokens.token_ids)

    def reference(self, call, out):
        return reference.ngram_hash(call.tokens.token_ids, call.plan, **call.tokens.options, out=out)

    def compiled(self, call, out):
        if out is None:
            return ngram_hash_op(*call.tokens, *call.plan.parts())
        ngram_hash_out_op(*call.tokens, out, *call.plan.parts())
        return out

    def allocate(self, call):
        token_ids, plan = call.tokens.token_ids, call.plan
        return torch.empty((*token_ids.shape, *plan.primes.shape), dtype=plan.index_dtype, device=token_ids.device)

    def launcher(self, call, out):
        launch = prepare_ngram_hash(*call)
        return lambda call, out: launch(call.tokens, out)


HASH = NgramHash()
_PLANS = Kept()


def known_plan(parts: Sequence) -> HashPlan:
    """The plan of a registered op's arguments: the same one, with what is kept for it, for the same tensors."""
    tensors, numbers = parts[:6], parts[6:]
    if isinstance(parts[0], FakeTensor) or capturing(parts[0]):
        return HashPlan.of_parts(parts)
    pad, eos, vocab_size, rows_per_layer, non_negative, heads = numbers
    form = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])
    form += (
        parts[0].shape,
        parts[1].shape,
        pad,
        eos,
        vocab_size,
        tuple(rows_per_layer),
        non_negative,
        None if heads is None else tuple(heads),
    )
    return _PLANS.get(form, lambda: HashPlan.of_parts(parts))  # it holds the tensors, whose addresses stay theirs


@registered("ngram_hash", f"({TOKENS_SCHEMA}, {PLAN_SCHEMA}) -> Tensor", lambda *args: HASH.allocate(HashCall.of(args)))
def ngram_hash_op(*arguments):
    """:func:`ngram_hash` for torch.compile."""
    return HASH.launch(HashCall.of(arguments))


@registered("ngram_hash_out", f"({TOKENS_SCHEMA}, Tensor(a!) out, {PLAN_SCHEMA}) -> ()", writes_alone)
def ngram_hash_out_op(*arguments):
    """:func:`ngram_hash` for torch.compile, into ``out``."""
    HASH.launch(HashCall.of((*arguments[:5], *arguments[6:])), arguments[5])


@declares(**TOKEN_KINDS, out=Optional(Tensor(*ID_DTYPES)))
def ngram_hash(
    token_ids: torch.Tensor,
    plan: HashPlan,
    *,
    cu_seqlens: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row ids ``[T, L, C]`` (``[B, S, L, C]``), offsets included; int32, or int64 for layers of 2^31 rows or more.

    token_ids: raw ids, int32 or int64, ``[T]`` packed or ``[B, S]`` with each row a sequence; contiguous.
    plan: the model's :class:`HashPlan`, on the device of token_ids.
    cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and the last ends; None for one sequence. Tokens at or
    beyond ``cu_seqlens[B]`` are padding.
    history: ``[B, N - 1]`` raw ids before each sequence's first token here, oldest first, -1 for none.
    dead: bool ``[T]`` (``[B, S]``), tokens that take no part in an n-gram and block what is older.
    slots: int32 ``[B]``, where history ``[slots, N - 1]`` is kept by slot: each sequence's row of it, -1 for none.
    out: a contiguous tensor to write to.

    A look-back that is blocked reads as the pad id (the EOS in the "eos" dialect). An invalid id raises ValueError on
    the CPU; in a kernel the columns that read it get -1, as do padding tokens. ValueError too where shapes do not fit.
    """
    return HASH(HashCall(Tokens(token_ids, cu_seqlens, history, dead, slots), plan), out)
