"""What two Engram layers cost a decoder's step: the lookup that other work does not hide, and all of it.

The decoder is a stand-in: the matmuls of a dense model's layers in a row, one new token for each of B sequences,
bfloat16 weights read in every step. It has no attention over a cache, no norm and no sampling, so that a real step
takes longer and the shares here are too high rather than too low. Its Engram layers read V4.1's rows from a host table,
project and gate them into its one residual stream; token ids and the three before them change in every step. Modes:

    plain      no Engram layer
    ready      rows are there already: projection and gate alone
    inline     one launch for both layers ahead of the step, in its stream
    side       the same launch on a second stream, awaited at the first Engram layer
    by_layer   a launch a layer on the second stream, each awaited at its layer
    projected  as side, and each layer's projection behind it on the second stream, awaited at its layer

Each mode is one CUDA graph; modes take turns. Exposed: time over ``ready``. Cost: the share of throughput that is lost
to ``plain``, which the paper puts at 1.92 % (4B) and 2.78 % (8B) for a table of 100 G parameters on the host.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch

from bench.running.cases import Workbench, poison, spread_tokens, wrong_rows
from bench.running.timing import Measurement, SideStream
from engram_kernels import gate_residual, hash_lookup, reference, split_kv

MODES = ("plain", "ready", "inline", "side", "by_layer", "projected")
FETCHING = MODES[2:]
BATCHES, ALL_BATCHES = (1, 8, 64, 512), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Programs of lookups on the second stream: 8 to 32 fill the link, and more would take multiprocessors from matmuls.
SIDE_PROGRAMS = 32
ROUNDS = 20
#: Seconds that a step's modes are expected to take before one has been measured.
FIRST_STEP = 4.0
_SETS = 64  # of token ids, so that a call reads rows that the calls before it did not


@dataclass(frozen=True)
class Decoder:
    """Widths of a dense decoder's matmuls. ``attention``: of all query heads; ``kv``: of keys and values together."""

    layers: int
    hidden: int
    ffn: int
    attention: int
    kv: int
    engram: tuple[int, ...] = (1, 14)  #: layers that an Engram layer comes before, V4.1's
    paper: float | None = None  #: throughput that the paper's model of this size loses

    @property
    def layer_weights(self) -> tuple[tuple[int, int], ...]:
        """Shapes ``[inputs, outputs]`` of a layer's matmuls, in their order."""
        into_heads, out_of_heads = (self.hidden, self.attention + self.kv), (self.attention, self.hidden)
        return into_heads, out_of_heads, (self.hidden, 2 * self.ffn), (self.ffn, self.hidden)

    @property
    def layer_bytes(self) -> int:
        return 2 * sum(inputs * outputs for inputs, outputs in self.layer_weights)


DECODERS = {
    "4b": Decoder(36, 2560, 9728, 4096, 2048, paper=0.0192),
    "8b": Decoder(36, 4096, 12_288, 4096, 2048, paper=0.0278),
}


def step_names(full: bool) -> list[str]:
    """Every measurement, in its order: sizes alternate, small batches first."""
    return [f"step/{name}/B{batch}" for batch in (ALL_BATCHES if full else BATCHES) for name in DECODERS]


