"""``python -m engram_kernels table inspect | verify | convert``: tables in checkpoints, without loading them."""

import argparse
import sys

import torch

from engram_kernels.checkpoints.convert import convert_table
from engram_kernels.checkpoints.files import CheckpointError
from engram_kernels.commands.console import byte_bar, print_sections

from .inspect import inspect_sections, read_config, size_of, without_caller
from .verify import verify_sections


def run_table(arguments: argparse.Namespace) -> int:
    """The exit code: 0, 1 for a failed verify, 2 for what cannot be done, which takes one line."""
    where = f"engram_kernels table {arguments.action}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks have threads of their own, each of which would start as many again
    try:
        return {"inspect": _inspect, "verify": _verify, "convert": _convert}[arguments.action](arguments, where)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{where}: {without_caller(error, where)}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def _inspect(arguments: argparse.Namespace, where: str) -> int:
    print_sections(inspect_sections(arguments.files, where))
    return 0


def _verify(arguments: argparse.Namespace, where: str) -> int:
    config = None if arguments.config is None else read_config(arguments.config, where)
    options = dict(layer=arguments.layer, prefix=arguments.prefix, values=not arguments.headers_only, bar=byte_bar)
    try:
        sections, holds = verify_sections(arguments.files, where, config=config, **options)
    except CheckpointError as error:
        sections, holds = [[("files", f"FAILED: {without_caller(error, where)}")]], False
    print_sections(sections)
    return 0 if holds else 1


def _convert(arguments: argparse.Namespace, where: str) -> int:
    options = {name: getattr(arguments, name) for name in ("format", "layer", "prefix", "out_prefix", "scale")}
    with byte_bar("convert") as progress:
        done = convert_table(
            arguments.files, arguments.out, where, shard_bytes=arguments.shard_bytes, progress=progress, **options
        )
    rows = [
        ("written", str(done.path)),
        ("table", f"{done.format.name}, {done.rows:,} rows x {done.width}, {size_of(done.nbytes)}"),
    ]
    if done.scale is not None:
        rows.append(("scale", f"{done.scale:.9g}"))
    if done.overflows:
        limit = "448 times the scale" if done.scale is not None else "infinite"
        rows.append(("overflows", f"{done.overflows:,} values were beyond the format's range and are {limit} now"))
    print_sections([rows])
    return 0
