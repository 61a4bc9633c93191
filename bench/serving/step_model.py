"""``python -m bench step_model``: what two Engram layers expose of a decode step, with rows ahead and with kv ahead.

Arithmetic, not measured. The decoder runs kernel after kernel on one stream; lookups, and with kv ahead projections, on
another. A kernel takes the longest of its bytes from device memory, its arithmetic and its bytes over the link. Two at
once share what both need, each to the same part of the speed that it has alone, and what one leaves is the other's.
Where multiprocessors are what they lack, both lose ``loss`` besides: to waves that no longer fill the GPU, and to a
shared cache. That is an assumption, for which ``interference.py`` has the measurement. Exposed: time over the same step
with rows and kv there already.

A decoder of few tokens leaves some of the memory's rate: all of it in the ``launch`` between kernels, and all but
``reach`` of it within them. That is what a projection ahead lives on; its rest delays the decoder by what it would have
taken in its place.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from bench.running.report import print_table
from bench.serving.step import DECODERS, SIDE_PROGRAMS
from engram_kernels import EngramConfig
from engram_kernels.serving.policy import layers_apart, projects_ahead

RESULT = Path(__file__).parents[1] / "results" / "step_model.json"
CONFIG = EngramConfig.deepseek_v41_flash()
ROW_BYTES = CONFIG.columns * (CONFIG.row_width + CONFIG.row_width // 32)  # of a token and layer: e4m3 and its scales
#: Of a token: hidden read and written, key and value read, in bfloat16.
GATE_BYTES = 2 * (3 * CONFIG.branches + 1) * CONFIG.hidden_size
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MODES = ("ready", "rows", "kv")
#: Tokens of the step that is drawn.
DRAWN = 16
WINDOW = 3.1e-4  # seconds of it, from the layer before each Engram layer on


@dataclass(frozen=True)
class Machine:
    """A GPU and a dense decoder on it: by default an H200 and the 8B decoder of ``step.py``."""

    sms: int = 132  # multiprocessors
    hbm: float = 4.3e12  # bytes a second from device memory, 0.9 of the datasheet
    sm_bytes: float = 65e9  # of which one multiprocessor draws so many
    sm_flops: float = 5.3e12  # bfloat16 operations a second of one, 0.7 of the datasheet
    link: float = 54.5e9  # bytes a second from host memory, PCIe Gen5 in requests of 128 bytes
    trip: float = 1.3e-6  # seconds of a round trip over it, of which a lookup has two before its first row
    launch: float = 1.5e-6  # seconds from a kernel's end to the start of the next, in a graph
    reach: float = 0.85  # part of hbm that a kernel draws by itself, ramps and tails counted
    loss: float = 0.05  # part of their speed that kernels lose which lack multiprocessors together
    programs: int = SIDE_PROGRAMS  # multiprocessors that a lookup holds
    layers: int = DECODERS["8b"].layers
    layer_weights: int = DECODERS["8b"].layer_bytes  # bytes of a layer that a step reads
    layer_kernels: int = 8  # by so many kernels
    projection: int = CONFIG.columns * CONFIG.row_width * (CONFIG.branches + 1) * CONFIG.hidden_size  # bytes, in e4m3


class Work(NamedTuple):
    """A kernel: seconds of its needs on a whole GPU, and what comes before it."""

    name: str
    lead: float  #: seconds before it begins that need nothing
    memory: float = 0.0
    arithmetic: float = 0.0
    link: float = 0.0
    held: float = 0.0  #: part of the multiprocessors, whatever its speed
    after: int = 0  #: how many works of the side stream it waits for


class Span(NamedTuple):
    """When a work ran, in seconds from the step's start."""

    name: str
    begin: float
    end: float


def alone(work: Work, machine: Machine) -> float:
    """Seconds of a work by itself."""
    return max(work.memory / machine.reach, work.arithmetic, work.link)


