"""What a checkpoint's tables are, in words: ``python -m engram_kernels table inspect``."""

import json
from pathlib import Path

from engram_kernels.checkpoints.files import Checkpoint, CheckpointError, Paths
from engram_kernels.checkpoints.names import find_tables
from engram_kernels.checkpoints.validate import StoredTable, check_all_given, read_table
from engram_kernels.commands.console import gib
from engram_kernels.commands.presets import PRESETS
from engram_kernels.geometry.config import EngramConfig

Section = list[tuple[str, str]]


def read_config(text: str, where: str) -> tuple[str, EngramConfig]:
    """(name, config) of a preset, of a ``config.json``, or of a folder with one."""
    if text in PRESETS:
        return text, getattr(EngramConfig, text)()
    path = Path(text) / "config.json" if Path(text).is_dir() else Path(text)
    if not path.is_file():
        known = ", ".join(PRESETS)
        raise ValueError(f"{where}: --config must be one of {known}, or a config.json, got {text!r}")
    try:
        return str(path), EngramConfig.from_hf(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {path}: {error}") from None


def inspect_sections(paths: Paths, where: str) -> list[Section]:
    """One section per table, after one of the files."""
    with Checkpoint(paths, where) as checkpoint:
        tables = find_tables(checkpoint.names)
        if not tables:
            names = ", ".join(sorted(checkpoint.names)[:3])
            raise checkpoint.error(f"no Engram table among {len(checkpoint.names)} tensors ({names}, ...)")
        there_is = f"{count_of(len(checkpoint.names), 'tensor')} in {count_of(len(checkpoint.paths), 'file')}"
        sections = [[("checkpoint", f"{there_is}, {count_of(len(tables), 'table')} among them")]]
        for prefix, members in tables.items():
            try:
                table = read_table(checkpoint, prefix, members)
                check_all_given(checkpoint, table)
                sections.append(describe_table(table))
            except (CheckpointError, FileNotFoundError) as error:
                sections.append([(prefix.rstrip("."), f"refused: {without_caller(error, where)}")])
        return sections


def describe_table(table: StoredTable) -> Section:
    """Format, size, files, and the published models that it fits."""
    stored = f"{table.weights[0].dtype} in {count_of(len(table.weights), 'tensor')}"
    if table.scales:
        stored += f", {table.scale_name} {table.scales[0].dtype}"
    elif table.scale is not None:
        stored += f", {table.scale_name} {table.scale:.6g}"
    shape = f"{table.format.name}, {table.rows:,} rows x {table.width}, {size_of(table.nbytes)}"
    return [
        (table.prefix.rstrip(".") or "table", shape),
        ("stored as", f"{stored}, in {_paths(table.paths)}"),
        ("fits", ", ".join(_fitting(table)) or "no preset"),
    ]


def _fitting(table: StoredTable) -> list[str]:
    """Presets and layers with as many rows, as wide; in another format where it is."""
    found = []
    for name in PRESETS:
        config = getattr(EngramConfig, name)()
        for layer in config.layers:
            if config.row_width == table.width and not table.mismatches(config, layer):
                note = "" if config.format == table.format.name else f" (published in {config.format})"
                found.append(f"{name} layer {layer}{note}")
    return found


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
