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
from triton.runtime import driver

from .arguments import INTERPRETING
from .launch import next_power_of_2


@dataclass(frozen=True)
class GateConfig:
    """Tokens and elements of D that a program holds at once in its branch, and its warps.

    stages: of the pipelined loop that sums over D, 1 for none. block_out: elements of D that are written at once.
    """

    block_t: int
    block_d: int
    num_warps: int
    stages: int
    block_out: int


FEW_TOKENS = 32  # as many are at most one program a multiprocessor, and those wait for memory


def few_tokens(num_tokens: int) -> bool:
    """Whether :func:`gate_config` is asked for few: on NVIDIA alone, as AMD's compiler would sum in another order."""
    return num_tokens <= FEW_TOKENS and (INTERPRETING or driver.active.get_current_target().backend == "cuda")


@lru_cache
def gate_config(hidden_size: int, few: bool = False) -> GateConfig:
    """Tiles of 2 tokens x 1,024 of D, 16 elements a thread: two tokens share the norm weights they load.

    All warps lie along D, so that the order of a row's sums does not depend on the number of tokens in a tile: it is a
    function of D and the dtypes alone, and a token keeps its bits. Few tokens have a tile each, and wait for memory: at
    D = 5120 all five tiles of a row are on their way at once then, through 32 KB (bfloat16) or 64 KB (float32) of
    shared memory, and four are written at once. That is 3 round trips in place of 10.
    """
    block_d = min(1024, next_power_of_2(hidden_size))
    num_warps = max(1, min(4, block_d // 256))
    block_t = max(1, num_warps * (256 if few else 512) // block_d)
    stages, block_out = (5, min(4096, next_power_of_2(hidden_size))) if few else (1, block_d)
    return GateConfig(block_t, block_d, num_warps, stages, block_out)


@triton.jit
def token_rows(base_ptr, token, branch, stride_t, stride_h, ALIGNED: tl.constexpr):
    """Pointers to the rows of tokens and branches, int64 both, which broadcast against each other.

    ALIGNED: the launcher found every row at a multiple of 16 bytes. Triton itself takes that from a stride only where
    it is a multiple of 16 elements.
    """
    stride_t, stride_h = tl.cast(stride_t, tl.int64), tl.cast(stride_h, tl.int64)
    if ALIGNED:
        VECTOR: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
        stride_t, stride_h = tl.multiple_of(stride_t, VECTOR), tl.multiple_of(stride_h, VECTOR)
    return base_ptr + (token * stride_t + branch * stride_h)


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
    branch,
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
    HIDDEN_SIZE: tl.constexpr,
    COPYSIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gates ``[BLOCK_T]`` of tokens ``token [BLOCK_T]`` in one branch, with d and the scales of hidden and key.

    ``token`` and ``branch`` are int64. Tokens that are not ``live`` are not read.
    """
    hidden_row = token_rows(hidden_ptr, token[:, None], branch, stride_hidden_t, stride_hidden_h, ALIGNED)
    key_row = token_rows(key_ptr, token[:, None], branch, stride_key_t, stride_key_h, ALIGNED)
    hidden_square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    key_square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for begin in tl.range(0, HIDDEN_SIZE, BLOCK_D, num_stages=STAGES):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < HIDDEN_SIZE
        offs_w = branch * HIDDEN_SIZE + offs_d
        hidden = tl.load(hidden_row + offs_d, mask=live[:, None] & mask_d, other=0).to(tl.float32)
        key = tl.load(key_row + offs_d, mask=live[:, None] & mask_d, other=0).to(tl.float32)
        query_norm = tl.load(query_norm_ptr + offs_w, mask=mask_d, other=0).to(tl.float32)
        key_norm = tl.load(key_norm_ptr + offs_w, mask=mask_d, other=0).to(tl.float32)
        hidden_square += hidden * hidden
        key_square += key * key
        product += (hidden * query_norm) * (key * key_norm)
    hidden_scale = tl.rsqrt(tl.sum(hidden_square, axis=1) / HIDDEN_SIZE + eps)
    key_scale = tl.rsqrt(tl.sum(key_square, axis=1) / HIDDEN_SIZE + eps)
    d = tl.sum(product, axis=1) * hidden_scale * key_scale * (HIDDEN_SIZE**-0.5)
    gate, _ = gate_of(d, clamp, COPYSIGN)
    return gate, d, hidden_scale, key_scale


@triton.jit
def store_scalars(scalars_ptr, token, branch, mask_t, d, hidden_scale, key_scale, NUM_BRANCHES: tl.constexpr):
    """What the backward pass needs of tokens in a branch, into ``[T, 3, H]``: d and the scales of hidden and key."""
    offs = token * (3 * NUM_BRANCHES) + branch
    tl.store(scalars_ptr + offs, d, mask=mask_t)
    tl.store(scalars_ptr + offs + NUM_BRANCHES, hidden_scale, mask=mask_t)
    tl.store(scalars_ptr + offs + 2 * NUM_BRANCHES, key_scale, mask=mask_t)


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
