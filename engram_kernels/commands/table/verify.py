"""What the checks of a checkpoint's tables say, in lines: ``engram-kernels table verify``."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from engram_kernels.checkpoints.files import Checkpoint, CheckpointError, Paths
from engram_kernels.checkpoints.names import find_tables, layer_of, table_under
from engram_kernels.checkpoints.parallel import Progress
from engram_kernels.checkpoints.validate import check_all_given, read_table
from engram_kernels.checkpoints.verify import check_config, check_hash, check_values, has_hash
from engram_kernels.geometry.config import EngramConfig

from .inspect import Section, count_of, describe_table, without_caller

Bar = Callable[[str], AbstractContextManager[Progress | None]]


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

    ValueError where there is nothing to check: the layer has no table in these files.

    config: its name and itself; every table of it must be there unless layer or prefix choose one. values: read all
    rows. bar: what shows the progress of a table with that name.
    """
    with Checkpoint(paths, where) as checkpoint:
        tables = find_tables(checkpoint.names) if prefix is None else dict([table_under(checkpoint, prefix)])
        if not tables:
            raise checkpoint.error("no Engram table; `table inspect` lists what there is")
        if layer is not None:
            layers = sorted({layer_of(name) for name in tables} - {None})
            tables = {name: members for name, members in tables.items() if layer_of(name) in (layer, None)}
            if not tables:
                raise ValueError(f"{where}: layer must be one with a table, {layers}, got {layer}")
        sections: list[Section] = [[("files", _verdict(where, _check_files, checkpoint, tables))]]
        for name, members in tables.items():
            title = name.rstrip(".") or "table"
            try:
                table = read_table(checkpoint, name, members)
                if config is None:  # whose rows are exact
                    check_all_given(checkpoint, table)
            except (CheckpointError, OSError) as error:
                sections.append([(title, f"FAILED: {without_caller(error, where)}")])
                continue
            section = describe_table(table)
            sections.append(section)
            if config is not None:
                section.append(("config", _verdict(where, check_config, checkpoint, table, *config, layer)))
                if has_hash(checkpoint, table, config[1]):
                    section.append(("hash", _verdict(where, check_hash, checkpoint, table, config[1])))
            if values:
                with bar(title) as progress:
                    section.append(("values", _verdict(where, check_values, checkpoint, table, progress)))
        layers = {layer_of(name) for name in tables}
        if config is not None and layer is None and prefix is None and None not in layers:
            sections += [
                [(f"layer {number}", f"FAILED: {config[0]} has a table there, and these files have none")]
                for number in config[1].layers
                if number not in layers
            ]
    return sections, not any(text.startswith("FAILED") for section in sections for _, text in section)


def verify_facts(sections: list[Section], holds: bool) -> dict:
    """What :func:`verify_sections` found, for programs: docs/commands.md has the keys."""
    checks = [
        {"of": section[0][0], "check": label, "holds": verdict == "ok", "says": says}
        for section in sections
        for label, text in section
        for verdict, colon, says in [text.partition(": ")]
        if colon and verdict in ("ok", "FAILED")
    ]
    return {"holds": holds, "checks": checks}


def _verdict(where: str, check: Callable[..., str], *arguments) -> str:
    try:
        return f"ok: {check(*arguments)}"
    except (CheckpointError, OSError) as error:
        return f"FAILED: {without_caller(error, where)}"


def _check_files(checkpoint: Checkpoint, tables: dict[str, dict[str, str]]) -> str:
    paths = {checkpoint.path(name) for members in tables.values() for name in members.values()}
    for path in sorted(paths):
        checkpoint.check(path)
    return f"{count_of(len(paths), 'file')} as long as the headers say"
