"""Command line: ``python -m engram_kernels demo``, ``info``, ``size``, ``cache`` and ``table``."""

import os
import sys

from .commands.arguments import parser
from .commands.cache import run_cache
from .commands.demo.command import run_demo
from .commands.info import run_info
from .commands.size import run_size
from .commands.table.command import run_table

_COMMANDS = {"demo": run_demo, "info": run_info, "size": run_size, "cache": run_cache, "table": run_table}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough of it. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
