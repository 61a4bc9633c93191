"""Tables and progress on a terminal: by rich where it is installed, as plain lines otherwise."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

#: Characters a line may have where the output is no terminal.
_PLAIN_WIDTH = 160


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def print_sections(sections: Sequence[Iterable[tuple[str, str]]]) -> None:
    """One table of two columns; a line divides its sections. Cells that start with FAILED stand out."""
    sections = [list(section) for section in sections]
    if has_rich():
        _print_rich(sections)
        return
    label_width = max(len(label) for section in sections for label, _ in section)
    for section in sections:
        print("-" * (label_width + 2))
        for label, text in section:
            print(f"{label:<{label_width}}  {text}".rstrip())


def _print_rich(sections) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Sections(Console):
        def on_broken_pipe(self):
            raise  # to the command line, which knows the exit code; rich's own is 1, that of a failed check

    console = Sections(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False, highlight=False)
    table = Table(box=box.ROUNDED, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        for label, text in section:
            table.add_row(label, Text(text, style="bold red" if text.startswith("FAILED") else ""))
        table.add_section()
    console.print(table)


def track(steps: Iterable, description: str, total: int) -> Iterable:
    """``steps``, with a bar on the terminal while they last; silent where there is none."""
    if not (has_rich() and sys.stderr.isatty()):
        return steps
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(steps, description=description, total=total, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """What takes (bytes done, bytes in all) and shows a bar on the terminal meanwhile; None where there is none."""
    if not sys.stderr.isatty():
        yield None
    elif not has_rich():
        yield lambda done, total: print(
            f"\r{description} {done / max(1, total):4.0%} ", end="", file=sys.stderr, flush=True
        )
        print(file=sys.stderr)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(description, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
