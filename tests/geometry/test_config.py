"""EngramConfig: presets against the published facts, primes against an oracle, every refusal."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from engram_kernels import EngramConfig
from engram_kernels.testing.golden import golden

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "deepseek_v41_layout.json").read_text())
PRESETS = ("deepseek_demo", "engram_27b", "engram_40b", "deepseek_v41_flash", "qwen38_flash_next")


def tiny(**changes):
    """A valid small config with some fields changed."""
    fields = {
        "layers": (0, 3),
        "max_ngram": 3,
        "heads": 2,
        "row_width": 16,
        "table_sizes": (10, 12),
        "hidden_size": 32,
        "branches": 2,
        "raw_vocab_size": 50,
    }
    return EngramConfig(**(fields | changes))


def is_prime(number):
    """Miller-Rabin with the bases that decide every number below 3.3e24 (Sorenson and Webster, 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        pow(base, odd, number) == 1 or any(pow(base, odd << step, number) == number - 1 for step in range(twos))
        for base in bases
    )


def expected_primes(config):
    """The layout rule in other words: per layer and order, the E smallest primes from its size that are still free."""
    taken, layers = [], []
    for _ in config.layers:
        columns = []
        for size in config.table_sizes:
            found = []
            number = size
            while len(found) < config.heads:
                if number not in taken and is_prime(number):
                    found.append(number)
                    taken.append(number)
                number += 1
            columns += found
        layers.append(tuple(columns))
    return tuple(layers)


def test_the_oracle_knows_primes():
    sieve = [True] * 2000
    for number in range(2, 2000):
        for multiple in range(2 * number, 2000, number):
            sieve[multiple] = False
    assert [n for n in range(2000) if is_prime(n)] == [n for n in range(2, 2000) if sieve[n]]
    assert not is_prime(3_215_031_751)  # fools the bases 2, 3, 5 and 7
    assert is_prime(2**61 - 1)


@pytest.mark.parametrize("name", PRESETS)
def test_primes_of_presets(name):
    config = getattr(EngramConfig, name)()
    assert config.primes == expected_primes(config)
    flat = [prime for layer in config.primes for prime in layer]
    assert len(set(flat)) == len(flat) == len(config.layers) * config.columns
    for layer in config.primes:
        for order, size in enumerate(config.table_sizes):
            column = layer[order * config.heads : (order + 1) * config.heads]
            assert list(column) == sorted(column) and column[0] >= size


@pytest.mark.parametrize(
    "changes",
    [
        {"table_sizes": (2, 2)},  # from the smallest prime, all orders from the same start
        {"table_sizes": (13, 7)},  # the second order meets the primes of the first
        {"table_sizes": (13, 14), "layers": (5, 0, 2)},  # a size that is prime counts
        {"max_ngram": 2, "table_sizes": (100,), "heads": 5},
    ],
)
def test_primes_of_small_layouts(changes):
    config = tiny(**changes)
    assert config.primes == expected_primes(config)


def test_primes_agree_with_golden_layouts():
    v41 = EngramConfig.deepseek_v41_flash()
    assert [list(layer) for layer in v41.primes] == [sum(layer, []) for layer in GOLDEN["primes"]]
    assert list(v41.rows_per_layer) == GOLDEN["rows_per_layer"]
    qwen = golden("qwen_ple_hash")["primes"]
    assert EngramConfig.qwen38_flash_next().primes == (tuple(qwen.ravel().tolist()),)


# layers, N, E, R, D, H, columns, bytes of the rows and scales that a token reads in a layer
PUBLISHED = {
    "deepseek_v41_flash": ((1, 14), 4, 8, 256, 5120, 4, 24, 6336),
    "engram_27b": ((2, 15), 3, 8, 80, 2560, 4, 16, 2560),
    "engram_40b": ((2, 15), 3, 8, 80, 2560, 4, 16, 2560),
    "deepseek_demo": ((1, 15), 3, 8, 64, 1024, 4, 16, 2048),
    "qwen38_flash_next": ((1,), 3, 8, 160, 2560, 4, 16, 2560),
}
ELEMENT_BYTES = {"bfloat16": 2.0, "e4m3": 1.0, "e4m3_ue8m0": 1.0 + 1 / 32}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_the_published_models(name):
    layers, max_ngram, heads, width, hidden, branches, columns, token_bytes = PUBLISHED[name]
    config = getattr(EngramConfig, name)()
    assert (config.layers, config.max_ngram, config.heads, config.row_width) == (layers, max_ngram, heads, width)
    assert (config.hidden_size, config.branches, config.columns) == (hidden, branches, columns)
    assert columns * width * ELEMENT_BYTES[config.format] == token_bytes
    assert config.conv_dilation == max_ngram


