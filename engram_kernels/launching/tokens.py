"""Token ids and what lies beside them: where sequences begin, what came before them, which tokens are dead."""

from typing import NamedTuple

import torch

from engram_kernels.geometry.kinds import Instance, Optional, Tensor
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.reference.ops.sequences import slot_history

from .checks import check_tensor

ID_DTYPES = (torch.int32, torch.int64)
#: What every function that hashes takes.
TOKEN_KINDS = dict(
    token_ids=Tensor(*ID_DTYPES),
    plan=Instance(HashPlan),
    cu_seqlens=Optional(Tensor(torch.int32)),
    history=Optional(Tensor(*ID_DTYPES)),
    dead=Optional(Tensor(torch.bool)),
    slots=Optional(Tensor(torch.int32)),
)
_MAX_TOKENS = 2**31 - 1
#: Tokens in the schema of a registered op.
TOKENS_SCHEMA = "Tensor token_ids, Tensor? cu_seqlens, Tensor? history, Tensor? dead, Tensor? slots"


class Tokens(NamedTuple):
    """What a hash reads: ``[T]`` packed, or ``[B, S]`` with each row a sequence; see :func:`ngram_hash`."""

    token_ids: torch.Tensor  #: int32 or int64 ``[T]`` or ``[B, S]``
    cu_seqlens: torch.Tensor | None = None  #: int32 ``[B + 1]``
    history: torch.Tensor | None = None  #: int32 or int64 ``[B, N - 1]``; with slots ``[slots, N - 1]``
    dead: torch.Tensor | None = None  #: bool, of the shape of token_ids
    slots: torch.Tensor | None = None  #: int32 ``[B]``, each sequence's row of history; another one is none

    @property
    def options(self) -> dict[str, torch.Tensor | None]:
        """All but the ids, as keyword arguments of the ops."""
        return dict(cu_seqlens=self.cu_seqlens, history=self.history, dead=self.dead, slots=self.slots)

    def gathered(self) -> "Tokens":
        """The same with each sequence's history in its place, a copy: slots move on."""
        if self.slots is None:
            return self
        return self._replace(history=slot_history(self.history, self.slots), slots=None)


def check_tokens(where: str, tokens: Tokens, plan: HashPlan) -> None:
    """Types, shapes and devices of what a hash reads."""
    token_ids, cu_seqlens, history, dead, slots = tokens
    check_tensor(where, "token_ids", token_ids, dtypes=ID_DTYPES)
    if token_ids.dim() not in (1, 2) or token_ids.numel() > _MAX_TOKENS:
        raise ValueError(
            f"{where}: token_ids must have shape [T] or [B, S], below 2^31 ids, got {list(token_ids.shape)}"
        )
    if not isinstance(plan, HashPlan):
        raise TypeError(f"{where}: plan must be a HashPlan, got {type(plan).__name__}")
    if not torch.compiler.is_compiling():
        plan.check_parts(where)
    if plan.device != token_ids.device:
        raise ValueError(f"{where}: plan must be on {token_ids.device} (plan.to(...)), got {plan.device}")
    batch = check_batch(where, token_ids.shape, cu_seqlens, token_ids.device)
    if slots is not None:
        check_tensor(where, "slots", slots, dtypes=(torch.int32,), shape=(batch,), device=token_ids.device)
        if history is None:
            raise ValueError(f"{where}: slots are rows of history, and there is no history")
    if history is not None:
        shape = (batch if slots is None else max(1, *history.shape[:1]), plan.max_ngram - 1)
        check_tensor(where, "history", history, dtypes=ID_DTYPES, shape=shape, device=token_ids.device)
    if dead is not None:
        check_tensor(where, "dead", dead, dtypes=(torch.bool,), shape=token_ids.shape, device=token_ids.device)


def check_token_values(where: str, tokens: Tokens, plan: HashPlan) -> None:
    """On the CPU: every id that is neither dead nor padding, and all history but -1, is in the vocabulary."""
    if tokens.token_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    token_ids, cu_seqlens, history, dead, _ = tokens.gathered()
    if cu_seqlens is not None:
        check_ends(where, cu_seqlens, token_ids.shape[0])
    live = token_ids if cu_seqlens is None else token_ids[: int(cu_seqlens[-1])]
    if dead is not None:
        live = live[~dead[: len(live)]]
    past = None if history is None else history[history != -1]
    for name, ids in (("token_ids", live), ("history", past)):
        if ids is None or not ids.numel():
            continue
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or (plan.vocab_size is not None and high >= plan.vocab_size):
            limit = "" if plan.vocab_size is None else f" < {plan.vocab_size}"
            raise ValueError(f"{where}: {name} must be valid ids, 0 <= id{limit}, got {low if low < 0 else high}")


def check_batch(where: str, shape, cu_seqlens: torch.Tensor | None, device: torch.device) -> int:
    """Number of sequences B of tokens of ``shape`` ``[T]`` or ``[B, S]``; raises where cu_seqlens does not fit."""
    if cu_seqlens is None:
        return shape[0] if len(shape) == 2 else 1
    check_tensor(where, "cu_seqlens", cu_seqlens, dtypes=(torch.int32,), device=device)
    if len(shape) == 2:
        raise ValueError(f"{where}: cu_seqlens is for packed tokens [T]; with {list(shape)} each row is a sequence")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"{where}: cu_seqlens must have shape [B + 1] with B >= 1, got {list(cu_seqlens.shape)}")
    check_ends(where, cu_seqlens, shape[0])
    return len(cu_seqlens) - 1


def check_ends(where: str, cu_seqlens: torch.Tensor, num_tokens: int) -> None:
    """On the CPU: cu_seqlens rise from 0 to at most T."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or any(a > b for a, b in zip(ends, ends[1:], strict=False)) or ends[-1] > num_tokens:
        got = str(ends) if len(ends) <= 12 else f"[{', '.join(map(str, ends[:12]))}, ...]"
        raise ValueError(f"{where}: cu_seqlens must rise from 0 to at most T = {num_tokens}, got {got}")
