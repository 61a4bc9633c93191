"""Whether a checkpoint's tables are whole: ``python -m engram_kernels table verify``."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from engram_kernels.checkpoints.files import Checkpoint, CheckpointError, Paths, StoredTensor
from engram_kernels.checkpoints.parallel import Progress, run_chunks
from engram_kernels.checkpoints.validate import StoredTable, find_tables, layer_of, read_table, table_under
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import RowFormat
from engram_kernels.tables.loading import iter_rows

from .inspect import Section, count_of, describe_table, without_caller

Bar = Callable[[str], AbstractContextManager[Progress | None]]

#: Bytes of rows that are looked at together: in a core's cache that takes a third of the time it takes for 16 MiB.
CHUNK = 1 << 20
#: A longer run of zero rows, as a share of all, is taken for what was never written: hashing leaves no such hole.
_ZERO_RUN = 0.01


def verify_sections(
    paths: Paths,
    where: str,
    *,
    config: tuple[str, EngramConfig] | None = None,
    layer: int | None = None,
    prefix: str | None = None,
    values: bool = True,
    bar: Bar,
) -> tuple[list[Section], bool]:
    """(what was checked, whether all of it holds). A failed check is a line that starts with FAILED.

    config: its name and itself; every table of it must be there unless layer or prefix choose one. values: read all
    rows. bar: what shows the progress of a table with that name.
    """
    with Checkpoint(paths, where) as checkpoint:
        tables = find_tables(checkpoint.names) if prefix is None else dict([table_under(checkpoint, prefix)])
        if layer is not None:
            tables = {name: members for name, members in tables.items() if layer_of(name) in (layer, None)}
        if not tables:
            raise checkpoint.error("no such Engram table; `table inspect` lists what there is")
        paths_of = {checkpoint.path(name) for members in tables.values() for name in members.values()}
        sections: list[Section] = [[("files", _attempt(where, lambda: _check_files(checkpoint, paths_of)))]]
        for name, members in tables.items():
            section: Section = []
            sections.append(section)
            try:
                table = read_table(checkpoint, name, members)
            except (CheckpointError, OSError) as error:
                section.append((name.rstrip(".") or "table", f"FAILED: {without_caller(error, where)}"))
                continue
            section += describe_table(table)
            if config is not None:
                section.append(("config", _check_config(table, config, layer)))
                section += _check_hash(checkpoint, table, config[1])
            if values:
                with bar(name.rstrip(".") or "table") as progress:
                    verdict = _attempt(where, lambda t=table, p=progress: _check_values(checkpoint, t, p))
                section.append(("values", verdict))
        layers = {layer_of(name) for name in tables}
        if config is not None and layer is None and prefix is None and None not in layers:
            missing = [number for number in config[1].layers if number not in layers]
            sections += [
                [(f"layer {number}", f"FAILED: {config[0]} has a table there, and these files have none")]
                for number in missing
            ]
    return sections, not any(text.startswith("FAILED") for section in sections for _, text in section)


def _attempt(where: str, check: Callable[[], str]) -> str:
    try:
        return check()
    except (CheckpointError, OSError) as error:
        return f"FAILED: {without_caller(error, where)}"


def _check_files(checkpoint: Checkpoint, paths: set[Path]) -> str:
    for path in sorted(paths):
        checkpoint.check(path)
    return f"ok: {count_of(len(paths), 'file')} as long as the headers say"


def _check_config(table: StoredTable, config: tuple[str, EngramConfig], layer: int | None) -> str:
    name, expected = config
    number = table.layer if layer is None else layer
    if number is None and len(expected.layers) == 1:
        number = expected.layers[0]
    if number not in expected.layers:
        return f"FAILED: {name} has tables at layers {expected.layers}, and this is of layer {number}"
    if problems := table.mismatches(expected, number):
        return f"FAILED: layer {number} of {name}: {'; '.join(problems)}"
    note = "" if table.format.name == expected.format else f"; its format there is {expected.format}"
    return f"ok: rows and width of layer {number} of {name}{note}"


def _check_hash(checkpoint: Checkpoint, table: StoredTable, config: EngramConfig) -> Section:
    """Qwen's checkpoints hold the constants of their hash: with others, every token would read the wrong rows."""
    base = re.sub(r"ngram_embedding\.$", "", table.prefix)
    if config.window != "eos" or table.layer not in config.layers or f"{base}layer_multipliers" not in checkpoint:
        return []
    plan, index = HashPlan.build(config), config.layers.index(table.layer)
    expected = {
        "layer_multipliers": plan.multipliers[index],
        "ngram_heads_vocab_sizes": plan.primes[index],
        "ngram_heads_offsets": plan.offsets[index],
    }
    for name, value in expected.items():
        if f"{base}{name}" in checkpoint:
            stored = checkpoint.tensor(f"{base}{name}")
            if stored.dtype != "I64" or checkpoint.read(stored, torch.int64).flatten().tolist() != value.tolist():
                return [("hash", f"FAILED: {stored} is not what the config gives")]
    return [("hash", "ok: the checkpoint's multipliers, primes and offsets are those of the config")]


