"""Progress: a bar on a terminal, by rich and without it, and a line now and then where stderr goes to a file."""

import io
import re
import sys
import threading

import pytest

from engram_kernels.commands import console
from tests.support.patience import HANG


class Errors(io.StringIO):
    """A stderr that tells when it has been written to."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal, self.written = terminal, threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        count = super().write(text)
        if text.strip():
            self.written.set()
        return count

    def wait(self):
        """Until something more is written."""
        self.written.clear()
        assert self.written.wait(HANG)


def stderr(monkeypatch, terminal, rich=True):
    """What errors go to in place of pytest's own, which it puts back after each fixture; and no waiting."""
    monkeypatch.setattr(console, "has_rich", lambda: rich)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.001 if not terminal else 1e6)
    monkeypatch.setattr(console, "BAR_SECONDS", 0.001 if terminal else 1e6)
    monkeypatch.setattr(sys, "stderr", Errors(terminal))
    return sys.stderr


@pytest.mark.parametrize("terminal, rich", [(False, True), (True, True), (True, False)])
def test_every_long_step_is_shown(monkeypatch, terminal, rich):
    """Without a report too, as long as it takes; then it is quiet."""
    errors = stderr(monkeypatch, terminal, rich)
    for step in ("bytes", "steps", "busy"):
        errors.truncate(0)
        if step == "busy":
            with console.busy("reading"):
                errors.wait()
        elif step == "bytes":
            with console.byte_bar("reading") as progress:
                progress(1 << 30, 4 << 30)
                errors.wait()
        else:
            for number in console.track(range(3), "reading", 3):
                if number == 1:
                    errors.wait()
        assert "reading" in errors.getvalue(), step
    assert not any(thread.name == "reading" for thread in threading.enumerate())


def test_lines_say_how_far_a_step_is(monkeypatch):
    errors = stderr(monkeypatch, terminal=False)
    with console.byte_bar("verify") as progress:
        progress(1 << 30, 4 << 30)
        errors.wait()
        errors.wait()
    assert re.search(r"^verify:  25%, 1.0 GiB of 4.0 GiB, \d+ s$", errors.getvalue(), re.M)
    assert "\r" not in errors.getvalue()
    errors.truncate(0)
    for number in console.track("abc", "sizes", 3):
        if number == "c":
            errors.wait()
            errors.wait()
    assert re.search(r"^sizes:  67%, 2 of 3, \d+ s$", errors.getvalue(), re.M)


def test_a_terminal_has_one_line_that_is_written_again(monkeypatch):
    errors = stderr(monkeypatch, terminal=True, rich=False)
    with console.byte_bar("verify") as progress:
        progress(1 << 30, 4 << 30)
        errors.wait()
        progress(4 << 30, 4 << 30)
    lines = errors.getvalue().split("\n")
    assert len(lines) == 2 and lines[0].split("\r")[-1].startswith("verify: 100%, 4.0 GiB of 4.0 GiB") and not lines[1]


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_within_a_step_ends_it(monkeypatch, terminal):
    stderr(monkeypatch, terminal)
    for end in (console.busy("reading"), console.byte_bar("reading")):
        with pytest.raises(KeyError), end:
            raise KeyError
    with pytest.raises(KeyError):
        for _ in console.track("ab", "reading", 2):
            raise KeyError
    assert not any(thread.name == "reading" for thread in threading.enumerate())


def test_a_step_of_less_than_thirty_seconds_says_nothing_to_a_file(capsys):
    assert console.LINE_SECONDS == 30
    assert list(console.track("ab", "reading", 2)) == ["a", "b"]
    with console.busy("reading"), console.byte_bar("reading") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_json_has_no_numbers_that_are_not_finite(capsys):
    console.print_json({"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": (True, None)})
    assert capsys.readouterr().out == (
        '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": {\n    "c": null\n  },\n  "d": [\n    true,\n    null\n  ]\n}\n'
    )
