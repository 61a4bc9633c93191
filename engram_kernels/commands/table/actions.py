"""``python -m engram_kernels table inspect | verify | convert``: tables in checkpoints, without loading them."""

import argparse

import torch

from engram_kernels.checkpoints.convert import convert_table
from engram_kernels.checkpoints.encoding import MOST
from engram_kernels.checkpoints.files import CheckpointError
from engram_kernels.commands.arguments import byte_count, errors_in_one_line, positive_float
from engram_kernels.commands.console import byte_bar, print_sections

from .inspect import inspect_sections, read_config, size_of, without_caller
from .verify import verify_sections

#: Formats that tables are converted to: those that kernels read.
_FORMATS = ("float32", "bfloat16", "float16", "e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4")
_ACTIONS = {
    "inspect": "names, format, rows, bytes, and the published models that fit",
    "verify": "files as long as their headers say, tables whole, and no NaN or unwritten rows in them",
    "convert": "into another format or other files: nearest values, ties to even, one rounding from float32",
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command is told."""
    command.description = (
        "Tables of up to 100 GB are streamed, never loaded. Exit code 1 if a check of verify fails, 2 for a command "
        "that cannot run."
    )
    actions = command.add_subparsers(dest="action", required=True)
    parsers = {name: actions.add_parser(name, help=text, description=text) for name, text in _ACTIONS.items()}
    for name, action in parsers.items():
        action.set_defaults(where=action.prog)
        action.add_argument("files", nargs="+", metavar="FILE", help="safetensors files, a folder, or an index (.json)")
        if name != "inspect":
            action.add_argument("--layer", metavar="N", type=int, help="the table of this model layer")
            action.add_argument("--prefix", metavar="NAME", help="the table whose rows are called NAME.weight")
    add = parsers["verify"].add_argument
    add("--config", metavar="NAME", help="a preset of EngramConfig, or a config.json to fit")
    add("--headers-only", action="store_true", help="do not read the rows")
    add = parsers["convert"].add_argument
    add("--out", metavar="PATH", required=True, help="file (.safetensors) or folder to write")
    add("--format", choices=_FORMATS, help="default: as it is")
    add("--scale", metavar="X", type=positive_float, help="of e4m3 and nvfp4; default: greatest value / 448, or 2688")
    text = "of nvfp4 and mxfp4: the scale that takes a group's greatest value to 6, without a search for a better one"
    add("--nearest", action="store_true", help=text)
    text = "an error of a row, relative to its norm, whose share of rows is printed; default: %(default)s"
    add("--bound", metavar="X", type=positive_float, default=0.125, help=text)
    add("--out-prefix", metavar="NAME", help="name before .weight; default: as it is")
    add("--shard-bytes", metavar="SIZE", type=byte_count, help="split into files of that size, as 5GB")


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0, or 1 for a failed verify; CommandError for what cannot be done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks have threads of their own, each of which would start as many again
    try:
        with errors_in_one_line():
            return {"inspect": _inspect, "verify": _verify, "convert": _convert}[arguments.action](arguments)
    finally:
        torch.set_num_threads(threads)


def _inspect(arguments: argparse.Namespace) -> int:
    print_sections(inspect_sections(arguments.files, arguments.where))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    where = arguments.where
    config = None if arguments.config is None else read_config(arguments.config, where)
    options = dict(layer=arguments.layer, prefix=arguments.prefix, values=not arguments.headers_only, bar=byte_bar)
    try:
        sections, holds = verify_sections(arguments.files, where, config=config, **options)
    except CheckpointError as error:
        sections, holds = [[("files", f"FAILED: {without_caller(error, where)}")]], False
    print_sections(sections)
    return 0 if holds else 1


def _convert(arguments: argparse.Namespace) -> int:
    names = ("format", "layer", "prefix", "out_prefix", "scale", "nearest", "bound", "shard_bytes")
    options = {name: getattr(arguments, name) for name in names}
    with byte_bar("convert") as progress:
        done = convert_table(arguments.files, arguments.out, arguments.where, progress=progress, **options)
    rows = [
        ("written", str(done.path)),
        ("table", f"{done.format.name}, {done.rows:,} rows x {done.width}, {size_of(done.nbytes)}"),
    ]
    if done.scale is not None:
        rows.append(("scale", f"{done.scale:.9g}"))
    if done.overflows:
        limit = f"{MOST[done.format.name]:g} times the scale" if done.scale is not None else "infinite"
        rows.append(("overflows", f"{done.overflows:,} values were beyond the format's range and are {limit} now"))
    if (loss := done.loss) is not None:
        rows.append(("error", f"{loss.signal_to_noise:.2f} dB of signal to noise, at most {loss.largest_error:.3g}"))
        rows.append(("", f"{loss.beyond:.3%} of rows have an error above {loss.bound:g} of their norm"))
    print_sections([rows])
    return 0
