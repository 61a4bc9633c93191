"""Which sequence each token of a packed batch belongs to, found inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(token, cu_seqlens_ptr, sequences):
    """Sequence and first token (both int32) of each ``token``, and whether it is padding.

    With ``cu_seqlens`` a binary search for the last sequence that starts at or before the token, which steps over empty
    ones; ``search_steps`` is the bit length of num_seqs - 1. Without it sequences are ``seq_len`` tokens long.
    sequences: (num_seqs, search_steps, seq_len), of :func:`sequence_arguments`.
    """
    num_seqs, search_steps, seq_len = sequences
    if cu_seqlens_ptr is not None:
        seq = token * 0
        for i in range(search_steps):
            probe = seq + (1 << (search_steps - 1 - i))
            exists = probe < num_seqs
            first = tl.load(cu_seqlens_ptr + probe, mask=exists, other=0)
            seq = tl.where(exists & (first <= token), probe, seq)
        start = tl.load(cu_seqlens_ptr + seq)
        padding = token >= tl.load(cu_seqlens_ptr + num_seqs)
    else:
        seq = token // seq_len
        start = seq * seq_len
        padding = token < 0
    return seq, start, padding


def sequence_arguments(shape, cu_seqlens) -> dict:
    """Scalars for :func:`find_sequence`, from the shape ``[T]`` or ``[B, S]`` of the tokens."""
    if cu_seqlens is None:
        return dict(num_seqs=0, search_steps=0, seq_len=max(1, shape[-1]))
    num_seqs = cu_seqlens.shape[0] - 1
    return dict(num_seqs=num_seqs, search_steps=(num_seqs - 1).bit_length(), seq_len=0)
