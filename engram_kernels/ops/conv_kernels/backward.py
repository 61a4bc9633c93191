"""Gradients of gate_conv_residual, from value and the scalars of each token and branch.

    u                = value * scale * conv_norm              scale and gate as in ops/conv_kernels/scale.py
    conv_grad        = grad * silu'(conv)
    u_grad[t]        = sum over taps k of conv_weight[k] * conv_grad[t + (K-1-k) * dilation]
    value_part       = sum over H of gate * grad + scale * conv_norm * u_grad
    scale_grad       = sum over D of u_grad * conv_norm * value
    product[k]       = sum over T of conv_grad[t] * (value * scale)[t - (K-1-k) * dilation]

in float32, where t and t + (K-1-k) * dilation are tokens of one sequence; conv is computed again. With
n = scale / gate = rsqrt(mean((gate * value)^2) + conv_eps), which turns scale into gate * n, the rest follows:

    gate_grad        = sum over D of grad * value + scale_grad * conv_eps * n^3
    grad_value       = value_part - value / D * sum over H of scale_grad * scale^3
    grad_conv_weight = conv_norm * product, grad_conv_norm = sum over k of conv_weight[k] * product[k]

and hidden, key and the other norms as in ops/gate_kernels/backward.py. T tokens, H branches, D hidden size, K conv
taps.

One kernel computes what needs neighbours, in chunks of D: value_part ``[T, D]``, sums over each chunk for gate_grad and
scale_grad, and each group of tokens' own product. A second is gate_backward_kernel, which reads them; two more add up
what programs left for weights. Nothing ``[T, H, D]`` is written but the gradients of hidden and key, and 31 D elements
a token move at H = 4.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of, processors
from engram_kernels.launching.sums import ordered_sum
from engram_kernels.ops.call import registered
from engram_kernels.ops.gate_kernels.arguments import flatten_tokens, float32_eps
from engram_kernels.ops.gate_kernels.backward import ConvParts, launch_gate_backward
from engram_kernels.ops.gate_kernels.branch import widen
from engram_kernels.ops.gate_kernels.gradients import (
    arrange_gradients,
    given,
    make_gate_gradients,
    readable,
    refuse_second_derivative,
)
from engram_kernels.ops.gate_kernels.weights import launch_conv_gradient
from engram_kernels.ops.hash_kernels.sequences import find_sequence, sequence_arguments

from .arguments import ConvCall


@dataclass(frozen=True)
class ConvBackwardConfig:
    """Tokens and elements of D that a program holds at once, its warps, and the tokens that it takes in turn."""

    block_t: int
    block_d: int
    num_warps: int
    group_tokens: int


def conv_backward_config(
    branches: int, hidden_size: int, num_taps: int, num_tokens: int, processors: int
) -> ConvBackwardConfig:
    """Tiles of 32 tokens x 32 of D, 8 elements a thread: with 128 registers four programs fit an sm_90 multiprocessor.
    All branches in a tile would take a third fewer instructions and 250 registers.

    The products of all taps and branches are held too, at most 4,096 elements. Some 32 programs a multiprocessor share
    the tokens, so that the last wave is short. That share alone depends on T: the tile fixes the order of the sums over
    D, hence the bits of a token's gradients.
    """
    products = next_power_of_2(num_taps) * next_power_of_2(branches)
    block_t, block_d = 32, max(1, min(32, next_power_of_2(hidden_size), 4096 // products))
    groups = max(1, 32 * processors // cdiv(hidden_size, block_d))
    return ConvBackwardConfig(block_t, block_d, 4, block_t * cdiv(cdiv(num_tokens, block_t), groups))


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "conv_backward_kernel": dict(sm_80=(208, 4096), sm_90=(168, 4096), sm_100=(168, 4096), gfx942=(128, 2048)),
}


@triton.jit(do_not_specialize=["num_tokens", "group_tokens", "num_seqs", "search_steps", "seq_len"])
def conv_backward_kernel(
    grad_ptr,
    value_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    value_part_ptr,
    product_ptr,
    stride_grad_t,
    stride_grad_h,
    stride_value_t,
    num_tokens,
    group_tokens,
    num_seqs,
    search_steps,
    seq_len,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_D elements of one group of tokens, BLOCK_T at a time: value_part, sums over these elements, product.

    Grid (groups * cdiv(D, BLOCK_D),), D innermost. Relies on dense last dimensions, and on ``weight [K, H, D]``
    float32, conv_weight * conv_norm. A token computes the convolutions that it is part of again, from K * K tiles of
    value in the cache: no program reads what another wrote.
    """
    CHUNKS: tl.constexpr = (HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D
    chunk, group = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HIDDEN_SIZE)[None, :]
    place_k, place_h = tl.arange(0, BLOCK_K)[:, None, None], tl.arange(0, BLOCK_H)[None, :, None]
    product = tl.zeros([BLOCK_K, BLOCK_H, BLOCK_D], tl.float32)
    follow_predecessor()
    for begin in range(0, group_tokens, BLOCK_T):
        token32 = group * group_tokens + begin + tl.arange(0, BLOCK_T)
        mask_t = token32 < num_tokens
        seq, start, padding = find_sequence(token32, cu_seqlens_ptr, (num_seqs, search_steps, seq_len))
        known = mask_t & ~padding
        if cu_seqlens_ptr is not None:
            end = tl.load(cu_seqlens_ptr + seq + 1, mask=known, other=0)
        else:
            end = start + seq_len
        token = token32.to(tl.int64)
        live = known
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + token, mask=known, other=0) != 0)
        value_tile = value_ptr + token[:, None] * stride_value_t + offs_d[None, :]
        value = widen(tl.load(value_tile, mask=live[:, None] & mask_d, other=0))
        value_part = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        if sums_ptr is not None:
            plane = tl.cast(num_tokens, tl.int64) * NUM_BRANCHES
            sums = sums_ptr + 2 * plane * chunk + token * NUM_BRANCHES
        for branch in range(NUM_BRANCHES):
            branch64 = tl.cast(branch, tl.int64)
            gate = tl.load(gate_ptr + token * NUM_BRANCHES + branch, mask=live, other=0)
            scale = tl.load(scale_ptr + token * NUM_BRANCHES + branch, mask=live, other=0)
            normed_here = value * scale[:, None]
            grad_branch = grad_ptr + branch64 * stride_grad_h + offs_d[None, :]
            own = tl.load(grad_branch + token[:, None] * stride_grad_t, mask=live[:, None] & mask_d, other=0)
            own = widen(own)
            value_part = tl.fma(own, gate[:, None], value_part)
            if sums_ptr is not None:
                tl.store(sums + branch, ordered_sum(own * value, axis=1), mask=mask_t)
            through = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            for ahead in range(NUM_TAPS):
                target = token + tl.cast(ahead, tl.int64) * DILATION
                reached = known & (target < end)
                conv = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                # The grid has one dimension. Of an end that it knows LLVM unrolls the loop, and ptxas spills.
                for tap in range(NUM_TAPS * tl.num_programs(1)):
                    source = target - (NUM_TAPS - 1 - tap) * DILATION
                    inside = reached & (source >= start)
                    if mask_ptr is not None:
                        inside = inside & (tl.load(mask_ptr + source, mask=inside, other=0) != 0)
                    past_scale = tl.load(scale_ptr + source * NUM_BRANCHES + branch, mask=inside, other=0)
                    past_tile = value_ptr + source[:, None] * stride_value_t + offs_d[None, :]
                    past = widen(tl.load(past_tile, mask=inside[:, None] & mask_d, other=0))
                    offs_w = (tap * NUM_BRANCHES + branch) * HIDDEN_SIZE + offs_d[None, :]
                    weight = tl.load(weight_ptr + offs_w, mask=mask_d, other=0)
                    conv = tl.fma(past * past_scale[:, None], weight, conv)
                sigmoid = 1.0 / (1.0 + tl.exp(-conv))
                grad = tl.load(grad_branch + target[:, None] * stride_grad_t, mask=reached[:, None] & mask_d, other=0)
                conv_grad = widen(grad) * (sigmoid * tl.fma(conv, 1.0 - sigmoid, 1.0))
                # The token is the target's tap K-1 - ahead.
                offs_w = ((NUM_TAPS - 1 - ahead) * NUM_BRANCHES + branch) * HIDDEN_SIZE + offs_d[None, :]
                through = tl.fma(conv_grad, tl.load(weight_ptr + offs_w, mask=mask_d, other=0), through)
                if product_ptr is not None:
                    place = (place_k == NUM_TAPS - 1 - ahead) & (place_h == branch)
                    product += tl.where(place, ordered_sum(conv_grad * normed_here, axis=0)[None, None, :], 0.0)
            value_part = tl.fma(through, scale[:, None], value_part)
            if sums_ptr is not None:
                tl.store(sums + plane + branch, ordered_sum(through * value, axis=1), mask=mask_t)
        if value_part_ptr is not None:
            offs_part = token[:, None] * HIDDEN_SIZE + offs_d[None, :]
            tl.store(value_part_ptr + offs_part, value_part, mask=mask_t[:, None] & mask_d)
    if product_ptr is not None:
        offs_kh = (group * NUM_TAPS + place_k) * NUM_BRANCHES + place_h
        mask_product = (place_k < NUM_TAPS) & (place_h < NUM_BRANCHES) & (offs_d < HIDDEN_SIZE)[None, None, :]
        tl.store(product_ptr + offs_kh.to(tl.int64) * HIDDEN_SIZE + offs_d[None, None, :], product, mask=mask_product)


