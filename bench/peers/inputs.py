"""What the peers' adapters share: packed requests in a form that each of them takes, and the tensors they want."""

from dataclasses import dataclass

import torch

from engram_kernels import EngramTable

SCALE_GROUP = 32
CLAMP = 1e-6


@dataclass(frozen=True)
class Requests:
    """Requests behind one another in a batch of tokens, as :func:`engram_kernels.ngram_hash` takes them.

    ``history`` has pads (-1) where a request has not begun yet; ``dead_id`` is the token id that is dead, which is how
    SGLang marks them.
    """

    cu_seqlens: torch.Tensor  # [B + 1] int32
    history: torch.Tensor  # [B, N - 1] int32, oldest first
    dead_id: int | None = None

    @property
    def lengths(self) -> torch.Tensor:
        return self.cu_seqlens.diff()

    def dead(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        return None if self.dead_id is None else token_ids == self.dead_id

    def positions(self) -> torch.Tensor:
        """Of each token in its request, int64: as far from its start as history is known."""
        known, begin = (self.history >= 0).sum(1), self.cu_seqlens[:-1].long()
        tokens = torch.arange(int(self.cu_seqlens[-1]), device=begin.device)
        return tokens + torch.repeat_interleave(known - begin, self.lengths.long())

    @classmethod
    def one(cls, tokens: int, longest: int, device: torch.device) -> "Requests":
        """A single request from its start."""
        ints = dict(dtype=torch.int32, device=device)
        return cls(torch.tensor([0, tokens], **ints), torch.full((1, longest - 1), -1, **ints))


def whole_kv(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``kv [T, (H + 1) * D]`` that ``key [T, H, D]`` and ``value [T, D]`` are views of."""
    tokens, branches, width = key.shape
    if value.data_ptr() != key.data_ptr() + branches * width * key.element_size():
        raise ValueError("whole_kv: value must lie right behind the keys of its token")
    return key.as_strided((tokens, (branches + 1) * width), (key.stride(0), 1))


def rows_like(table: EngramTable, row_ids: torch.Tensor) -> torch.Tensor:
    """NaN ``[..., R]``: what a peer does not write cannot pass a check."""
    shape = (*row_ids.shape, table.width)
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=row_ids.device)


def check_format(table: EngramTable) -> None:
    if table.format.name != "e4m3_ue8m0":
        raise ValueError(f"peers read e4m3 rows with a ue8m0 scale per {SCALE_GROUP}, got {table.format}")
