"""Tables that processes share, and what was kept of them: ``engram-kernels table shared``."""

from collections.abc import Sequence

from engram_kernels.tables.memory.kept import SharedTable, free_shared, list_shared

from .inspect import Section, count_of, size_of

_STATES = {"filling": "is being filled by process {0.writer}", "dead": "dead: the next shared table removes it"}


def free_tables(names: Sequence[str], where: str) -> list[SharedTable]:
    """Free these, in order; what they were."""
    freed = []
    for name in names:
        there = [table for table in list_shared() if table.name == name]
        free_shared(name, where)
        freed += there
    return freed


def shared_sections(freed: Sequence[SharedTable]) -> list[Section]:
    """One section for each table, those just freed first."""
    sections = [
        [
            (table.name, f"freed: {size_of(table.nbytes)}"),
            ("memory", f"stays until these let go of it: {_pids(table)}" if table.pids else "given back"),
        ]
        for table in freed
    ]
    tables = list_shared()
    sections += [_described(table) for table in tables]
    return sections + ([] if tables else [[("shared tables", "none of this user's")]])


def shared_facts(freed: Sequence[SharedTable]) -> dict:
    """The same for programs: docs/commands.md has the keys."""
    return {"freed": [_facts(table) for table in freed], "tables": [_facts(table) for table in list_shared()]}


def _described(table: SharedTable) -> Section:
    found = table.geometry
    stays = "kept until it is freed" if found.kept else "goes with its last process"
    return [
        (table.name, f"{found.format}, {found.rows:,} rows x {found.width}, {size_of(table.nbytes)}"),
        ("file", str(table.path)),
        ("state", _STATES.get(table.state, stays).format(table)),
        ("digest", found.digest or "none"),
        ("held by", _pids(table) or "no process of this user"),
    ]


def _pids(table: SharedTable) -> str:
    return f"{count_of(len(table.pids), 'process')}: {', '.join(map(str, table.pids))}" if table.pids else ""


def _facts(table: SharedTable) -> dict:
    found = table.geometry
    return {
        "name": table.name,
        "path": str(table.path),
        "format": found.format,
        "rows": found.rows,
        "width": found.width,
        "bytes": table.nbytes,
        "digest": found.digest or None,
        "kept": found.kept,
        "state": table.state,
        "pids": list(table.pids),
    }
