"""Checks of the public functions' arguments.

Every error names the function, the argument, what was expected and what came. Values (ids, cu_seqlens) are checked in
eager calls on the CPU only: on a GPU a check would wait for it, and the kernels give invalid ids a defined meaning.
"""

import torch


def records_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records a call on ``tensors``."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def describe(value) -> str:
    """A value in an error message: what matters of a tensor, the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:80]


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


def check_out(where, out, shape, dtype, device) -> None:
    """Raise unless ``out`` is None or a contiguous tensor to write the result to."""
    if out is not None:
        check_tensor(where, "out", out, dtypes=(dtype,), shape=shape, device=device)


def check_choice(where, name, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bound(where, name, number) -> None:
    """Raise unless ``number`` is a finite one of at least 0, and no tensor, whose value may change unseen."""
    if isinstance(number, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a number, got {describe(number)}")
    if number is None or not 0 <= number < float("inf"):
        raise ValueError(f"{where}: {name} must be a finite number of at least 0, got {number}")


def check_programs(where, programs) -> None:
    if programs is not None and (isinstance(programs, bool) or not isinstance(programs, int) or programs < 1):
        raise ValueError(f"{where}: programs must be a positive int or None, got {programs!r}")