def speeds(works: Sequence[Work], machine: Machine) -> list[float]:
    """Of each of one or two works at once, as a part of its speed alone."""
    feeding = machine.hbm / (machine.sms * machine.sm_bytes)  # multiprocessors that draw all of hbm
    needs = []
    for work in works:
        seconds = alone(work, machine)
        cores = 0.0 if work.held else max(work.arithmetic, feeding * work.memory) / seconds
        needs.append((work.memory / seconds, work.link / seconds, cores))
    room = (1.0, 1.0, 1.0 - sum(work.held for work in works))
    sums = [sum(part) for part in zip(*needs, strict=True)]
    equal = min([1.0] + [each / wanted for each, wanted in zip(room, sums, strict=True) if wanted])
    found = [equal] * len(works)
    for place, need in enumerate(needs):
        left = [each - sum(s * n[i] for s, n in zip(found, needs, strict=True)) for i, each in enumerate(room)]
        more = [max(0.0, spare) / wanted for spare, wanted in zip(left, need, strict=True) if wanted]
        found[place] += min([1.0 - found[place], *more])
    lacking = len(works) > 1 and all(need[2] for need in needs) and sums[2] * equal > room[2] * (1 - 1e-9)
    return [each * (1 - machine.loss) for each in found] if lacking else found


def timeline(main: Sequence[Work], side: Sequence[Work], machine: Machine) -> tuple[list[Span], list[Span]]:
    """When the works of both streams run, each stream one after the other."""
    streams = (main, side)
    spans: tuple[list[Span], list[Span]] = ([], [])
    fresh, lead, left, begun = [True, True], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]
    now = 0.0
    while any(len(done) < len(stream) for done, stream in zip(spans, streams, strict=True)):
        working, waiting = [], []
        for number, (done, stream) in enumerate(zip(spans, streams, strict=True)):
            if len(done) == len(stream) or stream[len(done)].after > len(spans[1]):
                continue
            work = stream[len(done)]
            if fresh[number]:
                fresh[number], lead[number], left[number], begun[number] = False, work.lead, 1.0, now
            (waiting if lead[number] > 0 else working).append(number)
        works = [streams[number][len(spans[number])] for number in working]
        rates = [
            speed / max(alone(work, machine), 1e-12)
            for speed, work in zip(speeds(works, machine) if works else [], works, strict=True)
        ]
        passed = min(
            [lead[number] for number in waiting]
            + [left[number] / rate for number, rate in zip(working, rates, strict=True)]
        )
        now += passed
        for number in waiting:
            lead[number] -= passed
            if lead[number] <= 1e-15:
                lead[number], begun[number] = 0.0, now
        for number, rate, work in zip(working, rates, works, strict=True):
            left[number] -= passed * rate
            if left[number] <= 1e-9:
                spans[number].append(Span(work.name, begun[number], now))
                fresh[number] = True
    return spans


def step_works(mode: str, tokens: int, machine: Machine) -> tuple[list[Work], list[Work]]:
    """The works of a step's two streams. Mode: what is there before it, or ahead: all ("ready"), rows, kv."""

    def kernel(name: str, weights: float, after: int = 0) -> Work:
        # 2 T operations for each weight of two bytes, twice as many a second for those of one.
        arithmetic = tokens * weights / (machine.sms * machine.sm_flops)
        return Work(name, machine.launch, weights / machine.hbm, arithmetic, after=after)

    engram = DECODERS["8b"].engram
    link = tokens * ROW_BYTES / machine.link
    lookups = [1] * len(engram) if layers_apart(tokens * ROW_BYTES, "host") else [len(engram)]
    side, ready, done = [], {}, 0
    for count in lookups if mode != "ready" else ():
        lead = machine.launch + 2 * machine.trip
        side.append(Work("lookup", lead, link=count * link, held=machine.programs / machine.sms))
        for layer in engram[done : done + count]:
            if mode == "kv":
                side.append(kernel("projection", machine.projection))
            ready[layer] = len(side)
        done += count
    main = []
    for layer in range(machine.layers):
        if layer in engram:
            after = ready.get(layer, 0)
            if mode == "rows":
                main.append(kernel("projection", machine.projection, after))
            main.append(Work("gate", machine.launch, tokens * GATE_BYTES / machine.hbm, after=after))
        main += [kernel(f"layer {layer}", machine.layer_weights / machine.layer_kernels)] * machine.layer_kernels
    return main, side


def predict(machine: Machine, batches: Sequence[int] = BATCHES) -> list[dict]:
    """For each batch the seconds of a step by mode, what is exposed, whether kv ahead pays, and what the rule says."""
    found = []
    for tokens in batches:
        seconds = {}
        for mode in MODES:
            main, _ = timeline(*step_works(mode, tokens, machine), machine)
            seconds[mode] = main[-1].end
        exposed = {mode: seconds[mode] - seconds["ready"] for mode in MODES[1:]}
        pays = exposed["rows"] - exposed["kv"] > 1e-9  # and more than rounding
        found.append(dict(tokens=tokens, seconds=seconds, exposed=exposed, pays=pays, rule=projects_ahead(tokens)))
    return found


