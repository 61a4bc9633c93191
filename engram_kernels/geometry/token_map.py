"""The token map: raw token id -> compressed id, where tokens that read alike share one.

Two tokens are alike when their text is, after NFKC, NFD, removal of accents, lower case and folded white space.
N-grams are hashed over compressed ids, so "The", " the" and "THE" reach the same rows. Source: the demo published with
arXiv 2601.07372; DeepSeek-V4.1 checkpoints use the same rule.
"""

from typing import Any

import torch

from .kinds import Having, declares

_LONE_SPACE = "\ue000"  # stands in for a token that is one space, which strip() would empty


TOKENIZER = Having("a tokenizers.Tokenizer or a fast transformers tokenizer", "decode", "id_to_token", "get_vocab")


@declares(tokenizer=TOKENIZER)
def build_token_map(tokenizer: Any) -> torch.Tensor:
    """Compressed id of every raw id, int32 ``[V_raw]`` on the CPU; ids are numbered as they first appear.

    V_raw is the greatest id and one, of added tokens beyond the vocabulary too. An id that no token has reads as
    nothing, and shares its number with all that do, as in the demo.

    tokenizer: a ``tokenizers.Tokenizer``, or a fast transformers tokenizer (its ``backend_tokenizer`` is used);
    TypeError for anything else. Needs the ``tokenizers`` package (extra ``hf``). Takes about two seconds for 129,280
    tokens.
    """
    tokenizer = TOKENIZER.check("build_token_map", "tokenizer", getattr(tokenizer, "backend_tokenizer", tokenizer))
    normalizer = _normalizer()
    numbers: dict[str, int] = {}
    compressed = []
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    for raw in range(max(ids, default=-1) + 1):
        text = tokenizer.decode([raw], skip_special_tokens=False)
        if "\ufffd" in text:  # bytes of half a UTF-8 sequence are no text: such a token stands for itself
            key = tokenizer.id_to_token(raw)
        else:
            key = normalizer.normalize_str(text) or text
        compressed.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(compressed, dtype=torch.int32, device="cpu")


def _normalizer():
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
