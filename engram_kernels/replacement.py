"""Swap the Engram modules of a model built like the DeepSeek demo for ours.

A module is one of the demo's by its attributes: ``hash_mapping``, ``multi_head_embedding``, ``key_projs``,
``value_proj``, ``norm1`` (keys), ``norm2`` (queries) and ``short_conv``. Source: the demo published with arXiv
2601.07372.
"""

import torch
from torch import nn

from .config import EngramConfig
from .module import Engram
from .plan import HashPlan
from .table import EngramTable

_MODULE = ("hash_mapping", "multi_head_embedding", "key_projs", "value_proj", "norm1", "norm2", "short_conv")
_NEEDED = (
    "layer_id",
    "hash_mapping.compressed_tokenizer.lookup_table",
    "hash_mapping.pad_id",
    "hash_mapping.layer_multipliers",
    "hash_mapping.vocab_size_across_layers",
    "multi_head_embedding.offsets",
    "multi_head_embedding.embedding.weight",
    "key_projs",
    "value_proj.weight",
    "norm1",
    "norm2",
    "short_conv.conv.weight",
    "short_conv.norms",
)


class DemoEngram(nn.Module):
    """Our :class:`Engram` behind the demo's call, ``module(hidden_states=, input_ids=)``: it returns the addend."""

    def __init__(self, engram: Engram):
        super().__init__()
        self.engram = engram

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """``[B, S, H, D]`` from hidden_states of that shape and raw ids ``[B, S]``."""
        return self.engram(hidden_states, input_ids)


def replace_engram(model: nn.Module, *, placement: str) -> dict[str, nn.Module]:
    """Replace every Engram module of the demo's shape in ``model``; returns {name: the module that was there}.

    placement: of the tables, as for :class:`EngramTable`; "cpu" shares the embedding's memory, "device" does where it
    lies there already, "host" copies it.
    Weights are shared, not doubled: ours hold the projections and norms of all branches in one tensor each, and the
    parameters of the modules returned become views of them. Only a weight of another dtype or device than the value
    projection's is copied.
    ValueError where a module looks like the demo's and lacks an attribute, or differs in what it computes.
    """
    found = {}
    for name, module in model.named_modules():
        present = [attribute for attribute in _MODULE if hasattr(module, attribute)]
        if len(present) > len(_MODULE) // 2:
            found[name] = module
    replacements = {name: DemoEngram(_converted(name or "model", module, placement)) for name, module in found.items()}
    if "" in found:
        raise ValueError("replace_engram: model is itself an Engram module; expected a model that contains some")
    for name, replacement in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    return found


def _converted(name: str, module: nn.Module, placement: str) -> Engram:
    for path in _NEEDED:
        _attribute(name, module, path)
    hash_mapping, embedding = module.hash_mapping, module.multi_head_embedding.embedding
    layer, conv = module.layer_id, module.short_conv.conv
    multipliers = torch.as_tensor(hash_mapping.layer_multipliers[layer])
    primes = torch.as_tensor(hash_mapping.vocab_size_across_layers[layer])  # [N - 1, heads]
    plan = HashPlan.from_parts(
        multipliers[None],
        primes.reshape(1, -1),
        pad=int(hash_mapping.pad_id),
        token_map=torch.as_tensor(hash_mapping.compressed_tokenizer.lookup_table),
    )
    config = EngramConfig(
        layers=(layer,),
        max_ngram=len(multipliers),
        heads=primes.shape[1],
        row_width=embedding.weight.shape[1],
        table_sizes=tuple(primes[:, 0].tolist()),
        hidden_size=module.value_proj.out_features,
        branches=len(module.key_projs),
        raw_vocab_size=plan.vocab_size,
        vocab_size=int(plan.token_map.max()) + 1,
        format=str(embedding.weight.dtype).removeprefix("torch."),
        eps=_shared_eps(name, "norm1 and norm2", [*module.norm1, *module.norm2]),
        projection_bias=module.value_proj.bias is not None,
        conv_kernel=conv.kernel_size[0],
        conv_eps=_shared_eps(name, "short_conv.norms", module.short_conv.norms),
        zero_gate="sign",
    )
    _check_form(name, module, config, plan)
    table = EngramTable.from_tensors(embedding.weight.detach(), placement=placement)
    weight = module.value_proj.weight
    engram = Engram(config, layer, plan, table, residual=False, device="meta", dtype=weight.dtype)
    projections = [*module.key_projs, module.value_proj]
    engram.wkv.weight = _joined([projection.weight for projection in projections], torch.cat, weight)
    if config.projection_bias:
        engram.wkv.bias = _joined([projection.bias for projection in projections], torch.cat, weight)
    engram.q_weight = _joined([norm.weight for norm in module.norm2], torch.stack, weight)
    engram.k_weight = _joined([norm.weight for norm in module.norm1], torch.stack, weight)
    engram.conv_norm = _joined([norm.weight for norm in module.short_conv.norms], torch.stack, weight)
    shape = (config.branches, config.hidden_size, config.conv_kernel)
    engram.conv_weight = nn.Parameter(conv.weight.detach().to(weight).view(shape), conv.weight.requires_grad)
    return engram.train(module.training)


def _attribute(name: str, module: nn.Module, path: str):
    value = module
    for part in path.split("."):
        if not hasattr(value, part):
            raise ValueError(f"replace_engram: {name} looks like the demo's Engram but has no attribute {path!r}")
        value = getattr(value, part)
    return value


def _shared_eps(name: str, which: str, norms) -> float | None:
    values = {norm.eps for norm in norms}
    if len(values) != 1:
        raise ValueError(f"replace_engram: {name}: {which} must share one eps, got {sorted(map(str, values))}")
    return values.pop()


def _check_form(name: str, module: nn.Module, config: EngramConfig, plan: HashPlan) -> None:
    """ValueError where the module computes something else than ours would."""
    conv, channels = module.short_conv.conv, config.branches * config.hidden_size
    rows = plan.rows_per_layer[0]
    checks = (
        ("norm1", len(module.norm1), config.branches),
        ("norm2", len(module.norm2), config.branches),
        ("short_conv.norms", len(module.short_conv.norms), config.branches),
        ("multi_head_embedding.offsets", module.multi_head_embedding.offsets.tolist(), plan.offsets[0].tolist()),
        ("multi_head_embedding.embedding.weight", module.multi_head_embedding.embedding.weight.shape[0], rows),
        ("value_proj.in_features", module.value_proj.in_features, config.columns * config.row_width),
        ("short_conv.conv.groups", conv.groups, channels),
        ("short_conv.conv.dilation", tuple(conv.dilation), (config.conv_dilation,)),
        ("short_conv.conv.bias", conv.bias, None),
        ("short_conv.activation", bool(getattr(module.short_conv, "activation", True)), True),
        ("key_projs", {projection.bias is not None for projection in module.key_projs}, {config.projection_bias}),
    )
    for attribute, got, expected in checks:
        if got != expected:
            raise ValueError(f"replace_engram: {name}.{attribute} must be {expected}, got {got}")


def _joined(parts: list[nn.Parameter], join, like: torch.Tensor) -> nn.Parameter:
    """One parameter of all ``parts``, which become views of it where they have its dtype and device."""
    whole = join([part.detach().to(like) for part in parts])
    views = whole.unbind() if join is torch.stack else whole.split([len(part) for part in parts])
    for part, view in zip(parts, views, strict=True):
        if part.dtype == whole.dtype and part.device == whole.device:
            part.data = view
    return nn.Parameter(whole, parts[0].requires_grad)
