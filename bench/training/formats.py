"""``python -m bench formats``: what each storage format of rows costs in quality, and what it saves in bytes.

Rows of three kinds are converted to every format and back: Gaussian, heavy-tailed (Student's t of three degrees of
freedom), and those that the model of ``python -m bench train`` has learnt, as wide as four bits ask for. Then that
model reads its table in each format on text that it has not seen, and for comparison a table of zeros: what its rows
are worth. Four bits are converted twice, with the search for scales and with ``--nearest``. On a CPU this takes
minutes.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from bench.running.environment import describe_software
from bench.running.report import print_table
from bench.running.text import load_token_ids, load_token_map
from engram_kernels import EngramConfig, EngramTable, HashPlan
from engram_kernels.cache.prediction import entries_within, link_bytes, measure_rates, text_keys
from engram_kernels.checkpoints.encoding import decode_rows, encode_rows, greatest, table_scale
from engram_kernels.commands.traffic import LINK, layer_traffic, link_seconds
from engram_kernels.geometry.row_format import FORMATS, RowFormat

from .train import Settings, device_name, fitted, held_out_loss, initial_rows, load_ids

RESULT = Path(__file__).parents[1] / "results" / "formats.json"
#: (format, whether its scales of groups are searched for), best first.
VARIANTS = (
    ("float32", True),
    ("float16", True),
    ("bfloat16", True),
    ("e4m3_ue8m0", True),
    ("e4m3", True),
    ("nvfp4", True),
    ("nvfp4", False),
    ("mxfp4", True),
    ("mxfp4", False),
)
ROWS, WIDTH = 1 << 15, 256  # of the random rows; DeepSeek-V4.1's width
BOUND = 0.125  # of a row's error, relative to its norm
DEGREES = 3.0
CACHE_BYTES, CACHED = 4 << 30, ("bfloat16", "e4m3_ue8m0", "nvfp4", "mxfp4")


class Converted(NamedTuple):
    """Rows in a format."""

    format: RowFormat
    rows: torch.Tensor
    scales: torch.Tensor | None
    own_scale: float | None

    def values(self) -> torch.Tensor:
        return decode_rows(self.rows, self.scales, self.format, self.own_scale)

    def table(self) -> EngramTable:
        both = self.format.group and self.format.table_scale
        scale = self.scales if self.format.group else self.own_scale
        return EngramTable.from_tensors(
            self.rows, scale, placement="cpu", **(dict(own_scale=self.own_scale) if both else {})
        )


def settings() -> Settings:
    """Of the trained model: rows of 32, the narrowest that all formats hold."""
    return replace(Settings(), row_width=32)


def name_of(name: str, searched: bool) -> str:
    return name if searched else f"{name}, nearest"


def convert(values: torch.Tensor, name: str, searched: bool) -> Converted:
    fmt = FORMATS[name]
    own = table_scale(float(greatest(values.flatten())), fmt) if fmt.table_scale else None
    return Converted(fmt, *encode_rows(values, fmt, "bench", scale=own, nearest=not searched), own)


def quality(values: torch.Tensor, converted: Converted) -> dict[str, float | None]:
    """Signal to noise in dB, the largest error over the root mean square of all, the share of rows beyond BOUND."""
    error, exact = (converted.values() - values).double(), values.double()
    noise, signal = error.square().sum(1), exact.square().sum(1)
    lost = float(noise.sum())
    return dict(
        signal_to_noise=10 * math.log10(float(signal.sum()) / lost) if lost else None,
        largest_error=float(error.abs().max()) / math.sqrt(float(exact.square().mean())),
        beyond=float((noise > BOUND**2 * signal).double().mean()),
    )


def random_rows() -> dict[str, torch.Tensor]:
    """``[ROWS, WIDTH]`` by distribution."""
    generator = torch.Generator().manual_seed(20260112)
    normal = torch.randn(ROWS, WIDTH, generator=generator)
    squares = sum(torch.randn(ROWS, WIDTH, generator=generator).square() for _ in range(int(DEGREES)))
    return {"gaussian": 0.02 * normal, "heavy": 0.02 * normal / (squares / DEGREES).sqrt()}


def seconds(work: Callable[[], object]) -> float:
    """The least of three times."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def run(chosen: Settings, device: torch.device) -> dict:
    """Every format on every kind of rows; held-out losses by seed."""
    rows, ids = random_rows(), load_ids(chosen)
    losses: dict[str, list[float]] = {name_of(*variant): [] for variant in VARIANTS}
    without = []
    for seed in chosen.seeds:
        with fitted("engram", chosen, seed, ids, device) as (model, _):
            table = cast(EngramTable, model.engram.table)
            table.wait_for_steps()
            values = table.weight.float().cpu()
            rows.setdefault("trained", values[(values != initial_rows(table, seed)).any(1)].clone())
            with convert(torch.zeros_like(values), "float32", True).table() as read:
                model.engram.table = read
                without.append(held_out_loss(model, chosen, ids, device))
            for variant in VARIANTS:
                with convert(values, *variant).table() as read:
                    model.engram.table = read
                    losses[name_of(*variant)].append(held_out_loss(model, chosen, ids, device))
            model.engram.table = table
    found = []
    for name, searched in VARIANTS:
        fmt = FORMATS[name]
        found.append(
            dict(
                name=name_of(name, searched),
                format=name,
                row_bytes={str(width): fmt.stored_bytes(width) for width in (WIDTH, 160)},
                quality={kind: quality(values, convert(values, name, searched)) for kind, values in rows.items()},
                held_out=losses[name_of(name, searched)],
                rows_a_second=ROWS / seconds(lambda: convert(rows["gaussian"], name, searched)),  # noqa: B023
            )
        )
    return dict(
        settings=asdict(chosen),
        environment=dict(describe_software(), device=device_name(device)),
        command="python -m bench formats",
        unit="dB; nats a token, on text that no model has seen",
        bound=BOUND,
        trained_rows=len(rows["trained"]),
        zero_rows=without,
        formats=found,
    )


