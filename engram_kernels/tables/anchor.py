"""The gradient of a table's anchor, under what torch's own tools do with gradients.

It is one element, the Euclidean norm of the rows' gradient: what multiplies it multiplies the rows when an optimizer
takes its step, so that clip_grad_norm_ and a GradScaler read and write one number. One element does not tell the other
norms, nor what clamping makes of it: both come from the rows. Whatever else is done to a gradient is refused.
"""

from typing import Any

import torch

from .gradient import RowGradient

#: Functions of torch by name, as __torch_function__ is told: those that multiply, in place and into a new tensor;
_SCALING_IN_PLACE = {"mul_", "div_", "multiply_", "divide_", "true_divide_", "neg_", "zero_"}
_SCALING_IN_PLACE |= {"_foreach_mul_", "_foreach_div_", "_foreach_zero_", "_amp_foreach_non_finite_check_and_unscale_"}
_SCALING = {"mul", "div", "multiply", "divide", "true_divide", "neg", "__mul__", "__rmul__", "__truediv__", "__neg__"}
#: the same element again;
_SAME = {"detach", "clone", "to", "cpu", "cuda", "float", "double", "contiguous"}
#: norms, and limits to elements;
_NORMS = {"linalg_vector_norm", "linalg_norm", "norm", "_foreach_norm"}
_CLAMPS = {"clamp_", "clip_", "clamp_min_", "clamp_max_", "_foreach_clamp_min_", "_foreach_clamp_max_"}
#: and what asks for facts, which are the rows' too.
_READING = {"item", "tolist", "__float__", "__repr__", "__str__", "__format__", "isfinite", "isnan", "isinf", "size"}
_READING |= {"dim", "numel", "nelement", "stride", "element_size", "data_ptr", "is_floating_point", "is_complex"}
_READING |= {"is_contiguous", "requires_grad_", "detach_", "__hash__", "get_device", "__len__"}
_KNOWN = _SCALING_IN_PLACE | _SCALING | _SAME | _NORMS | _CLAMPS | _READING


class RowNorm(torch.Tensor):
    """``anchor.grad``: the norm of ``gradient``, times what has scaled it since the backward pass."""

    gradient: RowGradient

    @classmethod
    def of(cls, gradient: RowGradient, anchor: torch.Tensor) -> "RowNorm":
        """The norm, with the anchor's shape, dtype and device."""
        return _standing_for(gradient, gradient.norm().to(anchor)[None])

    def factor(self) -> torch.Tensor:
        """What the norm was multiplied by, a scalar tensor; 1 where that cannot be told, since the norm is 0 or NaN."""
        with torch._C.DisableTorchFunctionSubclass():
            norm = self.gradient.norm()
            scaled = self.detach()[0].to(norm)
            # Infinity times 0 is what clipping makes of it, and finite rows are 0 then; else it is not known.
            of_infinity = torch.where(scaled.isnan(), 0.0, 1.0)
            return torch.where((norm > 0) & norm.isfinite(), scaled / norm, torch.where(norm.isinf(), of_infinity, 1.0))

    def norm_of_order(self, order: float) -> torch.Tensor:
        """The norm of this order of the rows' scaled gradient, a scalar."""
        with torch._C.DisableTorchFunctionSubclass():
            if order == 2:
                return self.detach()[0].abs()
            return (self.gradient.norm(order) * self.factor().abs()).to(self.dtype)

    def clamp_rows(self, low: float | None, high: float | None) -> None:
        """Bring every element of the rows' scaled gradient within low..high, in place."""
        low, high = (None if limit is None else float(limit) for limit in (low, high))
        if (low is not None and not low <= 0) or (high is not None and not high >= 0):
            raise ValueError(
                "EngramTable.anchor.grad: limits must be on both sides of 0, which is the gradient of all other rows, "
                f"got {low} and {high}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            self.gradient.clamp_(low, high, self.factor())
            self.copy_(self.gradient.norm()[None])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
            result = _plainly(func, args, kwargs)
            if name != "data" and isinstance(result, torch.Tensor):
                raise _refusal(name)
            return result if result is None or name != "data" else _standing_for(args[0].gradient, result)
        if name not in _KNOWN or any(map(_holds_norm, (*args[1:], *kwargs.values()))):
            raise _refusal(name)
        if name in _NORMS:
            return _norms(func, *args, **kwargs)
        if name in _CLAMPS:
            return _clamped(func, name, args, kwargs)
        result = _plainly(func, args, kwargs)
        if name in _SCALING | _SAME:
            if result.numel() != 1:
                raise _refusal(f"{name} with a tensor of shape {list(result.shape)}")
            return _standing_for(args[0].gradient, result)
        return result


def _standing_for(gradient: RowGradient, element: torch.Tensor) -> RowNorm:
    found = element.as_subclass(RowNorm)
    found.gradient = gradient
    return found


def _plainly(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _holds_norm(value) -> bool:
    return isinstance(value, RowNorm) or (isinstance(value, (list, tuple)) and any(map(_holds_norm, value)))


def _refusal(what: str) -> ValueError:
    # No TypeError: Python would make "unsupported operand" of it where an operator raises one.
    return ValueError(
        "EngramTable.anchor.grad: expected a norm, multiplication by a number, or limits in place (clamp_), which act "
        f"on the rows, got {what}. It is one element, the norm of all rows; table.row_grad holds these"
    )


def _norms(func, given, *args, **kwargs) -> Any:
    """Norms of one gradient or of a list, those of rows from their elements."""
    options = dict(zip(("ord",), args, strict=False)) | kwargs
    order = options.pop("ord", options.pop("p", 2))
    order, dtype = 2.0 if order in (None, "fro") else float(order), options.pop("dtype", None)
    if len(args) > 1 or not all(value is None or value is False for value in options.values()):
        raise _refusal(f"{func.__name__} of a dimension")
    if not order > 0:
        raise ValueError(f"EngramTable.anchor.grad: a norm's order must be above 0, got {order:g}")
    several = isinstance(given, (list, tuple))
    found = list(_plainly(func, (given, order), {"dtype": dtype})) if several else [None]
    for place, tensor in enumerate(given if several else (given,)):
        if isinstance(tensor, RowNorm):
            norm = tensor.norm_of_order(order)
            found[place] = norm if dtype is None else norm.to(dtype)
    return found if several else found[0]


def _clamped(func, name: str, args, kwargs) -> Any:
    """One gradient or a list within limits, in place."""
    given, *limits = args
    low, high = kwargs.get("min"), kwargs.get("max")
    if name.strip("_") in ("clamp", "clip"):
        low, high = (*limits, *(low, high)[len(limits) :])
    elif "min" in name:
        (low,) = limits or (low,)
    else:
        (high,) = limits or (high,)
    if any(isinstance(limit, (list, tuple)) for limit in (low, high)):
        raise _refusal(f"{name} with limits of each")
    if isinstance(given, RowNorm):
        given.clamp_rows(low, high)
        return given
    for tensor in given:
        if isinstance(tensor, RowNorm):
            tensor.clamp_rows(low, high)
    if others := [tensor for tensor in given if not isinstance(tensor, RowNorm)]:
        func(others, *limits, **kwargs)
    return None
