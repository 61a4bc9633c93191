"""Columns of every token times a weight each.

    out = x * weight        per token t and element d, in float32, rounded once

T tokens, D elements. To copy to engram_kernels/ops/scaling.py.
"""

from typing import NamedTuple

import torch

from engram_kernels.launching.checks import check_out, check_tensor, records_gradient
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.ops.call import Op, form_of, registered, writes_alone

from . import reference
from .kernel import prepare_scale_columns


class ScalingCall(NamedTuple):
    """The arguments of :func:`scale_columns`, but for ``out``."""

    x: torch.Tensor
    weight: torch.Tensor


class ScaleColumns(Op):
    """:func:`scale_columns`."""

    name = "scale_columns"
    input_names = ScalingCall._fields

    def signature(self, call, out):
        return form_of(*call, out)  # and every option that a launch depends on

    def check(self, call, out):
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        check_tensor(self.name, "x", call.x, dtypes=dtypes)
        if call.x.ndim != 2:
            raise ValueError(f"{self.name}: x must have shape [T, D], got {list(call.x.shape)}")
        shape = call.x.shape[1:]
        check_tensor(self.name, "weight", call.weight, dtypes=(torch.float32,), shape=shape, device=call.x.device)
        check_out(self.name, out, call.x.shape, call.x.dtype, call.x.device)

    def inputs(self, call):
        return call

    def on_kernels(self, call):
        return is_kernel_device(call.x)

    def records(self, call):
        return records_gradient(*call)

    def record(self, call, out):  # ops/gate.py has an op whose gradients are kernels
        result = self.reference(call, None)
        return result if out is None else out.copy_(result)

    def reference(self, call, out):
        return reference.scale_columns(*call, out=out)

    def compiled(self, call, out):
        if out is None:
            return scale_columns_op(*call)
        scale_columns_out_op(*call, out)
        return out

    def allocate(self, call):
        return torch.empty_like(call.x)

    def launcher(self, call, out):
        launch = prepare_scale_columns(call.x)
        return lambda call, out: launch(*call, out)


SCALING = ScaleColumns()


@registered("scale_columns", "(Tensor x, Tensor weight) -> Tensor", lambda *call: SCALING.allocate(ScalingCall(*call)))
def scale_columns_op(x, weight):
    """:func:`scale_columns` for torch.compile."""
    return SCALING.launch(ScalingCall(x, weight))


@registered("scale_columns_out", "(Tensor x, Tensor weight, Tensor(a!) out) -> ()", writes_alone)
def scale_columns_out_op(x, weight, out):
    """:func:`scale_columns` for torch.compile, into ``out``."""
    SCALING.launch(ScalingCall(x, weight), out)


def scale_columns(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x * weight`` ``[T, D]``, in the dtype of x.

    x: ``[T, D]``, float32, bfloat16 or float16, contiguous. weight: ``[D]``, float32. out: a contiguous tensor to write
    to. Raises TypeError or ValueError where these do not fit each other.
    """
    return SCALING(ScalingCall(x, weight), out)