def cached(token_ids: np.ndarray, nbytes: int = CACHE_BYTES, tokens: int = 2048) -> list[dict]:
    """What an n-gram cache of ``nbytes`` holds of DeepSeek-V4.1's rows in each format, by simulation on a text."""
    base = EngramConfig.deepseek_v41_flash()
    keys = text_keys(token_ids, HashPlan.build(base, torch.from_numpy(load_token_map())))
    without, found = measure_rates(keys, 0, tokens), []
    for name in CACHED:
        config = replace(base, format=name)
        rates = measure_rates(keys, entries_within(config, nbytes), tokens)
        link = dict(link_bytes=link_bytes(config, rates), without_cache=link_bytes(config, without))
        found.append(dict(format=name, bytes=nbytes, entries=rates.entries, hit=rates.hit) | link)
    return found


def cache_rows(result: dict) -> list[list[str]]:
    """The table of caches in ``docs/formats.md``."""
    return [
        [each["format"], f"{each['entries']:,}", f"{each['hit']:.3f}"]
        + [f"{each[name]:,.0f}" for name in ("without_cache", "link_bytes")]
        for each in result["cache"]
    ]


def traffic_rows() -> list[list[str]]:
    """The table of the link in ``docs/formats.md``, by the traffic model: one of DeepSeek-V4.1's rows."""
    rows = []
    for name in CACHED:
        traffic = layer_traffic(replace(EngramConfig.deepseek_v41_flash(), format=name), 1)
        wire = traffic.wire_bytes / traffic.rows
        facts = traffic.gather_bytes // traffic.rows, f"{traffic.requests / traffic.rows:g}", f"{wire:g}"
        rows.append([name, *map(str, facts), f"{1e-6 / link_seconds(wire, LINK):.0f} M"])
    return rows


def table_rows(result: dict) -> list[list[str]]:
    """The table of ``docs/formats.md``: a row a format."""
    exact = result["formats"][0]["held_out"]
    rows = []
    for each in result["formats"]:
        worse = [loss - best for loss, best in zip(each["held_out"], exact, strict=True)]
        decibels = [each["quality"][kind]["signal_to_noise"] for kind in ("gaussian", "heavy", "trained")]
        rows.append(
            [
                each["name"],
                *(f"{size:,}" for size in each["row_bytes"].values()),
                *("exact" if value is None else f"{value:.1f}" for value in decibels),
                f"{each['quality']['trained']['beyond']:.1%}",
                f"{sum(each['held_out']) / len(exact):.4f}",
                f"{sum(worse) / len(worse):+.4f}",
                f"{min(worse):+.4f} to {max(worse):+.4f}",
            ]
        )
    return rows


