"""The demo's pipeline: a text's n-grams through hash, lookup and gate, every step timed and checked.

For each window of tokens, the rows that its n-grams are due to read by a scalar hash, which shares no code with this
package, are written to the tables; all other rows are zero. T tokens, L layers, C columns, R elements a row, H
branches, D hidden size.
"""

import time

import numpy as np
import torch
import triton

from engram_kernels.commands.arguments import CommandError
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.ops.gate import gate_residual
from engram_kernels.ops.hash_rows import hash_lookup
from engram_kernels.ops.hashing import ngram_hash
from engram_kernels.ops.rows import lookup

from . import checks
from .tables import TablePlan, make_tables, write_rows

GPU_CALLS = 8  # in a row, so that the host's time to launch one hides behind the one before
_SEED = 20260112


class Stages:
    """Seconds and bytes of each stage, added up over windows."""

    def __init__(self, device: torch.device):
        self._device = device
        self.totals: dict[str, list[float]] = {}

    def time(self, name: str, call, count_bytes=lambda result: 0):
        """Run a step that uses no GPU."""
        start = time.perf_counter()
        result = call()
        self._add(name, time.perf_counter() - start, count_bytes(result))
        return result

    def measure(self, name: str, call, count_bytes):
        """Run a step of the pipeline, after a first call that is not counted (compilation, thread pools)."""
        if name not in self.totals and not triton.knobs.runtime.interpret:
            call()
        if self._device.type == "cpu":
            return self.time(name, call, count_bytes)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(GPU_CALLS):
            result = call()
        end.record()
        end.synchronize()
        self._add(name, start.elapsed_time(end) / 1e3 / GPU_CALLS, count_bytes(result))
        return result

    def _add(self, name: str, seconds: float, nbytes: int) -> None:
        total = self.totals.setdefault(name, [0.0, 0])
        total[0] += seconds
        total[1] += nbytes

    def lines(self):
        yield "stage", f"{'time':>12} {'bytes':>12} {'GB/s':>9}"
        for name, (seconds, nbytes) in self.totals.items():
            rate = f"{nbytes / 1e6:>9.2f} MB {nbytes / seconds / 1e9:>9.3g}" if nbytes else ""
            yield name, f"{seconds * 1e3:>9.2f} ms {rate}".rstrip()


