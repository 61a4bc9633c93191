"""What launchers share, at little cost to the host, where a bare launch takes 10 us.

triton.cdiv and triton.next_power_of_2, made for kernels as well, take 3 us a call each, and torch.cuda.device_of 1.
"""

import contextlib

import torch
from triton.runtime import driver

from .checks import INTERPRETING

_HERE = contextlib.nullcontext()


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
