"""What it costs to keep a serving copy in step with its master on a CPU: rows that changed, beside all of them.

    python -c "from bench.training.pushes import print_push_costs; print_push_costs()"

Seconds are the best of three. A whole conversion by files is what a trainer without a record of changes does:
``save_safetensors``, ``table convert`` and ``from_safetensors`` again.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from bench.running.report import print_table
from engram_kernels import EngramTable
from engram_kernels.checkpoints.convert import convert_table
from engram_kernels.geometry.row_format import FORMATS

WIDTH, SCALE = 256, 0.02
COUNTS = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class PushCost:
    """Seconds that ``rows`` rows took."""

    what: str
    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.rows / self.seconds


def push_costs(rows: int = 1_000_000, counts: tuple[int, ...] = COUNTS, form: str = "e4m3_ue8m0") -> Iterator[PushCost]:
    """Of a bfloat16 master of ``rows`` rows of 256 and a copy in ``form``; pushes of ``counts`` random rows."""
    scale = SCALE if FORMATS[form].table_scale else None
    master = EngramTable.from_tensors(torch.randn(rows, WIDTH).bfloat16(), placement="cpu")
    copy = EngramTable.empty(rows, WIDTH, form, scale=scale or 1.0, placement="cpu")
    master.record_changes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)

        def by_files() -> None:
            convert_table(master.save_safetensors(path / "m.safetensors"), path / "c.safetensors", "bench", **options)
            EngramTable.from_safetensors(path / "c.safetensors", placement="cpu").close()

        options = dict(format=form, scale=scale)
        yield PushCost("all, by files", rows, _seconds(by_files))
        yield PushCost("all, in memory", rows, _seconds(lambda: copy.update_from(master)))
        for count in counts:
            version = master.version
            master.rows_changed(torch.randperm(rows)[:count])
            ids = master.changed_since(version)
            yield PushCost("changed, in memory", count, _seconds(partial(copy.update_from, master, version)))

            def by_file(version=version) -> None:
                master.save_changes(path / "p.safetensors", version, **options)
                copy.load_changes(path / "p.safetensors", version)

            yield PushCost("changed, by a file", count, _seconds(by_file))
            edit = ids, copy.weight[ids].clone(), copy.scale[ids].clone() if scale is None else None

            def on_and_off(edit=edit) -> None:
                copy.overlay(*edit).remove()

            yield PushCost("overlay on and off", count, _seconds(on_and_off))


def print_push_costs() -> None:
    """A table of :func:`push_costs` for both fp8 formats."""
    for form in ("e4m3_ue8m0", "e4m3"):
        found = [
            (c.what, f"{c.rows:,}", f"{c.seconds * 1e3:,.1f}", f"{c.rate / 1e6:.2f}") for c in push_costs(form=form)
        ]
        print_table((form, "rows", "ms", "million rows a second"), found)


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        begin = perf_counter()
        call()
        best = min(best, perf_counter() - begin)
    return best