def print_points(points: list[dict]) -> None:
    """A line a batch."""
    columns = ("tokens", "step us", "exposed: rows ahead us", "kv ahead us", "gain us", "of the step", "pays", "rule")
    rows = []
    for point in points:
        exposed, whole = point["exposed"], point["seconds"]["rows"]
        gain = exposed["rows"] - exposed["kv"]
        micros = [f"{seconds * 1e6:,.1f}" for seconds in (whole, exposed["rows"], exposed["kv"], gain)]
        chosen = ["yes" if point[name] else "no" for name in ("pays", "rule")]
        rows.append([f"{point['tokens']:,}", *micros, f"{gain / whole:.2%}", *chosen])
    print("Step of an 8B decoder with V4.1's two Engram layers, by arithmetic: nothing here ran on a GPU.")
    print_table(columns, rows)


def draw(machine: Machine, tokens: int, path: Path) -> None:
    """The timeline of a step, with rows ahead alone and with kv ahead, around both Engram layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A gate takes a microsecond, and is not drawn.
    colors = dict(layer="#b9c4d0", lookup="#2f7d57", projection="#d98032")
    titles = {"rows": "rows ahead alone, the layer projects", "kv": "kv ahead, the side stream projects"}
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 4.6), layout="constrained", sharex="col", facecolor="white")
    try:
        for line, mode in zip(grid, titles, strict=True):
            streams = timeline(*step_works(mode, tokens, machine), machine)
            starts = [next(span.begin for span in streams[0] if span.name == f"layer {n}") for n in (0, 13)]
            for axes, start in zip(line, starts, strict=True):
                for lane, spans in zip((1, 0), streams, strict=True):
                    for name, begin, end in merged(spans):
                        if (color := colors.get(name.partition(" ")[0])) is None:
                            continue
                        axes.barh(lane, (end - begin) * 1e6, 0.62, begin * 1e6, color=color, edgecolor="white")
                        if name.startswith("layer") and start <= begin and end < start + WINDOW:
                            axes.text((begin + end) * 5e5, lane, name, ha="center", va="center")
                axes.set_xlim((start - 4e-6) * 1e6, (start + WINDOW) * 1e6)
                axes.set_ylim(-0.5, 1.5)
                axes.set_yticks([1, 0], ["caller's\nstream", "side\nstream"] if axes is line[0] else ["", ""])
                axes.spines[["top", "right"]].set_visible(False)
            title = f"{titles[mode]}: a step of {streams[0][-1].end * 1e6:,.0f} us"
            line[0].set_title(title, loc="left", fontsize=11)
            line[1].set_title("the same, at its second Engram layer", loc="left", fontsize=11)
        for axes in grid[1]:
            axes.set_xlabel("us from the start of the step")
        names = {"layer": "the decoder's kernels"}
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
        figure.legend(handles, [names.get(name, name) for name in colors], loc="outside lower center", ncols=3)
        figure.suptitle(
            f"A decode step of {tokens} tokens, by the model of bench/serving/step_model.py: arithmetic, not measured",
            fontsize=11,
        )
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def merged(spans: Sequence[Span]) -> list[Span]:
    """Kernels of one name in a row as one."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].name == span.name and span.name.startswith("layer"):
            found[-1] = found[-1]._replace(end=span.end)
        else:
            found.append(span)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench step_model", description=__doc__.splitlines()[0])
    for field in fields(Machine):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default, help=f"default {field.default:g}")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="T")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the JSON, and beside it the timeline: {RESULT}")
    chosen = vars(parser.parse_args(arguments))
    machine = Machine(**{field.name: chosen[field.name] for field in fields(Machine)})
    points = predict(machine, chosen["batches"])
    print_points(points)
    if chosen["out"] is not None:
        path = chosen["out"]
        content = dict(kind="arithmetic, not measured", machine=asdict(machine), drawn=DRAWN, points=points)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        draw(machine, DRAWN, path.with_suffix(".png"))
        print(f"Wrote {path} and {path.with_suffix('.png')}")
    return 0
