"""What is measured: cases, the inputs they need, and how they are found.

``bench_<file>.py`` yields :class:`Case` objects from ``cases(full)``; a new file of that name is found by itself. A
case makes its inputs in a :class:`Workbench`, which holds what cases share: plans, tables and token ids of the models.

Tables are the layer's own size where that is below the workbench's limit and scaled down to it where not, in rows and
primes alike, so that ids still cover the whole table. All layers of a plan read one table.
"""

import contextlib
import dataclasses
import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

import bench
from bench.peers.adapters import Peers
from engram_kernels import EngramConfig, EngramTable, HashPlan, reference
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.testing.implementations import Implementation

from .text import load_token_ids, load_token_map

#: Name in cases -> preset of EngramConfig.
MODELS = {"v41": "deepseek_v41_flash", "27b": "engram_27b"}
ALL_MODELS = MODELS | {"40b": "engram_40b", "demo": "deepseek_demo", "qwen": "qwen38_flash_next"}
#: Formats of rows besides a model's own, in which DeepSeek-V4.1's are looked up too: model "v41-nvfp4".
OTHER_FORMATS = ("nvfp4", "mxfp4")
TOKENS, ALL_TOKENS = (1, 8, 128, 2048, 8192), tuple(2**power for power in range(15))
_FILL_BYTES = 256 << 20  # a divisor of the unit in which host memory is registered: no copy crosses two of them
_FAR_APART = 104_729  # tokens between two places of the text; a prime, so that places come again late
INFINITY = float("inf")
_RANK = {8192: 0, 1: 1, 2048: 2, 128: 3, 8: 4}


@dataclass(frozen=True)
class InTurn:
    """For calls of which each changes what the next one finds: every one of them runs once, in their order.

    The first and the last are checked; those between are timed, as the same ones of a baseline are.
    start: called ahead of the timed ones. finish: after them; what was counted, as entries of the record, or ValueError
    where that cannot be right.
    """

    start: Callable[[], object]
    finish: Callable[[], dict]


@dataclass
class Prepared:
    """A case's inputs in place, ready to be called again and again, or once each with ``in_turn``.

    calls: one per set of inputs, each of which runs the op once and returns its result. check: compares such a result
    with the reference, given the set's number; None, or what is wrong in words. baselines: name -> what makes a call.
    """

    calls: list[Callable[[], object]]
    check: Callable[[object, int], str | None]
    nbytes: int  #: read and written by one call
    link_bytes: int = 0  #: of these, read over the link
    wire_bytes: float = 0.0  #: what these take on the link, with headers and in whole sectors: traffic.LayerTraffic
    facts: dict = field(default_factory=dict)
    baselines: dict[str, Callable[[], Callable[[int], object]]] = field(default_factory=dict)
    in_turn: InTurn | None = None


@dataclass(frozen=True)
class Case:
    """One op on one model's geometry at one number of tokens. Low ``priority`` comes first."""

    op: str
    model: str
    variant: str
    tokens: int
    priority: int
    prepare: Callable[["Workbench"], Prepared]
    roof: str = "device_copy"  #: the roof that its GB/s is compared with

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.op, self.model, self.variant, f"T{self.tokens}") if part)


def priority(model: str, tokens: int, extra: int = 0) -> int:
    """DeepSeek-V4.1 first; most tokens (bandwidth), then one (latency), then those between."""
    return 2 * _RANK.get(tokens, 4) + 3 * (model != "v41") + extra


def models(full: bool) -> tuple[str, ...]:
    """Names of the models that are measured."""
    return tuple(ALL_MODELS if full else MODELS)


def config_of(model: str) -> EngramConfig:
    """The preset of a model's name; behind a hyphen stands another format of rows."""
    name, _, row_format = model.partition("-")
    config = getattr(EngramConfig, ALL_MODELS[name])()
    return dataclasses.replace(config, format=row_format) if row_format else config


def token_counts(full: bool) -> tuple[int, ...]:
    """Numbers of tokens that are measured."""
    return ALL_TOKENS if full else TOKENS


def load_cases(full: bool = False) -> list[Case]:
    """Every case of every ``bench_*.py``, in the order in which they are run: by priority; a full run model by model.

    All tables of a full run do not fit into memory at once.
    """
    modules = (module.name for module in pkgutil.walk_packages(bench.__path__, "bench."))
    names = sorted((name for name in modules if ".bench_" in name), key=lambda name: name.rpartition(".")[2])
    found = [case for name in names for case in importlib.import_module(name).cases(full)]
    order = {name: number for number, name in enumerate(ALL_MODELS)}
    return sorted(found, key=lambda case: (order.get(case.model.partition("-")[0], 0) if full else 0, case.priority))


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements that the tensors view."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def row_bytes(table: EngramTable, rows: int) -> int:
    """Bytes of ``rows`` rows of a table and of their scales."""
    scales = table.scale if table.format.group else None
    return rows * tensor_bytes(table.weight[0], None if scales is None else scales[0])


