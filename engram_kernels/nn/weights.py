"""The weights of one Engram layer in a checkpoint, by the names and in the shapes of the module's parameters."""

from collections.abc import Mapping

import torch

from engram_kernels.checkpoints.weights import dense_tensor, matrix
from engram_kernels.geometry.config import EngramConfig


def layer_weights(
    where: str,
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    config: EngramConfig,
    parameters: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """A tensor for each of ``parameters``, of its shape, from those whose names start with ``prefix``.

    ValueError, in the name of ``where``, for one that is missing, has another shape or is more than the config has.
    """
    if prefix + "wkv.weight" in tensors:
        loaded = {"wkv.weight": matrix(tensors, prefix + "wkv", where)}
        optional = [name for name in ("wkv.bias", "conv_norm", "conv_weight") if prefix + name in tensors]
        for name in ("q_weight", "k_weight", *optional):
            loaded[name] = dense_tensor(tensors, prefix + name, where)
    elif prefix + "key_proj.weight" in tensors:
        loaded = _qwen_tensors(tensors, prefix, config, where)
    else:
        raise ValueError(
            f"{where}: expected {prefix}wkv.weight (DeepSeek-V4.1) or {prefix}key_proj.weight (Qwen), got neither"
        )
    if more := sorted(loaded.keys() - parameters.keys()):
        raise ValueError(f"{where}: the checkpoint has {', '.join(more)}, and this config has none")
    for name, parameter in parameters.items():
        if name not in loaded:
            raise ValueError(f"{where}: this config needs {name}, and the checkpoint has none")
        if loaded[name].shape != parameter.shape:
            raise ValueError(f"{where}: {name} must have shape {list(parameter.shape)}, got {list(loaded[name].shape)}")
    return loaded


def _qwen_tensors(tensors, prefix: str, config: EngramConfig, where: str) -> dict[str, torch.Tensor]:
    branches, hidden_size = shape = (config.branches, config.hidden_size)
    projections = {f"{prefix}{name}_proj": rows for name, rows in (("key", branches), ("value", 1))}
    weights = {name: matrix(tensors, name, where) for name in projections}
    width = config.columns * config.row_width
    for name, weight in weights.items():
        _check_shape(f"{name}.weight", weight, [projections[name] * hidden_size, width], where)
    loaded = {"wkv.weight": torch.cat(list(weights.values()))}
    if any(f"{name}.bias" in tensors for name in projections):
        loaded["wkv.bias"] = torch.cat([dense_tensor(tensors, f"{name}.bias", where) for name in projections])
    for ours, theirs in (("q_weight", "query"), ("k_weight", "key"), ("conv_norm", "conv")):
        norm = dense_tensor(tensors, name := f"{prefix}norm_{theirs}.weight", where)
        _check_shape(name, norm, [branches * hidden_size], where)
        loaded[ours] = norm.float().view(shape) + config.norm_offset
    conv = dense_tensor(tensors, name := f"{prefix}conv1d.weight", where)
    _check_shape(name, conv, [branches * hidden_size, 1, config.conv_kernel], where)
    loaded["conv_weight"] = conv.view(*shape, -1)
    return loaded


def _check_shape(name: str, tensor: torch.Tensor, shape: list[int], where: str) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{where}: {name} must have shape {shape}, got {list(tensor.shape)}")
