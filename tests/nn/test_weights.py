"""Engram.load_checkpoint: names of published models, quantised projections, and everything that is no weight."""

import dataclasses

import pytest
import torch

from engram_kernels import Engram, EngramTable, HashPlan

from .test_engram import FORMS, built


def v41_checkpoint(module, scaled):
    """The layer's tensors under a checkpoint's names; scaled: wkv in fp8 with one ue8m0 scale per 8 x 4 block."""
    prefix = "layers.4.engram."
    tensors = {prefix + name: torch.randn(2, 24) for name in ("q_weight", "k_weight")}
    weight = torch.randn(72, 32)
    tensors[prefix + "wkv.weight"] = weight
    if scaled:
        scale = torch.randint(120, 134, (9, 8), dtype=torch.uint8)
        tensors[prefix + "wkv.weight"] = weight.to(torch.float8_e4m3fn)
        tensors[prefix + "wkv.scale"] = scale.view(torch.float8_e8m0fnu)
        factor = torch.exp2(scale.float() - 127)
        blocks = weight.to(torch.float8_e4m3fn).float().view(9, 8, 8, 4)
        weight = (blocks * factor[:, None, :, None]).reshape(72, 32)
    return prefix, tensors, weight


@pytest.mark.parametrize("scaled", [False, True])
def test_load_deepseek_checkpoint(scaled):
    module, _, _ = built("v41")
    prefix, tensors, weight = v41_checkpoint(module, scaled)
    module.load_checkpoint(tensors, prefix)
    assert torch.equal(module.wkv.weight, weight)
    assert torch.equal(module.q_weight, tensors[prefix + "q_weight"])
    assert torch.equal(module.k_weight, tensors[prefix + "k_weight"])


def qwen_checkpoint():
    tensors = {"ple.key_proj.weight": torch.randn(48, 32), "ple.value_proj.weight": torch.randn(24, 32)}
    tensors |= {f"ple.norm_{name}.weight": torch.randn(48) for name in ("query", "key", "conv")}
    return tensors | {"ple.conv1d.weight": torch.randn(48, 1, 3)}


def test_load_qwen_checkpoint():
    module, _, _ = built("qwen")
    tensors = qwen_checkpoint()
    module.load_checkpoint(tensors, "ple.")
    assert torch.equal(module.wkv.weight[:48], tensors["ple.key_proj.weight"])
    assert torch.equal(module.wkv.weight[48:], tensors["ple.value_proj.weight"])
    assert torch.equal(module.q_weight.flatten(), tensors["ple.norm_query.weight"] + 1)
    assert torch.equal(module.conv_norm.flatten(), tensors["ple.norm_conv.weight"] + 1)
    assert torch.equal(module.conv_weight.flatten(0, 1), tensors["ple.conv1d.weight"][:, 0])


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    module, _, _ = built("qwen")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for name in qwen_checkpoint():
        tensors = qwen_checkpoint()
        del tensors[name]
        with pytest.raises(ValueError, match=name if "key_proj" not in name else "expected ple.wkv.weight"):
            module.load_checkpoint(tensors, "ple.")
    tensors = qwen_checkpoint() | {"ple.conv1d.weight": torch.randn(48, 1, 4)}
    with pytest.raises(ValueError, match=r"ple.conv1d.weight must have shape \[48, 1, 3\], got \[48, 1, 4\]"):
        module.load_checkpoint(tensors, "ple.")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def quantised(weight, scale):
    """e4m3 codes of ``weight`` under a scale that broadcasts over it, and what they stand for."""
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


