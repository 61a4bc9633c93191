"""gate_residual: the gated addition, against the reference op by op and compiled."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.running.cases import (
    TOKENS,
    Case,
    Prepared,
    Workbench,
    models,
    poison,
    priority,
    spread_tokens,
    tensor_bytes,
    token_counts,
)
from engram_kernels import gate_residual, reference, split_kv

from . import baselines

#: A gate near d = 0 jumps by 1e-3 between the signs, and float32 sums of another order may disagree on the sign.
GATE_JUMP = 2.0**-10
BFLOAT16_STEP = 2.0**-7


def cases(full: bool = False) -> Iterator[Case]:
    for model in models(full):
        for tokens in token_counts(full):
            prepared = partial(prepare, model, tokens, full)
            yield Case("gate_residual", model, "", tokens, priority(model, tokens), prepared)


@dataclass(frozen=True)
class GateInputs:
    """One set: ``hidden [T, H, D]``, and key and value as views of one ``kv``."""

    hidden: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(cls, bench: Workbench, model: str, tokens: int, seed: int) -> "GateInputs":
        config = bench.config(model)
        branches, width = config.branches, config.hidden_size
        kv = bench.randn(tokens, (branches + 1) * width, seed=2 * seed + 1)
        key, value = split_kv(kv, branches, width)
        return cls(bench.randn(tokens, branches, width, seed=2 * seed), key, value)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.key, self.value


def norms(bench: Workbench, model: str, count: int) -> list[torch.Tensor]:
    """Norm weights around one, ``[H, D]`` each."""
    config = bench.config(model)
    return [bench.randn(config.branches, config.hidden_size, seed=90 + index) * 0.1 + 1 for index in range(count)]


def disagreement(result: torch.Tensor, expected: torch.Tensor, value: torch.Tensor) -> str | None:
    """In words where an element is further off than one step of bfloat16 and what a gate may jump by; NaN counts."""
    result, expected = result.float(), expected.float()
    bound = BFLOAT16_STEP * expected.abs() + GATE_JUMP * value.float().abs().unsqueeze(-2)
    error = (result - expected).abs()
    wrong = int((~(error <= bound)).sum())
    worst = float(error.nan_to_num(float("inf")).max())
    return f"{wrong} of {error.numel()} elements are off the reference, by up to {worst:.3g}" if wrong else None


def prepare(model: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    config = bench.config(model)
    query_norm, key_norm = norms(bench, model, 2)
    options = dict(eps=config.eps, zero_gate=config.zero_gate)
    out = torch.empty(tokens, config.branches, config.hidden_size, dtype=torch.bfloat16, device=bench.device)
    nbytes = (3 * config.branches + 1) * config.hidden_size * tokens * 2
    sets = [GateInputs.random(bench, model, tokens, index) for index in range(bench.sets(nbytes))]
    poison(out)

    def plain(hidden, key, value):
        return reference.gate_residual(hidden, key, value, query_norm, key_norm, **options)

    def check(result: torch.Tensor, index: int) -> str | None:
        at = spread_tokens(tokens).to(bench.device)
        hidden, key, value = (tensor[at] for tensor in sets[index].tensors())
        return disagreement(result[at], plain(hidden, key, value), value)

    prepared = Prepared(
        calls=[partial(gate_residual, *each.tensors(), query_norm, key_norm, **options, out=out) for each in sets],
        check=check,
        nbytes=tensor_bytes(*sets[0].tensors(), query_norm, key_norm, out),
        facts={"sets": len(sets)},
    )
    prepared.baselines["eager"] = lambda: lambda index: plain(*sets[index].tensors())
    if bench.peers and model == "v41":
        prepared.baselines |= bench.peers.gate([each.tensors() for each in sets], query_norm, key_norm, config.eps)
    if full or (model == "v41" and tokens == max(TOKENS)):
        prepared.baselines["compiled"] = lambda: baselines.compiled(plain, [each.tensors() for each in sets])
    return prepared
