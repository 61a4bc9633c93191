"""What the arguments of commands have in common: numbers, and mistakes that are told in one line."""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: What every command returns, as their help says.
EXIT_CODES = """exit codes:
  0    done; every check passed
  1    a check failed (demo, table verify)
  2    an argument or an input is wrong, or something to read or write cannot be
  3    an error in the program, whose traceback is on stderr
  130  interrupted
  141  whoever read the output has enough of it"""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CommandError(Exception):
    """A command cannot run: its message is all that a user needs to see."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors of the package, which name what was wrong with an argument or a file, are a CommandError."""
    try:
        yield
    except BrokenPipeError:  # of the reader of the output
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(error) from None


class _Help(argparse.HelpFormatter):
    """Help whose epilog keeps its lines."""

    def _fill_text(self, text, width, indent):
        if text == EXIT_CODES:
            return text
        return super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, where argparse would print the usage above it."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, epilog=EXIT_CODES, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(expected: str, accepts: Callable[[float], bool], parse: Callable[[str], float] = float) -> Callable:
    """A ``type`` of argparse: ``parse(text)`` where that is a number which ``accepts`` takes, else ``expected``."""

    def parsed(text: str) -> float:
        try:
            value = parse(text)
        except (ValueError, KeyError, OverflowError):
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parsed


def existing(text: str) -> str:
    """A ``type`` of argparse: a path where something is."""
    if not os.path.lexists(text):
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return text


def new_file(text: str) -> str:
    """A ``type`` of argparse: a path in a folder that is there."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"no folder {folder} for {text}")
    return text


def _whole(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _bytes(text: str) -> int:
    digits = text.rstrip("BGIKMbgikm")
    return int(float(digits) * _UNITS[text[len(digits) :].upper()])


positive_int = number("a whole number of at least 1", lambda value: value >= 1, _whole)
entry_count = number("a whole number from 1 to 2147483647", lambda value: 1 <= value < 2**31, _whole)
rank_count = number("a whole number from 2 to 65536", lambda value: 2 <= value <= 65536, _whole)
fraction = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
positive_float = number("a positive number", lambda value: 0 < value < math.inf)
bandwidth = number("a positive number of GB/s", lambda value: 0 < value < math.inf)
#: Such as 5GB (10^9 each) or 4GiB (2^30).
byte_count = number("a positive number of bytes, such as 5GB or 512MiB", lambda value: value >= 1, _bytes)
