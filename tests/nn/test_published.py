"""Qwen's per-layer embedding as transformers computes it: constants, rows and results from its config and weights."""

import pytest
import torch

from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, hash_lookup


@pytest.fixture(scope="module")
def qwen4():
    """transformers' module of the model, which takes seconds to import."""
    from transformers.models.qwen4_exp import modeling_qwen4_exp

    return modeling_qwen4_exp


@pytest.fixture(scope="module")
def config(qwen4):
    sizes = dict(ple_embed_dim=128, ngram_vocab_size_base=50, vocab_size=40, hidden_size=32, hc_count=2)
    return qwen4.Qwen4ExpTextConfig(ple_layer_ids=[6, 2, 6], eos_token_id=[7, 8], rms_norm_eps=1e-5, **sizes)


@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_from_config_and_checkpoint(qwen4, config, tmp_path, index):
    """Layers are given in any order; the first of several end-of-text ids cuts windows."""
    from safetensors.torch import save_file

    torch.manual_seed(index)
    number = config.ple_layer_ids[index] - 1
    theirs = qwen4.Qwen4ExpTextPLELayer(config, number, index)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" in name else 0.3)
    state = {f"model.layers.{number}.ple.{name}": tensor for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)

    ours = EngramConfig.from_hf(config)
    plan = HashPlan.build(ours)
    assert ours.layers[index] == number
    hashing = theirs.ple_embedding
    for name, values in (("layer_multipliers", plan.multipliers), ("ngram_heads_vocab_sizes", plan.primes)):
        assert torch.equal(getattr(hashing, name), values[index])
    table = EngramTable.from_safetensors(path, placement="cpu", config=ours, layer=number)
    ids = torch.randint(0, 40, (2, 30))
    ids[:, ::9] = 7
    with torch.no_grad():
        rows = hash_lookup(ids, plan.select(layers=[index]), [table])[0]
        assert torch.equal(rows.flatten(-2), hashing(ids, None))
        module = Engram(ours, number, plan, table, residual=False)
        module.load_checkpoint(path)
        hidden = torch.randn(2, 30, 2, 32)
        expected = theirs(hidden.flatten(-2), ids, None).unflatten(-1, (2, 32))
        torch.testing.assert_close(module(hidden, ids), expected, rtol=1e-5, atol=1e-5)
