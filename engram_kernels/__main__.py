"""Command line: ``python -m engram_kernels demo`` and ``python -m engram_kernels info``."""

import argparse
import os
import sys

from .version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line: argparse would print the usage above it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _positive(text: str) -> int:
    try:
        number = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="engram_kernels", description="Kernels for Engram, the conditional memory of DeepSeek.")
    parser.add_argument("--version", action="version", version=f"engram_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="hash, lookup and gate on real text at the full size of DeepSeek-V4.1-Flash, checked",
        description="Tokenizes text, reads its n-grams' rows from tables of DeepSeek-V4.1-Flash's size and gates them "
        "into a residual stream; every step is checked. Exit code 0 if all checks pass, 1 if one fails, 2 for a "
        "command that cannot run.",
    )
    demo.add_argument("--text", metavar="FILE", help="UTF-8 text; default: the opening of Pride and Prejudice")
    demo.add_argument(
        "--tokens", metavar="N", type=_positive, help="read at most N tokens; default 2,048 on a CPU, 8,192 on a GPU"
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes a GPU where there is one",
    )
    demo.add_argument(
        "--inject-fault",
        choices=("ids", "rows", "gate"),
        help="spoil one row id, one stored byte or one output element, to see the checks notice",
    )
    commands.add_parser("info", help="versions, devices, and what would run where and why")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _info() if arguments.command == "info" else _demo(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough of it. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# Imports are left to the commands: torch takes seconds, and --help and mistakes need none of it.
def _info() -> int:
    from .info import print_info

    print_info()
    sys.stdout.flush()
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import DemoError, run_demo

    try:
        code = run_demo(arguments.text, arguments.tokens, arguments.device, arguments.inject_fault)
    except DemoError as error:
        print(f"engram_kernels demo: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
