"""The hash of a model as tensors: multipliers, primes and offsets, ready for a device.

Per layer l, ``mix_n = XOR over s < n of id[t-s] * multipliers[l, s]`` in wrapping int64, and column c of order n reads
row ``floor_mod(mix_n, primes[l, c]) + offsets[l, c]``. Source: arXiv 2601.07372, section 2.2, and the demo's code.
"""

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch.compiler import is_compiling

from .config import EngramConfig
from .kinds import (
    INT64,
    Device,
    Each,
    Flag,
    Instance,
    Integers,
    Many,
    Optional,
    Tensor,
    Whole,
    check_all,
    declares,
    takes,
)
from .row_format import check_content

_INT64_MAX = INT64[1]
_MASK64 = 2**64 - 1
#: A HashPlan in the schema of a registered op; what HashPlan.parts() returns, and what HashPlan() takes.
PLAN_SCHEMA = (
    "Tensor multipliers, Tensor primes, Tensor offsets, Tensor reciprocals, Tensor orders, Tensor? token_map, int pad, "
    "int? eos, int? vocab_size, int[] rows_per_layer, bool non_negative, int[]? heads"
)
#: What HashPlan() takes.
KINDS = dict.fromkeys(("multipliers", "primes", "offsets", "reciprocals"), Tensor(torch.int64)) | dict(
    orders=Tensor(torch.int32),
    token_map=Optional(Tensor(torch.int32)),
    pad=Whole(),
    eos=Optional(Whole()),
    vocab_size=Optional(Whole(1)),
    rows_per_layer=Each(Whole(1), least=1),
    non_negative=Flag(),
    heads=Optional(Each(Whole(0))),
)
_LAYER_SEED = 10007  # what a layer's number adds to the seed, in both rules


