"""The stand-in for a GPU: what a launch may touch, what is an error, and when warps run in several orders.

Small kernels are broken on purpose; the executor's own tests are in test_machine_*.py.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engram_kernels.launching import device as running
from tests.conftest import package_kernels
from tests.machine import gpu
from tests.machine.parsing.orders import modified, takes_orders

from .test_aliases import count_rows_kernel

pytestmark = pytest.mark.compile
OPTIONS = dict(num_warps=4, enable_fp_fusion=False)


@triton.jit
def copy_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Copy ``count`` elements, BLOCK in a program."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < count, other=0), mask=offs < count)


@triton.jit(do_not_specialize=["address"])
def copy_from_address_kernel(address, out_ptr, BLOCK: tl.constexpr):
    """Copy BLOCK int32 from an address."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(address.to(tl.int64).to(tl.pointer_type(tl.int32)) + offs))


@triton.jit
def copy_from_descriptor_kernel(descriptor_ptr, out_ptr, BLOCK: tl.constexpr):
    """Copy BLOCK int32 from the address that a descriptor holds."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(tl.load(descriptor_ptr).to(tl.pointer_type(tl.int32)) + offs))


@pytest.fixture
def machine():
    with gpu.standing_in("sm_90") as machine:
        yield machine


def count_from(first, size):
    return torch.arange(first, first + size, dtype=torch.int32)


def test_a_launch_computes_and_everything_is_taken_back():
    before, run, data_ptr, empty = driver._active, JITFunction.run, torch.Tensor.data_ptr, torch.empty
    assert not running.is_kernel_device(torch.zeros(1)) and not running.takes_kernels(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), gpu.standing_in("sm_90") as machine:
        assert running.is_kernel_device(torch.zeros(1)) and running.takes_kernels(torch.device("cpu"))
        out = torch.zeros(100, dtype=torch.int32)
        copy_kernel[(2,)](count_from(5, 100), out, 100, BLOCK=64, **OPTIONS)
        assert torch.equal(out, count_from(5, 100))
        assert machine.ran == dict(kernels=1, launches=1, programs=2, runs=1)
        raise ZeroDivisionError
    assert (driver._active, JITFunction.run, torch.Tensor.data_ptr) == (before, run, data_ptr) and torch.empty is empty
    assert not running.is_kernel_device(torch.zeros(1))


def test_a_grid_without_programs_and_one_that_is_too_large(machine):
    x = count_from(0, 64)
    copy_kernel[(0,)](x, x.clone(), 64, BLOCK=64, **OPTIONS)
    with pytest.raises(gpu.Report, match="a grid of"):
        copy_kernel[(1, 2**16)](x, x.clone(), 64, BLOCK=64, **OPTIONS)
    assert machine.ran["programs"] == 2**16 and machine.ran["runs"] == 0


def test_outside_of_a_tensor(machine):
    x, room = count_from(0, 128), torch.zeros(192, dtype=torch.int32)
    with pytest.raises(gpu.Report, match="copy_kernel: out of bounds: store"):
        copy_kernel[(2,)](x, room[64:128], 128, BLOCK=64, **OPTIONS)  # there is room behind it, but not this launch's
    with pytest.raises(gpu.Report, match="copy_kernel: out of bounds: load"):
        copy_kernel[(2,)](x[:100], room[:128], 128, BLOCK=64, **OPTIONS)


def test_memory_by_address(machine):
    """What data_ptr gave can be read as long as it is there; another tensor's memory, and what is behind it, not."""
    x, out = count_from(7, 64), torch.zeros(64, dtype=torch.int32)
    address, options = x.data_ptr(), dict(BLOCK=64, **OPTIONS)
    copy_from_address_kernel[(1,)](address, out, **options)
    assert torch.equal(out, x)
    copy_from_descriptor_kernel[(1,)](torch.tensor([address]), out.zero_(), **options)
    assert torch.equal(out, x)
    with pytest.raises(gpu.Report, match="out of bounds"):
        copy_from_address_kernel[(1,)](address + 4, out, **options)
    unasked = count_from(0, 64)
    with pytest.raises(gpu.Report, match="out of bounds"):
        copy_from_address_kernel[(1,)](unasked.untyped_storage().data_ptr(), out, **options)
    del x
    with pytest.raises(gpu.Report, match="out of bounds"):
        copy_from_address_kernel[(1,)](address, out, **options)


