"""``python -m bench updates``: what one step over the rows of a batch takes, by the size of their table.

RowAdagrad and RowAdam beside torch.optim.SparseAdam, whose state is as large as RowAdam's, and torch.optim.Adam over a
dense gradient. Ids are uniform, all rows float32, gradients ready; a step's work is then the same in every table, and
what grows is what finding rows costs: misses of caches and of address translation. On a GPU ours run on host tables and
on device tables, torch's on device tables; without one all run on the CPU, ours as the reference.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.running.environment import describe_software
from bench.running.plots import label_end, plain_ticks
from bench.running.report import print_table
from bench.running.timing import CpuTimer, GpuTimer
from engram_kernels import EngramTable, RowAdagrad, RowAdam
from engram_kernels.commands.console import track
from engram_kernels.tables.gradient import row_gradient
from engram_kernels.tables.memory.report import available_host_memory

from .train import device_name

RESULT = Path(__file__).parents[1] / "results" / "updates.json"
WIDTH, SETS = 64, 4  # rows of 256 B, and batches that take turns
GB = 10**9
#: Copies of the table's size that a run holds: rows and states, and for Adam its gradient and one intermediate.
COPIES = {"RowAdagrad": 1 + 1 / WIDTH, "RowAdam": 3 + 1 / WIDTH, "SparseAdam": 3, "Adam": 5}


@dataclass(frozen=True)
class Subject:
    """An optimizer over a table of a placement."""

    optimizer: str
    placement: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}/{self.placement}"


def subjects(device: torch.device) -> Iterator[Subject]:
    for placement in ("host", "device") if device.type == "cuda" else ("cpu",):
        for optimizer in COPIES:
            if placement != "host" or optimizer.startswith("Row"):
                yield Subject(optimizer, placement)


def fill(weight: torch.Tensor) -> None:
    """Small numbers in every row, so that all of its memory is there; a chunk at a time."""
    for part in weight.split(1 << 20):
        part.copy_(torch.linspace(-1, 1, part.numel()).view(part.shape))


def batches(rows: int, count: int, device: torch.device):
    """SETS times ``count`` uniform ids and their gradients."""
    generator = torch.Generator().manual_seed(20260112)
    for _ in range(SETS):
        ids = torch.randint(0, rows, (count,), generator=generator)
        yield ids.to(device), torch.randn(count, WIDTH, generator=generator).to(device)


def steps(optimizer: str, table: EngramTable, rows_read: int, device: torch.device):
    """A call per batch, each a step of its own; what ends the optimizer; and the batches' gradients."""
    grads = [row_gradient(ids, grad, table.rows) for ids, grad in batches(table.rows, rows_read, device)]
    if optimizer in ("RowAdagrad", "RowAdam"):
        table.requires_row_grad_()
        rows = (RowAdagrad if optimizer == "RowAdagrad" else RowAdam)(table, lr=1e-2)

        def step(index: int) -> None:
            table.row_grad = grads[index]
            rows.step()

        return [partial(step, index) for index in range(SETS)], rows.close, grads
    weight = torch.nn.Parameter(table.weight)
    sparse = [grad.to_sparse_coo() for grad in grads]
    if optimizer == "SparseAdam":
        torch_optimizer: torch.optim.Optimizer = torch.optim.SparseAdam([weight], lr=1e-2)
    else:
        # One tensor at a time: foreach would hold several intermediates of the table's size.
        torch_optimizer = torch.optim.Adam([weight], lr=1e-2, foreach=False)
        dense = torch.zeros_like(table.weight)

    def torch_step(index: int) -> None:
        if optimizer == "SparseAdam":
            weight.grad = sparse[index]
        else:
            # As a backward pass through an embedding leaves it: zeros, and the rows of the batch.
            weight.grad = dense.zero_().add_(sparse[index])
        torch_optimizer.step()

    return [partial(torch_step, index) for index in range(SETS)], lambda: None, grads


def check(call: Callable[[], None], table: EngramTable, ids: torch.Tensor) -> None:
    """The first step moves the rows of ``ids`` and no others."""
    others = torch.randint(0, table.rows, (4096,), generator=torch.Generator().manual_seed(1)).to(ids.device)
    others = others[~torch.isin(others, ids)].to(table.weight.device)
    mine = ids.to(table.weight.device)
    before = table.weight[mine].clone(), table.weight[others].clone()
    call()
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    moved = (table.weight[mine] != before[0]).any(1)
    if not bool(moved.all()) or not torch.equal(table.weight[others], before[1]):
        raise RuntimeError(f"a step moved {int(moved.sum())} of {len(mine)} rows, or one without a gradient")


