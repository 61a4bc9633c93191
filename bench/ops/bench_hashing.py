"""ngram_hash: row ids of all layers, against the reference and the demo's hash in numpy."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import TOKENS, Case, Prepared, Workbench, models, poison, priority, tensor_bytes, token_counts
from engram_kernels import ngram_hash, reference

from . import baselines


def cases(full: bool = False) -> Iterator[Case]:
    for model in models(full):
        for tokens in token_counts(full):
            yield Case(
                op="ngram_hash",
                model=model,
                variant="uniform",
                tokens=tokens,
                priority=priority(model, tokens, 1),
                prepare=partial(prepare, model, tokens, full),
            )


def prepare(model: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    plan, plan_cpu = bench.plan(model, "host"), bench.plan(model, "host", torch.device("cpu"))
    out = torch.empty(tokens, *plan.primes.shape, dtype=plan.index_dtype, device=bench.device)
    nbytes = tokens * 4 + tensor_bytes(out)
    ids = [bench.token_ids("uniform", model, tokens, index) for index in range(bench.sets(nbytes))]
    poison(out)

    def check(result: torch.Tensor, index: int) -> str | None:
        expected = reference.ngram_hash(ids[index].cpu(), plan_cpu)
        wrong = int((result.cpu() != expected).sum())
        return f"{wrong} of {expected.numel()} row ids differ from the reference" if wrong else None

    prepared = Prepared(
        calls=[partial(ngram_hash, each, plan, out=out) for each in ids],
        check=check,
        nbytes=tensor_bytes(ids[0], out),
        facts={"sets": len(ids)},
    )
    inputs = [(each,) for each in ids]
    prepared.baselines = {
        "demo": lambda: baselines.demo_hash(ids, plan_cpu),
        "eager": lambda: lambda index: reference.ngram_hash(ids[index], plan),
    }
    if bench.peers and model == "v41":
        prepared.baselines |= bench.peers.hash(ids, plan)
    if full or (model == "v41" and tokens == max(TOKENS)):
        prepared.baselines["compiled"] = lambda: baselines.compiled(
            lambda each: reference.ngram_hash(each, plan), inputs
        )
    return prepared
