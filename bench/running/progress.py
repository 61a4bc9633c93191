"""What a run says while it lasts: lines, and below them a bar where the terminal and rich allow one."""

import sys
from typing import Any

from engram_kernels.commands.console import has_rich


class Progress:
    """Lines on stderr, and a bar of ``total`` steps on a terminal with rich. Use it as a context."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if has_rich() and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, what: str, total: int) -> None:
        """A new bar, of ``total`` steps."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)
