"""A module's weights from a checkpoint's tensors, as the numbers that they stand for.

Dense ones (float32, bfloat16, float16, float64) are those numbers. e4m3 ones are times the scale beside them:

    {name}.scale               DeepSeek-V4.1: ue8m0, one per block of 32 x 32
    {name}.weight_scale_inv    DeepSeek-V3 and Qwen: one float per block of 128 x 128; a factor, in spite of its name
    {name}.weight_scale        compressed-tensors, ModelOpt: one float for all, or one per row [rows] or [rows, 1]

Which of these shapes a scale has, its shape tells, whatever it is called. All else is a code for numbers, and refused:
a cast would take it for them. Sources: the published checkpoints, and the loaders of vLLM (layers/quantization).
"""

from collections.abc import Mapping

import torch

from engram_kernels.geometry.row_format import check_content

from .names import SCALE_NAMES

_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALE_DTYPES = (*_DENSE, torch.float8_e8m0fnu, torch.uint8)
#: What may lie beside a weight without changing it: a bias, and the scale of what it is multiplied with.
_BESIDE = ("weight", "bias", "input_scale")


def dense_tensor(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    """The tensor called ``name``; ValueError where there is none, or none of a dense dtype."""
    tensor = _tensor(tensors, name, where)
    if tensor.dtype not in _DENSE:
        raise ValueError(
            f"{where}: {name} must be float32, bfloat16, float16 or float64, got {_described(tensor)}, whose numbers "
            "are no weights; load the model's bfloat16 checkpoint instead"
        )
    stem, _, last = name.rpartition(".")
    if last == "weight" and (scales := [each for rest in SCALE_NAMES if (each := f"{stem}.{rest}") in tensors]):
        raise ValueError(f"{where}: {name} is {tensor.dtype} and takes no scale, got {', '.join(scales)}")
    return tensor


def matrix(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    """``{name}.weight [rows, columns]``; one in e4m3 times its scale, in float32.

    ValueError names what is missing, of another shape, or beside it and not understood.
    """
    weight = _tensor(tensors, f"{name}.weight", where)
    beside = [each for each in tensors if each.startswith(f"{name}.")]
    known = {f"{name}.{rest}" for rest in (*_BESIDE, *SCALE_NAMES)}
    if foreign := [each for each in beside if each not in known]:
        raise ValueError(f"{where}: {name}.weight must stand for itself, got {', '.join(foreign)} beside it")
    if weight.dim() != 2:
        raise ValueError(f"{where}: {name}.weight must have shape [rows, columns], got {list(weight.shape)}")
    if weight.dtype != torch.float8_e4m3fn:
        return dense_tensor(tensors, f"{name}.weight", where)
    scales = [each for rest in SCALE_NAMES if (each := f"{name}.{rest}") in tensors]
    if len(scales) != 1:
        expected, got = " or ".join(f"{name}.{rest}" for rest in SCALE_NAMES), ", ".join(scales) or "none"
        raise ValueError(f"{where}: {name}.weight is {weight.dtype} and needs one scale, {expected}, got {got}")
    return weight.to(torch.float32) * _factors(tensors, scales[0], weight, name, where)


def _factors(tensors, name: str, weight: torch.Tensor, owner: str, where: str) -> torch.Tensor:
    """The scale called ``name`` as float32 that broadcasts over ``weight``."""
    scale = _tensor(tensors, name, where)
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{where}: {name} must be of a float dtype or ue8m0, got {_described(scale)}")
    values = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
    if not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"{where}: {name} must hold positive numbers of float32, got others")
    if values.numel() == 1:
        return values.reshape(())
    if values.dim() == 1 and len(values) == len(weight):
        return values[:, None]
    # Blocks are powers of two, and the last of a dimension may be a part of one.
    shape = list(weight.shape)
    blocks = [
        1 << (-(-size // count) - 1).bit_length() for size, count in zip(shape, values.shape, strict=False) if count
    ]
    expected = [-(-size // block) for size, block in zip(shape, blocks, strict=False)]
    if list(values.shape) != expected:
        raise ValueError(
            f"{where}: {name} must have one entry per block of {owner}.weight {shape}, got {list(scale.shape)}"
        )
    for dim, block in enumerate(blocks):
        values = values.repeat_interleave(block, dim).narrow(dim, 0, shape[dim])
    return values


def _tensor(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"{where}: the checkpoint has no tensor {name}")
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    check_content(tensor, name, where)
    return tensor


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
