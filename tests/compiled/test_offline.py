"""The compile lane's own eyes: kernels that do what its gates forbid, and what is counted in them."""

import pytest
import torch
import triton
import triton.language as tl

from tests.reports.offline import compiling_for, machine_code

pytestmark = pytest.mark.compile


@triton.jit
def double_kernel(x_ptr, out_ptr, divisor, BLOCK: tl.constexpr):
    """Float64 arithmetic. Grid (1,)."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, (tl.load(x_ptr + offs).to(tl.float64) * divisor + 0.1).to(tl.float32))


@triton.jit
def divide_kernel(x_ptr, out_ptr, divisor, BLOCK: tl.constexpr):
    """A 64-bit remainder. Grid (1,)."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) % tl.cast(divisor, tl.int64))


@triton.jit
def byte_kernel(x_ptr, out_ptr, divisor, BLOCK: tl.constexpr):
    """Bytes from an address of which nothing is known. Grid (1,)."""
    offs = tl.arange(0, BLOCK)
    address = tl.cast(divisor, tl.int64).to(tl.pointer_type(tl.uint8))
    tl.store(out_ptr + offs, tl.load(address + offs))


@triton.jit
def crowded_kernel(x_ptr, out_ptr, divisor, BLOCK: tl.constexpr):
    """More values alive than a thread has registers. Grid (1,)."""
    rows, columns = tl.arange(0, BLOCK)[:, None] * BLOCK, tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows + columns)
    tl.store(out_ptr + rows + columns, x + tl.sum(x, axis=0)[None, :] + tl.sum(x, axis=1)[:, None])


def code_of(kernel, dtype, target, block=256, **options):
    x = torch.empty(block * block, dtype=dtype)
    with compiling_for(target) as compiled:
        kernel[(1,)](x, torch.empty_like(x), 7, BLOCK=block, enable_fp_fusion=True, **(dict(num_warps=1) | options))
    return machine_code(compiled[0])


@pytest.mark.parametrize(("target", "limit"), [("sm_90", dict(maxnreg=32)), ("gfx942", dict(waves_per_eu=8))])
def test_what_the_gates_forbid_is_counted(target, limit):
    assert code_of(double_kernel, torch.float32, target).float64 > 0
    narrow = code_of(byte_kernel, torch.uint8, target)
    assert narrow.loads.get("1", 0) >= 4 and narrow.loads.get("16", 0) == 0 and narrow.float64 == 0
    divides = code_of(divide_kernel, torch.int64, target)
    # Divisions are inlined on AMD, where the count of instructions shows them.
    assert (divides.divisions > 0) == (target == "sm_90") and divides.spills == 0
    assert divides.loads.get("16", 0) > 0
    crowded = code_of(crowded_kernel, torch.float32, target, block=128, num_warps=4, **limit)
    assert crowded.spills > 0 and crowded.registers >= 32 and crowded.shared_bytes > 0
