"""What a call costs the host, beside bare Triton launches of the same kernels with the same arguments.

No GPU takes part: Triton's own launch code runs under a driver that only names a GPU, up to the call into the compiled
kernel, which does nothing. So the times are those of Python on this machine, for calls and bare launches alike. What is
missing in both is the driver's own launch. Tensors are on the CPU; what the ops would do for that reason alone is
switched off.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.running.report import print_table
from engram_kernels import (
    EngramConfig,
    EngramState,
    EngramTable,
    HashPlan,
    Prefetcher,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    lookup,
    ngram_hash,
    split_kv,
)
from engram_kernels.launching import device as running
from engram_kernels.launching.dependent import dependent_options
from engram_kernels.launching.launch import Kept, Launch
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops import gate, gate_conv, hash_rows, hashing, rows
from engram_kernels.serving import prefetch
from engram_kernels.tables.view import view_tables

TOKENS = 4
OPS = (hashing.HASH, rows.LOOKUP, hash_rows.HASH_LOOKUP, gate.GATE, gate_conv.GATE_CONV)


class _Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Kernel(CompiledKernel):
    """A compiled kernel that does nothing."""

    function = packed_metadata = module = src = None
    name = "nothing"

    def __init__(self):
        pass

    def _init_handles(self):
        pass

    def run(self, *_):
        pass


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Within the context CPU tensors take the kernels' path, and nothing is compiled or run."""
    kernel, used = _Kernel(), []

    def compile_nothing(self, key, signature, device, *_, **__):
        used.append(self)
        self.device_caches[device][0][key] = kernel
        return kernel

    previous = driver._active
    driver.set_active(_Driver())
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
            stack.enter_context(mock.patch.object(running, "CPU_TAKES_KERNELS", True))
            for module in (hash_rows, hashing, prefetch):
                stack.enter_context(mock.patch.object(module, "check_token_values", lambda *_: None))
            stack.enter_context(mock.patch.object(EngramState, "_checks_values", lambda _: False))
            forget_launches()  # what was kept is not for CPU tensors
            yield
    finally:
        forget_launches()
        driver._active = previous
        for function in used:
            function.device_caches.clear()


def forget_launches() -> None:
    """Drop the launches that ops and others keep, as in a process that has launched nothing."""
    for op in OPS:
        op.forget()
    Kept.forget()


def launches_of(call: Callable[[], object]) -> list[tuple]:
    """(kernel, grid, arguments, keyword arguments) of each launch that ``call`` makes."""
    launches, run = [], JITFunction.run
    forget_launches()  # Triton's own launches are those of a first call

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, grid, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def record_kept(self, compiled, values):
        launches.append((self.kernel, self.grid, values, self.options | dependent_options()))
        return again(self, compiled, values)

    again = Launch.again
    with mock.patch.object(JITFunction, "run", record), mock.patch.object(Launch, "again", record_kept):
        call()
    return launches


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """Mean of some calls."""
    begin = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - begin) / calls


@dataclass(frozen=True)
class HostCost:
    """Seconds of one call, of its bare launches, and how many these are."""

    name: str
    call: float
    bare: float
    launches: int

    @property
    def ratio(self) -> float:
        return self.call / self.bare


def calls(hidden_size: int = 256) -> dict[str, Callable[[], object]]:
    """Calls of an inference engine in DeepSeek-V4.1's geometry, on small tensors."""
    config = EngramConfig.deepseek_v41_flash()
    plan = HashPlan.build(config, torch.arange(config.raw_vocab_size) % (config.vocab_size or 1))
    kind = (config.row_width, config.format)  # address space alone, as no row is written
    tables = [EngramTable.empty(count, *kind, placement="host") for count in plan.rows_per_layer]
    ids, row_ids = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(TOKENS, config.columns, dtype=torch.int32)
    branches = config.branches
    hidden, kv = torch.zeros(TOKENS, branches, hidden_size), torch.zeros(TOKENS, (branches + 1) * hidden_size)
    key, value = split_kv(kv, branches, hidden_size)
    norms = [torch.ones(branches, hidden_size) for _ in range(3)]
    tensors, weight = (hidden, key, value, norms[0], norms[1]), torch.ones(branches, hidden_size, 4)
    options = dict(dilation=3, eps=1e-6, conv_eps=1e-6)
    operands = (*tensors, 1e-6, 1e-6, None, "copysign", True)
    given = Tokens(ids)
    view, view_of_one = view_tables(tables, ids.device), view_tables(tables[:1], ids.device)
    state = EngramState(config, TOKENS, "cpu", dtype=torch.float32)
    prefetcher = Prefetcher(plan, tables, 16 * TOKENS, layers=config.layers)
    slots = torch.arange(TOKENS, dtype=torch.int32)

    def step(drafts: int) -> Callable[[], None]:
        """Of a sequence in each slot: state, rows ahead, the gates of all layers; projections are torch's."""
        length, accepted = 1 + drafts, torch.ones(TOKENS, dtype=torch.int32) if drafts else None
        ids = torch.zeros(TOKENS, length, dtype=torch.int64)
        hidden = torch.zeros(TOKENS, length, branches, hidden_size)
        parts = split_kv(torch.zeros(TOKENS, length, (branches + 1) * hidden_size), branches, hidden_size)

        def run() -> None:
            begun = state.begin(ids, slots)
            prefetcher.start(ids, **begun.options)
            for layer in config.layers:
                prefetcher.rows(layer)
                gate_residual(hidden, *parts, norms[0], norms[1], eps=1e-6)
            begun.commit(accepted)

        return run

    return {
        "ngram_hash": lambda: ngram_hash(ids, plan),
        "lookup": lambda: lookup(tables[0], row_ids),
        "hash_lookup": lambda: hash_lookup(ids, plan, tables),
        "ngram_hash as a registered op": lambda: hashing.ngram_hash_op(*given, *plan.parts()),
        "lookup as a registered op": lambda: rows.lookup_op(row_ids, *view_of_one, None, False, None, None),
        "hash_lookup as a registered op": lambda: hash_rows.hash_lookup_op(
            *given, *view, None, False, None, None, *plan.parts()
        ),
        "gate_residual": lambda: gate_residual(*tensors, eps=1e-6),
        "gate_residual as a registered op": lambda: gate.gate_residual_op(*operands),
        "gate_conv_residual": lambda: gate_conv_residual(*tensors, norms[2], weight, **options),
        "a step of decode, two layers": step(0),
        "a step of verification, 3 drafts": step(3),
    }


def host_costs(rounds: int = 150) -> list[HostCost]:
    """Each call beside its bare launches, in turn; the best of many short rounds, as what disturbs one only adds."""
    costs = []
    with launching_nothing(), torch.no_grad():
        for name, call in calls().items():
            launches = launches_of(call)

            def bare(launches=launches):
                for kernel, grid, args, kwargs in launches:
                    kernel[grid](*args, **kwargs)

            best = [float("inf")] * 2
            for _ in range(rounds):
                best = [min(old, seconds_of(one, 20)) for old, one in zip(best, (call, bare), strict=True)]
            costs.append(HostCost(name, best[0], best[1], len(launches)))
    return costs


def print_host_costs() -> None:
    """A table of :func:`host_costs`."""
    rows = [(c.name, f"{c.call * 1e6:.1f}", f"{c.bare * 1e6:.1f}", f"{c.ratio:.2f}", c.launches) for c in host_costs()]
    print_table(("call", "us on the host", "us of its bare launches", "ratio", "launches"), rows)