def test_rows_per_layer_of_presets():
    v41, qwen = EngramConfig.deepseek_v41_flash(), EngramConfig.qwen38_flash_next()
    assert v41.rows_per_layer == (384_006_168, 384_016_682)
    assert round(v41.rows_per_layer[0] * 264 / 2**30, 1) == 94.4
    assert sum(qwen.primes[0]) == 320_001_446
    assert qwen.rows_per_layer == (320_001_536,) and 320_001_536 % 512 == 0
    for name, size in (("engram_27b", 2_262_400), ("engram_40b", 7_239_680), ("deepseek_demo", 646_400)):
        for rows in getattr(EngramConfig, name)().rows_per_layer:
            assert 16 * size <= rows <= 16 * size * 1.001


def test_dialects_of_presets():
    v41, qwen = EngramConfig.deepseek_v41_flash(), EngramConfig.qwen38_flash_next()
    assert (v41.window, v41.multiplier_rule, v41.pad_id, v41.vocab_size) == ("pad", "numpy", 2, 99_092)
    assert (v41.conv_kernel, v41.projection_bias, v41.norm_offset, v41.zero_gate) == (0, False, 0.0, "copysign")
    assert (qwen.window, qwen.multiplier_rule, qwen.eos_id, qwen.seed) == ("eos", "splitmix64", 248_044, 1234)
    assert (qwen.conv_kernel, qwen.norm_offset, qwen.vocab_size) == (4, 1.0, 248_320)
    for name in ("deepseek_demo", "engram_27b", "engram_40b"):
        paper = getattr(EngramConfig, name)()
        assert (paper.conv_kernel, paper.projection_bias, paper.zero_gate) == (4, True, "sign")
        assert (paper.eps, paper.conv_eps, paper.pad_id, paper.raw_vocab_size) == (None, 1e-5, 2, 129_280)


@pytest.mark.parametrize("rows, multiple", [(10 + 11, 1), (24, 8), (21, 7), (21, 3)])
def test_rows_are_padded_to_the_multiple(rows, multiple):
    config = tiny(layers=(0,), heads=1, table_sizes=(7, 13), row_multiple=multiple)  # 7 + 13 = 20 rows
    assert config.rows_per_layer == ({1: 20}.get(multiple, rows),)


