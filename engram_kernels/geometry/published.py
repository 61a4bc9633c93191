"""What published configurations call the fields of an EngramConfig.

DeepSeek-V4.1        engram_* fields, all of them required
Qwen3.8-Flash-Next   ple_* and ngram_* fields; a config.json may leave out what transformers' Qwen4ExpTextConfig
                     has a default for, since saving there drops it, and has null where that derives a value
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .bounds import BOUNDS
from .kinds import Number, Whole, short

_WHERE = "EngramConfig.from_hf"
#: Where a model of several parts keeps the configuration of its text model.
_NESTED = ("thinker_config", "text_config", "language_config", "llm_config")
#: Of transformers' Qwen4ExpTextConfig; a test compares them.
QWEN_DEFAULTS = {
    "hidden_size": 2048,
    "vocab_size": 248_320,
    "rms_norm_eps": 1e-6,
    "hc_count": 4,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 512,
    "seed": 1234,
}
_FORMATS = {name: name for name in ("float32", "bfloat16", "float16", "float64")}
_FORMATS |= {"float8_e4m3fn": "e4m3", "fp8": "e4m3", "nvfp4": "nvfp4"}


class Published(NamedTuple):
    """What a published configuration says."""

    arguments: dict[str, Any]  #: of EngramConfig
    rows: tuple[int, ...] | None  #: of each layer's table, where it tells


def read_published(config: Any) -> Published:
    """What a config.json, parsed, or a config object says; :meth:`EngramConfig.from_hf` has the errors."""
    fields = _fields(config)
    if fields is None:
        raise TypeError(f"{_WHERE}: config must be a dict or a config object, got {type(config).__name__}")
    if fields.get("engram_layer_ids"):
        return _deepseek(fields)
    if fields.get("ple_layer_ids"):
        return _qwen(QWEN_DEFAULTS | {name: value for name, value in fields.items() if value is not None})
    raise ValueError(f"{_WHERE}: config has neither 'engram_layer_ids' (DeepSeek-V4.1) nor 'ple_layer_ids' (Qwen)")


def _fields(config: Any) -> dict[str, Any] | None:
    """All fields, those of the text model over those of the whole; None of what is no configuration."""
    if not isinstance(config, Mapping):
        config = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", None)
        if not isinstance(config, Mapping):
            return None
    fields = dict(config)
    for name in _NESTED:
        inner = _fields(config.get(name)) or {}
        fields |= {field: value for field, value in inner.items() if value is not None}
    return fields


def _required(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None:
        raise ValueError(f"{_WHERE}: config has no field {name!r}")
    return value


def _integer(fields: Mapping[str, Any], name: str, means: str) -> int:
    """A required field, within the bounds of the field of EngramConfig that it means."""
    return BOUNDS[means].check(_WHERE, repr(name), _required(fields, name))


def _eps(fields: Mapping[str, Any]) -> float:
    return Number(0).check(_WHERE, "'rms_norm_eps'", _required(fields, "rms_norm_eps"))


def _integers(fields: Mapping[str, Any], name: str, kind: Whole) -> tuple[int, ...]:
    """A required field that is an integer or a list of at least one."""
    value = _required(fields, name)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise ValueError(f"{_WHERE}: {name!r} must be one or more integers, got {short(value)}")
    return tuple(kind.check(_WHERE, repr(name), entry) for entry in values)


def _deepseek(fields: Mapping[str, Any]) -> Published:
    max_ngram = _integer(fields, "engram_max_ngram_size", "max_ngram")
    arguments = dict(
        layers=_integers(fields, "engram_layer_ids", BOUNDS["layers"]),
        max_ngram=max_ngram,
        heads=_integer(fields, "engram_n_heads", "heads"),
        row_width=_integer(fields, "engram_head_dim", "row_width"),
        table_sizes=(_integer(fields, "engram_vocab_size", "table_sizes"),) * (max_ngram - 1),
        hidden_size=_integer(fields, "hidden_size", "hidden_size"),
        branches=_integer(fields, "hc_mult", "branches"),
        raw_vocab_size=_integer(fields, "vocab_size", "raw_vocab_size"),
        vocab_size=_integer(fields, "engram_compressed_vocab_size", "raw_vocab_size"),
        pad_id=_integer(fields, "engram_pad_token_id", "pad_id"),
        format="e4m3_ue8m0",
        eps=_eps(fields),
    )
    return Published(arguments, _integers(fields, "engram_num_embeddings", Whole(1)))


def _qwen(fields: Mapping[str, Any]) -> Published:
    max_ngram, heads = _integer(fields, "ngram_size", "max_ngram"), _integer(fields, "heads_per_ngram", "heads")
    hidden_size = _integer(fields, "hidden_size", "hidden_size")
    columns, embed = (max_ngram - 1) * heads, fields.get("ple_embed_dim", hidden_size)
    width, rest = divmod(Whole(1, 2**31).check(_WHERE, "'ple_embed_dim'", embed), columns)
    if rest or not width:
        raise ValueError(
            f"{_WHERE}: 'ple_embed_dim' must be a multiple of (ngram_size - 1) * heads_per_ngram = {columns}, "
            f"got {embed}"
        )
    eps = _eps(fields)
    Whole(1, 2**31).check(_WHERE, "'split_ngram_parts'", fields["split_ngram_parts"])  # the last part may be shorter
    arguments = dict(
        # ple_layer_ids count from 1, in any order; primes and multipliers go by the sorted ones
        layers=tuple(layer - 1 for layer in sorted(set(_integers(fields, "ple_layer_ids", Whole(1, 2**31))))),
        max_ngram=max_ngram,
        heads=heads,
        row_width=width,
        table_sizes=(_integer(fields, "ngram_vocab_size_base", "table_sizes"),) * (max_ngram - 1),
        hidden_size=hidden_size,
        branches=_integer(fields, "hc_count", "branches"),
        raw_vocab_size=_integer(fields, "vocab_size", "raw_vocab_size"),
        vocab_size=_integer(fields, "vocab_size", "raw_vocab_size"),
        # one id or a list, the first of which ends a document
        eos_id=_integers(fields, "eos_token_id", BOUNDS["eos_id"])[0],
        window="eos",
        multiplier_rule="splitmix64",
        seed=_integer(fields, "seed", "seed"),
        row_multiple=_integer(fields, "make_ngram_vocab_size_divisible_by", "row_multiple"),
        format=_qwen_format(fields),
        eps=eps,
        conv_kernel=_integer(fields, "ple_conv_kernel_size", "conv_kernel"),
        conv_eps=eps,
        norm_offset=1.0,
        zero_gate="sign",
    )
    return Published(arguments, None)


def _qwen_format(fields: Mapping[str, Any]) -> str:
    """The format of rows: of their own dtype, else of the checkpoint's, which was called torch_dtype once."""
    names = ("ple_embedding_dtype", "dtype", "torch_dtype")
    name = next((name for name in names if name in fields), None)
    dtype = "bfloat16" if name is None else str(fields[name]).removeprefix("torch.")
    if dtype not in _FORMATS:
        raise ValueError(f"{_WHERE}: {name!r} must be one of {', '.join(_FORMATS)}, got {short(dtype)}")
    return _FORMATS[dtype]
