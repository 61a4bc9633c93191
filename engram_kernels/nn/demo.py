"""The Engram module of the demo published with arXiv 2601.07372, and of models built like it.

A module counts as the demo's if it has most of these attributes: ``hash_mapping``, ``multi_head_embedding``,
``key_projs``, ``value_proj``, ``norm1`` (keys), ``norm2`` (queries) and ``short_conv``.
"""

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.ops.gate_conv import gate_conv_residual
from engram_kernels.reference.ops.gate import rms_norm

from .drop_in import DropIn, as_token_ids

_PARTS = ("hash_mapping", "multi_head_embedding", "key_projs", "value_proj", "norm1", "norm2", "short_conv")
_NEEDED = (
    "layer_id",
    "hash_mapping.compressed_tokenizer.lookup_table",
    "hash_mapping.pad_id",
    "hash_mapping.layer_multipliers",
    "hash_mapping.vocab_size_across_layers",
    "multi_head_embedding.offsets",
    "multi_head_embedding.embedding.weight",
    "key_projs",
    "value_proj",
    "norm1",
    "norm2",
    "short_conv.conv.weight",
    "short_conv.norms",
)


class Shape(NamedTuple):
    """Of one module, and the eps of its norms; None is the machine epsilon."""

    branches: int
    hidden_size: int
    taps: int
    dilation: int
    eps: float | None
    conv_eps: float | None


class DemoEngram(DropIn):
    """In the demo's place: the same call, ``module(hidden_states=, input_ids=)``, which returns the addend."""

    looked_for = f"modules with most of the attributes {', '.join(_PARTS)} (the DeepSeek demo)"
    embedding = "multi_head_embedding.embedding"
    layer_number = "layer_id"
    called = ("key_projs", "value_proj")

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        return sum(hasattr(module, part) for part in _PARTS) > len(_PARTS) // 2

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        for path in _NEEDED:
            try:
                attrgetter(path)(module)
            except AttributeError:
                raise ValueError(f"{name} looks like the demo's Engram but has no attribute {path!r}") from None
        tensors = (*module.named_parameters(), *module.named_buffers())
        if absent := [path for path, tensor in tensors if tensor.is_meta and not path.startswith(cls.embedding)]:
            raise ValueError(f"{name}.{absent[0]} is on the meta device; the embedding alone may be, with tables=")
        shape, plan = _geometry(name, module)
        _check_options(name, module, shape, plan)
        _check_results(name, module, shape)

    def __init__(self, module: nn.Module, *arguments):
        super().__init__(module, *arguments)
        self._shape, plan = _geometry("", module)
        self._plans[plan.device] = plan

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """``[B, S, H, D]`` from hidden_states of that shape and raw ids ``[B, S]``: a tensor, an array or lists."""
        hidden, shape = hidden_states.contiguous(), self._shape
        rows = self._rows(as_token_ids(input_ids, hidden.device), None, self.value_proj, hidden)
        key = torch.stack([project(rows) for project in self.key_projs], -2).to(hidden.dtype)
        value = self.value_proj(rows).to(hidden.dtype)
        norms = (self.norm2, self.norm1, self.short_conv.norms)
        norms = [torch.stack([norm.weight for norm in branches]) for branches in norms]
        weight = self.short_conv.conv.weight.view(shape.branches, shape.hidden_size, shape.taps)
        options = dict(
            dilation=shape.dilation, eps=shape.eps, conv_eps=shape.conv_eps, zero_gate="sign", residual=False
        )
        return gate_conv_residual(hidden, key, value, *norms, weight, **options)


