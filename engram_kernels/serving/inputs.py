"""A step's tokens copied into buffers by one launch: what another stream reads while the caller writes the next ones.

History that is kept by slot is gathered on the way, so that a commit may move the slots on at once. T tokens, B
sequences, N longest n-gram.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import cdiv, is_kernel_device
from engram_kernels.launching.launch import Launch
from engram_kernels.launching.ranges import ranged
from engram_kernels.launching.tokens import Tokens, check_tokens

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "copy_tokens_kernel": dict(sm_80=(32, 0), sm_90=(32, 0), sm_100=(32, 0), gfx942=(24, 0)),
}
_ELEMENTS = 128


@triton.jit(do_not_specialize=["num_tokens", "num_ends", "num_past", "num_slots"])
def copy_tokens_kernel(
    token_ids_ptr,
    cu_seqlens_ptr,
    history_ptr,
    dead_ptr,
    slots_ptr,
    out_token_ids_ptr,
    out_cu_seqlens_ptr,
    out_history_ptr,
    out_dead_ptr,
    num_tokens,
    num_ends,
    num_past,
    num_slots,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of each of them: T ids and flags, B + 1 ends of sequences, B * DEPTH ids of history.

    Grid (cdiv(the most of them, BLOCK),). All loads come before the first store, past which none is moved. Relies on
    contiguous arguments, and on outputs that are none of the inputs.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_token, mask_end, mask_past = offs < num_tokens, offs < num_ends, offs < num_past
    follow_predecessor()
    token = tl.load(token_ids_ptr + offs, mask=mask_token, other=0)
    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + offs, mask=mask_end, other=0)
    if history_ptr is not None:
        row, known = offs // DEPTH, mask_past
        if slots_ptr is not None:
            row = tl.load(slots_ptr + row, mask=mask_past, other=-1)
            known = (row >= 0) & (row < num_slots)
        past = tl.load(history_ptr + row.to(tl.int64) * DEPTH + offs % DEPTH, mask=known, other=-1)
    if dead_ptr is not None:
        dead = tl.load(dead_ptr + offs, mask=mask_token, other=0)
        tl.store(out_dead_ptr + offs, dead, mask=mask_token)
    if history_ptr is not None:
        tl.store(out_history_ptr + offs, past.to(tl.int64), mask=mask_past)
    if cu_seqlens_ptr is not None:
        tl.store(out_cu_seqlens_ptr + offs, end, mask=mask_end)
    tl.store(out_token_ids_ptr + offs, token.to(tl.int64), mask=mask_token)


class TokenBuffers:
    """Room for the tokens of a step: ``max_tokens`` of at most ``max_sequences`` sequences, N - 1 ids before each.

    memory: int64, all of it. parts: int64 ids, int32 ends of sequences, int64 history and bool dead, views of it.
    """

    def __init__(self, max_tokens: int, max_sequences: int, max_ngram: int, device: torch.device):
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        counts = max_tokens, max_sequences + 1, max_sequences * (max_ngram - 1), max_tokens
        dtypes = torch.int64, torch.int32, torch.int64, torch.bool
        words = [2 * cdiv(count * dtype.itemsize, 16) for count, dtype in zip(counts, dtypes, strict=True)]
        self.memory = torch.empty(sum(words), dtype=torch.int64, device=device)
        parts = zip(self.memory.split(words), counts, dtypes, strict=True)
        self.parts = tuple(part.view(dtype)[:count] for part, count, dtype in parts)

    def check(self, where: str, sources: Tokens, plan: HashPlan) -> None:
        """Raise unless ``sources`` are tokens for the plan, and no more than there is room for."""
        check_tokens(where, sources, plan)
        token_ids, ends, past = sources.token_ids, sources.cu_seqlens, sources.history
        past = past if sources.slots is None else sources.slots
        sequences = max(0 if ends is None else len(ends) - 1, 0 if past is None else len(past))
        rooms = (("tokens", token_ids.numel(), self.max_tokens), ("sequences", sequences, self.max_sequences))
        for name, count, most in rooms:
            if count > most:
                raise ValueError(f"{where}: token_ids must be at most max_{name} = {most} {name}, got {count}")

    def views(self, sources: Tokens) -> Tokens:
        """Where copies of ``sources`` go: no slots, but history for each sequence where there is one."""
        shapes = [None if x is None else x.shape for x in sources[:4]]
        if sources.slots is not None:
            shapes[2] = torch.Size((len(sources.slots), sources.history.shape[1]))
        views = zip(self.parts, shapes, strict=True)
        return Tokens(*(None if shape is None else buffer[: shape.numel()].view(shape) for buffer, shape in views))


def copying(sources: Tokens, copies: Tokens) -> Callable[..., None]:
    """What fills ``copies``, views of buffers, from the five parts of tokens such as these: on a GPU one launch."""
    if not is_kernel_device(sources.token_ids):
        return ranged("copy_tokens", lambda *parts: _copy(Tokens(*parts), copies))
    return ranged("copy_tokens", prepare_copy(sources, copies))


def prepare_copy(sources: Tokens, copies: Tokens) -> Callable[..., None]:
    """The launch of :func:`copying`."""
    num_tokens, past = sources.token_ids.numel(), copies.history
    ends = 0 if sources.cu_seqlens is None else len(sources.cu_seqlens)
    num_past = 0 if past is None else past.numel()
    most = max(num_tokens, ends, num_past)
    if not most:
        return lambda *_: None
    fixed = dict(
        num_tokens=num_tokens,
        num_ends=ends,
        num_past=num_past,
        num_slots=None if sources.slots is None else len(sources.history),
        **{f"out_{name}_ptr": part for name, part in copies._asdict().items() if name != "slots"},
        DEPTH=1 if past is None else max(1, past.shape[1]),
        BLOCK=_ELEMENTS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return Launch(copy_tokens_kernel, (cdiv(most, _ELEMENTS),), fixed)


def _copy(sources: Tokens, copies: Tokens) -> None:
    for target, source in zip(copies, sources.gathered(), strict=True):
        if target is not None:
            target.copy_(source)