@dataclass(frozen=True, eq=False)
class HashPlan:
    """Tensors of the hash of L layers with C columns each. Make one with :meth:`build` or :meth:`from_parts`.

    multipliers: int64 ``[L, N]``; N is the longest n-gram.
    primes: int64 ``[L, C]``, rows of each column.
    offsets: int64 ``[L, C]``, first row of each column.
    reciprocals: int64 ``[L, C]``, bits of the unsigned floor(2^64 / prime).
    orders: int32 ``[C]``, n of each column's n-grams.
    token_map: int32 ``[V_raw]``, raw id -> compressed id, or None.
    pad: id (after the token map) that blocked look-backs read.
    eos: raw id that blocks what is older than itself, or None.
    vocab_size: valid raw ids are 0 <= id < vocab_size; None: no upper bound.
    rows_per_layer: rows of each layer's table, L of them.
    non_negative: no mix can be negative and primes are below 2^31, so that reciprocals are exact.
    heads: columns of each order from 2 to N; None where they don't come in that order.

    TypeError or ValueError where a part has another type or shape; whether the numbers belong together is not checked.
    """

    multipliers: torch.Tensor
    primes: torch.Tensor
    offsets: torch.Tensor
    reciprocals: torch.Tensor
    orders: torch.Tensor
    token_map: torch.Tensor | None
    pad: int
    eos: int | None
    vocab_size: int | None
    rows_per_layer: tuple[int, ...]
    non_negative: bool
    heads: tuple[int, ...] | None
    _addresses = None  # of the tensors, when they were last found whole

    def __post_init__(self):
        if not is_compiling():
            check_all("HashPlan", KINDS, vars(self))
            self.check_parts("HashPlan")

    @classmethod
    def of_parts(cls, parts: Sequence) -> "HashPlan":
        """The plan whose :meth:`parts` these are, unchecked: a registered op makes one in each call."""
        plan = object.__new__(cls)
        vars(plan).update(zip(_FIELDS, parts, strict=True))
        return plan

    def check_memory(self, where: str) -> None:
        """Raise ValueError where the memory of a tensor was freed or shrunk since the last call."""
        if self._addresses != [x.data_ptr() for x in self.tensors]:
            self.check_parts(where)
            vars(self)["_addresses"] = [x.data_ptr() for x in self.tensors]

    def check_parts(self, where: str) -> None:
        """Raise ValueError unless the tensors have the shapes of a plan, and memory for them."""
        layers, orders = len(self.rows_per_layer), self.multipliers.shape[-1] if self.multipliers.dim() else 0
        columns = self.orders.numel()
        expected = dict(multipliers=[layers, orders], orders=[columns])
        expected |= dict.fromkeys(("primes", "offsets", "reciprocals"), [layers, columns])
        if self.token_map is not None:
            expected["token_map"] = [self.token_map.numel()]
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if list(tensor.shape) != shape or not tensor.is_contiguous() or 0 in shape:
                sizes = " for layers, orders or columns" if name != "token_map" else ""
                raise ValueError(
                    f"{where}: plan.{name} must be contiguous, of shape {shape} and not empty{sizes}, "
                    f"got {list(tensor.shape)}"
                )
            end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
            if tensor.device != self.device:
                raise ValueError(f"{where}: plan.{name} must be on {self.device}, got {tensor.device}")
            if tensor.untyped_storage().nbytes() < end:
                raise ValueError(f"{where}: the memory of plan.{name} was freed; make another plan")

    @classmethod
    @takes(config=Instance(EngramConfig), token_map=Optional(Integers(1)))
    def build(cls, config: EngramConfig, token_map: torch.Tensor | None = None) -> "HashPlan":
        """The plan of ``config`` on the CPU, whatever torch's default device is.

        token_map: integers ``[V_raw]`` from :func:`build_token_map`; required for window "pad", refused for "eos".
        ValueError where its size or its number of distinct ids differs from the config's: every multiplier
        derives from them, and the hash would silently be another one. ValueError also where the rows of a layer
        have no int64 number.
        """
        _check_rows(config.rows_per_layer, "primes from table_sizes on", "HashPlan.build")
        if config.window == "eos":
            if token_map is not None:
                raise ValueError("HashPlan.build: window 'eos' hashes raw ids and takes no token_map, got one")
            vocab, pad = config.vocab_size or config.raw_vocab_size, config.eos_id
        else:
            if token_map is None:
                raise ValueError(
                    "HashPlan.build: this config needs the token map of its tokenizer (build_token_map), got None"
                )
            token_map = _checked_token_map(token_map, "HashPlan.build")
            if len(token_map) != config.raw_vocab_size:
                raise ValueError(
                    f"HashPlan.build: token_map must have one entry per raw id, {config.raw_vocab_size}, "
                    f"got {len(token_map)}"
                )
            vocab, pad = len(token_map.unique()), int(token_map[config.pad_id])
            if config.vocab_size not in (None, vocab):
                raise ValueError(
                    f"HashPlan.build: token_map must give {config.vocab_size} compressed ids, as the config says, "
                    f"got {vocab}"
                )
            if int(token_map.max()) >= vocab:
                raise ValueError(
                    f"HashPlan.build: token_map must number its {vocab} compressed ids from 0 without gaps, "
                    f"got {int(token_map.max())}"
                )
        plan = cls.from_parts(
            _int64([_layer_multipliers(config, index, vocab) for index in range(len(config.layers))]),
            _int64(config.primes),
            pad=pad,
            token_map=token_map,
            eos=config.eos_id if config.window == "eos" else None,
            vocab_size=None if token_map is not None else config.raw_vocab_size,
        )
        return replace(plan, rows_per_layer=config.rows_per_layer)

    @classmethod
    @takes(
        multipliers=Integers(2),
        primes=Integers(2),
        pad=Whole(),
        token_map=Optional(Integers(1)),
        eos=Optional(Whole()),
        vocab_size=Optional(Whole(1)),
    )
    def from_parts(
        cls,
        multipliers: torch.Tensor,
        primes: torch.Tensor,
        *,
        pad: int,
        token_map: torch.Tensor | None = None,
        eos: int | None = None,
        vocab_size: int | None = None,
    ) -> "HashPlan":
        """A plan from a model's own constants, on the CPU.

        multipliers: int64 ``[L, N]``.
        primes: integers ``[L, C]``, C a multiple of N - 1, order-major: all heads of 2-grams, then of 3-grams, and so
        on.
        pad: the id blocked look-backs read, after the token map.
        token_map: integers ``[V_raw]`` or None.
        eos: raw id of the "eos" dialect; blocked look-backs then read ``pad``, which must equal it.
        vocab_size: number of valid raw ids where there is no token map; None accepts every id from 0.

        ValueError where shapes do not fit, a number is out of bounds, or pad and eos differ.
        """
        where = "HashPlan.from_parts"
        for name, tensor in (("multipliers", multipliers), ("primes", primes)):
            _check_integers(tensor, 2, name, where)
        layers, max_ngram = multipliers.shape
        if max_ngram < 2 or primes.shape[0] != layers or primes.shape[1] % (max_ngram - 1) or not primes.numel():
            raise ValueError(
                f"{where}: expected multipliers [L, N >= 2] and primes [L, (N - 1) * heads], "
                f"got {list(multipliers.shape)} and {list(primes.shape)}"
            )
        factors, columns = multipliers.tolist(), primes.tolist()
        if min(map(min, columns)) < 2:
            raise ValueError(f"{where}: primes must be at least 2, got {min(map(min, columns))}")
        _check_rows(map(sum, columns), "primes", where)
        if max(map(max, factors)) > _INT64_MAX:
            raise ValueError(f"{where}: multipliers must be int64, got {max(map(max, factors))}")
        if eos is not None and (token_map is not None or pad != eos):
            raise ValueError(f"{where}: with eos={eos}, pad must equal it and token_map be None, got pad={pad}")
        if token_map is not None:
            token_map = _checked_token_map(token_map, where)
            vocab_size = len(token_map)
        multipliers, primes = _int64(factors), _int64(columns)
        largest_id = int(token_map.max()) if token_map is not None else (vocab_size or 0) - 1
        columns_per_order = primes.shape[1] // (max_ngram - 1)
        return cls(
            multipliers=multipliers,
            primes=primes,
            offsets=primes.cumsum(1) - primes,
            reciprocals=_int64([[_signed(2**64 // prime) for prime in layer] for layer in columns]),
            orders=torch.arange(2, max_ngram + 1, dtype=torch.int32, device="cpu").repeat_interleave(columns_per_order),
            token_map=token_map,
            pad=pad,
            eos=eos,
            vocab_size=vocab_size,
            rows_per_layer=tuple(map(sum, columns)),
            non_negative=largest_id >= 0
            and pad >= 0
            and int(multipliers.min()) >= 0
            and max(largest_id, pad) * int(multipliers.max()) <= _INT64_MAX
            and int(primes.max()) < 2**31,
            heads=(columns_per_order,) * (max_ngram - 1),
        )

    def parts(self) -> tuple:
        """Every field in order, for registered ops, which take tensors and numbers alone."""
        tensors = (self.multipliers, self.primes, self.offsets, self.reciprocals, self.orders, self.token_map)
        return (*tensors, self.pad, self.eos, self.vocab_size, list(self.rows_per_layer), self.non_negative, self.heads)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors."""
        return tuple(part for part in self.parts()[:6] if part is not None)

    @property
    def max_ngram(self) -> int:
        """N, the longest n-gram."""
        return self.multipliers.shape[1]

    @cached_property
    def token_map_digest(self) -> str | None:
        """SHA-256 of the token map, by which files tell the tokenizer they were made with; None without a map."""
        if self.token_map is None:
            return None
        return hashlib.sha256(self.token_map.cpu().contiguous().numpy().astype("<i4").tobytes()).hexdigest()

    @property
    def index_dtype(self) -> torch.dtype:
        """Type of row ids: int32, or int64 where a layer has 2^31 rows or more."""
        return torch.int64 if max(self.rows_per_layer) >= 2**31 else torch.int32

    @property
    def device(self) -> torch.device:
        return self.primes.device

    @takes(device=Device())
    def to(self, device: torch.device | str) -> "HashPlan":
        """The same plan with its tensors on ``device``; ValueError or TypeError for what names no device."""
        names = ("multipliers", "primes", "offsets", "reciprocals", "orders", "token_map")
        moved = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items()})

    @takes(layers=Optional(Many()), columns=Optional(Many()))
    def select(self, layers: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> "HashPlan":
        """The plan of some of its layers and columns, by position, in the order given.

        Row ids are those of the whole plan: offsets stay as they are. TypeError for positions that are no integers,
        ValueError for those that are not there, for none, and for one that is named twice.
        """
        layers = _positions(layers, self.primes.shape[0], "layers")
        columns = _positions(columns, self.primes.shape[1], "columns")
        per_column = {
            name: getattr(self, name)[layers][:, columns].contiguous() for name in ("primes", "offsets", "reciprocals")
        }
        orders = self.orders[columns].contiguous()
        return replace(
            self,
            multipliers=self.multipliers[layers].contiguous(),
            orders=orders,
            heads=_heads(orders.tolist(), self.max_ngram),
            rows_per_layer=tuple(self.rows_per_layer[layer] for layer in layers),
            **per_column,
        )


declares(**KINDS)(HashPlan.__init__)
_FIELDS = tuple(field.name for field in fields(HashPlan))


def layer_plan(plan: HashPlan, config: EngramConfig, layer: int, where: str) -> HashPlan:
    """The plan of model layer ``layer`` alone; ``plan`` is of all the config's layers, or of that one."""
    layers, columns = plan.primes.shape
    if layers not in (1, len(config.layers)) or columns != config.columns:
        raise ValueError(
            f"{where}: plan must have 1 or {len(config.layers)} layers of {config.columns} columns, "
            f"got {layers} of {columns}"
        )
    return plan if layers == 1 else plan.select(layers=[config.layers.index(layer)])


def _layer_multipliers(config: EngramConfig, index: int, vocab: int) -> list[int]:
    """N odd multipliers of the layer at ``index``; below 2^63 / V, so that products of valid ids never wrap."""
    bound = max(1, _INT64_MAX // vocab // 2)
    if config.multiplier_rule == "numpy":
        generator = np.random.default_rng(config.seed + _LAYER_SEED * config.layers[index])
        draws = generator.integers(0, bound, config.max_ngram, dtype=np.int64).tolist()
    else:  # Qwen counts its own layers here, not the model's
        base = config.seed + _LAYER_SEED * index
        draws = [_splitmix64(base, step) % bound for step in range(1, config.max_ngram + 1)]
    return [2 * draw + 1 for draw in draws]


def _splitmix64(seed: int, step: int) -> int:
    """Output number ``step + 1`` of the SplitMix64 generator started at ``seed`` (Steele, Lea, Flood 2014)."""
    state = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & _MASK64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
    return state ^ (state >> 31)


def _heads(orders: list[int], max_ngram: int) -> tuple[int, ...] | None:
    """Columns of each order from 2 to ``max_ngram``; None unless lower orders come first."""
    return tuple(map(orders.count, range(2, max_ngram + 1))) if orders == sorted(orders) else None


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``word``."""
    return word - 2**64 if word >= 2**63 else word


def _int64(numbers) -> torch.Tensor:
    """On the CPU, where torch's default device would put what is made from numbers elsewhere."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _check_rows(rows: Iterable[int], name: str, where: str) -> None:
    """Raise ValueError where row ids or offsets would wrap."""
    if (most := max(rows)) > _INT64_MAX:
        raise ValueError(f"{where}: {name} must add up to at most 2^63 - 1 rows in every layer, got {most}")


def _check_integers(tensor, dimensions: int, name: str, where: str) -> None:
    """Raise TypeError unless it is a tensor of integers, ValueError where it has no content."""
    Integers(dimensions).check(where, name, tensor)
    check_content(tensor, name, where)


def _checked_token_map(token_map: torch.Tensor, where: str) -> torch.Tensor:
    _check_integers(token_map, 1, "token_map", where)
    if not token_map.numel() or int(token_map.min()) < 0 or int(token_map.max()) >= 2**31:
        raise ValueError(f"{where}: token_map must hold at least one id, all within 0 <= id < 2^31")
    return token_map.detach().to("cpu", torch.int32).contiguous()


def _positions(chosen: Sequence[int] | None, size: int, what: str) -> list[int]:
    if chosen is not None and not isinstance(chosen, Iterable):
        raise TypeError(f"HashPlan.select: {what} must be a sequence of integers, got {chosen!r}")
    chosen = list(range(size)) if chosen is None else [_position(position, what) for position in chosen]
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= size:
        raise ValueError(f"HashPlan.select: {what} must be distinct positions within 0..{size - 1}, got {chosen}")
    return chosen


def _position(position, what: str) -> int:
    # True counts as 1 for Python and for torch, and is no number where one is asked for.
    if not isinstance(position, bool) and getattr(position, "dtype", None) != torch.bool:
        try:
            return operator.index(position)
        except TypeError:
            pass
    raise TypeError(f"HashPlan.select: {what} must be integers, got {position!r}")
