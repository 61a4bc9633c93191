"""Gradients of norm and convolution weights from the parts that programs of a backward kernel leave behind.

    product [P, H, D] of the norms              grad_query_norm = key_norm * product
                                                grad_key_norm = query_norm * product
    product [P, K, H, D] of the convolution     grad_conv_weight[..., k] = conv_norm * product[k]
                                                grad_conv_norm = sum over k of conv_weight[..., k] * product[k]

where product is the sum of its float32 parts in their order; the result is rounded once: same device, same bits. P
parts, K conv taps, H branches, D hidden size.
"""

import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv
from engram_kernels.launching.sums import ordered_sum

# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "norm_gradient_kernel": dict(sm_80=(40, 4096), sm_90=(40, 4096), sm_100=(40, 4096), gfx942=(24, 2048)),
    "conv_gradient_kernel": dict(sm_80=(64, 4096), sm_90=(56, 4096), sm_100=(56, 4096), gfx942=(56, 2048)),
}
BLOCK_P, BLOCK = 8, 128  # parts and elements that a program adds at once


@triton.jit
def sum_parts(part_ptr, offs, mask, stride, num_parts, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """``[BLOCK]`` float32 sums over the parts, ``stride`` elements apart, in an order that num_parts fixes."""
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for begin in range(0, num_parts, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)[:, None]
        here = (part < num_parts) & mask[None, :]
        total += tl.load(part_ptr + part.to(tl.int64) * stride + offs[None, :], mask=here, other=0)
    return ordered_sum(total, axis=0)


@triton.jit(do_not_specialize=["num_parts"])
def norm_gradient_kernel(
    product_ptr,
    query_norm_ptr,
    key_norm_ptr,
    grad_query_norm_ptr,
    grad_key_norm_ptr,
    num_parts,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of the H * D elements of both norm weights' gradients, from products ``[num_parts, H, D]``.

    Grid (cdiv(H * D, BLOCK),). The parts are added in their order.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    follow_predecessor()
    product = sum_parts(product_ptr, offs, mask, SIZE, num_parts, BLOCK_P, BLOCK)
    if grad_query_norm_ptr is not None:
        key_norm = tl.load(key_norm_ptr + offs, mask=mask, other=0).to(tl.float32)
        tl.store(grad_query_norm_ptr + offs, (key_norm * product).to(grad_query_norm_ptr.dtype.element_ty), mask=mask)
    if grad_key_norm_ptr is not None:
        query_norm = tl.load(query_norm_ptr + offs, mask=mask, other=0).to(tl.float32)
        tl.store(grad_key_norm_ptr + offs, (query_norm * product).to(grad_key_norm_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_parts"])
def conv_gradient_kernel(
    product_ptr,
    conv_norm_ptr,
    conv_weight_ptr,
    grad_conv_norm_ptr,
    grad_conv_weight_ptr,
    stride_weight_h,
    stride_weight_d,
    stride_weight_k,
    num_parts,
    SIZE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of the H * D elements of the gradients of conv_norm and of conv_weight, whose taps are dense.

    Grid (cdiv(H * D, BLOCK),). The parts are added in their order.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    branch, offs_d = (offs // HIDDEN_SIZE).to(tl.int64), (offs % HIDDEN_SIZE).to(tl.int64)
    weight_row = conv_weight_ptr + branch * stride_weight_h + offs_d * stride_weight_d
    follow_predecessor()
    conv_norm = tl.load(conv_norm_ptr + offs, mask=mask, other=0).to(tl.float32)
    norm_grad = tl.zeros([BLOCK], tl.float32)
    for tap in range(NUM_TAPS):
        product = sum_parts(product_ptr + tap * SIZE, offs, mask, NUM_TAPS * SIZE, num_parts, BLOCK_P, BLOCK)
        weight = tl.load(weight_row + tap * stride_weight_k, mask=mask, other=0).to(tl.float32)
        norm_grad = tl.fma(weight, product, norm_grad)
        if grad_conv_weight_ptr is not None:
            weight_grad = (conv_norm * product).to(grad_conv_weight_ptr.dtype.element_ty)
            tl.store(grad_conv_weight_ptr + offs.to(tl.int64) * NUM_TAPS + tap, weight_grad, mask=mask)
    if grad_conv_norm_ptr is not None:
        tl.store(grad_conv_norm_ptr + offs, norm_grad.to(grad_conv_norm_ptr.dtype.element_ty), mask=mask)


def launch_norm_gradient(product, query_norm, key_norm, grad_query_norm, grad_key_norm) -> None:
    """One launch; ``product [P, H * D]``. A gradient that is None is not written."""
    num_parts, size = product.shape
    norm_gradient_kernel[(cdiv(size, BLOCK),)](
        product,
        query_norm,
        key_norm,
        grad_query_norm,
        grad_key_norm,
        num_parts,
        SIZE=size,
        BLOCK_P=BLOCK_P,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_options(),
    )


def launch_conv_gradient(product, conv_norm, conv_weight, grad_conv_norm, grad_conv_weight) -> None:
    """One launch; ``product [P, K, H * D]``. A gradient that is None is not written."""
    num_parts, num_taps, size = product.shape
    conv_gradient_kernel[(cdiv(size, BLOCK),)](
        product,
        conv_norm,
        conv_weight,
        grad_conv_norm,
        grad_conv_weight,
        *conv_weight.stride(),
        num_parts,
        SIZE=size,
        HIDDEN_SIZE=conv_norm.shape[1],
        NUM_TAPS=num_taps,
        BLOCK_P=BLOCK_P,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_options(),
    )
