"""What of a hot n-gram cache's predicted gain was measured, from a run's JSON alone.

Gain is a baseline's time over the op's; predicted, by the rows that each reads over the link.
"""

#: On text, the least share of the predicted gain over direct order; on ids that do not come again, the most that a
#: cache may add to the faster baseline's time.
LEAST_SHARE, MOST_COST = 0.9, 0.05
CACHE_COLUMNS = (
    "case",
    "memory",
    "hits",
    "link B a token",
    "M rows/s",
    "over direct: predicted",
    "measured",
    "over address: predicted",
    "measured",
    "target",
)


def measured_gain(record: dict) -> dict[str, float]:
    """Baseline -> its time over the op's; only baselines that have a time."""
    baselines = record.get("baselines", {}).items()
    return {name: entry["median"] / record["median"] for name, entry in baselines if "median" in entry}


def target(record: dict) -> tuple[bool, str] | None:
    """Whether the case holds its target, and in words; None for another op, or without the times that tell."""
    if record.get("op") != "cache" or record["status"] != "ok":
        return None
    gain = measured_gain(record)
    if record["facts"]["kind"] == "uniform":
        if gain.keys() != {"direct", "address"}:
            return None
        cost = 1 / min(gain.values()) - 1
        return cost < MOST_COST, f"costs {cost:.1%}, target below {MOST_COST:.0%}"
    if "direct" not in gain:
        return None
    share = gain["direct"] / record["facts"]["predicted_gain"]["direct"]
    return share >= LEAST_SHARE, f"{share:.3f} of the predicted gain, target {LEAST_SHARE}"


def missed_target(record: dict) -> str | None:
    """In words, or None where the case holds its target or has none."""
    found = target(record)
    return None if found is None or found[0] else found[1]


def cache_rows(records: list[dict]) -> list[list[str]]:
    """A line a case that has a time."""
    rows = []
    for record in records:
        if record.get("op") != "cache" or record["status"] != "ok":
            continue
        facts, gain, found = record["facts"], measured_gain(record), target(record)
        gains = [
            text
            for name in ("direct", "address")
            for text in (f"{facts['predicted_gain'][name]:.2f}x", f"{gain[name]:.2f}x" if name in gain else "")
        ]
        rows.append(
            [record["name"], f"{facts['cache_bytes'] / 1e9:.2f} GB", f"{facts['hits']:.3f}"]
            + [f"{record['link_bytes'] / record['tokens']:,.0f}", f"{facts['rows'] / record['median'] / 1e6:,.1f}"]
            + [*gains, "" if found is None else f"{'held' if found[0] else 'MISSED'}: {found[1]}"]
        )
    return rows
