"""Checks of the public functions' arguments.

Every error names the function, the argument, what was expected and what came. Values (ids, cu_seqlens) are checked in
eager calls on the CPU only: on a GPU a check would wait for it, and the kernels give invalid ids a defined meaning.
"""

import torch

from engram_kernels.geometry.kinds import describe
from engram_kernels.geometry.row_format import check_memory


def records_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records a call on ``tensors``."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def check_tensor(where, name, value, *, dtypes, shape=None, device=None, contiguous=True) -> None:
    """Raise unless ``value`` is a tensor of one of ``dtypes``, of ``shape`` and on ``device`` where they are given."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{where}: {name} must be a tensor of {names}, got {describe(value)}")
    if shape is not None and value.shape != tuple(shape):
        raise ValueError(f"{where}: {name} must have shape {list(shape)}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{where}: {name} must be on {device}, got {value.device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{where}: {name} must be contiguous, got strides {list(value.stride())}")
    if not torch.compiler.is_compiling():
        check_memory(value, name, where)


def check_out(where, out, shape, dtype, device) -> None:
    """Raise unless ``out`` is None or a contiguous tensor to write the result to."""
    if out is not None:
        check_tensor(where, "out", out, dtypes=(dtype,), shape=shape, device=device)
