"""A tiny random model of transformers' ``qwen4_exp``, as it is and with its PLE layers replaced. Needs transformers."""

import copy

import torch
from transformers import DynamicCache, Qwen4ExpTextConfig, StaticCache
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM
from transformers.utils import logging

from engram_kernels import replace_engram

logging.set_verbosity_error()
logging.disable_progress_bar()

EOS, VOCABULARY = 5, 97
CLOSE = dict(rtol=1e-4, atol=2e-5)  # float32, through three layers
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


def config(**options):
    """PLE layers 0 and 2, N = 3, 2 heads an order, rows of 16, K = 4, two streams of 32."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, max_position_embeddings=256)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_key_head_dim=8)
    sizes |= dict(linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, moe_intermediate_size=16)
    sizes |= dict(shared_expert_intermediate_size=16, num_experts_per_tok=2, num_experts=4, hc_count=2, hc_lowrank=8)
    sizes |= dict(layer_types=["linear_attention", "indexed_attention", "linear_attention"])
    sizes |= dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2
    )
    sizes |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
    ple = dict(ple_layer_ids=[1, 3], ple_embed_dim=64, ple_conv_kernel_size=4, ngram_size=3, heads_per_ngram=2)
    ple |= dict(ngram_vocab_size_base=101, make_ngram_vocab_size_divisible_by=8, seed=1234, split_ngram_parts=4)
    ids = dict(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
    return Qwen4ExpTextConfig(**(sizes | ple | ids | options))


def tiny_model(dtype=torch.float32, **options):
    """In evaluation mode. Weights are random everywhere, so that no part of a layer counts for nothing."""
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and "embed" not in name else 1
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else fan_in**-0.5))
    return model.to(dtype).eval()


def pair(dtype=torch.float32, **options):
    """The same model twice, the second with its layers replaced."""
    theirs = tiny_model(dtype, **options)
    ours = copy.deepcopy(theirs)
    replace_engram(ours, placement="cpu")
    return theirs, ours


def token_ids(*shape, seed=0):
    """Ids in which n-grams recur and documents end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 40, shape, generator=generator)
    return ids.masked_fill(torch.rand(shape, generator=generator) < 0.1, EOS)


def layers(models, dtype=torch.float32):
    """The first PLE layer of both, and random streams for as many tokens as are asked for."""
    generator = torch.Generator().manual_seed(4)
    return [model.model.layers[0].ple for model in models], lambda *shape: torch.randn(
        *shape, 64, generator=generator, dtype=torch.float32
    ).to(dtype)