# name of the scale -> a scale of a weight [rows, 32], as stored and as it broadcasts
SCALES = {
    "weight_scale_inv": lambda rows: (torch.tensor([[0.01]]), 0.01),  # the last of a dimension is a part of a block
    "weight_scale": lambda rows: (torch.tensor(0.03), 0.03),
    "weight_scale of one": lambda rows: (torch.tensor([0.03], dtype=torch.bfloat16), torch.tensor(0.03).bfloat16()),
    "weight_scale per row": lambda rows: (torch.linspace(0.1, 0.3, rows), torch.linspace(0.1, 0.3, rows)[:, None]),
    "weight_scale per row as a column": lambda rows: 2 * (torch.linspace(0.1, 0.3, rows)[:, None],),
    "scale of blocks": lambda rows: (
        torch.arange(120, 120 + rows // 8 * 4, dtype=torch.uint8).view(-1, 4).view(torch.float8_e8m0fnu),
        torch.exp2(torch.arange(-7.0, rows // 8 * 4 - 7)).view(-1, 4).repeat_interleave(8, 0).repeat_interleave(8, 1),
    ),
}


@pytest.mark.parametrize("scale", SCALES)
def test_projections_in_e4m3_are_multiplied_by_their_scale(scale):
    module, _, _ = built("qwen")
    tensors, expected = qwen_checkpoint(), []
    for name, rows in (("key", 48), ("value", 24)):
        stored, factor = SCALES[scale](rows)
        codes, values = quantised(tensors[f"ple.{name}_proj.weight"], factor)
        tensors |= {f"ple.{name}_proj.weight": codes, f"ple.{name}_proj.{scale.split()[0]}": stored}
        tensors[f"ple.{name}_proj.input_scale"] = torch.tensor(7.0)  # of what comes in, not of the weight
        expected.append(values)
    module.load_checkpoint(tensors, "ple")
    assert torch.equal(module.wkv.weight, torch.cat(expected))


def test_blocks_of_128_by_128():
    config = dataclasses.replace(FORMS["qwen"], hidden_size=160, row_width=64)
    plan = HashPlan.build(config)
    module = Engram(config, 1, plan, EngramTable.empty(plan.rows_per_layer[0], 64, "float32", placement="cpu"))
    tensors = {f"norm_{name}.weight": torch.zeros(320) for name in ("query", "key", "conv")}
    tensors["conv1d.weight"], expected = torch.zeros(320, 1, 3), []
    for name, rows in (("key", 320), ("value", 160)):
        blocks = torch.rand(-(-rows // 128), 2) + 0.5
        factor = blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
        tensors[f"{name}_proj.weight"], values = quantised(torch.randn(rows, 256), factor)
        tensors[f"{name}_proj.weight_scale_inv"] = blocks
        expected.append(values)
    module.load_checkpoint(tensors)
    assert torch.equal(module.wkv.weight, torch.cat(expected))


def codes(shape, dtype):
    return torch.ones(shape).to(dtype)


E4M3 = torch.float8_e4m3fn
NOT_WEIGHTS = {
    "key_proj.weight must be float32, .*, got int8": {"key_proj.weight": codes((48, 32), torch.int8)},
    "value_proj.weight must be float32, .*, got float8_e5m2": {"value_proj.weight": codes((24, 32), torch.float8_e5m2)},
    "key_proj.weight must be .*, got float8_e4m3fnuz": {"key_proj.weight": codes((48, 32), torch.float8_e4m3fnuz)},
    "key_proj.weight must be .*, got bool": {"key_proj.weight": codes((48, 32), torch.bool)},
    "norm_key.weight must be .*, got int8": {"norm_key.weight": codes(48, torch.int8)},
    "norm_query.weight must be .*, got float8_e4m3fn ": {"norm_query.weight": codes(48, E4M3)},
    "conv1d.weight must be .*, got uint8": {"conv1d.weight": codes((48, 1, 3), torch.uint8)},
    "key_proj.weight is torch.float8_e4m3fn and needs one scale, .*, got none": {
        "key_proj.weight": codes((48, 32), E4M3)
    },
    "needs one scale, .*, got ple.key_proj.weight_scale, ple.key_proj.weight_scale_inv": {
        "key_proj.weight": codes((48, 32), E4M3),
        "key_proj.weight_scale": torch.ones(1),
        "key_proj.weight_scale_inv": torch.ones(1, 1),
    },
    "key_proj.weight is torch.float32 and takes no scale, got ple.key_proj.weight_scale": {
        "key_proj.weight_scale": torch.ones(1)
    },
    "key_proj.weight must stand for itself, got ple.key_proj.weight_zero_point beside": {
        "key_proj.weight": codes((48, 32), E4M3),
        "key_proj.weight_scale": torch.ones(1),
        "key_proj.weight_zero_point": torch.ones(1),
    },
    "key_proj.weight must stand for itself, got ple.key_proj.scales, ple.key_proj.biases beside": {  # MLX
        "key_proj.weight": torch.ones(48, 4, dtype=torch.uint32),
        "key_proj.scales": torch.ones(48, 1),
        "key_proj.biases": torch.ones(48, 1),
    },
    "key_proj.weight_scale must hold positive numbers": {
        "key_proj.weight": codes((48, 32), E4M3),
        "key_proj.weight_scale": torch.tensor([float("nan")]),
    },
    "value_proj.scale must hold positive numbers": {
        "value_proj.weight": codes((24, 32), E4M3),
        "value_proj.scale": torch.full((3, 4), 255, dtype=torch.uint8),
    },
    "key_proj.weight_scale must be of a float dtype or ue8m0, got float8_e4m3fn": {
        "key_proj.weight": codes((48, 32), E4M3),
        "key_proj.weight_scale": codes((48, 2), E4M3),
    },
    r"key_proj.weight_scale must have one entry per block of ple.key_proj.weight \[48, 32\], got \[32\]": {
        "key_proj.weight": codes((48, 32), E4M3),
        "key_proj.weight_scale": torch.ones(32),
    },
    r"key_proj.weight must have shape \[48, 32\], got \[48, 16\]": {"key_proj.weight": torch.ones(48, 16)},
    r"norm_conv.weight must have shape \[48\], got \[24\]": {"norm_conv.weight": torch.ones(24)},
    r"conv1d.weight must have shape \[48, 1, 3\], got \[48, 3, 1\]": {"conv1d.weight": torch.ones(48, 3, 1)},  # MLX
    "the checkpoint has wkv.bias, and this config has none": {
        "key_proj.bias": torch.ones(48),
        "value_proj.bias": torch.ones(24),
    },
    "norm_key.weight must hold numbers, and a tensor on the meta device has none": {
        "norm_key.weight": torch.ones(48, device="meta")
    },
}


@pytest.mark.parametrize("expected", NOT_WEIGHTS)
def test_what_is_no_weight_is_refused_by_name(expected):
    module, _, _ = built("qwen")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = qwen_checkpoint() | {f"ple.{name}": value for name, value in NOT_WEIGHTS[expected].items()}
    with pytest.raises(ValueError, match=rf"^Engram.load_checkpoint: .*{expected}"):
        module.load_checkpoint(tensors, "ple.")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.uint8, E4M3])
def test_v41_takes_no_codes_for_weights(dtype):
    module, _, _ = built("v41")
    for name in ("wkv.weight", "q_weight", "k_weight"):
        prefix, tensors, _ = v41_checkpoint(module, False)
        tensors[prefix + name] = codes(tensors[prefix + name].shape, dtype)
        with pytest.raises(ValueError, match=rf"^Engram.load_checkpoint: layers.4.engram.{name} "):
            module.load_checkpoint(tensors, prefix)
        with pytest.raises(ValueError, match=f"^Engram.load_state_dict: {name} must be float32, .*, got "):
            module.load_state_dict(module.state_dict() | {name: tensors[prefix + name]})


def test_names_of_the_state_dict_load_in_every_form():
    """What the config has and the checkpoint holds besides V4.1's tensors; what the config has not is refused."""
    for form in FORMS:
        module, other = built(form)[0], built(form)[0]
        module.load_checkpoint(other.state_dict())
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match="the checkpoint has conv_norm, conv_weight, wkv.bias, and this config has"):
        built("v41")[0].load_checkpoint(built("paper")[0].state_dict())


def test_a_module_on_the_meta_device_is_refused_and_can_be_given_memory():
    module, plan, tables = built("v41")
    empty = Engram(module.config, 4, plan, tables[-1], device="meta")
    with pytest.raises(ValueError, match=r"q_weight, k_weight, wkv.weight are on the .* \(engram.to_empty\(device="):
        empty.load_checkpoint(module.state_dict())
    empty.to_empty(device="cpu").load_checkpoint(module.state_dict())
    assert torch.equal(empty.wkv.weight, module.wkv.weight)
    empty = Engram(module.config, 4, plan, tables[-1], device="meta")
    empty.load_state_dict(module.state_dict(), assign=True)
    hidden, ids = torch.randn(4, 2, 24), torch.randint(0, 40, (4,))
    assert torch.equal(empty(hidden, ids), module(hidden, ids))
