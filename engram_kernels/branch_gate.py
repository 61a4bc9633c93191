"""The gate of each token and branch inside a kernel, and what every kernel that reads hidden states row by row shares.

    d    = <rms(hidden) * query_norm, rms(key) * key_norm> / sqrt(D)
    gate = sigmoid(sgn(d) * sqrt(max(|d|, clamp)))

in float32. The scales of hidden and key are rsqrt(mean(x^2) + eps). T tokens, H branches, D hidden size.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2


@dataclass(frozen=True)
class GateConfig:
    """Tokens, branches (a power of two) and elements of D that a program holds at once, and its warps."""

    block_t: int
    block_h: int
    block_d: int
    num_warps: int


@lru_cache
def gate_config(branches: int, hidden_size: int) -> GateConfig:
    """Tiles of 2,048 elements, 16 a thread, with 256 of D, so that a warp sums a row of a tile alone.

    Two tokens share the norm weights they load: in float32 those are 2 H D * 4 bytes, more than the hidden state and
    key of one token. With four, the weights' tile has another layout than the hidden state's, and Triton converts one
    to the other through shared memory. A function of H and D only: it fixes the order of the sums over D, hence a
    token's bits.
    """
    block_h, block_d = next_power_of_2(branches), min(256, next_power_of_2(hidden_size))
    block_t = max(1, min(8, 2048 // (block_h * block_d)))
    return GateConfig(block_t, block_h, block_d, max(1, min(4, block_t * block_h * block_d // 512)))


@triton.jit
def token_rows(base_ptr, token, offs_h, stride_t, stride_h, ALIGNED: tl.constexpr):
    """Pointers ``[BLOCK_T, BLOCK_H, 1]`` to the rows of tokens and branches.

    ALIGNED: the launcher found every row at a multiple of 16 bytes. Triton itself takes that from a stride only where
    it is a multiple of 16 elements.
    """
    rows = base_ptr + (token[:, None, None] * stride_t + offs_h.to(tl.int64) * stride_h)
    if ALIGNED:
        # Triton 3.9 folds a tile of one row to a scalar and fails on its three hints; the strides have to do there.
        if rows.numel > 1:
            rows = tl.multiple_of(rows, (16, 16, 16))
    return rows


@triton.jit
def gate_of(d, clamp, COPYSIGN: tl.constexpr):
    """The gate of ``d``, and the square root in it."""
    magnitude = tl.abs(d)
    # Not tl.maximum, which drops NaN on NVIDIA hardware.
    root = tl.sqrt(tl.where(magnitude < clamp, clamp, magnitude))
    if COPYSIGN:
        logit = tl.where(d < 0, -root, root)
    else:
        logit = tl.where(d < 0, -root, tl.where(d == 0, 0.0, root))
    return 1.0 / (1.0 + tl.exp(-logit)), root


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
    """Gates ``[BLOCK_T, BLOCK_H]`` of tokens ``token [BLOCK_T]`` (int64), with d and the scales of hidden and key.

    Tokens that are not ``live`` are not read.
    """
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
    gate, _ = gate_of(d, clamp, COPYSIGN)
    return gate, d, hidden_scale, key_scale


@triton.jit
def store_scalars(
    scalars_ptr, token, mask_t, d, hidden_scale, key_scale, NUM_BRANCHES: tl.constexpr, BLOCK_H: tl.constexpr
):
    """What the backward pass needs of each token and branch, ``[T, 3, H]``: d and the scales of hidden and key."""
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    offs = token[:, None] * (3 * NUM_BRANCHES) + offs_h
    mask = mask_t[:, None] & (offs_h < NUM_BRANCHES)
    tl.store(scalars_ptr + offs, d, mask=mask)
    tl.store(scalars_ptr + offs + NUM_BRANCHES, hidden_scale, mask=mask)
    tl.store(scalars_ptr + offs + 2 * NUM_BRANCHES, key_scale, mask=mask)


def rows_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return strides_aligned(*tensors) and addresses_aligned(*tensors)


def strides_aligned(*tensors: torch.Tensor) -> bool:
    """Whether the rows of every tensor are multiples of 16 bytes apart."""
    return all(stride * tensor.element_size() % 16 == 0 for tensor in tensors for stride in tensor.stride()[:-1])


def addresses_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes."""
    misaligned = 0  # a bit below 16 is set where it is set in any address
    for tensor in tensors:
        misaligned |= tensor.data_ptr()
    return misaligned % 16 == 0


def float32_eps(eps: float | None) -> float:
    """What the kernels add inside a norm: None is the machine epsilon, as in torch.nn.RMSNorm."""
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


def flatten_tokens(where: str, name: str, tensor: torch.Tensor, kept: int) -> torch.Tensor:
    """``tensor`` with all but its last ``kept`` dimensions viewed as one; ValueError where that would take a copy."""
    if tensor.dim() == kept + 1:
        return tensor
    shape = tensor.shape[tensor.dim() - kept :]
    try:
        return tensor.view(-1 if tensor.numel() else 0, *shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: leading dimensions of {name} must be viewable as one, "
            f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
        ) from None
