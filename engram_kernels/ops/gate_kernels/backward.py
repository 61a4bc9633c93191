"""Gradients of gate_residual, from its inputs and three scalars of each token and branch: d and both norms' scales.

    gate_grad        = sum over D of grad * value
    d_grad           = gate_grad * gate * (1 - gate) / (2 * sqrt(|d|)); 0 where |d| < clamp, and at d = 0
    q, k             = hidden * hidden_scale, key * key_scale
    w                = query_norm * key_norm
    grad_hidden      = grad + hidden_scale * (d_grad / sqrt(D) * w * k - d_grad * d / D * q)
    grad_key         = key_scale * (d_grad / sqrt(D) * w * q - d_grad * d / D * k)
    grad_value       = sum over H of gate * grad
    product          = sum over T of d_grad / sqrt(D) * q * k
    grad_query_norm  = key_norm * product, grad_key_norm = query_norm * product

in float32, rounded once; grad is the gradient of out. The normed states q and k rather than hidden and key times one
factor: such a factor leaves float32 where the states are large or small. T tokens, H branches, D hidden size.

A block of tokens is gone over twice, first for gate_grad, then for everything else; what both read (grad) comes from
the cache the second time. So 22 D elements a token move at H = 4. Each program keeps its own product [H, D] in memory,
which stays in the cache, and a second kernel adds the programs' products in their order: same device, same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engram_kernels.launching.dependent import dependent_options, follow_predecessor
from engram_kernels.launching.device import cdiv, next_power_of_2, on_device_of, processors
from engram_kernels.launching.sums import ordered_sum
from engram_kernels.ops.call import registered

from .arguments import GateCall, rows_aligned
from .branch import gate_of, token_rows, widen
from .gradients import arrange_gradients, given, make_gate_gradients, readable, refuse_second_derivative, split_gradient
from .weights import launch_norm_gradient


@dataclass(frozen=True)
class GateBackwardConfig:
    """Tokens, branches (a power of two) and elements of D that a program holds at once, its warps, and programs."""

    block_t: int
    block_h: int
    block_d: int
    num_warps: int
    programs: int


def gate_backward_config(branches: int, hidden_size: int, num_tokens: int, processors: int) -> GateBackwardConfig:
    """Tiles of 1,024 of D whose warps lie along D, 8 elements a thread, so that a thread holds all branches of its own.

    The gradient of value, a sum over branches, then meets no other thread: 274 barriers and accesses of shared memory a
    token at H = 4 and D = 5120 (sm_90), where warps across branches had 2,082.
    Branches come one after the other in the second loop, where a thread would hold too much of all: 8 to 16 elements of
    each of six tensors. Two tokens share the norm weights they load, and one read and write of the product.

    Two programs a multiprocessor. Between its loops a block's grad should stay in the cache, and every program's
    product always: at H = 4 and D = 5120 80 KB each, 21 MB for the 264 programs of an H100, whose cache holds 50 MB.
    One program a multiprocessor would need half and wait for memory more often. BLOCK_D, which is part of the order of
    the sums over D, hence of the bits of a token's gradients, is a function of D alone.
    """
    block_h, block_d = next_power_of_2(branches), min(1024, next_power_of_2(hidden_size))
    num_warps = max(1, min(4, block_d // 256))
    block_t = max(1, min(2, 2048 * num_warps // (block_h * block_d)))
    programs = max(1, min(2 * processors, cdiv(num_tokens, block_t)))
    return GateBackwardConfig(block_t, block_h, block_d, num_warps, programs)


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "gate_backward_kernel": dict(sm_80=(232, 8192), sm_90=(248, 8192), sm_100=(240, 8192), gfx942=(160, 8192)),
}


@triton.jit
def gate_slope(d, root, clamp):
    """Derivative of the gate by d. ``gate * (1 - gate)`` as written would lose its digits near a gate of 1."""
    e = tl.exp(-root)
    return tl.where((tl.abs(d) < clamp) | (d == 0), 0.0, e / ((1.0 + e) * (1.0 + e) * (2.0 * root)))


@triton.jit
def within(offs_d, HIDDEN_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile exist: all, known when compiling, where tiles end with D."""
    return offs_d >= 0 if HIDDEN_SIZE % BLOCK_D == 0 else offs_d < HIDDEN_SIZE


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def gate_backward_kernel(
    grad_ptr,
    hidden_ptr,
    key_ptr,
    value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    scalars_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    scale_ptr,
    sums_ptr,
    value_part_ptr,
    grad_hidden_ptr,
    grad_key_ptr,
    grad_value_ptr,
    product_ptr,
    stride_grad_t,
    stride_grad_h,
    stride_hidden_t,
    stride_hidden_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_grad_hidden_t,
    stride_grad_key_t,
    stride_grad_value_t,
    num_tokens,
    num_seqs,
    clamp,
    conv_eps,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks of BLOCK_T tokens: every gradient that has a pointer, and this program's own product ``[H, D]``.

    Persistent grid: program p takes blocks p, p + programs, and so on. Relies on dense last dimensions. With scale_ptr
    it is the second pass over gate_conv_residual: see ops/conv_kernels/backward.py for ``sums`` and ``value_part``.
    """
    clamp, conv_eps = tl.cast(clamp, tl.float32), tl.cast(conv_eps, tl.float32)
    offs_b = tl.arange(0, BLOCK_H)[None, :]
    offs_h = offs_b[:, :, None].to(tl.int64)
    follow_predecessor()
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask_t = token < num_tokens
        live = mask_t
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + token, mask=mask_t, other=0) != 0)
        if cu_seqlens_ptr is not None:
            live = live & (token < tl.load(cu_seqlens_ptr + num_seqs))
        # Everything of a token that is not live reads as zero, so that nothing of it can spread, NaN included.
        live_b = live[:, None] & (offs_b < NUM_BRANCHES)
        scalars = scalars_ptr + token[:, None] * (3 * NUM_BRANCHES) + offs_b
        d = tl.load(scalars, mask=live_b, other=0)
        gate, root = gate_of(d, clamp, COPYSIGN)

        rows, mask_row, live_row = token[:, None], mask_t[:, None], live[:, None]
        value_row = token_rows(value_ptr, rows, 0, stride_value_t, 0, ALIGNED)
        if grad_value_ptr is not None:
            grad_value_row = token_rows(grad_value_ptr, rows, 0, stride_grad_value_t, 0, ALIGNED)
        if scale_ptr is None:
            grad_rows = token_rows(grad_ptr, token[:, None, None], offs_h, stride_grad_t, stride_grad_h, ALIGNED)
            live_rows = live_b[:, :, None]
            total = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
            for begin in range(0, HIDDEN_SIZE, BLOCK_D):
                offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
                mask_d = within(offs_d, HIDDEN_SIZE, BLOCK_D)
                value = widen(tl.load(value_row + offs_d, mask=live_row & mask_d, other=0))
                grad_tile = grad_rows + offs_d[:, None, :]
                mask_tile = live_rows & mask_d[:, None, :]
                grad = tl.load(grad_tile, mask=mask_tile, other=0, eviction_policy="evict_last")
                grad = widen(grad)
                total = tl.fma(grad, value[:, None, :], total)
                if grad_value_ptr is not None:
                    grad_value = ordered_sum(gate[:, :, None] * grad, axis=1).to(grad_value_ptr.dtype.element_ty)
                    tl.store(grad_value_row + offs_d, grad_value, mask=mask_row & mask_d)
            gate_grad = ordered_sum(total, axis=2)
        else:
            offs_c = tl.arange(0, BLOCK_C)[None, None, :].to(tl.int64)
            plane = tl.cast(num_tokens, tl.int64) * NUM_BRANCHES
            offs_scale = token[:, None] * NUM_BRANCHES + offs_b
            sums = sums_ptr + 2 * plane * offs_c + offs_scale[:, :, None]
            mask_c = live_b[:, :, None] & (offs_c < NUM_CHUNKS)
            scale = tl.load(scale_ptr + offs_scale, mask=live_b, other=0)
            gate_grad = ordered_sum(tl.load(sums, mask=mask_c, other=0), axis=2)
            scale_grad = ordered_sum(tl.load(sums + plane, mask=mask_c, other=0), axis=2)
            norm = tl.where(gate == 0, 0.0, scale / gate)
            gate_grad = tl.fma(scale_grad * norm, conv_eps * norm * norm, gate_grad)
            if grad_value_ptr is not None:
                value_factor = ordered_sum(scale_grad * scale * scale * scale, axis=1) / HIDDEN_SIZE
                for begin in range(0, HIDDEN_SIZE, BLOCK_D):
                    offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
                    mask_d = within(offs_d, HIDDEN_SIZE, BLOCK_D)
                    value = widen(tl.load(value_row + offs_d, mask=live_row & mask_d, other=0))
                    value_part = value_part_ptr + rows * HIDDEN_SIZE + offs_d
                    value_part = tl.load(value_part, mask=live_row & mask_d, other=0)
                    grad_value = tl.fma(value, -value_factor[:, None], value_part)
                    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
                    tl.store(grad_value_row + offs_d, grad_value, mask=mask_row & mask_d)

        slope = gate_slope(d, root, clamp)
        d_grad = tl.where(slope == 0, 0.0, gate_grad * slope)  # gate_grad may be infinite where the gate is flat
        for branch in range(NUM_BRANCHES):
            branch64 = tl.cast(branch, tl.int64)
            # One branch's numbers: all other terms are zero.
            own_grad = tl.sum(tl.where(offs_b == branch, d_grad, 0.0), axis=1)[:, None]
            scalar = scalars_ptr + rows * (3 * NUM_BRANCHES) + branch
            own_d = tl.load(scalar, mask=live_row, other=0)
            hidden_factor = tl.load(scalar + NUM_BRANCHES, mask=live_row, other=0)
            key_factor = tl.load(scalar + 2 * NUM_BRANCHES, mask=live_row, other=0)
            w_factor, state_factor = own_grad * (HIDDEN_SIZE**-0.5), own_grad * own_d * (-1.0 / HIDDEN_SIZE)
            hidden_w, hidden_state = hidden_factor * w_factor, hidden_factor * state_factor
            key_w, key_state = key_factor * w_factor, key_factor * state_factor
            grad_row = token_rows(grad_ptr, rows, branch64, stride_grad_t, stride_grad_h, ALIGNED)
            hidden_row = token_rows(hidden_ptr, rows, branch64, stride_hidden_t, stride_hidden_h, ALIGNED)
            key_row = token_rows(key_ptr, rows, branch64, stride_key_t, stride_key_h, ALIGNED)
            # From the end of D, where the first loop has just been.
            for back in range(0, HIDDEN_SIZE, BLOCK_D):
                offs_d = (HIDDEN_SIZE - 1) // BLOCK_D * BLOCK_D - back + tl.arange(0, BLOCK_D)[None, :]
                mask_d = within(offs_d, HIDDEN_SIZE, BLOCK_D)
                mask, mask_live = mask_row & mask_d, live_row & mask_d
                offs_w = branch * HIDDEN_SIZE + offs_d
                query_norm = widen(tl.load(query_norm_ptr + offs_w, mask=mask_d, other=0))
                key_norm = widen(tl.load(key_norm_ptr + offs_w, mask=mask_d, other=0))
                hidden = tl.load(hidden_row + offs_d, mask=mask_live, other=0, eviction_policy="evict_first")
                key = tl.load(key_row + offs_d, mask=mask_live, other=0, eviction_policy="evict_first")
                q, k, w = widen(hidden) * hidden_factor, widen(key) * key_factor, query_norm * key_norm
                if grad_hidden_ptr is not None:
                    grad_hidden = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                    if RESIDUAL:
                        grad = tl.load(grad_row + offs_d, mask=mask, other=0, eviction_policy="evict_first")
                        grad_hidden = widen(grad)
                    grad_hidden = tl.fma(q, hidden_state, grad_hidden)
                    grad_hidden = tl.fma(w * k, hidden_w, grad_hidden)
                    row = token_rows(grad_hidden_ptr, rows, branch64, stride_grad_hidden_t, HIDDEN_SIZE, ALIGNED)
                    grad_hidden = grad_hidden.to(grad_hidden_ptr.dtype.element_ty)
                    tl.store(row + offs_d, grad_hidden, mask=mask, eviction_policy="evict_first")
                if grad_key_ptr is not None:
                    grad_key = tl.fma(w * q, key_w, k * key_state)
                    row = token_rows(grad_key_ptr, rows, branch64, stride_grad_key_t, HIDDEN_SIZE, ALIGNED)
                    grad_key = grad_key.to(grad_key_ptr.dtype.element_ty)
                    tl.store(row + offs_d, grad_key, mask=mask, eviction_policy="evict_first")
                if product_ptr is not None:
                    product = ordered_sum(w_factor * (q * k), axis=0)[None, :]
                    own = product_ptr + tl.program_id(0).to(tl.int64) * (NUM_BRANCHES * HIDDEN_SIZE) + offs_w
                    # A tile of one: Triton 3.9's interpreter widens a scalar condition that it broadcasts.
                    later = block + tl.arange(0, 1)[:, None] >= tl.num_programs(0)
                    product += tl.load(own, mask=mask_d & later, other=0, eviction_policy="evict_last")
                    tl.store(own, product, mask=mask_d, eviction_policy="evict_last")
        if product_ptr is not None:
            # Another thread may read what one wrote: nothing makes a load's layout that of a store.
            tl.debug_barrier()


@dataclass(frozen=True)
class ConvParts:
    """What the convolution's kernel leaves to the gate's: see ops/conv_kernels/backward.py."""

    scale: torch.Tensor
    sums: torch.Tensor
    value_part: torch.Tensor | None
    conv_eps: float
    cu_seqlens: torch.Tensor | None


def launch_gate_backward(grad, call: GateCall, scalars, needs, gradients, conv: ConvParts | None = None) -> None:
    """Two launches, the second for the norms; writes ``gradients``, which :func:`make_gate_gradients` made."""
    branches, hidden_size = call.hidden.shape[-2:]
    grad_hidden, grad_kv, grad_query_norm, grad_key_norm = gradients
    if call.hidden.numel() == 0:
        for gradient in (grad_query_norm, grad_key_norm):
            if gradient is not None:
                gradient.zero_()
        return
    call, grad = call.flattened("gate_residual_backward"), readable(grad)
    hidden, key, value, query_norm, key_norm, *_ = call
    grad_key = grad_value = None
    if grad_kv is not None:
        grad_key, grad_value = split_gradient(grad_kv.view(-1, grad_kv.shape[-1]), branches, hidden_size, needs)
    num_tokens, size = len(hidden), branches * hidden_size
    config = gate_backward_config(branches, hidden_size, num_tokens, processors(hidden.device))
    product = None
    if needs[3] or needs[4]:
        product = torch.empty(config.programs, size, dtype=torch.float32, device=hidden.device)
    given = [tensor for tensor in (grad_hidden, grad_key, grad_value) if tensor is not None]
    chunks = 1 if conv is None else len(conv.sums)
    with on_device_of(hidden):
        gate_backward_kernel[(config.programs,)](
            grad,
            hidden,
            key,
            value,
            query_norm,
            key_norm,
            scalars,
            call.mask,
            conv and conv.cu_seqlens,
            conv and conv.scale,
            conv and conv.sums,
            conv and conv.value_part,
            grad_hidden,
            grad_key,
            grad_value,
            product,
            grad.stride(0),
            grad.stride(1),
            hidden.stride(0),
            hidden.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            size,
            0 if grad_key is None else grad_key.stride(0),
            0 if grad_value is None else grad_value.stride(0),
            num_tokens,
            0 if conv is None or conv.cu_seqlens is None else len(conv.cu_seqlens) - 1,
            float(call.clamp),
            0.0 if conv is None else conv.conv_eps,
            NUM_BRANCHES=branches,
            HIDDEN_SIZE=hidden_size,
            COPYSIGN=call.zero_gate == "copysign",
            RESIDUAL=call.residual,
            ALIGNED=rows_aligned(grad, hidden, key, value, *given),
            NUM_CHUNKS=chunks,
            BLOCK_C=next_power_of_2(chunks),
            BLOCK_T=config.block_t,
            BLOCK_H=config.block_h,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **dependent_options(),
        )
        if product is not None:
            launch_norm_gradient(product, query_norm, key_norm, grad_query_norm, grad_key_norm)


def _new_gradients(grad, hidden, key, value, query_norm, key_norm, *options):
    return given(make_gate_gradients(hidden, query_norm, key_norm, options[-1]))


@registered(
    "gate_residual_backward",
    "(Tensor grad, Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, Tensor scalars, "
    "float clamp, Tensor? mask, str zero_gate, bool residual, bool[] needs) -> Tensor[]",
    _new_gradients,
    refuse_second_derivative("gate_residual"),
)
def gate_residual_backward_op(grad, hidden, key, value, query_norm, key_norm, scalars, *options):
    """Gradients that ``needs`` asks for (hidden, key, value, query_norm, key_norm), key and value in one tensor."""
    *options, needs = options
    gradients = make_gate_gradients(hidden, query_norm, key_norm, needs)
    call = GateCall(hidden, key, value, query_norm, key_norm, None, *options)
    launch_gate_backward(grad, call, scalars, needs, gradients)
    return given(gradients)


def save_gate(ctx, inputs, output) -> None:
    """Keep the inputs and the scalars of gate_residual_scalars."""
    *tensors, _, clamp, mask, zero_gate, residual = inputs
    ctx.save_for_backward(*tensors, output[1], mask)
    ctx.options = clamp, zero_gate, residual
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else autograd makes zeros for the scalars


def gate_formula(ctx, grad, _):
    """Gradients of the arguments of gate_residual_scalars."""
    *tensors, scalars, mask = ctx.saved_tensors
    clamp, *options = ctx.options
    needs = list(ctx.needs_input_grad[:5])
    found = gate_residual_backward_op(grad, *tensors, scalars, clamp, mask, *options, needs)
    return *arrange_gradients(found, tensors[0], needs), None, None, None, None, None
