"""replace_engram: the demo's golden output, a stand-in model before and after, and near misses."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engram_kernels import replace_engram
from engram_kernels.nn.demo import DemoEngram
from engram_kernels.testing.golden import golden

ROOT = Path(__file__).parents[2]


def stand_in():
    spec = importlib.util.spec_from_file_location("demo_engram", ROOT / "examples" / "demo_engram.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = stand_in()


def golden_model():
    """The stand-in's modules with the golden weights of layers 1 and 15, float64."""
    data = {name: part.numpy() for name, part in golden("deepseek_demo").items()}
    primes = {}
    for layer in (1, 15):
        ends = [*data[f"layer{layer}_offsets"], len(data[f"layer{layer}_table"])]
        primes[layer] = np.diff(ends).reshape(2, 4).tolist()
    mapping = demo.HashMapping((1, 15), data["token_map"], 2, list(primes.values()), seed=0)
    model = nn.Module()
    model.layers = nn.ModuleDict()
    for layer in (1, 15):
        part = {k.split("_", 1)[1]: torch.from_numpy(v) for k, v in data.items() if k.startswith(f"layer{layer}_")}
        assert mapping.layer_multipliers[layer].tolist() == part["multipliers"].tolist()
        engram = demo.Engram(layer, mapping, 8, 64, 4).double()
        with torch.no_grad():
            engram.multi_head_embedding.embedding.weight.copy_(part["table"])
            engram.value_proj.weight.copy_(part["value_weight"])
            engram.value_proj.bias.copy_(part["value_bias"])
            engram.short_conv.conv.weight.copy_(part["conv_weight"])
            for h in range(4):
                engram.key_projs[h].weight.copy_(part["key_weight"][h])
                engram.key_projs[h].bias.copy_(part["key_bias"][h])
                engram.norm1[h].weight.copy_(part["key_norm"][h])
                engram.norm2[h].weight.copy_(part["query_norm"][h])
                engram.short_conv.norms[h].weight.copy_(part["conv_norm"][h])
        model.layers[str(layer)] = engram
    return model, {k: torch.from_numpy(v) for k, v in data.items()}


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_golden(placement):
    model, data = golden_model()
    inputs = dict(hidden_states=data["hidden"], input_ids=data["token_ids"])
    for layer in (1, 15):  # the stand-in itself computes the demo's output
        torch.testing.assert_close(
            model.layers[str(layer)](**inputs), data[f"layer{layer}_output"], rtol=1e-10, atol=1e-12
        )
    if placement == "host":
        model = model.float()
        inputs["hidden_states"] = inputs["hidden_states"].float()
    replaced = replace_engram(model, placement=placement)
    assert list(replaced) == ["layers.1", "layers.15"]
    tolerance = dict(rtol=1e-10, atol=1e-12) if placement == "cpu" else dict(rtol=2e-5, atol=2e-5)
    for layer in (1, 15):
        assert isinstance(model.layers[str(layer)], DemoEngram)
        output = model.layers[str(layer)](**inputs)
        torch.testing.assert_close(output.double(), data[f"layer{layer}_output"], **tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_model_before_and_after(dtype, tolerance):
    model, ids = demo.Model(seed=3).to(dtype), torch.randint(0, 500, (2, 17))
    with torch.no_grad():
        before = model(ids)
        replace_engram(model, placement="cpu")
        after = model(ids)
    assert after.dtype == dtype
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


def test_model_in_bfloat16_is_no_further_from_float64():
    """The demo rounds after every operation, ours once: with the same bfloat16 weights ours is the closer one."""
    model, ids = demo.Model(seed=3).to(torch.bfloat16), torch.randint(0, 500, (2, 17))
    with torch.no_grad():
        before = model(ids).double()
        exact = copy.deepcopy(model).double()(ids)
        replace_engram(model, placement="cpu")
        after = model(ids).double()
    errors = [(result - exact).square().mean().sqrt() for result in (before, after)]
    assert 0 < errors[1] <= 1.05 * errors[0] < 0.05


def test_weights_are_shared():
    model = demo.Model()
    embedding = model.engrams["1"].multi_head_embedding.embedding.weight
    parameters = dict(model.named_parameters())
    replaced = replace_engram(model, placement="cpu")
    original = replaced["engrams.1"]
    assert model.engrams["1"].table.weight.data_ptr() == embedding.data_ptr()
    assert replaced.tables == {name: model.get_submodule(name).table for name in replaced}
    rest = {name: parameter for name, parameter in parameters.items() if not name.endswith("embedding.weight")}
    assert len(parameters) - len(rest) == 2
    assert dict(model.named_parameters()) == rest  # the same objects, under the same names
    with torch.no_grad():
        original.norm2[1].weight.fill_(5)
    hidden, ids = torch.randn(1, 4, 4, 64), torch.randint(0, 500, (1, 4))
    torch.testing.assert_close(original(hidden, ids), model.engrams["1"](hidden, ids), rtol=1e-4, atol=1e-4)


def test_a_module_under_two_names_is_replaced_under_both():
    model = demo.Model()
    model.first, original = model.engrams["1"], model.engrams["1"]
    replaced = replace_engram(model, placement="cpu")
    assert model.first is model.engrams["1"] and isinstance(model.first, DemoEngram)
    assert replaced["first"] is replaced["engrams.1"] is original


def test_nothing_to_replace():
    kinds = r"Sequential has no module of these kinds: Qwen4ExpTextPLELayer of .*; .* hash_mapping, .*DeepSeek demo"
    with pytest.raises(ValueError, match=kinds):
        replace_engram(nn.Sequential(nn.Linear(2, 2)), placement="cpu")
    model = demo.Model()
    replace_engram(model, placement="cpu")
    with pytest.raises(ValueError, match=r"of these kinds \(engrams.1, engrams.3: replaced already\): "):
        replace_engram(model, placement="cpu")


@pytest.mark.parametrize("given", [dict(), dict(placement="cpu", tables={})])
def test_placement_or_tables(given):
    with pytest.raises(ValueError, match="expected either placement or tables"):
        replace_engram(demo.Model(), **given)


def put(index, replacement):
    return lambda modules: modules.__setitem__(index, replacement)


class OffsetNorm(nn.RMSNorm):
    """As models do that store w and use 1 + w."""

    def forward(self, x):
        return super().forward(x) + nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def broken(change):
    model = demo.Model()
    change(model.engrams["3"])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: delattr(e, "norm2"), "has no attribute 'norm2'"),
        (lambda e: setattr(e, "hash_mapping", SimpleNamespace(pad_id=0)), "'hash_mapping.compressed_tokenizer"),
        (lambda e: delattr(e.short_conv, "norms"), "has no attribute 'short_conv.norms'"),
        (lambda e: e.norm1.append(nn.RMSNorm(64)), "norm1 must be 4, got 5"),
        (lambda e: setattr(e.norm1[0], "eps", 1e-3), "norm1 and norm2 must share one eps"),
        (lambda e: e.multi_head_embedding.offsets.add_(1), "offsets must be"),
        (lambda e: setattr(e.short_conv.conv, "dilation", (2,)), r"dilation must be \(3,\), got \(2,\)"),
        (lambda e: setattr(e.short_conv, "activation", False), "activation must be True, got False"),
        (lambda e: e.hash_mapping.layer_multipliers.pop(3), "layer_multipliers has nothing for layer_id 3"),
        (lambda e: e.hash_mapping.vocab_size_across_layers.pop(3), "across_layers has nothing for layer_id 3"),
        (lambda e: e.hash_mapping.vocab_size_across_layers.update({3: [[2], [3, 5]]}), r"every order, got \[1, 2\]"),
        (lambda e: e.hash_mapping.layer_multipliers.update({3: [1.5, 3.0, 5.0]}), "hash_mapping does not make a plan"),
        (lambda e: setattr(e, "key_projs", nn.ModuleList()), "key_projs must have one projection for each branch"),
        (lambda e: put(0, nn.RMSNorm(32))(e.norm1), r"norm1.weight must have shape \[64\], got \[32\]"),
        (lambda e: put(1, nn.RMSNorm(64, elementwise_affine=False))(e.norm2), "norm2.weight must have .* got None"),
        (lambda e: put(1, nn.Identity())(e.norm1), "must be RMS norms with an attribute 'eps'"),
        (lambda e: put(1, nn.LayerNorm(64, 1e-5))(e.short_conv.norms), "short_conv.norms computes something else"),
        (lambda e: put(3, OffsetNorm(64))(e.norm2), "norm2 computes something else than the demo's"),
        (lambda e: setattr(e.short_conv.conv, "padding", (3,)), r"conv.padding must be \(9,\), got \(3,\)"),
        (lambda e: setattr(e.short_conv.conv, "stride", (2,)), "short_conv.conv computes something else"),
        (lambda e: setattr(e.short_conv, "act_fn", nn.GELU()), "act_fn computes something else than SiLU"),
        (lambda e: setattr(e.multi_head_embedding.embedding, "max_norm", 1.0), "max_norm must be None, got 1.0"),
        (lambda e: setattr(e.multi_head_embedding.embedding, "padding_idx", 0), "padding_idx must be None, got 0"),
        (lambda e: e.norm1[2].register_forward_hook(print), "norm1.2 has hooks, which would not be called any more"),
        (lambda e: e.multi_head_embedding.register_full_backward_hook(print), "multi_head_embedding has hooks"),
        (lambda e: setattr(e, "forward", e.forward), "has a forward of its own"),
        (lambda e: setattr(e.short_conv, "forward", e.short_conv.forward), "short_conv has a forward of its own"),
        (lambda e: e.short_conv.to("meta"), "short_conv.conv.weight is on the meta device"),
        (lambda e: setattr(e.multi_head_embedding, "embedding", Scaled(2328, 8)), "an nn.Embedding .* got Scaled"),
    ],
)
def test_near_misses_change_nothing(change, message):
    model = broken(change)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"engrams\.3.*{message}.*of the right kind: engrams\.1"):
        replace_engram(model, placement="cpu")
    assert dict(model.named_modules()) == modules


def test_the_module_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match="model is itself an Engram module"):
        replace_engram(demo.Model().engrams["1"], placement="cpu")
