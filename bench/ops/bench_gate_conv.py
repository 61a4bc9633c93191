"""gate_conv_residual: gate and short convolution in the paper's form, against the reference op by op and compiled."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import TOKENS, Case, Prepared, Workbench, models, poison, priority, tensor_bytes, token_counts
from engram_kernels import gate_conv_residual, reference

from . import baselines
from .bench_gate import GateInputs, disagreement, norms

_CHECKED = 256  # tokens at either end that are compared with the reference


def cases(full: bool = False) -> Iterator[Case]:
    # DeepSeek-V4.1 has no convolution. The other model is first here, so it gets the rank of the first.
    for model in models(full):
        if model != "v41":
            for tokens in token_counts(full):
                prepared = partial(prepare, model, tokens, full)
                yield Case("gate_conv_residual", model, "", tokens, priority("v41", tokens), prepared)


def prepare(model: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    config = bench.config(model)
    branches, width, dilation = config.branches, config.hidden_size, config.conv_dilation
    query_norm, key_norm, conv_norm = norms(bench, model, 3)
    conv_weight = bench.randn(branches, width, config.conv_kernel, seed=99) * 0.5
    weights = (query_norm, key_norm, conv_norm, conv_weight)
    options = dict(dilation=dilation, eps=config.eps, conv_eps=config.conv_eps, zero_gate=config.zero_gate)
    out = torch.empty(tokens, branches, width, dtype=torch.bfloat16, device=bench.device)
    nbytes = (4 * branches + 2) * width * tokens * 2
    sets = [GateInputs.random(bench, model, tokens, index) for index in range(bench.sets(nbytes))]
    poison(out)

    def plain(hidden, key, value):
        return reference.gate_conv_residual(hidden, key, value, *weights, **options)

    def check(result: torch.Tensor, index: int) -> str | None:
        """The first tokens, and the last with as many before them as the convolution looks back."""
        span = (config.conv_kernel - 1) * dilation
        begin = max(0, tokens - _CHECKED - span)
        head, tail = slice(0, _CHECKED), slice(begin, tokens)
        for part, skipped in ((head, 0), (tail, span if begin else 0)):
            inputs = [tensor[part] for tensor in sets[index].tensors()]
            expected = plain(*inputs)[skipped:]
            # v and the convolution each carry a gate's error, and silu stretches it by at most 1.1.
            problem = disagreement(result[part][skipped:], expected, 4 * _reach(inputs[2], span, dilation)[skipped:])
            if problem is not None:
                return problem
        return None

    prepared = Prepared(
        calls=[partial(gate_conv_residual, *each.tensors(), *weights, **options, out=out) for each in sets],
        check=check,
        # Two passes: both read hidden and value, the first the key, the second writes the result.
        nbytes=2 * tensor_bytes(sets[0].hidden, sets[0].value) + tensor_bytes(sets[0].key, *weights, out),
        facts={"sets": len(sets)},
    )
    prepared.baselines["eager"] = lambda: lambda index: plain(*sets[index].tensors())
    if full or tokens == max(TOKENS):
        prepared.baselines["compiled"] = lambda: baselines.compiled(plain, [each.tensors() for each in sets])
    return prepared


def _reach(value: torch.Tensor, span: int, dilation: int) -> torch.Tensor:
    """Per element the largest magnitude of ``value`` that the convolution reads there, ``[T, D]``."""
    largest = value.float().abs()
    reach = largest.clone()
    for back in range(dilation, span + 1, dilation):
        reach[back:] = torch.maximum(reach[back:], largest[: max(0, len(largest) - back)])
    return reach