class StandIn:
    """A decoder's weights and those of its Engram layers; :meth:`at` makes it ready for a batch."""

    def __init__(self, decoder: Decoder, bench: Workbench, free_bytes: int | None = None):
        self.decoder, self.bench = decoder, bench
        self.plan, self.table = bench.plan("v41", "host"), bench.table("v41", "host")
        self.config = bench.config("v41")
        options = dict(device=bench.device, dtype=torch.bfloat16)
        self._generator = torch.Generator(bench.device).manual_seed(20260112)

        def weight(inputs: int, outputs: int, scale: float = 1.0) -> torch.Tensor:
            drawn = torch.randn(inputs, outputs, generator=self._generator, **options)
            return drawn * (scale * inputs**-0.5)

        # Where they do not all fit, layers share weights. One layer's are more than a cache holds.
        most = decoder.layers if free_bytes is None else max(1, int(0.5 * free_bytes) // decoder.layer_bytes)
        scales = (1.0, 0.1, 1.0, 0.1)  # what is added to the stream is small, so that it stays finite over all layers
        self.weights = [
            [weight(*shape, scale) for shape, scale in zip(decoder.layer_weights, scales, strict=True)]
            for _ in range(min(most, decoder.layers))
        ]
        width = self.config.columns * self.config.row_width
        # Rows are random bytes of several thousand in the mean.
        self.wkv = [weight(width, 2 * decoder.hidden, 1e-4) for _ in decoder.engram]
        self.norms = [weight(1, decoder.hidden, 0.1) + 1 for _ in range(2)]

    def at(self, batch: int) -> "StepAt":
        return StepAt(self, batch)


class StepAt:
    """The step at one batch size, over buffers that stay where they are."""

    def __init__(self, stand_in: StandIn, batch: int):
        bench, config, plan = stand_in.bench, stand_in.config, stand_in.plan
        self.of, self.batch = stand_in, batch
        layers, columns = plan.primes.shape
        self.tables = (stand_in.table,) * layers
        windows = [bench.windows(batch, config.max_ngram, number) for number in range(_SETS)]
        self.sets = [(window[:, -1].contiguous(), window[:, :-1].contiguous()) for window in windows]
        self.ids, self.history = (tensor.clone() for tensor in self.sets[0])
        self.cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=bench.device)
        options = dict(dtype=torch.bfloat16, device=bench.device)
        self.rows = torch.zeros(layers, batch, columns, stand_in.table.width, **options)
        self.kv = torch.zeros(layers, batch, 2 * stand_in.decoder.hidden, **options)
        self.hidden = bench.randn(batch, stand_in.decoder.hidden)
        self.final = torch.zeros_like(self.hidden)
        self.side = SideStream(bench.device)
        self.plans = [plan.select(layers=[layer]) for layer in range(layers)]

    def choose(self, number: int) -> None:
        """Make token ids and what precedes them those of set ``number``."""
        for buffer, chosen in zip((self.ids, self.history), self.sets[number % _SETS], strict=True):
            buffer.copy_(chosen)

    def run(self, mode: str) -> None:
        """One step: ``final`` from ``hidden``, and in modes that fetch also ``rows``, in projected also ``kv``."""
        fetched = self._fetch(mode)
        stream = self.hidden
        for layer in range(self.of.decoder.layers):
            if mode != "plain" and layer in self.of.decoder.engram:
                index = self.of.decoder.engram.index(layer)
                if index < len(fetched):
                    self.side.wait(fetched[index])
                stream = self._engram(stream, index, mode == "projected")
            stream = self._layer(stream, layer)
        self.final.copy_(stream)

    def check(self, number: int) -> str | None:
        """What is wrong after a step that fetched, with set ``number``; None where rows are the reference's."""
        at = spread_tokens(self.batch, 64)
        ids, history = (tensor.cpu() for tensor in self.sets[number % _SETS])
        plan = self.of.bench.plan("v41", "host", torch.device("cpu"))
        row_ids = reference.ngram_hash(ids, plan, cu_seqlens=self.cu_seqlens.cpu(), history=history)[at]
        problem = wrong_rows(self.rows[:, at.to(self.rows.device)], row_ids, self.of.table)
        if problem is None and not bool(self.final.isfinite().all()):
            return "the stream is not finite: a layer read rows too early"
        return problem

    def _fetch(self, mode: str) -> list:
        if mode == "inline":
            self._look_up(self.of.plan, self.tables, self.rows, None)
        if mode == "side":
            return self.side.start(partial(self._look_up, self.of.plan, self.tables, self.rows, SIDE_PROGRAMS))
        if mode == "by_layer":
            parts = zip(self.plans, self.tables, self.rows.split(1), strict=True)
            return self.side.start(*[partial(self._look_up, p, (t,), r, SIDE_PROGRAMS) for p, t, r in parts])
        if mode == "projected":
            look_up = partial(self._look_up, self.of.plan, self.tables, self.rows, SIDE_PROGRAMS)
            return self.side.start(look_up, *[partial(self._project, index) for index in range(len(self.kv))])[1:]
        return []

    def _look_up(self, plan, tables, out, programs) -> None:
        options = dict(cu_seqlens=self.cu_seqlens, history=self.history, programs=programs)
        hash_lookup(self.ids, plan, tables, out=out, **options)

    def _project(self, index: int) -> None:
        torch.mm(self.rows[index].flatten(1), self.of.wkv[index], out=self.kv[index])

    def _engram(self, stream: torch.Tensor, index: int, projected: bool) -> torch.Tensor:
        kv = self.kv[index] if projected else self.rows[index].flatten(1) @ self.of.wkv[index]
        key, value = split_kv(kv, 1, stream.shape[1])
        norms = self.of.norms
        return gate_residual(stream[:, None], key, value, *norms, eps=self.of.config.eps)[:, 0]

    def _layer(self, stream: torch.Tensor, layer: int) -> torch.Tensor:
        decoder = self.of.decoder
        into_heads, out_of_heads, up, down = self.of.weights[layer % len(self.of.weights)]
        stream = torch.addmm(stream, (stream @ into_heads)[:, : decoder.attention], out_of_heads)
        return torch.addmm(stream, (stream @ up)[:, : decoder.ffn], down)


