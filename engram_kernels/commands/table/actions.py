"""``engram-kernels table inspect | verify | convert | shared``: tables in checkpoints and in shared memory, not loaded.

What the actions are told is here as well; what they import, they import when they run.
"""

import argparse
from typing import TYPE_CHECKING

from engram_kernels.commands.arguments import byte_count, errors_in_one_line, existing, positive_float
from engram_kernels.commands.console import byte_bar, print_json, print_sections
from engram_kernels.commands.parsers import add_json
from engram_kernels.commands.presets import FORMATS, PRESETS, model_name, read_config

if TYPE_CHECKING:
    from engram_kernels.checkpoints.convert import Conversion

#: Of each action: what it does in one line, and more of it.
_ACTIONS = {
    "inspect": ("names, format, rows, bytes, and the published models that fit", "Headers alone are read."),
    "verify": (
        "whole files, whole tables, no NaN and no unwritten rows",
        "Files as long as their headers say, tables whole, and no NaN or unwritten rows in them.",
    ),
    "convert": (
        "into another format or other files, whole or not at all",
        "Nearest values, ties to even, one rounding from float32. Without --layer and --prefix, all tables.",
    ),
    "shared": (
        "list and free tables that processes share, or that were kept",
        "Tables of placement 'shared' that this user has in /dev/shm and on hugetlbfs, and who holds them.",
    ),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command is told."""
    command.description = "Tables of up to 100 GB are streamed, never loaded."
    command.set_defaults(help=command, run=None)
    actions = command.add_subparsers(metavar="ACTION", title="actions")
    parsers = {name: actions.add_parser(name, help=line, description=more) for name, (line, more) in _ACTIONS.items()}
    for name, action in parsers.items():
        action.set_defaults(run=".table.actions", action=name, where=action.prog)
        if name != "convert":
            add_json(action)
        if name == "shared":
            continue
        files = "safetensors files, a folder, or an index (.json)"
        action.add_argument("files", nargs="+", metavar="FILE", type=existing, help=files)
        if name != "inspect":
            action.add_argument("--layer", metavar="N", type=int, help="the table of this model layer")
            action.add_argument("--prefix", metavar="NAME", help="the table whose rows are called NAME.weight")
    add = parsers["verify"].add_argument
    config = f"what tables have to fit: a preset ({', '.join(PRESETS)}), a config.json or a folder with one"
    add("--config", metavar="MODEL", type=model_name, help=config)
    add("--headers-only", action="store_true", help="do not read the rows")
    text = "take this name away first; the memory goes when no process maps it. May be given several times"
    parsers["shared"].add_argument("--free", metavar="NAME", action="append", default=[], help=text)
    add = parsers["convert"].add_argument
    add("--out", metavar="PATH", required=True, help="file (.safetensors) or folder to write, made if need be")
    add("--format", choices=FORMATS, help="default: as it is")
    add("--scale", metavar="X", type=positive_float, help="of e4m3 and nvfp4; default: greatest value / 448, or 2688")
    text = "of nvfp4 and mxfp4: the scale that takes a group's greatest value to 6, without a search for a better one"
    add("--nearest", action="store_true", help=text)
    text = "an error of a row, relative to its norm, whose share of rows is printed; default: %(default)s"
    add("--bound", metavar="X", type=positive_float, default=0.125, help=text)
    add("--out-prefix", metavar="NAME", help="name before .weight; default: as it is")
    add("--shard-bytes", metavar="SIZE", type=byte_count, help="split into files of that size, as 5GB")


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0, or 1 for a failed verify; CommandError for what cannot be done."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks have threads of their own, each of which would start as many again
    try:
        with errors_in_one_line():
            actions = {"inspect": _inspect, "verify": _verify, "convert": _convert, "shared": _shared}
            return actions[arguments.action](arguments)
    finally:
        torch.set_num_threads(threads)


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspect import inspect_facts, inspect_sections

    if arguments.json:
        print_json(inspect_facts(arguments.files, arguments.where))
    else:
        print_sections(inspect_sections(arguments.files, arguments.where))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from engram_kernels.checkpoints.files import CheckpointError

    from .inspect import without_caller
    from .verify import verify_facts, verify_sections

    where = arguments.where
    config = None if arguments.config is None else read_config(arguments.config)
    options = dict(layer=arguments.layer, prefix=arguments.prefix, values=not arguments.headers_only, bar=byte_bar)
    try:
        sections, holds = verify_sections(arguments.files, where, config=config, **options)
    except CheckpointError as error:
        sections, holds = [[("files", f"FAILED: {without_caller(error, where)}")]], False
    if arguments.json:
        print_json(verify_facts(sections, holds))
    else:
        print_sections(sections)
    return 0 if holds else 1


def _convert(arguments: argparse.Namespace) -> int:
    from engram_kernels.checkpoints.convert import convert_table

    from .outputs import choose_outputs, output_folder

    where, chosen = arguments.where, {name: getattr(arguments, name) for name in ("layer", "prefix", "out_prefix")}
    outputs = choose_outputs(arguments.files, arguments.out, where, **chosen)
    names = ("format", "out_prefix", "scale", "nearest", "bound", "shard_bytes")
    options = {name: getattr(arguments, name) for name in names}
    done = []
    with output_folder(arguments.out, where):
        for layer, prefix, path in outputs:
            with byte_bar(f"convert to {path.name}") as progress:
                options |= dict(layer=layer, prefix=prefix, progress=progress)
                done.append(convert_table(arguments.files, path, where, **options))
    print_sections([_converted(each) for each in done])
    return 0


def _shared(arguments: argparse.Namespace) -> int:
    from .shared import free_tables, shared_facts, shared_sections

    freed = free_tables(arguments.free, arguments.where)
    if arguments.json:
        print_json(shared_facts(freed))
    else:
        print_sections(shared_sections(freed))
    return 0


def _converted(done: "Conversion") -> list[tuple[str, str]]:
    """What was written."""
    from engram_kernels.checkpoints.encoding import MOST

    from .inspect import size_of

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
    return rows
