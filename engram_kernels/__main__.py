"""Command line: ``python -m engram_kernels demo``, ``info`` and ``size``."""

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


def _rate(text: str) -> float:
    return _number(text, lambda number: 0 < number < float("inf"), "a positive number of GB/s")


def _share(text: str) -> float:
    return _number(text, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _number(text: str, accepts, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not accepts(number):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
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
    size = commands.add_parser(
        "size",
        help="bytes, requests, least times and memory of a model's Engram layers, without a GPU",
        description="The traffic model: what each step moves, and the least time that takes at given rates.",
    )
    size.add_argument("--config", metavar="NAME", default="deepseek_v41_flash", help="a preset of EngramConfig")
    size.add_argument("--tokens", metavar="T", type=_positive, action="append", help="may be given more than once")
    size.add_argument("--link", metavar="GB/s", type=_rate, help="of the link to the host; default PCIe Gen5 x16")
    size.add_argument("--memory", metavar="GB/s", type=_rate, help="of device memory; default an H200")
    size.add_argument("--hit-rate", metavar="SHARE", type=_share, help="rows that come from device memory; default 0")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return {"info": _info, "demo": _demo, "size": _size}[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough of it. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# Imports are left to the commands: torch takes seconds, and --help and mistakes need none of it.
def _info(arguments: argparse.Namespace) -> int:
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


def _size(arguments: argparse.Namespace) -> int:
    from .size import PRESETS, print_size

    if arguments.config not in PRESETS:
        known = ", ".join(PRESETS)
        print(f"engram_kernels size: --config must be one of {known}, got {arguments.config!r}", file=sys.stderr)
        return 2
    options = {name: getattr(arguments, name) for name in ("tokens", "link", "memory", "hit_rate")}
    print_size(name=arguments.config, **{name: value for name, value in options.items() if value is not None})
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
