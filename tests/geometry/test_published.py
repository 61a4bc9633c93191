"""EngramConfig.from_hf: configurations as they are published, transformers' defaults, and what is wrong with fields."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from engram_kernels import EngramConfig
from engram_kernels.geometry.published import QWEN_DEFAULTS

DEEPSEEK = {
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_vocab_size": 16_000_000,
    "engram_compressed_vocab_size": 99_092,
    "engram_pad_token_id": 2,
    "hidden_size": 5120,
    "hc_mult": 4,
    "vocab_size": 129_280,
    "rms_norm_eps": 1e-6,
}
QWEN = {
    "ple_layer_ids": [2],
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 512,
    "ple_embed_dim": 2560,
    "ple_conv_kernel_size": 4,
    "ple_embedding_dtype": "float8_e4m3fn",
    "seed": 1234,
    "eos_token_id": 248_044,
    "vocab_size": 248_320,
    "hidden_size": 2560,
    "hc_count": 4,
    "rms_norm_eps": 1e-6,
}
QWEN_REQUIRED = ("ple_layer_ids", "eos_token_id")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "fields, preset", [(DEEPSEEK, "deepseek_v41_flash"), (QWEN, "qwen38_flash_next")], ids=["deepseek", "qwen"]
)
def test_from_hf_equals_the_preset(fields, preset, nested):
    # The outer level of a nested config describes another model part: the text model's fields win.
    config = {"model_type": "x", "hidden_size": 7, "text_config": fields} if nested else fields
    assert EngramConfig.from_hf(config) == getattr(EngramConfig, preset)()


def test_from_hf_variants_of_qwen():
    preset = EngramConfig.qwen38_flash_next()
    assert EngramConfig.from_hf(QWEN | {"eos_token_id": [248_044, 7]}) == preset
    assert EngramConfig.from_hf(QWEN | {"ple_embedding_dtype": "torch.bfloat16"}).format == "bfloat16"
    for parts in (1, 7, 128, 1024):  # of which the last may be shorter
        assert EngramConfig.from_hf(QWEN | {"split_ngram_parts": parts}) == preset
    assert EngramConfig.from_hf(QWEN | {"ple_embed_dim": None, "hidden_size": 1280}).row_width == 80


@pytest.mark.parametrize(
    "changes, format",
    [
        ({"ple_embedding_dtype": None}, "bfloat16"),
        ({"ple_embedding_dtype": None, "dtype": "float16"}, "float16"),
        ({"ple_embedding_dtype": None, "dtype": None, "torch_dtype": torch.float32}, "float32"),
        ({"ple_embedding_dtype": "fp8", "dtype": "bfloat16"}, "e4m3"),
        ({"ple_embedding_dtype": "nvfp4"}, "nvfp4"),
    ],
)
def test_rows_of_qwen_have_the_checkpoints_dtype_unless_one_of_their_own(changes, format):
    assert EngramConfig.from_hf(QWEN | changes).format == format
    absent = {name: value for name, value in (QWEN | changes).items() if value is not None}
    assert EngramConfig.from_hf(absent).format == format
    if "dtype" in absent:  # of a model of several parts, that of the whole
        whole = {"dtype": absent.pop("dtype"), "text_config": absent}
        assert EngramConfig.from_hf(whole).format == format


def test_layers_of_qwen_are_sorted_and_counted_once():
    """As transformers does before it derives primes and multipliers of the layers."""
    assert EngramConfig.from_hf(QWEN | {"ple_layer_ids": [5, 2, 5]}) == EngramConfig.from_hf(
        QWEN | {"ple_layer_ids": [2, 5]}
    )
    assert EngramConfig.from_hf(QWEN | {"ple_layer_ids": [5, 2]}).layers == (1, 4)


def test_defaults_of_qwen_are_those_of_transformers():
    """Each alone, absent or null; all at once; and as its config objects and what they save."""
    from transformers.models.qwen4_exp import configuration_qwen4_exp as qwen4

    least = dict(ple_layer_ids=[5, 2], eos_token_id=[7, 8])
    ours = qwen4.Qwen4ExpTextConfig(**least)
    assert {name: getattr(ours, name) for name in QWEN_DEFAULTS} == QWEN_DEFAULTS
    expected = EngramConfig.from_hf(least)
    assert (expected.seed, expected.row_width, expected.eos_id, expected.layers) == (1234, 128, 7, (1, 4))
    whole = qwen4.Qwen4ExpConfig(text_config=ours.to_dict())
    for config in (
        ours,
        ours.to_dict(),
        ours.to_diff_dict(),
        whole,
        whole.to_dict(),
        json.loads(whole.to_json_string()),
    ):
        assert EngramConfig.from_hf(config) == expected
    for name in [name for name in QWEN if name not in QWEN_REQUIRED]:
        assert EngramConfig.from_hf(least | {name: None}) == expected
    for name in QWEN_DEFAULTS:
        assert EngramConfig.from_hf(without(QWEN, name)) == EngramConfig.from_hf(QWEN | {name: None})


def test_from_hf_takes_objects():
    """Of any class that keeps its fields as attributes, one within another included."""
    inner = SimpleNamespace(**DEEPSEEK)
    for config in (inner, SimpleNamespace(text_config=inner), {"language_config": inner}):
        assert EngramConfig.from_hf(config) == EngramConfig.deepseek_v41_flash()


def test_from_hf_leaves_other_fields_alone():
    more = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "text_config": 3},
        "engram_from_the_future": {"engram_layer_ids": [9]},
        "text_config": None,
        "rope_scaling": None,
    }
    assert EngramConfig.from_hf(DEEPSEEK | more) == EngramConfig.deepseek_v41_flash()
    assert EngramConfig.from_hf(more | {"text_config": DEEPSEEK | more}) == EngramConfig.deepseek_v41_flash()
    assert EngramConfig.from_hf(QWEN | more) == EngramConfig.qwen38_flash_next()


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("name", [*DEEPSEEK])
def test_from_hf_names_a_missing_field_of_deepseek(name):
    for config in (without(DEEPSEEK, name), DEEPSEEK | {name: None}, {"text_config": without(DEEPSEEK, name)}):
        with pytest.raises(ValueError, match=f"'{name}'"):
            EngramConfig.from_hf(config)


@pytest.mark.parametrize("name", QWEN_REQUIRED)
def test_from_hf_names_a_missing_field_of_qwen(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        EngramConfig.from_hf(without(QWEN, name))


@pytest.mark.parametrize(
    "fields, name, off",
    [
        (DEEPSEEK, "engram_num_embeddings", [384_006_168, 384_006_168]),
        (DEEPSEEK, "engram_num_embeddings", [384_006_168]),
        (DEEPSEEK, "engram_num_embeddings", 384_006_168),
        (DEEPSEEK, "engram_layer_ids", [1]),  # then the row counts no longer fit
        (DEEPSEEK, "engram_n_heads", 7),
        (DEEPSEEK, "engram_vocab_size", 16_000_058),
        (DEEPSEEK, "engram_n_heads", "eight"),
        (QWEN, "ple_embed_dim", 2561),
        (QWEN, "ple_embedding_dtype", "int4"),
        (QWEN, "ple_embed_dim", 0),
        (QWEN, "split_ngram_parts", 0),
        (QWEN, "eos_token_id", []),
        (QWEN, "eos_token_id", [None]),
        (QWEN, "seed", "many"),
        (QWEN, "seed", 1234.0),
        (QWEN, "ple_layer_ids", [0]),
        (QWEN, "ple_layer_ids", [True]),
        *(
            (fields, "rms_norm_eps", eps)
            for fields in (DEEPSEEK, QWEN)
            for eps in (-1, math.nan, math.inf, "1e-6", True, 10**400)
        ),
        # What would be minutes of searching primes, or a tuple beyond all memory.
        *(
            (DEEPSEEK, name, 10**12)
            for name in ("engram_n_heads", "engram_max_ngram_size", "engram_head_dim", "hc_mult")
        ),
        *(
            (QWEN, name, 10**12)
            for name in ("heads_per_ngram", "ngram_size", "ple_embed_dim", "hc_count", "vocab_size")
        ),
        *((QWEN, name, -5) for name in ("ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by", "hidden_size")),
        (QWEN, "ngram_vocab_size_base", 10**30),
        (QWEN, "ple_conv_kernel_size", 10**12),
    ],
)
def test_from_hf_names_a_field_that_is_off(fields, name, off):
    with pytest.raises(ValueError, match=f"^EngramConfig.from_hf: .*'{name}'"):
        EngramConfig.from_hf(fields | {name: off})


def test_from_hf_refuses_what_is_no_engram_config():
    with pytest.raises(TypeError, match="EngramConfig.from_hf: config must be a dict or a config object, got str"):
        EngramConfig.from_hf("config.json")
    for config in ({}, {"hidden_size": 5120}, {"engram_layer_ids": []}):
        with pytest.raises(ValueError, match="neither 'engram_layer_ids'.*nor 'ple_layer_ids'"):
            EngramConfig.from_hf(config)