def make_conv_gradients(hidden, query_norm, key_norm, conv_norm, conv_weight, needs):
    """What :func:`make_gate_gradients` makes, and the gradients of conv_norm and conv_weight."""
    return (
        *make_gate_gradients(hidden, query_norm, key_norm, needs),
        conv_norm.new_empty(conv_norm.shape) if needs[5] else None,
        conv_weight.new_empty(conv_weight.shape) if needs[6] else None,
    )


def launch_gate_conv_backward(grad, call: ConvCall, gate, scale, scalars, needs, gradients) -> None:
    """Two to four launches; writes ``gradients``, which :func:`make_conv_gradients` made.

    gate, scale, scalars: what the forward pass left.
    """
    *of_gate, grad_conv_norm, grad_conv_weight = gradients
    if call.hidden.numel() == 0:
        for gradient in gradients[2:]:
            if gradient is not None:
                gradient.zero_()
        return
    hidden, conv_norm, conv_weight, cu_seqlens = call.hidden, call.conv_norm, call.conv_weight, call.cu_seqlens
    grad, flat_value = readable(grad), flatten_tokens("gate_conv_residual_backward", "value", call.value, 1)
    num_tokens, branches, hidden_size = grad.shape
    num_taps = conv_weight.shape[2]
    config = conv_backward_config(branches, hidden_size, num_taps, num_tokens, processors(hidden.device))
    chunks, groups = cdiv(hidden_size, config.block_d), cdiv(num_tokens, config.group_tokens)
    # [K, H, D], so that a tap's weights are dense, whatever the strides of conv_weight.
    weight = (conv_weight.to(torch.float32) * conv_norm.to(torch.float32)[..., None]).permute(2, 0, 1).contiguous()
    float32 = dict(dtype=torch.float32, device=hidden.device)
    sums = torch.empty(chunks, 2, num_tokens, branches, **float32) if any(needs[:5]) else None
    value_part = torch.empty(num_tokens, hidden_size, **float32) if needs[2] else None
    product = torch.empty(groups, num_taps, branches * hidden_size, **float32) if any(needs[5:]) else None
    with on_device_of(hidden):
        conv_backward_kernel[(chunks * groups,)](
            grad,
            flat_value,
            gate,
            scale,
            weight,
            call.mask,
            cu_seqlens,
            sums,
            value_part,
            product,
            grad.stride(0),
            grad.stride(1),
            flat_value.stride(0),
            num_tokens,
            config.group_tokens,
            **sequence_arguments(hidden.shape[:-2], cu_seqlens),
            NUM_BRANCHES=branches,
            HIDDEN_SIZE=hidden_size,
            NUM_TAPS=num_taps,
            DILATION=call.dilation,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            BLOCK_H=next_power_of_2(branches),
            BLOCK_K=next_power_of_2(num_taps),
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
        )
        if product is not None:
            launch_conv_gradient(product, conv_norm, conv_weight, grad_conv_norm, grad_conv_weight)
    if sums is not None:
        conv = ConvParts(scale, sums, value_part, float32_eps(call.conv_eps), cu_seqlens)
        launch_gate_backward(grad, call.of_gate, scalars, needs[:5], of_gate, conv)


