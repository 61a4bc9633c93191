"""What the report of executed instructions runs: small inputs of real geometry, the same for us and the peers.

A job is a call of the package, the reference's answer, and the peers' calls for the same answer. Tables and primes are
scaled down, which changes no instruction.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

from bench.ops.bench_gate import GateInputs, norms
from bench.peers.adapters import Peers
from bench.peers.inputs import Requests
from bench.running.cases import Workbench
from engram_kernels import (
    NgramCache,
    RowAdagrad,
    RowAdam,
    RowSinkhorn,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    lookup,
    ngram_hash,
    reference,
)
from engram_kernels.launching import device as running
from engram_kernels.launching.tokens import Tokens
from engram_kernels.serving.history import commit_history
from engram_kernels.serving.inputs import TokenBuffers, copying
from engram_kernels.tables.editing.exchange import StoredRows, exchange_rows
from engram_kernels.tables.gradient import row_gradient
from engram_kernels.testing.tables import place

CPU = torch.device("cpu")
TABLE_BYTES = 24 << 20
PROCESSORS = 132  # multiprocessors of the GPU that grids are made for
#: By how much sums of another order may differ.
CLOSE = dict(rtol=2**-6, atol=2**-6)


@dataclass
class Job:
    name: str
    unit: str  # what counts are divided by
    units: int
    expected: list[torch.Tensor]
    ours: Callable[[], object]
    differing: float = 0.0  # share of the elements that may differ, and then by little: sums of another order
    peers: dict[str, Callable] = field(default_factory=dict)  # name -> what makes a call of an index
    places: int | None = None  # elements in front that are compared, None for all

    def verdict(self, found) -> str:
        """How a result agrees with the reference, for the report. ValueError where it does not."""
        found = list(found) if isinstance(found, list | tuple) else [found]
        if len(found) == 1 and len(self.expected) > 1:
            found = list(found[0])
        if len(found) != len(self.expected):
            raise ValueError(f"{self.name}: {len(found)} results for {len(self.expected)}")
        wrong = total = 0
        for got, wanted in zip(found, self.expected, strict=True):
            got, wanted = got.detach().reshape(wanted.shape)[: self.places], wanted.detach()[: self.places]
            if not wanted.is_floating_point():
                got = got.to(wanted.dtype)  # a peer's integers may be wider
            got, wanted = got.contiguous(), wanted.contiguous()
            differ = (got.flatten()[:, None].view(torch.uint8) != wanted.flatten()[:, None].view(torch.uint8)).any(-1)
            wrong, total = wrong + int(differ.sum()), total + wanted.numel()
            if self.differing:
                torch.testing.assert_close(got, wanted, **CLOSE, msg=lambda text: f"{self.name}: {text}")
        if wrong > self.differing * total:
            raise ValueError(f"{self.name}: {wrong} of {total} elements differ from the reference")
        return "equal" if not wrong else f"{wrong} of {total} differ in the last bits"


def jobs(peers: Peers | None = None, families: Iterable[str] | None = None) -> Iterator[Job]:
    """The jobs of some families, by default of all. A consumer runs each before it asks for the next."""
    with Workbench(CPU, TABLE_BYTES, TABLE_BYTES, say=lambda line: None, peers=peers) as bench:
        for family in FAMILIES if families is None else families:
            yield from FAMILIES[family](bench)


def _peers(bench: Workbench, kind: str, *arguments, **options) -> dict[str, Callable]:
    return getattr(bench.peers, kind)(*arguments, **options) if bench.peers else {}


def _hashes(bench: Workbench) -> Iterator[Job]:
    plan = bench.plan("v41", "device")
    layers = len(plan.primes)
    unit = "token and layer"

    def job(name, ids, requests=None):
        options = {}
        if requests is not None:
            options = dict(cu_seqlens=requests.cu_seqlens, history=requests.history, dead=requests.dead(ids))
        expected = reference.ngram_hash(ids, plan, **options)
        of_peers = _peers(bench, "hash", [ids], plan, requests)
        return Job(name, unit, len(ids) * layers, [expected], lambda: ngram_hash(ids, plan, **options), peers=of_peers)

    for tokens in (64, 1):
        yield job(
            f"hash, {tokens} tokens" if tokens > 1 else "hash, 1 token", bench.token_ids("uniform", "v41", tokens, 0)
        )
    requests = packed_requests(plan.multipliers.shape[1] - 1)
    ids = bench.token_ids("uniform", "v41", 64, 3)
    ids[ids == requests.dead_id] += 1
    ids[[4, 5, 6, 30, 31, 50]] = requests.dead_id
    yield job("hash, 64 tokens packed", ids, requests)
    requests = Requests(torch.arange(65, dtype=torch.int32), _history(64, plan.multipliers.shape[1] - 1))
    yield job("hash, 64 requests decode", bench.token_ids("uniform", "v41", 64, 7), requests)


def _history(batch: int, depth: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(100, 100_000, (batch, depth), generator=generator, dtype=torch.int32)


def packed_requests(depth: int) -> Requests:
    """Eight requests of 1 to 16 tokens: two begin here, one is two tokens old; token id 77 is dead."""
    lengths = torch.tensor([1, 16, 3, 9, 12, 2, 14, 7])
    history = _history(len(lengths), depth)
    history[[0, 3]] = -1
    history[4, 0] = -1
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return Requests(cu_seqlens, history, dead_id=77)


def _lookups(bench: Workbench) -> Iterator[Job]:
    for model, tokens, programs in (
        ("v41", 16, None),
        ("v41", 16, 4),
        ("v41-nvfp4", 16, 4),
        ("v41-mxfp4", 16, 4),
        ("27b", 16, None),
        ("qwen", 16, None),
    ):
        plan, table = bench.plan(model, "device"), bench.table(model, "device")
        row_ids = reference.ngram_hash(bench.token_ids("uniform", model, tokens, 1), plan)[:, 0].contiguous()
        options = dict(order="direct", programs=programs)
        at_most = PROCESSORS if programs is None else programs
        yield Job(
            name=f"lookup {model}, {tokens} tokens" + (f", {programs} programs" if programs else ""),
            unit="row",
            units=row_ids.numel(),
            expected=[reference.lookup(table, row_ids)],
            ours=lambda table=table, row_ids=row_ids, options=options: lookup(table, row_ids, **options),
            peers=_peers(bench, "lookup", table, [row_ids], at_most) if model == "v41" else {},
        )


def _hash_lookups(bench: Workbench) -> Iterator[Job]:
    plan, table = bench.plan("v41", "device"), bench.table("v41", "device")
    tables = [table] * len(plan.primes)
    for tokens, programs in ((1, None), (16, None), (64, None), (16, 4)):
        ids = bench.token_ids("uniform", "v41", tokens, 1)
        expected = list(reference.hash_lookup(ids, plan, tables))
        options = dict(order="direct", programs=programs)
        at_most = PROCESSORS if programs is None else programs
        name = f"hash_lookup, {tokens} tokens" if tokens > 1 else "hash_lookup, 1 token"
        yield Job(
            name=name + (f", {programs} programs" if programs else ""),
            unit="row",
            units=tokens * plan.primes.numel(),
            expected=expected,
            ours=lambda ids=ids, options=options: hash_lookup(ids, plan, tables, **options),
            peers=_peers(bench, "hash_lookup", [ids], plan, tables, at_most),
        )


def _cached(bench: Workbench) -> Iterator[Job]:
    plan, table = bench.plan("v41", "device"), bench.table("v41", "device")
    tables = [table] * len(plan.primes)
    cache = NgramCache(plan, tables, entries=1 << 10, min_tokens=1)
    ids = bench.token_ids("uniform", "v41", 16, 1)
    expected = list(reference.hash_lookup(ids, plan, tables))
    for found in ("misses", "hits"):  # what the first call missed the second finds
        yield Job(
            name=f"cached hash_lookup, 16 tokens, all {found}",
            unit="row",
            units=len(ids) * plan.primes.numel(),
            expected=expected,
            ours=lambda: hash_lookup(ids, plan, tables, cache=cache, order="direct"),
        )


def _gates(bench: Workbench) -> Iterator[Job]:
    for tokens in (8, 64):
        inputs, weights = GateInputs.random(bench, "v41", tokens, 0).tensors(), norms(bench, "v41", 2)
        eps = bench.config("v41").eps
        yield Job(
            name=f"gate, {tokens} tokens",
            unit="token",
            units=tokens,
            expected=[reference.gate_residual(*inputs, *weights, eps=eps)],
            ours=lambda inputs=inputs, weights=weights, eps=eps: gate_residual(*inputs, *weights, eps=eps),
            differing=1e-3,
            peers=_without_tilelang(_peers(bench, "gate", [inputs], *weights, eps)),
        )
    for tokens in (8, 64):
        arguments, options = _conv_arguments(bench, tokens)
        yield Job(
            name=f"gate_conv, {tokens} tokens",
            unit="token",
            units=tokens,
            expected=[reference.gate_conv_residual(*arguments, **options)],
            ours=lambda arguments=arguments, options=options: gate_conv_residual(*arguments, **options),
            differing=1e-3,
        )


def _without_tilelang(peers: dict) -> dict:
    return {name: make for name, make in peers.items() if name != "tilekernels"}


def _conv_arguments(bench: Workbench, tokens: int):
    config = bench.config("27b")
    inputs, weights = GateInputs.random(bench, "27b", tokens, 0).tensors(), norms(bench, "27b", 3)
    kernel = bench.randn(config.branches, config.hidden_size, config.conv_kernel, seed=99) * 0.5
    options = dict(dilation=config.conv_dilation, eps=config.eps, conv_eps=config.conv_eps, zero_gate=config.zero_gate)
    return (*inputs, *weights, kernel), options


def _gradients(bench: Workbench) -> Iterator[Job]:
    inputs = (*GateInputs.random(bench, "v41", 64, 0).tensors(), *norms(bench, "v41", 2))
    yield _backward(
        "gate backward, 64 tokens", gate_residual, "gate_residual", inputs, dict(eps=bench.config("v41").eps)
    )
    arguments, options = _conv_arguments(bench, 64)
    yield _backward("gate_conv backward, 64 tokens", gate_conv_residual, "gate_conv_residual", arguments, options)


def _backward(name, op, reference_name, arguments, options) -> Job:
    """All gradients; those of the reference from float32 inputs."""

    def run(function, dtype=None):
        leaves = [(each if dtype is None else each.to(dtype)).detach().requires_grad_() for each in arguments]
        return function(*leaves, **options), leaves

    out, leaves = run(op)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(17)).to(out.dtype)
    wanted = torch.autograd.grad(*run(getattr(reference, reference_name), torch.float32), grad.float())
    return Job(
        name=name,
        unit="token",
        units=len(arguments[0]),
        expected=[each.to(leaf.dtype) for each, leaf in zip(wanted, leaves, strict=True)],
        ours=lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        differing=1e-3,
    )


def _updates(bench: Workbench) -> Iterator[Job]:
    width, rows = bench.config("27b").row_width, 4096
    ids = reference.ngram_hash(bench.token_ids("uniform", "27b", 16, 1), bench.plan("27b", "device"))
    row_ids = (ids[:, 0] % rows).contiguous()
    grad = bench.randn(*row_ids.shape, width, seed=7)

    def gradient():
        found = row_gradient(row_ids, grad, rows)
        return [found.ids, found.values, found.squares, found.count]

    expected = list(reference.tables.gradient.row_gradient(row_ids, grad, rows))
    distinct = int(expected[3])
    # Places beyond the distinct rows are undefined.
    yield Job("row gradient 27b, 16 tokens", "row", distinct, expected, gradient, differing=2e-2, places=distinct)
    # Of sums over columns most bits are of another order.
    kinds = {
        RowAdagrad: (dict(weight_decay=0.05), 2e-2),
        RowAdam: (dict(weight_decay=0.05), 2e-2),
        RowSinkhorn: ({}, 1),
    }
    for kind, (options, differing) in kinds.items():
        tables = [place(bench.randn(rows, width, seed=8), None, CPU, None).requires_row_grad_() for _ in range(2)]
        optimizers = [kind(table, lr=0.1, **options) for table in tables]
        with on_the_reference():
            for table in tables:
                table.accumulate_row_grad(row_ids, grad)
            optimizers[0].step()
        wanted = [tables[0].weight, *optimizers[0].states().values()]

        def step(optimizer=optimizers[1], table=tables[1]):
            optimizer.step()
            return [table.weight, *optimizer.states().values()]

        yield Job(f"{kind.__name__} 27b, 16 tokens", "row", distinct, wanted, step, differing=differing)
    yield _exchange(bench)


def _exchange(bench: Workbench) -> Job:
    """256 rows of V4.1 for as many others, the same ones there and back."""
    config, ids = bench.config("v41"), torch.randperm(4096, generator=torch.Generator().manual_seed(9))[:256]
    given = [torch.randint(0, 256, (n, config.row_width), dtype=torch.uint8) for n in (4096, 256)]
    given += [torch.randint(0, 256, (n, config.row_width // 32), dtype=torch.uint8) for n in (4096, 256)]
    expected = [each.clone() for each in given]
    for memory, rows in (expected[:2], expected[2:]):
        reference.tables.editing.exchange.exchange_rows(ids, rows, memory)

    def exchange():
        weight, rows, scale, scales = (each.clone() for each in given)
        exchange_rows(place(weight.view(torch.float8_e4m3fn), scale, CPU, None), StoredRows(ids, rows, scales))
        return [weight, rows, scale, scales]

    return Job("rows of v41 exchanged", "row", len(ids), expected, exchange)


@contextlib.contextmanager
def on_the_reference():
    """Within the context CPU tensors go to the reference, whatever stands in for a GPU."""
    with mock.patch.object(running, "CPU_TAKES_KERNELS", False):
        yield


def _histories(bench: Workbench) -> Iterator[Job]:
    requests = packed_requests(3)
    slots = torch.tensor([5, 2, 9, 0, 7, 1, 3, 8], dtype=torch.int32)
    ids = bench.token_ids("uniform", "v41", 64, 3)
    dead = ids % 7 == 0
    before = _history(10, 3).long()
    wanted = before.clone()
    options = dict(cu_seqlens=requests.cu_seqlens, dead=dead)
    reference.serving.history.commit_history(wanted, None, slots, ids, **options)

    def commit():
        after = before.clone()
        commit_history(after, None, slots, ids, **options)
        return after

    yield Job("history committed, 8 requests", "request", len(slots), [wanted], commit)
    given = Tokens(ids, requests.cu_seqlens, before, dead, slots)

    def copy():
        buffers = TokenBuffers(64, 8, 4, ids.device)
        copies = buffers.views(given)
        copying(given, copies)(*given)
        return copies[:4]

    yield Job("tokens copied, history by slot, 8 requests", "token", 64, list(given.gathered()[:4]), copy)


FAMILIES = dict(hash=_hashes, lookup=_lookups, hash_lookup=_hash_lookups, cache=_cached, gate=_gates)
FAMILIES |= dict(gradients=_gradients, updates=_updates, history=_histories)
#: Those that peers have kernels for.
OF_PEERS = ("hash", "lookup", "hash_lookup", "gate")