@dataclass(frozen=True)
class _Tally:
    """Counts over some rows; of zero rows also the runs at either end and the longest, for a run across chunks."""

    rows: int
    nan: int
    infinite: int
    nan_scales: int
    least_scales: int
    zero: int
    zero_head: int
    zero_tail: int
    longest: tuple[int, int]  #: (rows, first row)


def _check_values(checkpoint: Checkpoint, table: StoredTable, progress: Progress | None) -> str:
    """One pass over all rows and scales: NaN, infinities, scale bytes of 255, and what was never written."""
    tallies: dict[int, _Tally] = {}

    def count(chunk) -> int:
        place, weight, begin, end, scales = chunk
        rows = _bytes(checkpoint, weight, begin, end)
        scale_bytes = torch.empty(0, dtype=torch.uint8) if scales is None else _bytes(checkpoint, scales, begin, end)
        nan, infinite = _not_finite(rows, table.format)
        nan_scales, least_scales = int((scale_bytes == 255).sum()), int((scale_bytes == 0).sum())
        tallies[place] = _Tally(end - begin, nan, infinite, nan_scales, least_scales, *_zero_rows(rows, place))
        return rows.nbytes + scale_bytes.nbytes

    chunks = list(iter_rows(checkpoint, table, max(1, CHUNK // (table.width * table.format.dtype.itemsize))))
    run_chunks(chunks, count, progress=progress, total=table.nbytes)
    total = {
        name: sum(getattr(tally, name) for tally in tallies.values()) for name in ("nan", "infinite", "nan_scales")
    }
    kinds = ("elements are NaN", "elements are infinite", "scale bytes are 255, which is NaN")
    faults = [f"{number:,} {kind}" for number, kind in zip(total.values(), kinds, strict=True) if number]
    length, first = _longest_zero_run(tallies)
    if length > max(1, _ZERO_RUN * table.rows):
        share = f"{length / table.rows:.1%} of the table"
        faults.append(f"rows {first:,} to {first + length - 1:,} are zero, {share}, as in a file that was never filled")
    least = sum(tally.least_scales for tally in tallies.values())
    notes = f"{table.rows:,} rows read, {sum(tally.zero for tally in tallies.values()):,} of them zero"
    notes += f", {least:,} scale bytes are 0" if least else ""
    return f"FAILED: {'; '.join(faults)} ({notes})" if faults else f"ok: no NaN, no infinity; {notes}"


def _bytes(checkpoint: Checkpoint, tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Rows ``[begin, end)`` of a stored tensor, uint8 ``[rows, bytes]``."""
    size = tensor.nbytes // tensor.shape[0]
    content = torch.empty(end - begin, size, dtype=torch.uint8)
    checkpoint.read_into(tensor, begin * size, memoryview(content.view(-1).numpy()))
    return content


def _not_finite(rows: torch.Tensor, format: RowFormat) -> tuple[int, int]:
    """(NaN, infinite elements) of rows as bytes."""
    if format.scaling == "none":
        found = rows.view(format.dtype)
        if torch.isfinite(found).all():
            return 0, 0
        return int(torch.isnan(found).sum()), int(torch.isinf(found).sum())
    # Eight bytes at once: adding 1 to seven bits carries into the eighth from 0x7F alone, which is NaN.
    words = (rows.view(torch.int64) & 0x7F7F7F7F7F7F7F7F) + 0x0101010101010101
    if not (words & -0x7F7F7F7F7F7F7F80).any():
        return 0, 0
    return int(((rows & 0x7F) == 0x7F).sum()), 0


def _zero_rows(rows: torch.Tensor, place: int) -> tuple[int, int, int, tuple[int, int]]:
    """(zero rows, those at the beginning, those at the end, (longest run, its first row))."""
    filled = rows.view(torch.int64).any(1).nonzero().flatten()
    # Filled rows, with one before the first and one behind the last: what lies between two is a run of zero rows.
    marks = torch.cat([filled.new_tensor([-1]), filled, filled.new_tensor([len(rows)])])
    gaps = marks.diff() - 1
    longest = int(gaps.argmax())
    return len(rows) - len(filled), int(gaps[0]), int(gaps[-1]), (int(gaps[longest]), place + int(marks[longest]) + 1)


def _longest_zero_run(tallies: dict[int, _Tally]) -> tuple[int, int]:
    """(rows, first row) of the longest run of zero rows, those across chunks included."""
    best, run = (0, 0), 0
    for place in sorted(tallies):
        tally = tallies[place]
        best = max(best, tally.longest, (run + tally.zero_head, place - run), key=lambda found: found[0])
        run = run + tally.rows if tally.zero_head == tally.rows else tally.zero_tail
    return best
