"""The kernel of scale_columns. Formula and symbols: op.py. To copy to engram_kernels/ops/scaling_kernels/columns.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import follow_predecessor
from engram_kernels.launching.device import next_power_of_2, on_device_of
from engram_kernels.launching.launch import Launch


@dataclass(frozen=True)
class ScalingConfig:
    """Elements of a row that a program takes at once (a power of two), and its warps."""

    block_d: int
    num_warps: int


def scaling_config(hidden_size: int) -> ScalingConfig:
    """16 bytes of bfloat16 a thread and load; the number that was measured stands here."""
    block_d = min(1024, next_power_of_2(hidden_size))
    return ScalingConfig(block_d, max(1, block_d // 256))


@triton.jit
def scale_columns_kernel(x_ptr, weight_ptr, out_ptr, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row of one token, BLOCK_D elements at a time.

    Grid (T,). Relies on contiguous arguments, weight in float32.
    """
    row = tl.program_id(0).to(tl.int64) * HIDDEN_SIZE
    follow_predecessor()
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)
        mask_d = offs_d < HIDDEN_SIZE
        x = tl.load(x_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)
        tl.store(out_ptr + row + offs_d, (x * weight).to(out_ptr.dtype.element_ty), mask=mask_d)


def prepare_scale_columns(x: torch.Tensor) -> Callable[..., None]:
    """The launch for tensors such as these, of (x, weight, out)."""
    num_tokens, hidden_size = x.shape
    if x.numel() == 0:
        return lambda *_: None
    config = scaling_config(hidden_size)
    fixed = dict(
        HIDDEN_SIZE=hidden_size,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    start = Launch(scale_columns_kernel, (num_tokens,), fixed)

    def launch(x, weight, out):
        with on_device_of(x):
            start(x, weight, out)

    return launch