TRAFFIC_TITLES = ("format", "bytes", "requests of 128 B", "bytes on the wire", f"rows a second at {LINK} GB/s")
CACHE_TITLES = ("format", "entries an order", "hit rate", "link bytes a token", "with the cache")
TITLES = (
    *("format", "bytes, 256 wide", "160 wide", "SNR, Gaussian", "heavy-tailed", "trained", "rows beyond"),
    *("held-out loss", "against float32", "by seed"),
)


def plot(result: dict, path: Path) -> None:
    """Signal to noise, and the loss that is added, against bytes of a row 256 wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    shown = [each for each in result["formats"] if "nearest" not in each["name"]]
    for kind, marker in (("gaussian", "o"), ("heavy", "s"), ("trained", "^")):
        some = [each for each in shown if each["quality"][kind]["signal_to_noise"] is not None]
        sizes = [each["row_bytes"]["256"] for each in some]
        left.plot(sizes, [each["quality"][kind]["signal_to_noise"] for each in some], marker, label=kind)
    exact = shown[0]["held_out"]
    for each in shown:
        worse = [1e3 * (loss - best) for loss, best in zip(each["held_out"], exact, strict=True)]
        size, mean = each["row_bytes"]["256"], sum(worse) / len(worse)
        below, above = mean - min(worse), max(worse) - mean
        right.errorbar([size], [mean], [[below], [above]], fmt="o", color="tab:blue", capsize=3)
    for axes, values in ((left, None), (right, shown)):
        axes.set_xscale("log", base=2)
        axes.set_xticks([136, 264, 512, 1024], ["136", "264", "512", "1,024"])
        axes.minorticks_off()
        axes.set_xlabel("bytes of a row of 256 elements, scales included")
        for each in values or [each for each in shown if each["quality"]["gaussian"]["signal_to_noise"]]:
            if values:
                top = 1e3 * max(loss - best for loss, best in zip(each["held_out"], exact, strict=True))
            else:
                top = max(found["signal_to_noise"] for found in each["quality"].values())
            # Neighbours of about one size: one name to the left, the other to the right.
            side = dict(mxfp4=("right", -6), e4m3=("right", -6), float16=("right", -6)).get(each["name"], ("left", 6))
            low = values and each["name"] == "e4m3_ue8m0"  # beside it there is no room for float16's name
            if low:
                top = 1e3 * min(loss - best for loss, best in zip(each["held_out"], exact, strict=True))
            axes.annotate(
                each["name"],
                (each["row_bytes"]["256"], top),
                (side[1], -12 if low else 5),
                textcoords="offset points",
                ha=side[0],
                fontsize=9,
            )
    left.set_ylabel("signal to noise, dB")
    left.margins(0.22, 0.16)
    right.margins(0.16)
    left.legend(title="rows", loc="lower right")
    right.set_ylabel("loss added, thousandths of a nat a token")
    right.set_title("Held-out loss of a small model, three seeds", fontsize=10)
    left.set_title("Rows converted and read back", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench formats", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="the JSON; its plot goes beside it")
    chosen = parser.parse_args(arguments)
    result = run(settings(), torch.device("cpu")) | dict(cache=cached(load_token_ids()))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, chosen.out.with_suffix(".png"))
    print_table(TITLES, table_rows(result))
    exact = result["formats"][0]["held_out"]
    print_table(TRAFFIC_TITLES, traffic_rows())
    print_table(CACHE_TITLES, cache_rows(result))
    worth = [zero - best for zero, best in zip(result["zero_rows"], exact, strict=True)]
    mean = sum(worth) / len(worth)
    print(f"A table of zeros costs {mean:.4f} nats a token; {result['trained_rows']:,} rows were trained")
    for each in result["formats"]:
        if FORMATS[each["format"]].scaled:
            print(f"{each['name']:<15} {each['rows_a_second'] * WIDTH / 1e6:.0f} M elements a second converted")
    print(f"Wrote {chosen.out} and {chosen.out.with_suffix('.png')}")
    return 0
