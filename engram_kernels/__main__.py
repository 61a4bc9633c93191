"""Command line: ``python -m engram_kernels demo``, ``info``, ``size``, ``cache`` and ``table``."""

import importlib
import os
import sys

from . import __version__
from .commands.arguments import CommandError, CommandParser

#: Modules of commands, each with ``add_arguments(parser)`` and ``run(arguments)``, and what the commands do.
_COMMANDS = {
    "demo": (".demo.report", "hash, lookup and gate on real text at the full size of DeepSeek-V4.1-Flash, checked"),
    "info": (".info", "versions, devices, and what would run where and why"),
    "size": (".size", "bytes, requests, least times and memory of a model's Engram layers, without a GPU"),
    "cache": (".cache", "hit rates of a hot n-gram cache on a text by its size, and what the link then carries"),
    "table": (".table.actions", "look at, check or convert the Engram tables of a checkpoint's safetensors files"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code, 2 for what cannot be done. Imports that command alone."""
    words = sys.argv[1:] if argv is None else argv
    parser = CommandParser(prog="engram_kernels", description="Kernels for Engram, the conditional memory of DeepSeek.")
    parser.add_argument("--version", action="version", version=f"engram_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if words[:1] == [name]:
            module = importlib.import_module(module_name, "engram_kernels.commands")
            module.add_arguments(command)
            command.set_defaults(where=command.prog)
    arguments = parser.parse_args(words)
    try:
        code = module.run(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        where = f"{arguments.where}: "
        print(where + str(error).removeprefix(where), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough of it
        _drop_output()
        return 141
    except OSError as error:  # of the output, or of a file that a command did not say more about
        print(f"{arguments.where}: {error}", file=sys.stderr)
        _drop_output()
        return 2


def _drop_output() -> None:
    """Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