class Run:
    """Tables, plan and checks of one run over ``tokens``. With ``sample`` about so many are checked, else all."""

    def __init__(
        self,
        tokens: list[int],
        token_map: torch.Tensor,
        tables: TablePlan,
        device: torch.device,
        stages: Stages,
        sample: int | None,
    ):
        self.tokens, self.device, self.stages, self.config = tokens, device, stages, tables.config
        self.checks = {
            "token map": checks.Check("token map", "the published SHA-256"),
            "geometry": checks.Check("geometry", "primes by trial division"),
            "row ids": checks.Check("row ids", "a scalar hash in Python"),
            "lookup": checks.Check("rows of lookup", "the closed form of their ids, bit for bit"),
            "hash_lookup": checks.Check("rows of hash_lookup", "the closed form of their ids, bit for bit"),
            "gate": checks.Check("gate", "float64 in another formulation"),
        }
        mapped = token_map.tolist()
        digest = checks.token_map_digest(mapped)
        self.checks["token map"].add(np.array([digest == checks.TOKEN_MAP_SHA256]), lambda _: f"is {digest}")
        if not self.checks["token map"].passed:
            raise CommandError(
                f"token map: SHA-256 {digest} is not the published one; this is another tokenizer than DeepSeek-V4.1's"
            )
        self.scalar = checks.ScalarHash(mapped, self.config.table_sizes[0])
        self.plan = stages.time("hash plan", lambda: HashPlan.build(self.config, token_map)).to(device)
        self._check_geometry()
        try:
            self.tables = make_tables(tables)
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandError(f"cannot make the tables ({tables.summary}): {error}") from None
        self._step = 1 if sample is None else max(1, len(tokens) // sample)
        branches, size = self.config.branches, self.config.hidden_size
        generator = torch.Generator().manual_seed(_SEED)
        self._norms = [(1 + 0.1 * torch.randn(branches, size, generator=generator)).to(device) for _ in range(2)]
        signs = torch.randint(0, 2, (branches, size), generator=generator) * 2 - 1
        self._signs = signs.to(device, torch.bfloat16)
        self.row_ids: list[np.ndarray] = []  # of each window, [T, L, C]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for table in self.tables:
            table.close()

    @property
    def results(self) -> list[tuple[str, bool, str]]:
        """(check, whether it passed, what it says) so far."""
        return [(check.name, check.passed, str(check)) for check in self.checks.values()]

    @property
    def checked_tokens(self) -> int:
        return len(range(0, len(self.tokens), self._step))

    def window(self, begin: int, end: int, fault: str | None = None) -> None:
        """Run and check tokens ``begin .. end``."""
        positions = np.arange(-(-begin // self._step) * self._step, end, self._step)
        due = self.scalar.row_ids(self.tokens, positions.tolist())
        self.stages.time("write rows due", lambda: self._write(due), lambda written: written)
        if fault == "rows":
            self.tables[0].weight.view(torch.uint8)[int(due[0, 0, 0]), 0] ^= 0x80
        local = torch.from_numpy(positions - begin).to(self.device)
        rows = self._rows(begin, end, positions, local, due, fault)
        hidden = self._hidden(end - begin, begin)
        for layer in range(len(self.tables)):
            hidden = self._gate(layer, hidden, rows[layer], positions, local, fault)
        if self.device.type == "cpu":
            for table in self.tables:
                table.discard()

    def _write(self, due: np.ndarray) -> int:
        """Give the rows due their content; returns their bytes."""
        return sum(write_rows(table, layer, due[:, layer]) for layer, table in enumerate(self.tables))

    def _rows(self, begin, end, positions, local, due, fault) -> torch.Tensor:
        """Row ids and rows by both ways, checked; returns ``[L, T, C, R]``."""
        ids = torch.tensor(self.tokens[begin:end], device=self.device)
        missing = self.plan.max_ngram - 1
        past = ([-1] * missing + self.tokens[max(0, begin - missing) : begin])[-missing:]
        history = torch.tensor([past], device=self.device)
        plan, tables = self.plan, self.tables
        stored = sum(table.nbytes // table.rows for table in tables) * plan.primes.shape[1] * len(ids)

        row_ids = self.stages.measure(
            "ngram_hash", lambda: ngram_hash(ids, plan, history=history), lambda out: ids.nbytes + out.nbytes
        )
        if fault == "ids":
            row_ids[int(local[0]), 0, 0] ^= 1
        self.row_ids.append(row_ids.cpu().numpy())
        checks.check_row_ids(self.checks["row ids"], row_ids[local].cpu().numpy(), due, positions)

        def look_up():
            return [lookup(table, row_ids[:, layer]) for layer, table in enumerate(tables)]

        read = self.stages.measure(
            "lookup", look_up, lambda out: row_ids.nbytes + stored + sum(rows.nbytes for rows in out)
        )
        bits = np.stack([_bits(rows[local]) for rows in read])
        checks.check_rows(self.checks["lookup"], bits, due, positions)
        rows = self.stages.measure(
            "hash_lookup",
            lambda: hash_lookup(ids, plan, tables, history=history),
            lambda out: ids.nbytes + stored + out.nbytes,
        )
        checks.check_rows(self.checks["hash_lookup"], _bits(rows[:, local]), due, positions)
        return rows

    def _hidden(self, num_tokens: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_SEED + seed)
        shape = (num_tokens, self.config.branches, self.config.hidden_size)
        return torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)

    def _project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key ``[T, H, D]`` and value ``[T, D]`` in the place of wkv's: slices of a token's rows, keys with signs."""
        flat = rows.flatten(1)
        branches, size = self._signs.shape
        slices = flat.unfold(1, size, (flat.shape[1] - size) // branches)
        return slices[:, :branches] * self._signs, slices[:, branches]

    def _gate(self, layer, hidden, rows, positions, local, fault) -> torch.Tensor:
        key, value = self.stages.measure(
            "wkv stand-in", lambda: self._project(rows), lambda kv: rows.nbytes + kv[0].nbytes
        )
        query_norm, key_norm = self._norms
        read = (hidden, key, value, query_norm, key_norm)
        out = self.stages.measure(
            "gate_residual",
            lambda: gate_residual(*read, eps=self.config.eps, zero_gate=self.config.zero_gate),
            lambda out: out.nbytes + sum(tensor.numel() * tensor.itemsize for tensor in read),
        )
        if fault == "gate" and layer == 0:
            spoilt = out[int(local[0]), 0]
            spoilt[0] += max(1.0, abs(float(spoilt[0]))) / 16

        def float64(chunk: slice):
            at = local[chunk]
            per_token = [tensor[at] for tensor in (hidden, key, value)]
            tensors = (*per_token, query_norm, key_norm, out[at])
            return tuple(tensor.double().cpu().numpy() for tensor in tensors)

        truncates = triton.knobs.runtime.interpret
        checks.check_gate(self.checks["gate"], layer, positions, float64, truncates)
        return out

    def _check_geometry(self) -> None:
        due = [self.scalar.rows_per_layer]
        if self.config == EngramConfig.deepseek_v41_flash():
            self.checks["geometry"].against = "the checkpoint's rows, and primes by trial division"
            due.append(checks.PUBLISHED_ROWS)
        got = np.array(self.plan.rows_per_layer)
        self.checks["geometry"].add(got == np.array(due), lambda _, layer: f"layer {layer}: {got[layer]:,} rows")
        self.checks["geometry"].add(
            self.plan.primes.cpu().numpy() == np.array(self.scalar.primes), lambda *at: f"prime {at}"
        )


def _bits(rows: torch.Tensor) -> np.ndarray:
    return rows.contiguous().cpu().view(torch.int16).numpy().view(np.uint16)