@pytest.mark.parametrize(
    "changes, expected",
    [
        *(({name: 0}, f"{name} must be a positive int.*, got 0") for name in ("heads", "hidden_size", "branches")),
        *(({name: -1}, f"{name} must be a positive int.*, got -1") for name in ("row_width", "raw_vocab_size")),
        ({"row_multiple": 0}, "row_multiple must be a positive int.*, got 0"),
        ({"max_ngram": 1, "table_sizes": ()}, "max_ngram must be an int of at least 2.*, got 1"),
        ({"layers": ()}, r"layers must be a sequence of int .* 1 or more, got tuple \(\)"),
        ({"layers": (0, -1)}, r"layers\[1\] must be an int of at least 0.*, got -1"),
        ({"layers": (3, 3)}, r"layers must be distinct layer numbers, got tuple \(3, 3\)"),
        ({"table_sizes": (10,)}, r"table_sizes must be 2 sizes of at least 2, one per order 2..3, got tuple \(10,\)"),
        ({"table_sizes": (10, 1)}, r"table_sizes\[1\] must be an int of at least 2, got 1"),
        ({"table_sizes": (10, 10, 10)}, "table_sizes must be 2 sizes"),
        ({"window": "bos"}, "window must be one of 'pad', 'eos', got 'bos'"),
        ({"multiplier_rule": "torch"}, "multiplier_rule must be one of 'numpy', 'splitmix64', got 'torch'"),
        ({"zero_gate": "one"}, "zero_gate must be one of 'copysign', 'sign', got 'one'"),
        ({"conv_kernel": -1}, "conv_kernel must be an int of at least 0.*, got -1"),
        ({"heads": 10**12}, "heads must be a positive int of at most 1024, got 10{12}"),
        (
            {"heads": 1024, "layers": range(3)},
            "heads must be so few that all layers have at most 4,096 columns, got 1024",
        ),
        ({"heads": 2.0}, "heads must be a positive int.*, got 2.0"),
        ({"heads": True}, "heads must be a positive int.*, got True"),
        ({"max_ngram": 10**12}, "max_ngram must be an int of at least 2 and at most 64"),
        ({"layers": "03"}, "layers must be a sequence of int.*, got '03'"),
        ({"layers": 3}, "layers must be a sequence of int.*, got 3"),
        ({"table_sizes": (10.5, 12)}, r"table_sizes\[0\] must be an int.*, got 10.5"),
        ({"seed": -1}, "seed must be at least 0 for rule 'numpy', got -1"),
        *(
            ({name: value}, f"{name} must be a finite number of at least 0 or None, got ")
            for name in ("eps", "conv_eps")
            for value in (-1, math.nan, math.inf, "1e-6")
        ),
        ({"norm_offset": None}, "norm_offset must be a finite number, got None"),
        ({"projection_bias": "no"}, "projection_bias must be True or False, got 'no'"),
        ({"format": ["e4m3"]}, "format must be one of .float32."),
        ({"pad_id": 50}, "pad_id must be a valid id for window 'pad', 0 <= id < 50, got 50"),
        ({"pad_id": -1}, "pad_id must be a valid id for window 'pad', 0 <= id < 50, got -1"),
        ({"pad_id": None}, "pad_id must be a valid id for window 'pad', 0 <= id < 50, got None"),
        ({"window": "eos"}, "eos_id must be a valid id for window 'eos', 0 <= id < 50, got None"),
        ({"window": "eos", "eos_id": 50}, "eos_id must be a valid id for window 'eos', 0 <= id < 50, got 50"),
        ({"vocab_size": 0}, "vocab_size must be between 1 and raw_vocab_size = 50, got 0"),
        ({"vocab_size": 51}, "vocab_size must be between 1 and raw_vocab_size = 50, got 51"),
        ({"format": "float8"}, "EngramConfig: format must be one of .float32., .* got 'float8'"),
        ({"row_width": 12}, "bytes of a row must be a multiple of 16, got 12 x bfloat16 = 24"),
        ({"row_width": 16, "format": "e4m3_ue8m0"}, "e4m3_ue8m0 needs a row width divisible by 32, got 16"),
        ({"row_width": 2048}, "row width must be between 1 and 1024 elements, got 2048"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_every_constraint_is_checked(changes, expected):
    tiny()
    with pytest.raises(ValueError, match=f"^EngramConfig: {expected.removeprefix('EngramConfig: ')}"):
        tiny(**changes)


def test_bounds_that_are_still_allowed():
    config = tiny(layers=[0], table_sizes=[2, 2], heads=1, pad_id=49, vocab_size=50)
    assert (config.layers, config.table_sizes) == ((0,), (2, 2))  # lists become tuples
    assert type(tiny(heads=np.int64(2), eps=1).heads) is int  # and integers of NumPy Python's own
    assert config.primes == ((2, 3),)
    assert tiny(vocab_size=1, conv_kernel=0).vocab_size == 1
    assert tiny(window="eos", eos_id=0, pad_id=-1).eos_id == 0  # the other dialect's boundary is not looked at


def test_config_is_frozen_and_hashable():
    config = tiny()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
    assert config == tiny() and hash(config) == hash(tiny()) and config != tiny(seed=1)
    assert dataclasses.replace(config, heads=3).columns == 6