def _new_gradients(grad, hidden, key, value, *options):
    return given(make_conv_gradients(hidden, *options[:4], options[-1]))


@registered(
    "gate_conv_residual_backward",
    "(Tensor grad, Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, "
    "Tensor conv_norm, Tensor conv_weight, Tensor gate, Tensor scale, Tensor scalars, int dilation, float? conv_eps, "
    "float clamp, Tensor? mask, str zero_gate, bool residual, Tensor? cu_seqlens, bool[] needs) -> Tensor[]",
    _new_gradients,
    refuse_second_derivative("gate_conv_residual"),
)
def gate_conv_residual_backward_op(grad, *arguments):
    """Gradients that ``needs`` asks for, in the order of the op's tensors, key and value in one tensor."""
    *arguments, needs = arguments
    tensors, recorded, (dilation, *options) = arguments[:7], arguments[7:10], arguments[10:]
    gradients = make_conv_gradients(tensors[0], *tensors[3:], needs)
    call = ConvCall(*tensors, dilation, None, *options)
    launch_gate_conv_backward(grad, call, *recorded, needs, gradients)
    return given(gradients)


def save_gate_conv(ctx, inputs, output) -> None:
    """Keep the inputs and the scalars of gate_conv_residual_scalars."""
    *tensors, dilation, _, conv_eps, clamp, mask, zero_gate, residual, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, *output[1:], mask, cu_seqlens)
    ctx.options = dilation, conv_eps, clamp, zero_gate, residual
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros for the scalars


def gate_conv_formula(ctx, grad, *_):
    """Gradients of the arguments of gate_conv_residual_scalars."""
    *tensors, mask, cu_seqlens = ctx.saved_tensors
    *options, zero_gate, residual = ctx.options
    needs = list(ctx.needs_input_grad[:7])
    options = (*options, mask, zero_gate, residual, cu_seqlens, needs)
    found = gate_conv_residual_backward_op(grad, *tensors, *options)
    return *arrange_gradients(found, tensors[0], needs), *[None] * 8
