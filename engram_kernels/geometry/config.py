"""Geometry of a model's Engram layers: what the tables, the hash and the gate look like, without any tensor.

Presets follow the published models; :meth:`EngramConfig.from_hf` reads a checkpoint's ``config.json``.
Sources: arXiv 2601.07372 (paper and demo), the DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .row_format import row_format

# What transformers' Qwen4Exp configuration assumes where a config.json, which drops defaults, leaves a field out.
_QWEN_DEFAULTS = {"make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128, "hc_count": 4}
_QWEN_FORMATS = {"float8_e4m3fn": "e4m3", "fp8": "e4m3", "bfloat16": "bfloat16", "float16": "float16"}


@dataclass(frozen=True)
class EngramConfig:
    """One model's Engram geometry.

    Sizes: N = ``max_ngram``, E = ``heads``, C = (N-1)*E columns, R = ``row_width``, D = ``hidden_size``,
    H = ``branches``, V_raw = ``raw_vocab_size``, V = ``vocab_size``.
    """

    layers: tuple[int, ...]  #: model layers that hold an Engram module, counted from 0
    max_ngram: int  #: N, the longest n-gram
    heads: int  #: E, heads: hash functions of each n-gram order, each of which gives a column
    row_width: int  #: R, elements of one row
    table_sizes: tuple[int, ...]  #: per order 2..N, where the search for its primes starts
    hidden_size: int  #: D
    branches: int  #: H, branches of the residual stream
    raw_vocab_size: int  #: V_raw, valid token ids are 0 <= id < V_raw
    vocab_size: int | None = None  #: V, distinct ids after the token map; None: whatever the token map gives
    pad_id: int = 0  #: raw id that blocked look-backs read (window "pad")
    eos_id: int | None = None  #: raw id that ends a document (window "eos")
    window: str = "pad"  #: "pad" (DeepSeek: token map, pad id) or "eos" (Qwen: raw ids, an EOS blocks what is older)
    multiplier_rule: str = "numpy"  #: "numpy" (DeepSeek) or "splitmix64" (Qwen)
    seed: int = 0  #: seed of the multipliers
    row_multiple: int = 1  #: tables are padded to a multiple of this many rows
    format: str = "bfloat16"  #: storage format of rows, a name of ``FORMATS`` in row_format.py
    eps: float | None = None  #: of the query and key norms; None: machine epsilon, as torch.nn.RMSNorm
    projection_bias: bool = False  #: key and value projections have a bias
    conv_kernel: int = 0  #: K taps of the short convolution, 0 for none; its dilation is N
    conv_eps: float | None = None  #: of the norm before the convolution
    norm_offset: float = 0.0  #: what is added to stored norm weights (Qwen stores w, uses 1 + w)
    zero_gate: str = "copysign"  #: sign of a gate at d = 0: "copysign" (+1) or "sign" (0)

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "table_sizes", tuple(self.table_sizes))
        positive = ("heads", "row_width", "hidden_size", "branches", "raw_vocab_size", "row_multiple")
        for name in positive:
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _expect(self.max_ngram >= 2, "max_ngram", "at least 2", self.max_ngram)
        _expect(self.layers and min(self.layers) >= 0, "layers", "one or more layer numbers from 0", self.layers)
        _expect(len(set(self.layers)) == len(self.layers), "layers", "distinct layer numbers", self.layers)
        _expect(
            len(self.table_sizes) == self.max_ngram - 1 and min(self.table_sizes) >= 2,
            "table_sizes",
            f"{self.max_ngram - 1} sizes of at least 2, one per order 2..{self.max_ngram}",
            self.table_sizes,
        )
        _expect(self.window in ("pad", "eos"), "window", "'pad' or 'eos'", self.window)
        _expect(
            self.multiplier_rule in ("numpy", "splitmix64"),
            "multiplier_rule",
            "'numpy' or 'splitmix64'",
            self.multiplier_rule,
        )
        _expect(self.zero_gate in ("copysign", "sign"), "zero_gate", "'copysign' or 'sign'", self.zero_gate)
        _expect(self.conv_kernel >= 0, "conv_kernel", "0 (no convolution) or more taps", self.conv_kernel)
        boundary, name = (self.eos_id, "eos_id") if self.window == "eos" else (self.pad_id, "pad_id")
        valid = f"a valid id for window {self.window!r}, 0 <= id < {self.raw_vocab_size}"
        _expect(boundary is not None and 0 <= boundary < self.raw_vocab_size, name, valid, boundary)
        if self.vocab_size is not None:
            distinct = f"between 1 and raw_vocab_size = {self.raw_vocab_size}"
            _expect(1 <= self.vocab_size <= self.raw_vocab_size, "vocab_size", distinct, self.vocab_size)
        row_format(self.format, "EngramConfig").check_width(self.row_width, "EngramConfig")

    @property
    def columns(self) -> int:
        """C = (N-1)*E rows read per token and layer."""
        return (self.max_ngram - 1) * self.heads

    @property
    def conv_dilation(self) -> int:
        """Tokens between two taps of the short convolution: N."""
        return self.max_ngram

    @cached_property
    def primes(self) -> tuple[tuple[int, ...], ...]:
        """Rows of each hash column, ``[L][C]``, order-major: all heads of 2-grams, then of 3-grams, and so on.

        Per layer and order, E primes ascending from the order's table size; none is used twice in a model.
        """
        from sympy import nextprime

        used: set[int] = set()
        layers = []
        for _ in self.layers:
            columns = []
            for size in self.table_sizes:
                prime = size - 1
                for _ in range(self.heads):
                    prime = int(nextprime(prime))
                    while prime in used:
                        prime = int(nextprime(prime))
                    used.add(prime)
                    columns.append(prime)
            layers.append(tuple(columns))
        return tuple(layers)

    @property
    def rows_per_layer(self) -> tuple[int, ...]:
        """Rows of each layer's table, padding to ``row_multiple`` included."""
        return tuple(-(-sum(columns) // self.row_multiple) * self.row_multiple for columns in self.primes)

    @classmethod
    def deepseek_demo(cls) -> "EngramConfig":
        """The demo published with the paper (its EngramConfig and BackBoneConfig defaults)."""
        return cls(row_width=64, table_sizes=(646_400,) * 2, hidden_size=1024, layers=(1, 15), **_PAPER)

    @classmethod
    def engram_27b(cls) -> "EngramConfig":
        """Engram-27B of the paper."""
        return cls(row_width=80, table_sizes=(2_262_400,) * 2, hidden_size=2560, layers=(2, 15), **_PAPER)

    @classmethod
    def engram_40b(cls) -> "EngramConfig":
        """Engram-40B of the paper."""
        return cls(row_width=80, table_sizes=(7_239_680,) * 2, hidden_size=2560, layers=(2, 15), **_PAPER)

    @classmethod
    def deepseek_v41_flash(cls) -> "EngramConfig":
        """DeepSeek-V4.1-Flash: two layers of 384 M rows of 256 e4m3 elements and 8 scale bytes."""
        return cls(
            layers=(1, 14),
            max_ngram=4,
            heads=8,
            row_width=256,
            table_sizes=(16_000_000,) * 3,
            hidden_size=5120,
            branches=4,
            raw_vocab_size=129_280,
            vocab_size=99_092,
            pad_id=2,
            format="e4m3_ue8m0",
            eps=1e-6,
        )

    @classmethod
    def qwen38_flash_next(cls) -> "EngramConfig":
        """Qwen3.8-Flash-Next: one per-layer embedding (PLE) of 320 M rows of 160 e4m3 elements."""
        return cls(
            layers=(1,),
            max_ngram=3,
            heads=8,
            row_width=160,
            table_sizes=(20_000_000,) * 2,
            hidden_size=2560,
            branches=4,
            raw_vocab_size=248_320,
            vocab_size=248_320,
            eos_id=248_044,
            window="eos",
            multiplier_rule="splitmix64",
            seed=1234,
            row_multiple=128,
            format="e4m3",
            eps=1e-6,
            conv_kernel=4,
            conv_eps=1e-6,
            norm_offset=1.0,
            zero_gate="sign",
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EngramConfig":
        """Read a checkpoint's ``config.json``, already parsed; a nested ``text_config`` is followed.

        Knows DeepSeek-V4.1 (``engram_*`` fields) and Qwen (``ple_*`` and ``ngram_*`` fields).
        ValueError names the field that is missing or does not fit the others.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"EngramConfig.from_hf: config must be a dict, got {type(config).__name__}")
        fields = config
        if isinstance(config.get("text_config"), Mapping):
            fields = {**config, **config["text_config"]}
        if fields.get("engram_layer_ids"):
            return _from_deepseek(cls, fields)
        if fields.get("ple_layer_ids"):
            return _from_qwen(cls, fields)
        raise ValueError(
            "EngramConfig.from_hf: config has neither 'engram_layer_ids' (DeepSeek-V4.1) nor 'ple_layer_ids' (Qwen)"
        )


# What the demo and both models of the paper share. V is None: their tokenizer's map decides it.
_PAPER = dict(
    max_ngram=3,
    heads=8,
    branches=4,
    raw_vocab_size=129_280,
    pad_id=2,
    projection_bias=True,
    conv_kernel=4,
    conv_eps=1e-5,
    zero_gate="sign",
)


def _expect(holds, field: str, expected: str, got) -> None:
    if not holds:
        raise ValueError(f"EngramConfig: {field} must be {expected}, got {got!r}")


def _field(fields: Mapping[str, Any], name: str):
    """A required field of a checkpoint's config; where it is an integer by nature, callers convert it."""
    value = fields.get(name, _QWEN_DEFAULTS.get(name))
    if value is None:
        raise ValueError(f"EngramConfig.from_hf: config has no field {name!r}")
    return value


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"EngramConfig.from_hf: {name!r} must be an integer, got {value!r}")
    return value


def _integers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A required field that is an integer or a list of at least one."""
    value = _field(fields, name)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(isinstance(entry, int) for entry in values):
        raise ValueError(f"EngramConfig.from_hf: {name!r} must be one or more integers, got {value!r}")
    return values


def _from_deepseek(cls, fields: Mapping[str, Any]) -> EngramConfig:
    max_ngram = _integer(fields, "engram_max_ngram_size")
    config = cls(
        layers=_integers(fields, "engram_layer_ids"),
        max_ngram=max_ngram,
        heads=_integer(fields, "engram_n_heads"),
        row_width=_integer(fields, "engram_head_dim"),
        table_sizes=(_integer(fields, "engram_vocab_size"),) * (max_ngram - 1),
        hidden_size=_integer(fields, "hidden_size"),
        branches=_integer(fields, "hc_mult"),
        raw_vocab_size=_integer(fields, "vocab_size"),
        vocab_size=_integer(fields, "engram_compressed_vocab_size"),
        pad_id=_integer(fields, "engram_pad_token_id"),
        format="e4m3_ue8m0",
        eps=float(_field(fields, "rms_norm_eps")),
    )
    stored = _integers(fields, "engram_num_embeddings")
    if stored != config.rows_per_layer:
        raise ValueError(
            "EngramConfig.from_hf: 'engram_num_embeddings' does not fit 'engram_vocab_size', 'engram_n_heads' and "
            f"'engram_layer_ids': their primes add up to {config.rows_per_layer}, got {stored}"
        )
    return config


def _from_qwen(cls, fields: Mapping[str, Any]) -> EngramConfig:
    max_ngram, heads = _integer(fields, "ngram_size"), _integer(fields, "heads_per_ngram")
    width, rest = divmod(_integer(fields, "ple_embed_dim"), max(1, (max_ngram - 1) * heads))
    if rest:
        raise ValueError(
            f"EngramConfig.from_hf: 'ple_embed_dim' must be a multiple of (ngram_size - 1) * heads_per_ngram = "
            f"{(max_ngram - 1) * heads}, got {fields['ple_embed_dim']}"
        )
    dtype = str(_field(fields, "ple_embedding_dtype")).removeprefix("torch.")
    if dtype not in _QWEN_FORMATS:
        raise ValueError(
            f"EngramConfig.from_hf: 'ple_embedding_dtype' must be one of {', '.join(_QWEN_FORMATS)}, got {dtype!r}"
        )
    eos = _integers(fields, "eos_token_id")  # one id or a list, the first of which ends a document
    rows, parts = _integer(fields, "make_ngram_vocab_size_divisible_by"), _integer(fields, "split_ngram_parts")
    config = cls(
        # ple_layer_ids count from 1
        layers=tuple(layer - 1 for layer in _integers(fields, "ple_layer_ids")),
        max_ngram=max_ngram,
        heads=heads,
        row_width=width,
        table_sizes=(_integer(fields, "ngram_vocab_size_base"),) * (max_ngram - 1),
        hidden_size=_integer(fields, "hidden_size"),
        branches=_integer(fields, "hc_count"),
        raw_vocab_size=_integer(fields, "vocab_size"),
        vocab_size=_integer(fields, "vocab_size"),
        eos_id=eos[0],
        window="eos",
        multiplier_rule="splitmix64",
        seed=_integer(fields, "seed"),
        row_multiple=rows,
        format=_QWEN_FORMATS[dtype],
        eps=float(_field(fields, "rms_norm_eps")),
        conv_kernel=_integer(fields, "ple_conv_kernel_size"),
        conv_eps=float(_field(fields, "rms_norm_eps")),
        norm_offset=1.0,
        zero_gate="sign",
    )
    uneven = [total for total in config.rows_per_layer if parts < 1 or total % parts]
    if uneven:
        raise ValueError(
            f"EngramConfig.from_hf: 'split_ngram_parts' must divide the padded rows {uneven[0]}, got {parts}"
        )
    return config
