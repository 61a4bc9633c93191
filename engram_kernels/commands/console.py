"""Tables and progress on a terminal, by rich where it is installed; plain lines otherwise; JSON for programs."""

import contextlib
import importlib.util
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

#: Between two lines of progress where stderr is no terminal, and between two states of a bar.
LINE_SECONDS, BAR_SECONDS = 30.0, 0.2

#: Characters a line may have where the output is no terminal.
_PLAIN_WIDTH = 160
_Step = TypeVar("_Step")


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


@contextlib.contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """What takes (bytes done, bytes in all) and shows how far they are."""
    with _shown(description, in_bytes=True) as state:
        yield state.tell


@contextlib.contextmanager
def busy(description: str) -> Iterator[None]:
    """Shows that a step without parts goes on, and since when; one that holds Python's lock shows nothing meanwhile."""
    with _shown(description):
        yield


def track(steps: Iterable[_Step], description: str, total: int) -> Iterator[_Step]:
    """``steps``, and how many of them are done."""
    with _shown(description) as state:
        state.tell(0, total)
        for done, step in enumerate(steps, start=1):
            yield step
            state.tell(done, total)


class _State:
    """How far a long step is."""

    def __init__(self, description: str, in_bytes: bool):
        self._description, self._in_bytes = description, in_bytes
        self._start = time.monotonic()
        self.done, self.total = 0, None

    def tell(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def __str__(self) -> str:
        seconds = f"{time.monotonic() - self._start:,.0f} s"
        if self.total is None:
            return f"{self._description}: {seconds}"
        count = f"{gib(self.done)} of {gib(self.total)}" if self._in_bytes else f"{self.done:,} of {self.total:,}"
        return f"{self._description}: {self.done / max(1, self.total):4.0%}, {count}, {seconds}"


@contextlib.contextmanager
def _shown(description: str, in_bytes: bool = False) -> Iterator[_State]:
    """A state, shown on stderr while it lasts: on a terminal as a bar, else as a line now and then, as logs want it.

    By a thread, so that a long step between two reports is no silence.
    """
    state, ended = _State(description, in_bytes), threading.Event()
    terminal = sys.stderr.isatty()
    show = _bar(state, description, in_bytes) if terminal and has_rich() else _line(state, terminal)
    every = BAR_SECONDS if terminal else LINE_SECONDS

    def run() -> None:
        with contextlib.suppress(OSError, ValueError), show as update:  # of a stderr that is gone
            while not ended.wait(every):
                update()
            if terminal:
                update()

    thread = threading.Thread(target=run, name=description, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _line(state: _State, terminal: bool) -> Iterator[Callable[[], None]]:
    """A line for each update; on a terminal one that is written again."""
    start, end = ("\r", "") if terminal else ("", "\n")
    yield lambda: print(f"{start}{state}", end=end, file=sys.stderr, flush=True)
    if terminal:
        print(file=sys.stderr)


@contextlib.contextmanager
def _bar(state: _State, description: str, in_bytes: bool) -> Iterator[Callable[[], None]]:
    """rich's bar, which moves to and fro as long as the total is not known."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = ("{task.description}", BarColumn(), *counts, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=None)
        yield lambda: bars.update(task, completed=state.done, total=state.total)


def print_json(facts: dict) -> None:
    """One object, in which a number that is not finite is null."""
    print(json.dumps(_finite(facts), indent=2))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
