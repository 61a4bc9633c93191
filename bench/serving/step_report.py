"""Tables of what two Engram layers cost a decoder's step, and of matmuls beside a lookup."""

STEP_COLUMNS = (
    "decoder",
    "sequences",
    "step us",
    "exposed: inline us",
    "side us",
    "by layer us",
    "projected us",
    "throughput lost: rows ready",
    "inline",
    "side",
    "by layer",
    "projected",
    "paper",
)
PAIR_COLUMNS = (
    "matmul",
    "programs",
    "slowdown",
    "alone us",
    "beside us",
    "lookup alone GB/s",
    "beside GB/s",
)
_FETCHING = ("inline", "side", "by_layer", "projected")
_COSTING = ("ready", *_FETCHING)


def step_rows(records: list[dict]) -> list[list[str]]:
    """A line a measurement, decoder by decoder; a failed one has its reason and no numbers."""
    rows = []
    for record in sorted(records, key=lambda record: (record["name"].split("/")[1], record.get("batch", 0))):
        if record["status"] != "ok":
            rows.append(_failed(record, len(STEP_COLUMNS)))
            continue
        rows.append(
            [record["decoder"], f"{record['batch']:,}", f"{record['seconds']['plain']['median'] * 1e6:,.1f}"]
            + [f"{record['exposed'][mode] * 1e6:.2f}" for mode in _FETCHING]
            + [f"{record['cost'][mode]:.2%}" for mode in _COSTING]
            + ["" if record["paper"] is None else f"{record['paper']:.2%}"]
        )
    return rows


def pair_rows(records: list[dict]) -> list[list[str]]:
    """A line a measurement, by matmul and rising programs."""
    rows = []
    for record in sorted(records, key=lambda record: (record["name"].split("/")[1], record.get("programs", 0))):
        if record["status"] != "ok":
            rows.append(_failed(record, len(PAIR_COLUMNS)))
            continue
        rates = [record["lookup_bytes"] / record[field] / 1e9 for field in ("lookup_alone", "lookup_beside")]
        rows.append(
            [f"{record['kind']} x {record['matmuls']}", f"{record['programs']}", f"{record['slowdown']:.1%}"]
            + [f"{record[field] * 1e6:,.1f}" for field in ("alone", "beside")]
            + [f"{rate:.1f}" for rate in rates]
        )
    return rows


def record_text(record: dict) -> str:
    """What a run says of a record as it ends."""
    if record["status"] != "ok":
        return f"FAILED: {record['reason']}"
    if "slowdown" in record:
        return f"matmul slowed by {record['slowdown']:.1%}"
    side = f"{record['exposed']['side'] * 1e6:.2f} us exposed on a second stream"
    return f"{side}, throughput lost {record['cost']['side']:.2%}"


def _failed(record: dict, columns: int) -> list[str]:
    return [record["name"], f"FAILED: {record['reason']}"] + [""] * (columns - 2)
