"""Raw ids before each sequence's first token, kept per slot, and moved on by the tokens accepted.

    history  [slots, N - 1]   raw ids, oldest first, int64; NO_TOKEN, INVALID: see below
    cursor   [slots]          int32, where the convolution's next entry goes (ops/conv_kernels/slots.py), or None

B sequences, of which each names its slot; a slot outside 0..slots-1 (-1 for padding) is neither read nor written.
A dead token at the end of a chunk is kept as NO_TOKEN: it blocks look-backs of the next chunk as it blocked those of
its own, since hashing reads nothing that is older than a NO_TOKEN.
"""

from collections.abc import Callable, Hashable

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import cdiv, is_kernel_device, next_power_of_2, on_device_of
from engram_kernels.launching.launch import Kept, Launch
from engram_kernels.launching.ranges import ranged
from engram_kernels.ops.call import form_of, registered, writes_alone
from engram_kernels.reference.serving import history as reference

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "commit_history_kernel": dict(sm_80=(32, 0), sm_90=(32, 0), sm_100=(32, 0), gfx942=(24, 0)),
}
_COMMIT_SEQUENCES = 8
# In place of an id: no token (before the text, or a dead one), and a token whose id was -1, which no vocabulary has.
NO_TOKEN = tl.constexpr(reference.NO_TOKEN)
INVALID = tl.constexpr(reference.INVALID)
COMMITS = Kept()


@triton.jit(do_not_specialize=["num_seqs", "num_slots", "seq_len", "restart"])
def commit_history_kernel(
    history_ptr,
    cursor_ptr,
    slots_ptr,
    token_ids_ptr,
    cu_seqlens_ptr,
    dead_ptr,
    accepted_ptr,
    num_seqs,
    num_slots,
    seq_len,
    restart,
    DEPTH: tl.constexpr,
    RING: tl.constexpr,
    SPAN: tl.constexpr,
    RESTART: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """New history and cursor of BLOCK_B sequences.

    Grid (cdiv(B, BLOCK_B),). A slot is read and written in place by one program; no two sequences write the same slot.
    """
    seq = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    mask_b = seq < num_seqs
    follow_predecessor()
    slot = tl.load(slots_ptr + seq, mask=mask_b, other=-1)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + seq, mask=mask_b, other=0)
        length = tl.load(cu_seqlens_ptr + seq + 1, mask=mask_b, other=0) - start
    else:
        start, length = seq * seq_len, seq_len + seq * 0
    taken = length
    if accepted_ptr is not None:
        taken = tl.minimum(tl.maximum(tl.load(accepted_ptr + seq, mask=mask_b, other=0), 0), length)
    writes = (slot >= 0) & (slot < num_slots)
    if not RESTART:
        writes = writes & (taken > 0)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    position = taken - DEPTH + offs_n
    mask = writes & (offs_n < DEPTH)
    inside = mask & (position >= 0)
    token = (start + position).to(tl.int64)
    id = tl.load(token_ids_ptr + token, mask=inside, other=NO_TOKEN).to(tl.int64)
    id = tl.where(id == NO_TOKEN, INVALID, id)  # a caller's id of -1 is no missing token
    if dead_ptr is not None:
        id = tl.where(tl.load(dead_ptr + token, mask=inside, other=0) != 0, NO_TOKEN, id)
    row = slot.to(tl.int64) * DEPTH
    old = tl.full([BLOCK_B, BLOCK_N], NO_TOKEN, tl.int64)
    if not RESTART:
        old = tl.load(history_ptr + row + offs_n + taken, mask=mask & (position < 0), other=NO_TOKEN)
    moved = restart + slot * 0
    if cursor_ptr is not None and not RESTART:
        cursor = tl.load(cursor_ptr + slot, mask=writes, other=0)
        moved = tl.maximum(cursor + taken - tl.maximum(length - (RING - SPAN), 0), 0)
        moved = tl.where(moved < RING, moved, RING + moved % RING)  # so that it never wraps
    tl.debug_barrier()  # every thread has read what another one overwrites
    tl.store(history_ptr + row + offs_n, tl.where(inside, id, old), mask=mask)
    if cursor_ptr is not None:
        tl.store(cursor_ptr + slot, moved, mask=writes)


def launch_commit_history(
    history, cursor, slots, token_ids, cu_seqlens, dead, accepted, ring: int, span: int, restart: int | None, form=None
) -> None:
    """One launch; rewrites the slots of ``history``, and of ``cursor`` where it is a tensor, in place."""
    if not len(slots):
        return
    tensors = history, cursor, slots, token_ids, cu_seqlens, dead, accepted
    form = form or (form_of(*tensors), ring, span, restart)
    with on_device_of(history):
        COMMITS.get(form, lambda: _committing(history, slots, token_ids, ring, span, restart))(*tensors)


def _committing(history, slots, token_ids, ring: int, span: int, restart: int | None) -> Callable[..., None]:
    batch, depth = len(slots), history.shape[1]
    fixed = dict(
        num_seqs=batch,
        num_slots=len(history),
        seq_len=token_ids.numel() // batch,
        restart=0 if restart is None else restart,
        DEPTH=depth,
        RING=ring,
        SPAN=span,
        RESTART=restart is not None,
        BLOCK_B=_COMMIT_SEQUENCES,
        BLOCK_N=next_power_of_2(depth),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return ranged("commit", Launch(commit_history_kernel, (cdiv(batch, _COMMIT_SEQUENCES),), fixed))


@registered(
    "commit_history",
    "(Tensor(a!) history, Tensor(b!)? cursor, Tensor slots, Tensor token_ids, Tensor? cu_seqlens, Tensor? dead, "
    "Tensor? accepted, int ring, int span, int? restart) -> ()",
    writes_alone,
)
def commit_history_op(history, cursor, *options):
    """:func:`commit_history` for torch.compile."""
    launch_commit_history(history, cursor, *options)


def commit_history(
    history: torch.Tensor,
    cursor: torch.Tensor | None,
    slots: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
    ring: int = 0,
    span: int = 0,
    restart: int | None = None,
    form: Hashable = None,
) -> None:
    """Write the newest N - 1 ids of each old history and the first ``accepted [B]`` tokens (None: all) to its slot.

    token_ids, cu_seqlens and dead are those of :func:`ngram_hash`. A dead token becomes NO_TOKEN (-1); an id of -1,
    which is invalid, becomes INVALID (-2), or it would pass for no token. The cursor moves by the tokens accepted.
    ``ring`` is the number of tokens that the convolution's state has room for in a slot, ``span`` how many of them it
    reads (both 0 without one). restart: the old history counts as none, and the cursor is set to this number.
    form: what this call shares with all that may be launched alike, where the caller knows.
    """
    if not is_kernel_device(history):
        options = dict(cu_seqlens=cu_seqlens, dead=dead, accepted=accepted, ring=ring, span=span, restart=restart)
        return ranged("commit", reference.commit_history)(history, cursor, slots, token_ids, **options)
    arguments = history, cursor, slots, token_ids, cu_seqlens, dead, accepted, ring, span, restart
    if torch.compiler.is_compiling():
        commit_history_op(*arguments)
    else:
        launch_commit_history(*arguments, form)
