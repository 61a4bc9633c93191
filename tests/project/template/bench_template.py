"""scale_columns against the reference. To copy to bench/ops/bench_scaling.py."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import Case, Prepared, Workbench, models, poison, priority, tensor_bytes, token_counts

from . import reference
from .op import scale_columns


def cases(full: bool = False) -> Iterator[Case]:
    for model in models(full):
        for tokens in token_counts(full):
            yield Case("scale_columns", model, "", tokens, priority(model, tokens), partial(prepare, model, tokens))


def prepare(model: str, tokens: int, bench: Workbench) -> Prepared:
    hidden_size = bench.config(model).hidden_size
    out = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, device=bench.device)
    weight = bench.randn(hidden_size, seed=99).float()
    sets = [bench.randn(tokens, hidden_size, seed=index) for index in range(bench.sets(2 * tensor_bytes(out)))]
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        wrong = int((result != reference.scale_columns(sets[index], weight)).sum())
        return f"{wrong} of {result.numel()} elements differ from the reference" if wrong else None

    prepared = Prepared(
        calls=[partial(scale_columns, x, weight, out=out) for x in sets],
        check=check,
        nbytes=tensor_bytes(sets[0], weight, out),
        facts={"sets": len(sets)},
    )
    prepared.baselines["eager"] = lambda: lambda index: reference.scale_columns(sets[index], weight)
    return prepared
