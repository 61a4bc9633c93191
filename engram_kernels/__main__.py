"""Command line: ``engram-kernels``, or ``python -m engram_kernels``.

Parsers import nothing heavy; the module of a command is imported when its arguments are found right.
"""

import importlib
import os
import sys
import traceback

from . import __version__
from .commands import parsers
from .commands.arguments import CommandError, CommandParser
from .commands.table import actions

#: Of each command: what it is told, the module whose ``run(arguments)`` it is, and what it does.
_COMMANDS = {
    "demo": (parsers.add_demo, ".demo.report", "hash, lookup and gate on real text at full size, checked"),
    "info": (parsers.add_info, ".info", "versions, devices, and what would run where and why"),
    "size": (parsers.add_size, ".size", "what a model's Engram layers move and hold, without a GPU"),
    "cache": (parsers.add_cache, ".cache", "hit rates of a cache of hot n-grams on a text, by its size"),
    "table": (actions.add_arguments, ".table.actions", "inspect, verify or convert the tables of a checkpoint"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (arguments.EXIT_CODES)."""
    about = "Kernels for Engram, the conditional memory of DeepSeek."
    parser = CommandParser(prog="engram-kernels", description=about)
    parser.set_defaults(run=None, help=parser, where=parser.prog)
    parser.add_argument("--version", action="version", version=f"engram_kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, (add_arguments, module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        command.set_defaults(run=module, where=command.prog)
        add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        if arguments.run is None:  # no command, or one that has others below it, and none of them
            print(arguments.help.format_help(), end="")
            code = 0
        else:
            code = importlib.import_module(arguments.run, "engram_kernels.commands").run(arguments)
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
    except Exception:
        traceback.print_exc()
        return 3


def _drop_output() -> None:
    """Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