def _geometry(name: str, module: nn.Module) -> tuple[Shape, HashPlan]:
    mapping, layer = module.hash_mapping, module.layer_id
    for attribute in ("layer_multipliers", "vocab_size_across_layers"):
        if layer not in getattr(mapping, attribute):
            raise ValueError(f"{name}.hash_mapping.{attribute} has nothing for layer_id {layer}")
    sizes = mapping.vocab_size_across_layers[layer]  # [N - 1][heads]
    if len({len(order) for order in sizes}) != 1:
        lengths = [len(order) for order in sizes]
        raise ValueError(
            f"{name}.hash_mapping.vocab_size_across_layers[{layer}] must have equally many heads in "
            f"every order, got {lengths}"
        )
    if not len(module.key_projs):
        raise ValueError(f"{name}.key_projs must have one projection for each branch, got none")
    try:
        plan = HashPlan.from_parts(
            torch.as_tensor(mapping.layer_multipliers[layer])[None],
            torch.as_tensor(sizes).reshape(1, -1),
            pad=int(mapping.pad_id),
            token_map=torch.as_tensor(mapping.compressed_tokenizer.lookup_table),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.hash_mapping does not make a plan: {error}") from None
    conv = module.short_conv.conv.weight
    shape = Shape(
        branches=len(module.key_projs),
        hidden_size=conv.shape[0] // len(module.key_projs),
        taps=conv.shape[-1],
        dilation=plan.max_ngram,
        eps=_shared_eps(name, "norm1 and norm2", [*module.norm1, *module.norm2]),
        conv_eps=_shared_eps(name, "short_conv.norms", module.short_conv.norms),
    )
    return shape, plan


def _shared_eps(name: str, which: str, norms) -> float | None:
    if not all(hasattr(norm, "eps") for norm in norms):
        raise ValueError(f"{name}: {which} must be RMS norms with an attribute 'eps'")
    values = {norm.eps for norm in norms}
    if len(values) != 1:
        raise ValueError(f"{name}: {which} must share one eps, got {sorted(map(str, values))}")
    return values.pop()


def _check_options(name: str, module: nn.Module, shape: Shape, plan: HashPlan) -> None:
    """ValueError where sizes or options are not those that ours will have."""
    conv, channels = module.short_conv.conv, shape.branches * shape.hidden_size
    rows, embedding = plan.rows_per_layer[0], module.multi_head_embedding.embedding
    checks = (
        ("norm1", len(module.norm1), shape.branches),
        ("norm2", len(module.norm2), shape.branches),
        ("short_conv.norms", len(module.short_conv.norms), shape.branches),
        ("multi_head_embedding.offsets", module.multi_head_embedding.offsets.tolist(), plan.offsets[0].tolist()),
        ("multi_head_embedding.embedding.weight", embedding.weight.shape[0], rows),
        ("multi_head_embedding.embedding.max_norm", getattr(embedding, "max_norm", None), None),
        ("short_conv.conv.groups", conv.groups, channels),
        ("short_conv.conv.dilation", tuple(conv.dilation), (shape.dilation,)),
        ("short_conv.conv.padding", tuple(conv.padding), ((shape.taps - 1) * shape.dilation,)),
        ("short_conv.conv.bias", None if conv.bias is None else "one", None),
        ("short_conv.activation", bool(getattr(module.short_conv, "activation", True)), True),
    )
    for attribute, got, expected in checks:
        if got != expected:
            raise ValueError(f"{name}.{attribute} must be {expected}, got {got}")


@torch.no_grad()
def _check_results(name: str, module: nn.Module, shape: Shape) -> None:
    """ValueError where a submodule has a weight of another shape, or computes something else with it than ours would.

    A LayerNorm has the attributes of an RMSNorm, and so have norms that use 1 + weight: only a trial tells them apart.
    """
    hidden_size, short_conv = shape.hidden_size, module.short_conv
    span = (shape.taps - 1) * shape.dilation

    def trial(attribute, submodule, weight_shape, x_shape, expected):
        weight = getattr(submodule, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.shape != weight_shape:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else weight
            raise ValueError(f"{name}.{attribute}.weight must have shape {list(weight_shape)}, got {got}")
        numbers = torch.arange(torch.Size(x_shape).numel(), device=weight.device) * 0.618
        x = (numbers % 1.5 + 0.25).to(weight.dtype).view(x_shape)
        got, wanted = submodule(x), expected(x.double(), weight.double())
        options = dict(rtol=0.05, atol=0.02 * float(wanted.abs().max()), equal_nan=True)
        if got.shape != wanted.shape or not torch.allclose(got.double(), wanted, **options):
            raise ValueError(f"{name}.{attribute} computes something else than the demo's")

    def norm(eps):
        return lambda x, weight: rms_norm(x, weight, torch.finfo(torch.float32).eps if eps is None else eps)

    def conv(x, weight):
        options = dict(padding=span, dilation=shape.dilation, groups=len(weight))
        return nn.functional.conv1d(x, weight, **options)

    for attribute, norms, eps in (
        ("norm1", module.norm1, shape.eps),
        ("norm2", module.norm2, shape.eps),
        ("short_conv.norms", short_conv.norms, shape.conv_eps),
    ):
        for each in norms:
            trial(attribute, each, (hidden_size,), (1, hidden_size), norm(eps))
    channels = shape.branches * hidden_size
    trial("short_conv.conv", short_conv.conv, (channels, 1, shape.taps), (1, channels, span + 2), conv)
    if hasattr(short_conv, "act_fn"):
        x = torch.linspace(-3, 3, 13)
        if not torch.allclose(short_conv.act_fn(x), nn.functional.silu(x), atol=1e-3):
            raise ValueError(f"{name}.short_conv.act_fn computes something else than SiLU")
