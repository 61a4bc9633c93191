"""Checks of the public functions' arguments, and where an op runs.

Every error names the function, the argument, what was expected and what came. Values (ids, cu_seqlens) are checked in
eager calls on the CPU only: on a GPU a check would wait for it, and the kernels give invalid ids a defined meaning.
"""

import torch
import triton

from engram_kernels.geometry.plan import HashPlan

# Whether kernels are Triton's interpreter's; read once, as Triton itself does when it decorates a kernel.
INTERPRETING = triton.knobs.runtime.interpret
# Whether CPU tensors take the kernels' path. Only the functions below ask, so that a stand-in for a GPU sets it here.
CPU_TAKES_KERNELS = INTERPRETING
_ID_DTYPES = (torch.int32, torch.int64)
_MAX_TOKENS = 2**31 - 1


def is_kernel_device(tensor: torch.Tensor) -> bool:
    """A CUDA or ROCm tensor runs the kernel; a CPU tensor runs it where Triton's own interpreter is switched on."""
    return tensor.is_cuda or CPU_TAKES_KERNELS


def takes_kernels(device: torch.device) -> bool:
    """:func:`is_kernel_device` of tensors on ``device``."""
    return device.type != "cpu" or CPU_TAKES_KERNELS


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter, so that programs take several steps."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


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


def check_batch(where, shape, cu_seqlens, device) -> int:
    """Number of sequences B of tokens of ``shape`` ``[T]`` or ``[B, S]``; raises where cu_seqlens does not fit."""
    if cu_seqlens is None:
        return shape[0] if len(shape) == 2 else 1
    if len(shape) == 2:
        raise ValueError(f"{where}: cu_seqlens is for packed tokens [T]; with {list(shape)} each row is a sequence")
    check_tensor(where, "cu_seqlens", cu_seqlens, dtypes=(torch.int32,), device=device)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"{where}: cu_seqlens must have shape [B + 1] with B >= 1, got {list(cu_seqlens.shape)}")
    check_ends(where, cu_seqlens, shape[0])
    return len(cu_seqlens) - 1


def check_ends(where, cu_seqlens, num_tokens: int) -> None:
    """On the CPU: cu_seqlens rise from 0 to at most T."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or any(a > b for a, b in zip(ends, ends[1:], strict=False)) or ends[-1] > num_tokens:
        raise ValueError(
            f"{where}: cu_seqlens must rise from 0 to at most T = {num_tokens}, got {describe_values(ends)}"
        )


def describe_values(values: list) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"


def check_tokens(where, token_ids, plan, cu_seqlens, history, dead) -> None:
    """Types, shapes and devices of what a hash reads."""
    check_tensor(where, "token_ids", token_ids, dtypes=_ID_DTYPES)
    if token_ids.dim() not in (1, 2) or token_ids.numel() > _MAX_TOKENS:
        raise ValueError(
            f"{where}: token_ids must have shape [T] or [B, S], below 2^31 ids, got {list(token_ids.shape)}"
        )
    if not isinstance(plan, HashPlan):
        raise TypeError(f"{where}: plan must be a HashPlan, got {type(plan).__name__}")
    if plan.device != token_ids.device:
        raise ValueError(f"{where}: plan must be on {token_ids.device} (plan.to(...)), got {plan.device}")
    batch = check_batch(where, token_ids.shape, cu_seqlens, token_ids.device)
    if history is not None:
        shape = (batch, plan.max_ngram - 1)
        check_tensor(where, "history", history, dtypes=_ID_DTYPES, shape=shape, device=token_ids.device)
    if dead is not None:
        check_tensor(where, "dead", dead, dtypes=(torch.bool,), shape=token_ids.shape, device=token_ids.device)


def check_token_values(where, token_ids, plan, cu_seqlens, history, dead) -> None:
    """On the CPU: every id that is neither dead nor padding, and all history but -1, is in the vocabulary."""
    if token_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
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
