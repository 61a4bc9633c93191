"""The demo's kernels in Triton's interpreter: in a process of its own, as it is switched on before Triton's import."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.token_map import build_token_map
from engram_kernels.ops.hash_kernels.row_ids import ngram_hash_kernel

from .run import Run, Stages
from .tables import plan_tables
from .tokenizer import load_tokenizer

_KERNELS = {"ngram_hash_kernel", "lookup_kernel", "hash_lookup_kernel", "gate_residual_kernel"}


def run_interpreted(ids: list[int]) -> int:
    """What :func:`check_interpreted` starts: the kernels in Triton's interpreter; prints results as JSON."""
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
    print(json.dumps({"memory": peak_memory(), "launches": launches, "checks": run.results}))
    return 0 if all(passed for _, passed, _ in run.results) else 1


def check_interpreted(ids: list[int]) -> tuple[list[tuple[str, bool, str]], int | None]:
    """[(check, whether it passed, what it says)] of the kernels on these tokens, and the process's peak memory."""
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


def peak_memory() -> int:
    """Bytes. Not getrusage, whose maximum a process inherits from the one that started it."""
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
