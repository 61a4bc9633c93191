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

from bench.running.text import load_token_ids, load_token_map
from engram_kernels import EngramConfig, HashPlan
from engram_kernels.cache.prediction import CacheRates, link_bytes, measure_rates, text_keys
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
    """Hit rates over capacity by order, and the gain beside them; a line style for each T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        for style, tokens in zip(("-", "--", ":", "-."), dict.fromkeys(p["tokens"] for p in points), strict=False):
            cached = [point for point in points if point["tokens"] == tokens and point["entries"]]
            sizes = [point["entries"] for point in cached]
            for order in range(2, 5):
                hits = [point["hits"][order - 2] for point in cached]
                left.plot(sizes, hits, style, color=f"C{order - 2}", label=f"order {order}, T = {tokens:,}")
            right.plot(sizes, [point["gain"] for point in cached], "o" + style, color="C3", label=f"T = {tokens:,}")
            once = next(point["gain"] for point in points if point["tokens"] == tokens and not point["entries"])
            right.axhline(once, linestyle=style, color="black", label=f"each n-gram of a call once, T = {tokens:,}")
        left.set_ylabel("hit rate")
        right.set_ylabel("times fewer rows over the link than in direct order")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("entries of each order in each layer")
            axes.set_ylim(0)
            axes.legend(fontsize="small")
        figure.suptitle(title)
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
