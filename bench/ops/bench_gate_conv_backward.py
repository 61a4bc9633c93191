"""gate_conv_residual in training: its backward pass alone, and forward and backward together against the reference."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.running.cases import Case, Prepared, Workbench, models, priority, tensor_bytes
from engram_kernels import gate_conv_residual, reference, split_kv

from . import baselines
from .bench_gate import GateInputs, norms
from .bench_gate_backward import (
    ALL_TOKENS,
    PRIORITY,
    TOKENS,
    VARIANTS,
    disagreement,
    gradients,
    gradients_alone,
    leaves,
)


def cases(full: bool = False) -> Iterator[Case]:
    for model in models(full):
        for tokens in (ALL_TOKENS if full else TOKENS) if model != "v41" else ():  # which has no convolution
            for variant in VARIANTS:
                prepared = partial(prepare, model, variant, tokens, full)
                rank = PRIORITY + priority("v41", tokens, VARIANTS.index(variant))
                yield Case("gate_conv_residual_backward", model, variant, tokens, rank, prepared)


def prepare(model: str, variant: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    config = bench.config(model)
    branches, width = config.branches, config.hidden_size
    weights = [*norms(bench, model, 3), bench.randn(branches, width, config.conv_kernel, seed=99) * 0.5]
    options = dict(dilation=config.conv_dilation, eps=config.eps, conv_eps=config.conv_eps, zero_gate=config.zero_gate)
    nbytes = (5 * branches + 2) * width * tokens * 2
    sets = [GateInputs.random(bench, model, tokens, index) for index in range(bench.sets(nbytes))]
    grads = [bench.randn(tokens, branches, width, seed=500 + index) for index in range(len(sets))]
    inputs = [leaves(each, weights) for each in sets]

    def plain(hidden, kv, *weights):
        key, value = kv.split([branches * width, width], dim=-1)
        inputs = (hidden, key.unflatten(-1, (branches, width)), value, *weights)
        return reference.gate_conv_residual(*inputs, **options)

    def op(index: int):
        hidden, kv, *rest = inputs[index]
        return gate_conv_residual(hidden, *split_kv(kv, branches, width), *rest, **options)

    def check(result, index: int) -> str | None:
        exact = [x.detach() if place < 2 else x.detach().float() for place, x in enumerate(inputs[index])]
        exact = [x.requires_grad_() for x in exact]
        *others, of_weight = torch.autograd.grad(plain(*exact), exact, grads[index])
        # A row of the weight's gradient is a tap's, since a tap's sum over tokens is of one size.
        found = [*result[:-1], result[-1].permute(2, 0, 1)]
        return disagreement(found, [*others, of_weight.permute(2, 0, 1)])

    scalars = torch.empty(tokens, 5, branches, device="meta")
    value_part = torch.empty(tokens, width, device="meta")
    # Backward: the first pass reads grad and value and writes value_part, the second reads both and grad again.
    nbytes = tensor_bytes(grads[0], grads[0], scalars, scalars, value_part, value_part, sets[0].value)
    nbytes += tensor_bytes(*inputs[0], *inputs[0])
    if variant == "both":
        # Forward: two passes that both read hidden and value, as in bench/ops/bench_gate_conv.py, and the scalars
        # written.
        nbytes += tensor_bytes(*inputs[0], sets[0].hidden, sets[0].value, grads[0], scalars, scalars)
    run = (gradients if variant == "both" else gradients_alone)(op, inputs, grads)
    calls = [partial(run, index) for index in range(len(sets))]
    prepared = Prepared(calls=calls, check=check, nbytes=nbytes, facts={"sets": len(sets)})
    if variant == "both":
        prepared.baselines["eager"] = lambda: gradients(lambda index: plain(*inputs[index]), inputs, grads)
        if full or tokens == max(TOKENS):
            prepared.baselines["compiled"] = lambda: gradients(baselines.compiled(plain, inputs), inputs, grads)
    return prepared