def measure(subject: Subject, nbytes: int, rows_read: int, device: torch.device, timer) -> dict:
    """Seconds of a step over a table of ``nbytes``, warm: every batch has been stepped once before."""
    with ExitStack() as opened:
        table = EngramTable.empty(nbytes // (4 * WIDTH), WIDTH, "float32", placement=subject.placement)
        opened.callback(table.close)
        fill(table.weight)
        calls, close, grads = steps(subject.optimizer, table, rows_read, device)
        opened.callback(close)
        check(calls[0], table, grads[0].ids[: int(grads[0].count)])
        for call in calls[1:]:
            call()
        measured = timer.measure(calls)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    distinct = sum(int(grad.count) for grad in grads) / SETS
    return dict(name=subject.name, table_bytes=nbytes, distinct_rows=distinct, **measured.as_dict())


def run(sizes: list[int], rows_read: int, device: torch.device, timer=None) -> dict:
    """Every optimizer over every size that fits in memory; the others are named."""
    timer = timer or (GpuTimer(device) if device.type == "cuda" else CpuTimer(limit=3.0))
    cases = [(subject, nbytes) for subject in subjects(device) for nbytes in sizes]
    records, left_out = [], []
    for subject, nbytes in track(cases, "updates", len(cases)):
        free = torch.cuda.mem_get_info(device)[0] if subject.placement == "device" else available_host_memory()
        wanted = int(COPIES[subject.optimizer] * nbytes)
        if wanted > 0.9 * free:
            left_out.append(f"{subject.name}, {nbytes / GB:g} GB: takes {wanted / GB:.1f} GB, {free / GB:.1f} are free")
            continue
        records.append(measure(subject, nbytes, rows_read, device, timer))
    return dict(
        command="python -m bench updates",
        unit="s a step: median, low and high of the samples",
        environment=dict(describe_software(), device=device_name(device), threads=torch.get_num_threads()),
        ids=rows_read,
        width=WIDTH,
        records=records,
        left_out=left_out,
        growth=growth(records),
    )


def growth(records: list[dict]) -> dict[str, float]:
    """Optimizer -> its time over the largest table, as a multiple of that over the smallest."""
    by_name: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda record: record["table_bytes"]):
        by_name.setdefault(record["name"], []).append(record)
    return {name: found[-1]["median"] / found[0]["median"] for name, found in by_name.items() if len(found) > 1}


def plot(result: dict, path: Path) -> None:
    """Time of a step over the table's size, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = {"SparseAdam": "torch SparseAdam", "Adam": "torch Adam, dense"}
    for name in dict.fromkeys(record["name"] for record in result["records"]):
        records = sorted((each for each in result["records"] if each["name"] == name), key=lambda it: it["table_bytes"])
        sizes = [record["table_bytes"] / GB for record in records]
        times = [record["median"] * 1e3 for record in records]
        optimizer, _, memory = name.partition("/")
        (line,) = axes.plot(sizes, times, "o-" if name.startswith("Row") else "s--", markersize=5)
        where = "" if memory == "cpu" else f", {memory}"
        shift = {"RowAdagrad": 7, "SparseAdam": -7}.get(optimizer, 0)
        label_end(line, f"{names.get(optimizer, optimizer)}{where}: {times[-1]:,.0f} ms", shift)
    sizes = sorted({record["table_bytes"] / GB for record in result["records"]})
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, sizes)
    low, high = axes.get_ylim()
    plain_ticks(axes.yaxis, [tick for tick in (n * 10**e for e in range(-3, 6) for n in (1, 3)) if low < tick < high])
    axes.set_xlim(sizes[0] * 0.85, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.45)  # room for the labels
    axes.set_xlabel("size of the table, GB")
    axes.set_ylabel("ms a step")
    axes.set_title(
        f"An optimizer's step over {result['ids']:,} uniform rows, {result['environment']['device']}", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench updates", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--gb", type=float, nargs="+", metavar="N", help="sizes of tables; default 1 to 64, on a CPU 0.125 to 2"
    )
    parser.add_argument("--ids", type=int, default=65_536, metavar="N", help="rows looked up in a batch")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="the JSON; its plot goes beside it")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    sizes = chosen.gb or ((1, 2, 4, 8, 16, 32, 64) if device.type == "cuda" else (0.125, 0.25, 0.5, 1, 2))
    if chosen.ids < 1 or min(sizes) * GB < 4 * WIDTH:
        parser.error(f"--ids must be at least 1 and --gb hold a row of {4 * WIDTH} bytes, got {chosen.ids}, {sizes}")
    result = run([int(size * GB) for size in sizes], chosen.ids, device)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, chosen.out.with_suffix(".png"))
    rows = [
        (each["name"], f"{each['table_bytes'] / GB:g}", f"{each['distinct_rows']:,.0f}", f"{each['median'] * 1e3:.2f}")
        for each in result["records"]
    ]
    print_table(("optimizer", "table, GB", "distinct rows", "ms a step"), rows)
    for line in result["left_out"]:
        print(f"left out: {line}")
    for name, factor in result["growth"].items():
        print(f"{name}: {factor:.2f} times the smallest table's step for the largest")
    print(f"Wrote {chosen.out} and {chosen.out.with_suffix('.png')}")
    return 0
