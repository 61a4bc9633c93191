"""Where an op runs, and what launchers share, at little cost to the host, where a bare launch takes 10 us.

triton.cdiv and triton.next_power_of_2, made for kernels as well, take 3 us a call each, and torch.cuda.device_of 1.
"""

import contextlib

import torch
import triton
from triton.runtime import driver

_HERE = contextlib.nullcontext()
# Whether kernels are Triton's interpreter's; read once, as Triton itself does when it decorates a kernel.
INTERPRETING = triton.knobs.runtime.interpret
# Whether CPU tensors take the kernels' path. Only the functions below ask, so that a stand-in for a GPU sets it here.
CPU_TAKES_KERNELS = INTERPRETING


def is_kernel_device(tensor: torch.Tensor) -> bool:
    """A CUDA or ROCm tensor runs the kernel; a CPU tensor runs it where Triton's own interpreter is switched on."""
    return tensor.is_cuda or CPU_TAKES_KERNELS


def takes_kernels(device: torch.device) -> bool:
    """:func:`is_kernel_device` of tensors on ``device``."""
    return device.type != "cpu" or CPU_TAKES_KERNELS


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter, so that programs take several steps."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least ``number``; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context to launch in: kernels run on the current device, so that is made the tensor's where it is another."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(tensor)


def warp_size() -> int:
    """Threads of a warp where kernels run: 32, or 64 on AMD's."""
    return 32 if INTERPRETING else driver.active.get_current_target().warp_size
