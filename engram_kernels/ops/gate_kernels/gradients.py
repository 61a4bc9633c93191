"""Where the gradients of a gate live, and the split of kv that costs no copy in either direction.

key ``[T, H, D]`` and value ``[T, D]`` are views of one kv ``[T, (H + 1) * D]``. Their gradients are views of one tensor
of that shape too, which :func:`split_kv` hands back as the gradient of kv.
"""

import torch

from engram_kernels.geometry.kinds import Tensor, Whole, check_all, declares
from engram_kernels.launching.device import is_kernel_device

from .arguments import FLOAT_DTYPES

_SPLIT = dict(kv=Tensor(*FLOAT_DTYPES), branches=Whole(1), hidden_size=Whole(1))


def readable(grad: torch.Tensor) -> torch.Tensor:
    """``grad [..., H, D]`` as ``[T, H, D]`` with a dense last dimension; a copy only where its strides need one.

    Autograd hands on what it has: the gradient of a sum is one number expanded.
    """
    if grad.stride(-1) != 1 and grad.shape[-1] > 1:
        grad = grad.contiguous()
    return grad.reshape(-1, *grad.shape[-2:])


def make_recorded(hidden):
    """The output, and the scalars ``[..., 3, H]`` that :func:`store_scalars` writes."""
    *tokens, branches, _ = hidden.shape
    return hidden.new_empty(hidden.shape), hidden.new_empty(*tokens, 3, branches, dtype=torch.float32)


def make_gate_gradients(hidden, query_norm, key_norm, needs):
    """Gradients to be written, None where ``needs`` has False: of hidden, of key and value in one, of both norms.

    key and value share ``[..., (H + 1) * D]`` as they do in kv, so that whoever split kv can join them without a copy.
    """
    *tokens, branches, hidden_size = hidden.shape
    # Without a product of a size and a bool, which a symbolic size of torch 2.11 refuses.
    width = ((branches if needs[1] else 0) + (1 if needs[2] else 0)) * hidden_size
    return (
        hidden.new_empty(hidden.shape) if needs[0] else None,
        hidden.new_empty(*tokens, width) if width else None,
        query_norm.new_empty(query_norm.shape) if needs[3] else None,
        key_norm.new_empty(key_norm.shape) if needs[4] else None,
    )


def given(gradients) -> list[torch.Tensor]:
    """Those gradients that are wanted, as backward ops return them."""
    return [gradient for gradient in gradients if gradient is not None]


def split_gradient(grad_kv, branches, hidden_size, needs):
    """Gradients of key ``[..., H, D]`` and value ``[..., D]`` as views of ``grad_kv``, None where there is none."""
    keys = branches * hidden_size if needs[1] else 0
    grad_key = grad_kv[..., :keys].unflatten(-1, (branches, hidden_size)) if needs[1] else None
    return grad_key, grad_kv[..., keys:] if needs[2] else None


def arrange_gradients(found, hidden, needs):
    """One gradient for each entry of ``needs`` from the list that a backward op returns, None where it is False."""
    found, gradients = iter(found), [None] * len(needs)
    gradients[0] = next(found) if needs[0] else None
    if needs[1] or needs[2]:
        gradients[1], gradients[2] = split_gradient(next(found), *hidden.shape[-2:], needs)
    for place in range(3, len(needs)):
        gradients[place] = next(found) if needs[place] else None
    return gradients


def refuse_second_derivative(name: str):
    """An autograd formula for the op that computes first derivatives of ``name``."""

    def refuse(ctx, *_):
        raise NotImplementedError(
            f"{name}: its gradient cannot be differentiated again (create_graph=True); reference.{name} can"
        )

    return refuse


class SplitKV(torch.autograd.Function):
    """Views of kv as key and value, and back: see :func:`split_kv`."""

    @staticmethod
    def forward(kv, branches, hidden_size):
        return _views(kv, branches, hidden_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.split = inputs[1:]

    @staticmethod
    def backward(ctx, grad_key, grad_value):
        branches, hidden_size = ctx.split
        if grad_key is None and grad_value is None:
            return None, None, None
        if grad_key is None:
            grad_key = grad_value.new_zeros(*grad_value.shape[:-1], branches, hidden_size)
        if grad_value is None:
            grad_value = grad_key.new_zeros(*grad_key.shape[:-2], hidden_size)
        return _join(grad_key, grad_value), None, None


@declares(**_SPLIT)
def split_kv(kv: torch.Tensor, branches: int, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key ``[..., H, D]`` and value ``[..., D]`` as views of ``kv [..., (H + 1) * D]``, the projection of rows.

    branches: H, whose keys come first. hidden_size: D. Any float dtype, any strides.
    Where the gradients that come back are views of one tensor, as those of the kernels are, that tensor is kv's
    gradient. torch.split would copy both, 10 D elements a token at H = 4, and slices would write zeros besides.
    ValueError where kv has another last dimension.
    """
    check_all("split_kv", _SPLIT, dict(kv=kv, branches=branches, hidden_size=hidden_size))
    if not kv.dim() or kv.shape[-1] != (branches + 1) * hidden_size:
        raise ValueError(
            f"split_kv: kv must have shape [..., (H + 1) * D], which ends with {(branches + 1) * hidden_size}, "
            f"got {list(kv.shape)}"
        )
    recorded = torch.is_grad_enabled() and kv.requires_grad
    if recorded and is_kernel_device(kv) and not torch.compiler.is_compiling():
        return SplitKV.apply(kv, branches, hidden_size)
    return _views(kv, branches, hidden_size)


def _views(kv, branches, hidden_size):
    key, value = kv.split([branches * hidden_size, hidden_size], dim=-1)
    return key.unflatten(-1, (branches, hidden_size)), value


def _join(grad_key: torch.Tensor, grad_value: torch.Tensor) -> torch.Tensor:
    """``[..., (H + 1) * D]``: the tensor that both are views of where there is one, else a new one."""
    *tokens, branches, hidden_size = grad_key.shape
    keys = branches * hidden_size
    neighbours = (
        grad_key.untyped_storage().data_ptr() == grad_value.untyped_storage().data_ptr()
        and grad_key.dtype == grad_value.dtype
        and grad_value.storage_offset() == grad_key.storage_offset() + keys
        and grad_key.stride() == (*grad_value.stride()[:-1], hidden_size, 1)
        and grad_value.stride(-1) == 1
    )
    # A view of the memory hides the value's part from autograd, which matters where this is recorded again.
    if neighbours and not torch.is_grad_enabled():
        return grad_key.as_strided((*tokens, keys + hidden_size), (*grad_value.stride()[:-1], 1))
    return torch.cat([grad_key.flatten(-2), grad_value], dim=-1)
