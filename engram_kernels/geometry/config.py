"""Geometry of a model's Engram layers: what the tables, the hash and the gate look like, without any tensor.

Presets follow the published models; :meth:`EngramConfig.from_hf` reads a checkpoint's ``config.json``.
Sources: arXiv 2601.07372 (paper and demo), the DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .bounds import BOUNDS, MAX_COLUMNS
from .choices import FormatName, MultiplierRule, Window, ZeroGate
from .kinds import AnyOf, Each, Flag, Having, Instance, Number, OneOf, Optional, declares, short
from .published import read_published
from .row_format import FORMATS, row_format

#: What every field takes by itself; how they fit each other is checked beside.
KINDS = BOUNDS | {
    "layers": Each(BOUNDS["layers"], least=1, error=ValueError),
    "table_sizes": Each(BOUNDS["table_sizes"], error=ValueError),
    **{name: Optional(BOUNDS[name]) for name in ("vocab_size", "pad_id", "eos_id")},
    "window": OneOf("pad", "eos"),
    "multiplier_rule": OneOf("numpy", "splitmix64"),
    "format": OneOf(*FORMATS),
    "eps": Optional(Number(0)),
    "projection_bias": Flag(),
    "conv_eps": Optional(Number(0)),
    "norm_offset": Number(),
    "zero_gate": OneOf("copysign", "sign"),
}


@dataclass(frozen=True)
class EngramConfig:
    """One model's Engram geometry.

    Sizes: N = ``max_ngram``, E = ``heads``, C = (N-1)*E columns, R = ``row_width``, D = ``hidden_size``,
    H = ``branches``, V_raw = ``raw_vocab_size``, V = ``vocab_size``.

    ValueError or TypeError names the field that is out of bounds or does not fit the others.
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
    window: Window = "pad"  #: "pad" (DeepSeek: token map, pad id) or "eos" (Qwen: raw ids, an EOS blocks what is older)
    multiplier_rule: MultiplierRule = "numpy"  #: "numpy" (DeepSeek) or "splitmix64" (Qwen)
    seed: int = 0  #: seed of the multipliers
    row_multiple: int = 1  #: tables are padded to a multiple of this many rows
    format: FormatName = "bfloat16"  #: storage format of rows, a name of ``FORMATS`` in row_format.py
    eps: float | None = None  #: of the query and key norms; None: machine epsilon, as torch.nn.RMSNorm
    projection_bias: bool = False  #: key and value projections have a bias
    conv_kernel: int = 0  #: K taps of the short convolution, 0 for none; its dilation is N
    conv_eps: float | None = None  #: of the norm before the convolution
    norm_offset: float = 0.0  #: what is added to stored norm weights (Qwen stores w, uses 1 + w)
    zero_gate: ZeroGate = "copysign"  #: sign of a gate at d = 0: "copysign" (+1) or "sign" (0)

    def __post_init__(self):
        for name, kind in KINDS.items():
            object.__setattr__(self, name, kind.check("EngramConfig", name, getattr(self, name)))
        _expect(len(set(self.layers)) == len(self.layers), "layers", "distinct layer numbers", self.layers)
        _expect(
            len(self.table_sizes) == self.max_ngram - 1 and min(self.table_sizes) >= 2,
            "table_sizes",
            f"{self.max_ngram - 1} sizes of at least 2, one per order 2..{self.max_ngram}",
            self.table_sizes,
        )
        _expect(self.seed >= 0 or self.multiplier_rule != "numpy", "seed", "at least 0 for rule 'numpy'", self.seed)
        few = f"so few that all layers have at most {MAX_COLUMNS:,} columns"
        _expect(len(self.layers) * self.columns <= MAX_COLUMNS, "heads", few, self.heads)
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
    @declares(config=AnyOf(Instance(Mapping), Having("a config object", "__dict__")))
    def from_hf(cls, config: Any) -> "EngramConfig":
        """Read a checkpoint's ``config.json``, already parsed, or a config object of transformers.

        Knows DeepSeek-V4.1 (``engram_*`` fields) and Qwen (``ple_*`` and ``ngram_*`` fields), also where they stand in
        a ``text_config``; other fields are left alone. Qwen's layers are sorted, and what is absent or null has the
        value that transformers gives it; rows without a dtype of their own have the checkpoint's.
        ValueError names the field that is missing, out of bounds or does not fit the others.
        """
        arguments, rows = read_published(config)
        found = cls(**arguments)
        if rows not in (None, found.rows_per_layer):
            raise ValueError(
                "EngramConfig.from_hf: 'engram_num_embeddings' does not fit 'engram_vocab_size', 'engram_n_heads' and "
                f"'engram_layer_ids': their primes add up to {found.rows_per_layer}, got {rows}"
            )
        return found


declares(**KINDS)(EngramConfig.__init__)

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
        raise ValueError(f"EngramConfig: {field} must be {expected}, got {short(got)}")
