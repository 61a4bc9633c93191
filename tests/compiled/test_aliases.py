"""The check of loads and stores through one pointer finds what it should, and nothing else."""

import pytest
import torch
import triton
import triton.language as tl

from tests.reports.aliases import unordered
from tests.reports.offline import TARGETS, compiling_for

pytestmark = pytest.mark.compile


@triton.jit
def count_rows_kernel(
    counts_ptr, out_ptr, BARRIER: tl.constexpr, USED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Of ROWS rows count one more, and where USED write each row's new count WIDTH times; one program.

    The shape of a row-wise optimizer: a number a row beside rows that all warps share.
    """
    row = tl.arange(0, ROWS)[:, None]
    count = tl.load(counts_ptr + row) + 1
    if BARRIER:
        tl.debug_barrier()
    tl.store(counts_ptr + row, count)
    if USED:
        offs = row * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(out_ptr + offs, tl.load(out_ptr + offs) + count)


@triton.jit
def count_once_kernel(count_ptr, out_ptr, USED: tl.constexpr):
    """One more of a single number, of which every thread has a copy; one program."""
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    if USED:
        tl.store(out_ptr + tl.arange(0, 256), count + tl.zeros((256,), tl.int32))


@triton.jit
def turn_kernel(x_ptr, y_ptr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    """x transposed in place, its rows summed beside it; one program."""
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + tl.arange(0, SIZE), tl.sum(x, axis=1))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + tl.trans(offs), x)


def found(kernel, *arguments, target="sm_90", num_warps=4, **options):
    """The pointers that are found in a kernel compiled for ``target``."""
    with compiling_for(target) as compiled:
        kernel[(1,)](*arguments, num_warps=num_warps, enable_fp_fusion=False, **options)
    return [pointer for pointer, *_ in unordered(compiled[0][0].asm["ttgir"])]


def count(**options):
    counts, out = torch.empty(2, dtype=torch.int32), torch.empty(2, 1024, dtype=torch.int32)
    return found(count_rows_kernel, counts, out, **dict(BARRIER=False, USED=True, ROWS=2, WIDTH=1024) | options)


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_that_all_warps_load_and_one_stores(target):
    assert count(target=target) == ["counts_ptr"]
    assert count(target=target, BARRIER=True) == []
    assert count(target=target, num_warps=1) == []
    assert count(target=target, USED=False) == [], "it goes back where it came from, and nowhere else"


def test_a_single_number():
    number, out = torch.empty(1, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    assert found(count_once_kernel, number, out, USED=True) == ["count_ptr"]
    assert found(count_once_kernel, number, out, USED=False) == []
    assert found(count_once_kernel, number, out, USED=True, num_warps=1) == []


def test_a_load_and_a_store_in_different_layouts():
    x, y = torch.empty(64, 64), torch.empty(64)
    assert found(turn_kernel, x, y, BARRIER=False, SIZE=64) == ["x_ptr"]
    assert found(turn_kernel, x, y, BARRIER=True, SIZE=64) == []


def test_what_it_cannot_read_is_an_error():
    text = 'module attributes {"ttg.num-warps" = 4 : i32} {\n  %x = tt.load %nowhere : !tt.ptr<f32>\n'
    with pytest.raises(ValueError, match="where its pointer comes from is not known"):
        unordered(text)
