"""``python -m bench cache``: what the simulator predicts of a hot n-gram cache on real text, over capacity and tokens.

Counted, not measured: the novels of ``data/``, their first half in the cache, their second half
looked up call by call; DeepSeek-V4.1-Flash's geometry.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bench.running.plots import label_end, plain_ticks
from bench.running.text import load_token_ids, load_token_map
from engram_kernels import EngramConfig, HashPlan
from engram_kernels.cache.prediction import CacheRates, cache_bytes, link_bytes, measure_rates, text_keys
from engram_kernels.commands.cache import cache_sections
from engram_kernels.commands.console import print_sections, track
from engram_kernels.reference.cache.simulator import WAYS

MODEL = "deepseek_v41_flash"
RESULT = Path(__file__).parents[1] / "results" / "cache.json"
ENTRIES, TOKENS = (1 << 14, 1 << 16, 1 << 18, 1 << 20), (512, 2048, 8192)
#: What ``python -m bench`` shows without a GPU: five simulations, a few seconds.
SHOWN_TOKENS = (8192,)


def predict(token_ids: np.ndarray, entries: Sequence[int] = ENTRIES, tokens: Sequence[int] = TOKENS) -> list[dict]:
    """For each T the rates without a cache (``entries`` 0, each n-gram of a call read once) and with each size."""
    config = getattr(EngramConfig, MODEL)()
    keys = text_keys(token_ids, HashPlan.build(config, torch.from_numpy(load_token_map())))
    points = [(count, size) for count in tokens for size in (0, *entries)]
    found = []
    for count, size in track(points, "cache", len(points)):
        rates = measure_rates(keys, size, count)
        gain = rates.gain
        found.append(asdict(rates) | dict(tokens=count, gain=gain, link_bytes=link_bytes(config, rates)))
    return found


def print_points(points: list[dict], text: str) -> None:
    """What :func:`predict` found, as ``python -m engram_kernels cache`` prints it, for one T after the other."""
    for tokens in dict.fromkeys(point["tokens"] for point in points):
        of_tokens = [point for point in points if point["tokens"] == tokens]
        found = [CacheRates(point["entries"], tuple(point["hits"]), tuple(point["read"])) for point in of_tokens]
        print_sections(cache_sections(MODEL, found, tokens, WAYS, text))


def print_prediction(token_ids: np.ndarray, name: str) -> None:
    """The tables for SHOWN_TOKENS, as ``python -m bench`` shows them without a GPU."""
    tokens = [count for count in SHOWN_TOKENS if 2 * count <= len(token_ids)]
    if not tokens:
        print(f"The text has fewer than two calls of {min(SHOWN_TOKENS):,} tokens.")
        return
    print_points(predict(token_ids, tokens=tokens), f"{name}, {len(token_ids):,} tokens; filled by the first half")


def plot(points: list[dict], title: str, path: Path) -> None:
    """Hit rates by order over device memory, and the gain beside them: of the middle T, and in a band of all T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = getattr(EngramConfig, MODEL)()
    counts = list(dict.fromkeys(point["tokens"] for point in points))
    middle = counts[len(counts) // 2]
    entries = sorted({point["entries"] for point in points} - {0})
    sizes = [cache_bytes(config, count) / 1e9 for count in entries]

    def draw(axes, value, color, text):
        by_size = [{p["tokens"]: value(p) for p in points if p["entries"] == count} for count in entries]
        (line,) = axes.plot(sizes, [each[middle] for each in by_size], "o-", color=color, markersize=4)
        lows, highs = zip(*((min(each.values()), max(each.values())) for each in by_size), strict=True)
        axes.fill_between(sizes, lows, highs, color=color, alpha=0.2, linewidth=0)
        label_end(line, text.format(line.get_ydata()[-1]))

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        names = {2: "bigrams", 3: "trigrams"}
        for order in range(2, config.max_ngram + 1):
            draw(
                left, lambda point, at=order - 2: point["hits"][at], f"C{order - 2}", names.get(order, f"{order}-grams")
            )
        draw(right, lambda point: point["gain"], "C3", "cache\n{:.2f} x")
        alone = next(point["gain"] for point in points if point["tokens"] == middle and not point["entries"])
        (line,) = right.plot(sizes, [alone] * len(sizes), "--", color="0.35")
        label_end(line, f"no cache, each n-gram\nof a call once: {alone:.2f} x")
        left.set_title("share of n-grams found in the cache", fontsize=11)
        right.set_title("times fewer rows read from the host", fontsize=11)
        left.set_ylim(0, 1)
        right.set_ylim(0, 1.2 * right.get_ylim()[1])
        for axes in (left, right):
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, sizes, "{:.2g}")
            axes.set_xlim(sizes[0] * 0.8, sizes[-1] * 8)  # room for the labels
            axes.set_xlabel("GB of device memory")
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{title}\nlines: calls of {middle:,} tokens; bands: of {min(counts):,} to {max(counts):,}", fontsize=11
        )
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench cache", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="the JSON; its plot goes beside it")
    chosen = parser.parse_args(arguments)
    ids = load_token_ids()
    points = predict(ids)
    text = f"data/austen_ids.npz, {len(ids):,} tokens"
    content = dict(model=MODEL, text=text, ways=WAYS, kind="simulated, not measured", points=points)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=1) + "\n")
    plot(points, f"Simulated: DeepSeek-V4.1-Flash, {text}", chosen.out.with_suffix(".png"))
    print_points(points, text)
    print(f"Wrote {chosen.out} and {chosen.out.with_suffix('.png')}")
    return 0