@pytest.mark.parametrize("make", ["empty", "empty_like", "new_empty"])
def test_what_nobody_has_written(machine, make):
    out = torch.zeros(128, dtype=torch.int32)
    makers = dict(
        empty=lambda: torch.empty(128, dtype=torch.int32),
        empty_like=lambda: torch.empty_like(out),
        new_empty=lambda: out.new_empty(128),
    )
    x = makers[make]()
    x[:100] = 3
    copy_kernel[(2,)](x, out, 100, BLOCK=64, **OPTIONS)
    assert out.sum() == 300
    with pytest.raises(gpu.Report, match="copy_kernel: undefined"):
        copy_kernel[(2,)](x, out, 101, BLOCK=64, **OPTIONS)
    x[100:] = 4
    copy_kernel[(2,)](x, out, 128, BLOCK=64, **OPTIONS)
    assert out.sum() == 300 + 4 * 28


def test_what_a_kernel_has_written_is_defined(machine):
    x, between, out = count_from(0, 64), torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    copy_kernel[(1,)](x, between, 64, BLOCK=64, **OPTIONS)
    copy_kernel[(1,)](between, out, 64, BLOCK=64, **OPTIONS)
    assert torch.equal(out, x)


def count_rows(counts, out, barrier):
    count_rows_kernel[(1,)](counts, out, BARRIER=barrier, USED=True, ROWS=2, WIDTH=1024, **OPTIONS)


def zeros():
    return torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1024, dtype=torch.int32)


def test_a_race_is_an_error(machine):
    with pytest.raises(gpu.Report, match="count_rows_kernel: race: counts_ptr.* two warps without a barrier between"):
        count_rows(*zeros(), barrier=False)


def test_orders_of_warps_must_give_the_same_bits(machine, monkeypatch):
    """Were the race let through, the bits would tell."""
    benign = (gpu.Benign("count_rows_kernel", "race", "counts_ptr:", "none, for the sake of this test"),)
    monkeypatch.setattr(gpu, "BENIGN", benign)
    with pytest.raises(gpu.Report, match="count_rows_kernel, warps up: out_ptr has other bits than with all warps in"):
        count_rows(*zeros(), barrier=False)
    counts, out = zeros()
    count_rows(counts, out, barrier=False)  # a kernel's first launch alone takes all orders
    assert (out == 1).all() and machine.ran == dict(kernels=1, launches=2, programs=2, runs=3)


def test_each_order_starts_from_what_the_launch_found(machine):
    counts, out = zeros()
    for launch in (1, 2):
        count_rows(counts, out, barrier=True)
        assert counts.tolist() == [launch, launch]
    assert (out == 3).all()
    assert machine.ran == dict(kernels=1, launches=2, programs=2, runs=4)


def test_which_kernels_take_orders(machine):
    counts, out = zeros()
    for warps in (4, 1):
        options = dict(BARRIER=True, USED=True, ROWS=2, WIDTH=1024, num_warps=warps, enable_fp_fusion=False)
        count_rows_kernel[(1,)](counts, out, **options)
    copy_kernel[(1,)](counts, counts.clone(), 2, BLOCK=64, **OPTIONS)
    several, one, copying = (text for text, _ in machine.kernels)
    assert modified(several) == modified(one) == {"count_rows_kernel_param_0", "count_rows_kernel_param_1"}
    assert (takes_orders(several), takes_orders(one), takes_orders(copying)) == (True, False, False)


def test_benign_reports_are_of_kernels_that_are_there():
    assert {known.kernel for known in gpu.BENIGN} <= set(package_kernels())
    assert all(known.memory.endswith(":") and len(known.reason) > 40 for known in gpu.BENIGN)
