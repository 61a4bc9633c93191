"""Launch configurations tried against each other: ``python -m bench sweep [--only NAME] [--seconds S] [--out DIR]``.

The package does not autotune: each configuration is a pure function with the measured reason beside it. This measures
the reason. Every candidate replaces fields of the configuration in force, its result is checked against the reference,
and all candidates of a case run in one process on the same inputs. Winners go into the functions by hand, losers into
NOTES.md. Needs a GPU.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.running.cases import Case, Workbench, load_cases
from bench.running.environment import describe_gpu, describe_software, slug
from bench.running.timing import Budget, GpuTimer
from engram_kernels.ops.call import Op
from engram_kernels.ops.conv_kernels import backward as gate_conv_backward
from engram_kernels.ops.conv_kernels import residual as conv_residual
from engram_kernels.ops.conv_kernels import scale as gate_scale
from engram_kernels.ops.gate_kernels import backward as gate_backward
from engram_kernels.ops.gate_kernels import residual as gate_residual
from engram_kernels.ops.hash_kernels import row_ids
from engram_kernels.ops.row_kernels import by_id
from engram_kernels.ops.row_kernels import hashed as hashed_rows


def grid(**choices) -> tuple[dict, ...]:
    """Every combination of the fields' values."""
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


@dataclass(frozen=True)
class Sweep:
    """Candidates for one configuration function, which ``modules`` hold by name, over ``cases``."""

    function: str
    modules: tuple
    cases: tuple[str, ...]
    candidates: tuple[dict, ...]


SWEEPS = {
    "hash": Sweep(
        "hash_config",
        (row_ids,),
        ("ngram_hash/v41/uniform/T1", "ngram_hash/v41/uniform/T8192"),
        grid(block_t=(1, 4, 8, 16, 32), num_warps=(1, 2, 4)),
    ),
    "rows": Sweep(
        "rows_config",
        (by_id, hashed_rows),
        (
            "hash_lookup/v41/host/uniform/T1",
            "hash_lookup/v41/host/uniform/T8192",
            "hash_lookup/v41/device/uniform/T8192",
            "lookup/v41/device/uniform/T8192",
        ),
        grid(block_rows=(8, 16, 32), num_warps=(1, 2, 4)),
    ),
    "programs": Sweep(
        "rows_config",
        (by_id, hashed_rows),
        ("hash_lookup/v41/host/uniform/T8192", "hash_lookup/v41/device/uniform/T8192"),
        grid(programs=(8, 16, 32, 66, 132, 264, 528, 1056, 2112)),
    ),
    "gate": Sweep(
        "gate_config",
        (gate_residual, gate_scale),
        ("gate_residual/v41/T1", "gate_residual/v41/T8192"),
        (
            *grid(block_d=(512, 1024, 2048), num_warps=(2, 4, 8)),
            *grid(programs=(33, 66, 99, 132, 198, 264, 528)),
            *grid(keep=(False,), programs=(99, 264)),
        ),
    ),
    "conv": Sweep(
        "conv_config",
        (conv_residual,),
        ("gate_conv_residual/27b/T1", "gate_conv_residual/27b/T8192"),
        grid(block_t=(4, 8, 16, 32), block_d=(64, 128), num_warps=(2, 4, 8)),
    ),
    # Programs of the grid as they are on 132 multiprocessors: one, two, three and four each.
    "gate_backward": Sweep(
        "gate_backward_config",
        (gate_backward,),
        ("gate_residual_backward/v41/backward/T8192",),
        grid(block_t=(1, 2, 4), num_warps=(4, 8), programs=(132, 264, 396, 528)),
    ),
    "conv_backward": Sweep(
        "conv_backward_config",
        (gate_conv_backward,),
        ("gate_conv_residual_backward/27b/backward/T8192",),
        grid(block_t=(16, 32), block_d=(32, 64), num_warps=(4, 8), group_tokens=(64, 160, 320, 640)),
    ),
}


@contextlib.contextmanager
def configured(sweep: Sweep, changes: dict) -> Iterator[None]:
    """Within the context the sweep's function returns its configuration with ``changes``."""
    original = getattr(sweep.modules[0], sweep.function)

    def changed(*arguments):
        return dataclasses.replace(original(*arguments), **changes)

    for module in sweep.modules:
        setattr(module, sweep.function, changed)
    try:
        with mock.patch.object(Op, "_kept_launch", lambda *_: None):  # launches were prepared with the original
            yield
    finally:
        for module in sweep.modules:
            setattr(module, sweep.function, original)


def try_candidate(sweep: Sweep, changes: dict, prepared, timer) -> dict:
    """Median and spread of a candidate in microseconds, or what is wrong with it."""
    with configured(sweep, changes):
        try:
            wrong = prepared.check(prepared.calls[0](), 0)
        except (RuntimeError, ValueError) as error:  # out of registers or shared memory, for one
            wrong = str(error).splitlines()[0]
        if wrong:
            return {"config": changes, "wrong": wrong}
        measured = timer.measure(prepared.calls)
    return {"config": changes, **{key: value * 1e6 for key, value in measured.as_dict().items() if key != "samples"}}


def run_sweep(sweep: Sweep, case: Case, bench: Workbench, timer, budget: Budget) -> dict:
    """All candidates on one case, the configuration in force first; fastest first in the result."""
    prepared = case.prepare(bench)
    tried = [try_candidate(sweep, {}, prepared, timer)]
    for changes in sweep.candidates:
        if budget.left() <= 0:
            break
        tried.append(try_candidate(sweep, changes, prepared, timer))
    in_force = tried[0].get("median")
    ranked = sorted(tried, key=lambda entry: entry.get("median", float("inf")))
    return {
        "case": case.name,
        "function": sweep.function,
        "in_force_us": in_force,
        "left_out": len(sweep.candidates) + 1 - len(tried),
        "candidates": ranked,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(SWEEPS), action="append", help="one sweep; may be given again")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--host-gib", type=float, default=8.0, help="size of the host table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench sweep: needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    budget, timer = Budget(arguments.seconds), GpuTimer(device)
    cases = {case.name: case for case in load_cases(full=False)}
    content: dict = {"environment": {**describe_software(), **describe_gpu(device)}, "sweeps": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"sweep-{slug(torch.cuda.get_device_name(device))}.json"
    limit = int(arguments.host_gib * 2**30)
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    with Workbench(device, limit, limit, cache) as bench:
        for name in arguments.only or SWEEPS:
            for case in SWEEPS[name].cases:
                result = run_sweep(SWEEPS[name], cases[case], bench, timer, budget)
                content["sweeps"].append(result)
                path.write_text(json.dumps(content, indent=1) + "\n")
                print_sweep(result)
    print(f"wrote {path}")
    return 0


def print_sweep(result: dict) -> None:
    in_force = result["in_force_us"]
    print(f"{result['case']}: {result['function']}, in force {in_force and round(in_force, 2)} us")
    for entry in result["candidates"]:
        config = ", ".join(f"{key}={value}" for key, value in entry["config"].items()) or "(in force)"
        figure = f"{entry['median']:10.2f} us" if "median" in entry else f"   wrong: {entry['wrong']}"
        print(f"  {figure}  {config}")
    if result["left_out"]:
        print(f"  no time left for {result['left_out']} candidates")
