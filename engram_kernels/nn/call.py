"""What a call of an Engram module returns, for type checkers: torch types every module's call as anything."""

from typing import Protocol, overload

import torch

from engram_kernels.geometry.choices import ConvState
from engram_kernels.serving.state import EngramStep


class EngramCall(Protocol):
    """:meth:`Engram.forward`: a new state is returned where one is given."""

    @overload
    def __call__(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        kv: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        conv_state: None = None,
        state: EngramStep | None = None,
    ) -> torch.Tensor: ...

    @overload
    def __call__(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        kv: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        conv_state: ConvState,
        state: None = None,
    ) -> tuple[torch.Tensor, ConvState]: ...