def _row_bytes(config: EngramConfig) -> int:
    fmt = FORMATS[config.format]
    return fmt.stored_bytes(config.row_width)


def poison(out: torch.Tensor) -> None:
    """NaN, or -1: what was not written cannot pass a check."""
    out.view(torch.uint8).fill_(0xFF)


def spread_tokens(tokens: int, most: int = 512) -> torch.Tensor:
    """Positions of at most ``most`` tokens, spread over all of them, the first and the last included."""
    return torch.linspace(0, tokens - 1, min(tokens, most)).round().long()


def wrong_rows(found: torch.Tensor, row_ids: torch.Tensor, table: EngramTable) -> str | None:
    """In words where rows ``[L, T, C, R]`` are not the reference's for ``row_ids [T, L, C]``, where the table is."""
    wrong = 0
    for layer in range(len(found)):
        expected = reference.lookup(table, row_ids[:, layer])
        wrong += int((found[layer].to(expected.device) != expected).sum())
    return f"{wrong} of {found.numel()} elements differ from the reference" if wrong else None


class Workbench:
    """Plans, tables and ids on one device. Use it as a context: it gives the tables' memory back.

    host_limit, device_limit: most bytes of a table. cache_bytes: size of the cache that inputs must not fit in. peers:
    other libraries' kernels, None where there are none. text: raw ids of real text, by default those in ``data/``.
    implementations: of the user's, to be timed beside ours.
    room: placement -> most bytes of all its tables; older ones are closed for a new one. Without it they all stay.
    """

    def __init__(
        self,
        device: torch.device,
        host_limit: int,
        device_limit: int,
        cache_bytes: int = 0,
        say=print,
        peers: Peers | None = None,
        text: np.ndarray | None = None,
        room: dict[str, int] | None = None,
        implementations: Sequence[Implementation] = (),
    ):
        self.device, self.cache_bytes, self._say, self.peers = device, cache_bytes, say, peers
        self.implementations = implementations
        self._limits, self._room = {"host": host_limit, "device": device_limit}, room or {}
        self._given_text = text
        self._tables: dict[tuple, EngramTable] = {}
        self._configs: dict[tuple, EngramConfig] = {}
        self._plans: dict[tuple, HashPlan] = {}

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(self, *_) -> None:
        self._close(list(self._tables))

    def sets(self, nbytes: int) -> int:
        """Input sets to rotate over, so that together they are more than twice the cache; 2 to 32.

        A timer takes 30 samples: the rows of a few tokens are then new to the address translation in each of them.
        """
        return max(2, min(32, -(-2 * self.cache_bytes // max(1, nbytes))))

    def config(self, model: str, placement: str = "host") -> EngramConfig:
        """The model's geometry with tables within the limit of ``placement``."""
        if (model, placement) not in self._configs:
            config = config_of(model)
            row = _row_bytes(config)
            # More than once, because primes lie above the sizes that they are sought from.
            while (share := self._limits[placement] / (max(config.rows_per_layer) * row)) < 1:
                sizes = tuple(max(2, int(size * share)) for size in config.table_sizes)
                if sizes == config.table_sizes:
                    sizes = tuple(max(2, size - 1) for size in sizes)
                config = dataclasses.replace(config, table_sizes=sizes)
            self._configs[model, placement] = config
        return self._configs[model, placement]

    def plan(self, model: str, placement: str, device: torch.device | None = None) -> HashPlan:
        """The hash of :meth:`config` on a device, the workbench's own by default."""
        device = device or self.device
        key = (model, placement, device)
        if key not in self._plans:
            cpu = (model, placement, torch.device("cpu"))
            if cpu not in self._plans:
                config = self.config(model, placement)
                self._plans[cpu] = HashPlan.build(config, None if config.window == "eos" else self._token_map)
            self._plans[key] = self._plans[cpu].to(device)
        return self._plans[key]

    def table(self, model: str, placement: str) -> EngramTable:
        """A table of random rows, none of them NaN, as large as the largest layer of :meth:`config`."""
        if (model, placement) not in self._tables:
            config = self.config(model, placement)
            rows, where = max(config.rows_per_layer), placement
            if placement == "device" and self.device.type == "cpu":
                where = "cpu"
            self._make_room(placement, rows * _row_bytes(config))
            table = EngramTable.empty(rows, config.row_width, config.format, placement=where)
            self._tables[model, placement] = table
            self._say(f"table {model}, {placement}: {rows:,} rows, {table.nbytes / 2**30:.2f} GiB")
            self._fill(table)
        return self._tables[model, placement]

    def token_ids(self, kind: str, model: str, tokens: int, index: int) -> torch.Tensor:
        """int32 ``[T]`` on the device: set number ``index`` of "uniform" ids or of windows of "text"."""
        if kind == "text":
            start = index * max(tokens, 65_536) % (len(self._text) - tokens)
            return self._text[start : start + tokens].to(self.device)
        generator = torch.Generator().manual_seed(20260112 + index)
        vocab = config_of(model).raw_vocab_size
        return torch.randint(0, vocab, (tokens,), generator=generator, dtype=torch.int32).to(self.device)

    def stream(self, kind: str, model: str, most: int) -> torch.Tensor:
        """int32 ``[T]`` on the device: ``most`` "uniform" ids, or of the "text", from its start, as many as it has."""
        return self._text[:most].to(self.device) if kind == "text" else self.token_ids(kind, model, most, 0)

    def windows(self, count: int, length: int, index: int) -> torch.Tensor:
        """int32 ``[count, length]`` on the device: set number ``index`` of ``count`` places of the text, far apart."""
        numbers = torch.arange(index * count, (index + 1) * count)
        starts = numbers * _FAR_APART % (len(self._text) - length)
        return self._text[starts[:, None] + torch.arange(length)].to(self.device)

    def randn(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Normal bfloat16 values on the device."""
        generator = torch.Generator(self.device).manual_seed(20260112 + seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=self.device).to(torch.bfloat16)

    @cached_property
    def _text(self) -> torch.Tensor:
        return torch.from_numpy(load_token_ids() if self._given_text is None else self._given_text)

    @cached_property
    def _token_map(self) -> torch.Tensor:
        return torch.from_numpy(load_token_map())

    def _make_room(self, placement: str, nbytes: int) -> None:
        """Close this placement's oldest tables until another of ``nbytes`` fits."""
        there = [key for key in self._tables if key[1] == placement]
        while there and sum(self._tables[key].nbytes for key in there) + nbytes > self._room.get(placement, INFINITY):
            self._close([there.pop(0)])

    def _close(self, keys: list[tuple]) -> None:
        # After a fault on the device this fails, as everything does; the report is still to be written.
        with contextlib.suppress(RuntimeError):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        for key in keys:
            self._tables.pop(key).close()
        gc.collect()  # torch.compile leaves cycles that hold views of them
        with contextlib.suppress(RuntimeError):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _fill(self, table: EngramTable) -> None:
        """Random bytes made on the device, which for tables of many GiB is much faster than on the host."""
        generator = torch.Generator(self.device).manual_seed(20260112)
        options = dict(generator=generator, device=self.device)

        def fill(flat: torch.Tensor, draw) -> None:
            step = _FILL_BYTES // flat.element_size()
            for begin in range(0, len(flat), step):
                part = flat[begin : begin + step]
                part.copy_(draw(len(part)))

        if not table.format.scaled:
            fill(table.weight.view(-1), lambda size: torch.randn(size, dtype=table.weight.dtype, **options))
            return
        # Without bit 3 no byte is an e4m3 NaN. Every byte of e2m1 is two numbers.
        weight = table.weight.view(torch.uint8).view(-1)
        fill(weight, lambda size: torch.randint(0, 256, (size,), dtype=torch.uint8, **options) & 0xF7)
        if table.format.group:
            some = (120, 135) if table.format.group_scale == "ue8m0" else (0x30, 0x40)
            fill(table.scale.view(-1), lambda size: torch.randint(*some, (size,), dtype=torch.uint8, **options))


def row_variants(full: bool = False) -> Iterator[tuple[str, str, int, int, str]]:
    """(model, variant, tokens, priority, roof) of the ops that read rows: each placement, ids uniform and of text."""
    for extra, (placement, kind) in enumerate(
        [("host", "uniform"), ("host", "text"), ("device", "uniform"), ("device", "text")]
    ):
        roof = "zero_copy" if placement == "host" else "device_copy"
        for model in (*models(full), *(f"v41-{other}" for other in OTHER_FORMATS)):
            for tokens in token_counts(full):
                yield model, f"{placement}/{kind}", tokens, priority(model, tokens, extra), roof
