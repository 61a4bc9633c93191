"""What a checkpoint's tables are: ``engram-kernels table inspect``."""

from collections.abc import Iterator
from pathlib import Path

from engram_kernels.checkpoints.files import Checkpoint, CheckpointError, Paths
from engram_kernels.checkpoints.names import find_tables
from engram_kernels.checkpoints.validate import StoredTable, check_all_given, read_table
from engram_kernels.commands.console import gib
from engram_kernels.commands.presets import PRESETS
from engram_kernels.geometry.config import EngramConfig

Section = list[tuple[str, str]]


def inspect_sections(paths: Paths, where: str) -> list[Section]:
    """One section per table, after one of the files."""
    with Checkpoint(paths, where) as checkpoint:
        found = [
            describe_table(table) if isinstance(table, StoredTable) else [(prefix.rstrip("."), f"refused: {table}")]
            for prefix, table in _tables(checkpoint)
        ]
        there_is = f"{count_of(len(checkpoint.names), 'tensor')} in {count_of(len(checkpoint.paths), 'file')}"
        return [[("checkpoint", f"{there_is}, {count_of(len(found), 'table')} among them")], *found]


def inspect_facts(paths: Paths, where: str) -> dict:
    """The same for programs: docs/commands.md has the keys."""
    with Checkpoint(paths, where) as checkpoint:
        found = [
            table_facts(table) if isinstance(table, StoredTable) else {"name": prefix.rstrip("."), "refused": table}
            for prefix, table in _tables(checkpoint)
        ]
        return {"tensors": len(checkpoint.names), "files": len(checkpoint.paths), "tables": found}


def _tables(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTable | str]]:
    """(prefix, the table, or why it is refused) of all tables; CheckpointError where there is none."""
    tables = find_tables(checkpoint.names)
    if not tables:
        names = ", ".join(sorted(checkpoint.names)[:3])
        raise checkpoint.error(f"no Engram table among {len(checkpoint.names)} tensors ({names}, ...)")
    for prefix, members in tables.items():
        try:
            table = read_table(checkpoint, prefix, members)
            check_all_given(checkpoint, table)
            yield prefix, table
        except (CheckpointError, FileNotFoundError) as error:
            yield prefix, without_caller(error, checkpoint.where)


def describe_table(table: StoredTable) -> Section:
    """Format, size, files, and the published models that it fits."""
    stored = f"{table.weights[0].dtype} in {count_of(len(table.weights), 'tensor')}"
    if table.scales:
        stored += f", {table.scale_name} {table.scales[0].dtype}"
    elif table.scale is not None:
        stored += f", {table.scale_name} {table.scale:.6g}"
    own = table.format.name
    fits = [(*at, "" if fmt == own else f" (published in {fmt})") for *at, fmt in _fitting(table)]
    shape = f"{own}, {table.rows:,} rows x {table.width}, {size_of(table.nbytes)}"
    return [
        (table.prefix.rstrip(".") or "table", shape),
        ("stored as", f"{stored}, in {_paths(table.paths)}"),
        ("fits", ", ".join(f"{name} layer {layer}{note}" for name, layer, note in fits) or "no preset"),
    ]


def table_facts(table: StoredTable) -> dict:
    """The same for programs."""
    return {
        "name": table.prefix.rstrip("."),
        "layer": table.layer,
        "format": table.format.name,
        "rows": table.rows,
        "width": table.width,
        "bytes": table.nbytes,
        "dtype": table.weights[0].dtype,
        "scale": table.scale,
        "paths": [str(path) for path in table.paths],
        "fits": [{"config": name, "layer": layer, "format": fmt} for name, layer, fmt in _fitting(table)],
    }


def _fitting(table: StoredTable) -> list[tuple[str, int, str]]:
    """(preset, layer, format published) of those with as many rows, as wide, in this or another format."""
    configs = {name: getattr(EngramConfig, name)() for name in PRESETS}
    return [
        (name, layer, config.format)
        for name, config in configs.items()
        for layer in config.layers
        if config.row_width == table.width and not table.mismatches(config, layer)
    ]


def without_caller(error: Exception, where: str) -> str:
    """An error's text without the name of the command, which stands beside it."""
    return str(error).removeprefix(f"{where}: ")


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_of(nbytes: int) -> str:
    return gib(nbytes) if nbytes >= 2**30 else f"{nbytes:,} bytes"


def _paths(paths: list[Path]) -> str:
    names = [str(path) for path in paths]
    return ", ".join(names) if len(names) <= 2 else f"{len(names)} files, {names[0]} to {names[-1]}"