def measure_step(stand_in: StandIn, batch: int, timer, rounds: int) -> dict:
    """Medians of every mode, what each exposes and costs; without a time where a mode's rows or stream are wrong."""
    step = stand_in.at(batch)
    replays = {mode: timer.record(partial(step.run, mode)) for mode in MODES}
    for number, mode in enumerate(FETCHING):
        step.choose(number)
        poison(step.rows)
        poison(step.kv)
        replays[mode]()
        problem = step.check(number)
        if problem is not None:
            return dict(status="failed", reason=f"{mode}: {problem}")
    taken = dict(zip(MODES, timer.rounds(list(replays.values()), rounds, step.choose), strict=True))
    pairs = {mode: list(zip(taken["ready"], taken["plain"], taken[mode], strict=True)) for mode in MODES}
    return dict(
        status="ok",
        seconds={mode: Measurement.of(seconds).as_dict() for mode, seconds in taken.items()},
        exposed={mode: statistics.median(own - ready for ready, _, own in pairs[mode]) for mode in FETCHING},
        cost={mode: statistics.median(1 - plain / own for _, plain, own in pairs[mode]) for mode in MODES[1:]},
        weight_bytes=stand_in.decoder.layer_bytes * stand_in.decoder.layers,
        distinct_layers=len(stand_in.weights),
        table_bytes=stand_in.table.nbytes,
        side_programs=SIDE_PROGRAMS,
    )


class Steps:
    """Measures by name; a decoder is made when its first batch comes."""

    def __init__(self, bench: Workbench, timer, decoders: dict[str, Decoder] | None = None, rounds: int = ROUNDS):
        self._bench, self._timer, self._decoders, self._rounds = bench, timer, decoders or DECODERS, rounds
        self._made: dict[str, StandIn] = {}

    def measure(self, name: str) -> dict:
        """The record of ``step/<decoder>/B=<batch>``."""
        _, size, batch = name.split("/")
        decoder = self._decoders[size]
        if size not in self._made:
            device = self._bench.device
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
            self._made[size] = StandIn(decoder, self._bench, free)
        tokens = int(batch.removeprefix("B"))
        measured = measure_step(self._made[size], tokens, self._timer, self._rounds)
        return dict(decoder=size, batch=tokens, paper=decoder.paper) | measured
