"""Gated residual addition.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))
    out  = hidden + gate * value

per token t and branch h, in float32, rounded once. T tokens, H branches, D hidden size. sgn(0) is +1 ("copysign",
DeepSeek-V4.1) or 0 ("sign", the demo and Qwen). Source: arXiv 2601.07372, section 2.3.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import reference
from .arguments import check_choice, check_no_out, check_out, check_tensor, is_kernel_device, records_gradient

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_BRANCHES, MAX_HIDDEN_SIZE = 8, 16_384


@dataclass(frozen=True)
class GateConfig:
    """Tokens, branches (a power of two) and elements of D that a program holds at once, and its warps."""

    block_t: int
    block_h: int
    block_d: int
    num_warps: int


def gate_config(branches: int, hidden_size: int) -> GateConfig:
    """Tiles of 2,048 elements, 16 a thread, with 256 of D, so that a warp sums a row of a tile alone.

    Two tokens share the norm weights they load: in float32 those are 2 H D * 4 bytes, more than the hidden state and
    key of one token. With four, the weights' tile has another layout than the hidden state's, and Triton converts one
    to the other through shared memory. A function of H and D only: it fixes the order of the sums over D, hence a
    token's bits.
    """
    block_h, block_d = triton.next_power_of_2(branches), min(256, triton.next_power_of_2(hidden_size))
    block_t = max(1, min(8, 2048 // (block_h * block_d)))
    return GateConfig(block_t, block_h, block_d, max(1, min(4, block_t * block_h * block_d // 512)))


# Registers and bytes of shared memory that no variant may exceed, on any supported Triton; the compile lane checks.
CEILINGS = {
    "gate_residual_kernel": dict(sm_80=(168, 4096), sm_90=(168, 4096), sm_100=(168, 4096), gfx942=(80, 8192)),
}


@triton.jit
def token_rows(base_ptr, token, offs_h, stride_t, stride_h, ALIGNED: tl.constexpr):
    """Pointers ``[BLOCK_T, BLOCK_H, 1]`` to the rows of tokens and branches.

    ALIGNED: the launcher found every row at a multiple of 16 bytes. Triton itself takes that from a stride only where
    it is a multiple of 16 elements.
    """
    rows = base_ptr + (token[:, None, None] * stride_t + offs_h.to(tl.int64) * stride_h)
    if ALIGNED:
        rows = tl.multiple_of(rows, (16, 16, 16))
    return rows


@triton.jit
def branch_gate(
    token,
    live,
    hidden_ptr,
    key_ptr,
    query_norm_ptr,
    key_norm_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_key_t,
    stride_key_h,
    eps,
    clamp,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gates ``[BLOCK_T, BLOCK_H]`` of tokens ``token [BLOCK_T]`` (int64); those not ``live`` are not read."""
    offs_h = tl.arange(0, BLOCK_H)[None, :, None]
    hidden_row = token_rows(hidden_ptr, token, offs_h, stride_hidden_t, stride_hidden_h, ALIGNED)
    key_row = token_rows(key_ptr, token, offs_h, stride_key_t, stride_key_h, ALIGNED)
    mask_row = live[:, None, None] & (offs_h < NUM_BRANCHES)
    hidden_square = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
    key_square = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, None, :]
        mask_d = offs_d < HIDDEN_SIZE
        mask_w = (offs_h < NUM_BRANCHES) & mask_d
        hidden = tl.load(hidden_row + offs_d, mask=mask_row & mask_d, other=0).to(tl.float32)
        key = tl.load(key_row + offs_d, mask=mask_row & mask_d, other=0).to(tl.float32)
        query_norm = tl.load(query_norm_ptr + offs_h * HIDDEN_SIZE + offs_d, mask=mask_w, other=0).to(tl.float32)
        key_norm = tl.load(key_norm_ptr + offs_h * HIDDEN_SIZE + offs_d, mask=mask_w, other=0).to(tl.float32)
        hidden_square += hidden * hidden
        key_square += key * key
        product += (hidden * query_norm) * (key * key_norm)
    hidden_scale = tl.rsqrt(tl.sum(hidden_square, axis=2) / HIDDEN_SIZE + eps)
    key_scale = tl.rsqrt(tl.sum(key_square, axis=2) / HIDDEN_SIZE + eps)
    d = tl.sum(product, axis=2) * hidden_scale * key_scale * (HIDDEN_SIZE**-0.5)
    magnitude = tl.abs(d)
    # Not tl.maximum, which drops NaN on NVIDIA hardware.
    root = tl.sqrt(tl.where(magnitude < clamp, clamp, magnitude))
    if COPYSIGN:
        logit = tl.where(d < 0, -root, root)
    else:
        logit = tl.where(d < 0, -root, tl.where(d == 0, 0.0, root))
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit(do_not_specialize=["num_tokens"])
def gate_residual_kernel(
    hidden_ptr,
    key_ptr,
    value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    mask_ptr,
    out_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_out_t,
    stride_out_h,
    num_tokens,
    eps,
    clamp,
    NUM_BRANCHES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_T tokens: their gates, then ``hidden + gate * value`` in all branches, a chunk of value read once for all.

    Grid (cdiv(T, BLOCK_T),). Relies on a dense last dimension. In place is safe: a token's sums over D are needed
    before its first store, and a chunk is read and written by the same program.
    """
    eps, clamp = tl.cast(eps, tl.float32), tl.cast(clamp, tl.float32)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < num_tokens
    live = mask_t
    if mask_ptr is not None:
        live = mask_t & (tl.load(mask_ptr + token, mask=mask_t, other=0) != 0)
    gate = branch_gate(
        token,
        live,
        hidden_ptr,
        key_ptr,
        query_norm_ptr,
        key_norm_ptr,
        stride_hidden_t,
        stride_hidden_h,
        stride_key_t,
        stride_key_h,
        eps,
        clamp,
        NUM_BRANCHES,
        HIDDEN_SIZE,
        COPYSIGN,
        ALIGNED,
        BLOCK_T,
        BLOCK_H,
        BLOCK_D,
    )
    offs_h = tl.arange(0, BLOCK_H)[None, :, None]
    hidden_row = token_rows(hidden_ptr, token, offs_h, stride_hidden_t, stride_hidden_h, ALIGNED)
    out_row = token_rows(out_ptr, token, offs_h, stride_out_t, stride_out_h, ALIGNED)
    value_row = token_rows(value_ptr, token, tl.arange(0, 1)[None, :, None], stride_value_t, 0, ALIGNED)
    mask_row = mask_t[:, None, None] & (offs_h < NUM_BRANCHES)
    for begin in range(0, HIDDEN_SIZE, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, None, :]
        mask_d = offs_d < HIDDEN_SIZE
        value = tl.load(value_row + offs_d, mask=live[:, None, None] & mask_d, other=0).to(tl.float32)
        result = gate[:, :, None] * value
        if RESIDUAL:
            hidden = tl.load(hidden_row + offs_d, mask=mask_row & mask_d, other=0)
            result = (result + hidden.to(tl.float32)).to(out_ptr.dtype.element_ty)
            # A masked token keeps its bits: -0.0 + 0.0 would not.
            result = tl.where(live[:, None, None], result, hidden)
        tl.store(out_row + offs_d, result.to(out_ptr.dtype.element_ty), mask=mask_row & mask_d)


def rows_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def float32_eps(eps: float | None) -> float:
    """What the kernels add inside a norm: None is the machine epsilon, as in torch.nn.RMSNorm."""
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


def launch_gate_residual(hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual, out) -> None:
    """One launch; hidden, key and out ``[..., H, D]``, value ``[..., D]``, whose leading dimensions view as one."""
    hidden, key, out = (
        flatten_tokens("gate_residual", name, tensor, 2)
        for name, tensor in (("hidden", hidden), ("key", key), ("out", out))
    )
    value = flatten_tokens("gate_residual", "value", value, 1)
    num_tokens, branches, hidden_size = hidden.shape
    if num_tokens == 0:
        return
    config = gate_config(branches, hidden_size)
    with torch.cuda.device_of(hidden):
        gate_residual_kernel[(triton.cdiv(num_tokens, config.block_t),)](
            hidden,
            key,
            value,
            query_norm,
            key_norm,
            mask,
            out,
            hidden.stride(0),
            hidden.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            out.stride(0),
            out.stride(1),
            num_tokens,
            float32_eps(eps),
            float(clamp),
            NUM_BRANCHES=branches,
            HIDDEN_SIZE=hidden_size,
            COPYSIGN=zero_gate == "copysign",
            RESIDUAL=residual,
            ALIGNED=rows_aligned(hidden, key, value, out),
            BLOCK_T=config.block_t,
            BLOCK_H=config.block_h,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )


@torch.library.custom_op(
    "engram::gate_residual",
    mutates_args=(),
    schema="(Tensor hidden, Tensor key, Tensor value, Tensor query_norm, Tensor key_norm, float? eps, float clamp, "
    "Tensor? mask, str zero_gate, bool residual) -> Tensor",
)
def gate_residual_op(hidden, *options):
    """:func:`gate_residual` for torch.compile."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    launch_gate_residual(hidden, *options, out)
    return out


@gate_residual_op.register_fake
def _(hidden, *options):
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


def check_gate(where, hidden, key, value, query_norm, key_norm, *, eps, clamp, mask, zero_gate) -> None:
    """Types, shapes and devices of what a gate reads."""
    check_tensor(where, "hidden", hidden, dtypes=FLOAT_DTYPES, contiguous=False)
    if hidden.dim() not in (3, 4):
        raise ValueError(f"{where}: hidden must have shape [T, H, D] or [B, S, H, D], got {list(hidden.shape)}")
    *tokens, branches, hidden_size = hidden.shape
    if not 1 <= branches <= MAX_BRANCHES or not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(
            f"{where}: hidden must have 1 to {MAX_BRANCHES} branches and a D of at most {MAX_HIDDEN_SIZE}, "
            f"got {list(hidden.shape)}"
        )
    for name, tensor, shape in (("key", key, hidden.shape), ("value", value, (*tokens, hidden_size))):
        check_tensor(where, name, tensor, dtypes=(hidden.dtype,), shape=shape, device=hidden.device, contiguous=False)
    for name, tensor in (("hidden", hidden), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1 and hidden_size > 1:
            raise ValueError(
                f"{where}: the last dimension of {name} must be dense, got strides {list(tensor.stride())}"
            )
    for name, tensor in (("query_norm", query_norm), ("key_norm", key_norm)):
        check_tensor(where, name, tensor, dtypes=FLOAT_DTYPES, shape=(branches, hidden_size), device=hidden.device)
    if mask is not None:
        check_tensor(where, "mask", mask, dtypes=(torch.bool,), shape=tokens, device=hidden.device)
    for name, number, optional in (("eps", eps, True), ("clamp", clamp, False)):
        if not (optional if number is None else 0 <= number < float("inf")):
            raise ValueError(f"{where}: {name} must be a finite number of at least 0, got {number}")
    check_choice(where, "zero_gate", zero_gate, ("copysign", "sign"))
    if hidden.is_cuda and hidden.dtype == torch.float64:
        raise TypeError(
            f"{where}: hidden must be bfloat16, float16 or float32 on a GPU, float64 is for the CPU; "
            f"got float64 on {hidden.device}"
        )


def check_gate_out(where, hidden, out) -> None:
    """Raise unless ``out`` is None, a contiguous tensor that fits, or ``hidden`` itself."""
    if out is not hidden:
        check_out(where, out, hidden.shape, hidden.dtype, hidden.device)


def flatten_tokens(where: str, name: str, tensor: torch.Tensor, kept: int) -> torch.Tensor:
    """``tensor`` with all but its last ``kept`` dimensions viewed as one; ValueError where that would take a copy."""
    shape = tensor.shape[tensor.dim() - kept :]
    try:
        return tensor.view(-1 if tensor.numel() else 0, *shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: leading dimensions of {name} must be viewable as one, "
            f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
        ) from None


def gate_residual(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    *,
    eps: float | None,
    clamp: float = 1e-6,
    mask: torch.Tensor | None = None,
    zero_gate: str = "copysign",
    residual: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``hidden + gate * value`` ``[T, H, D]`` (or ``[B, S, H, D]``), in the dtype of hidden.

    hidden, key: ``[T, H, D]``, value ``[T, D]``, of one dtype: bfloat16, float16 or float32 (float64 on the CPU), last
    dimension dense. key and value may be views of one ``kv [T, (H + 1) * D]``.
    query_norm, key_norm: ``[H, D]``, any float dtype, contiguous. eps: of both norms; None is the machine epsilon.
    clamp: below it ``|d|`` counts as clamp, which bounds the slope of the square root.
    mask: bool ``[T]``; where False, key and value are not read and hidden comes back bit for bit.
    zero_gate: "copysign" (a gate at d = 0 counts as positive) or "sign" (it is 0.5).
    residual: False returns ``gate * value`` alone. out: a contiguous tensor, or hidden itself.

    Where autograd records the call it runs the reference, on any device: the kernel has no backward yet.
    """
    where = "gate_residual"
    check_gate(where, hidden, key, value, query_norm, key_norm, eps=eps, clamp=clamp, mask=mask, zero_gate=zero_gate)
    check_gate_out(where, hidden, out)
    differentiable = records_gradient(hidden, key, value, query_norm, key_norm)
    if not is_kernel_device(hidden) or hidden.dtype == torch.float64 or differentiable:
        options = dict(eps=eps, clamp=clamp, mask=mask, zero_gate=zero_gate, residual=residual, out=out)
        return reference.gate_residual(hidden, key, value, query_norm, key_norm, **options)
    arguments = (hidden, key, value, query_norm, key_norm, eps, float(clamp), mask, zero_gate, residual)
    if torch.compiler.is_compiling():
        check_no_out(where, out)
        return gate_residual_op(*arguments)
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    launch_gate_residual(*arguments, out)
    return out
