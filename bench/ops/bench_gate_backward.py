"""gate_residual in training: its backward pass alone, and forward and backward together against the reference.

Tokens are those of training batches. Gradients of hidden, kv and both norms, as a layer with a projection asks for.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from bench.peers.inputs import whole_kv
from bench.running.cases import Case, Prepared, Workbench, models, priority, tensor_bytes
from engram_kernels import gate_residual, reference, split_kv

from . import baselines
from .bench_gate import GateInputs, norms

TOKENS, ALL_TOKENS = (2048, 8192), (128, 512, 1024, 2048, 4096, 8192, 16_384)
VARIANTS = ("backward", "both")
#: Behind the forward passes.
PRIORITY = 20
#: Of a row's largest gradient. Rows of d near the clamp, where the slope jumps, may be off by more: one in 4,096.
STEP, JUMPS = 2.0**-6, 4096
_CHUNK = 512  # tokens of the reference at a time


def cases(full: bool = False) -> Iterator[Case]:
    for model in models(full):
        for tokens in ALL_TOKENS if full else TOKENS:
            for variant in VARIANTS:
                prepared = partial(prepare, model, variant, tokens, full)
                rank = PRIORITY + priority(model, tokens, VARIANTS.index(variant))
                yield Case("gate_residual_backward", model, variant, tokens, rank, prepared)


def disagreement(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """In words where a gradient has more rows off the reference's than jumps of the slope explain; NaN counts."""
    for place, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
        wanted = wanted.float()
        error = (gradient.float() - wanted).abs().flatten(0, -2).amax(-1)
        off = int((~(error <= STEP * wanted.abs().flatten(0, -2).amax(-1))).sum())
        if off > len(error) // JUMPS:
            return f"gradient {place} is off the reference in {off} of {len(error)} rows"
    return None


def gradients(call: Callable[[int], torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], grads):
    """``call(index)`` and its gradients, of all of ``inputs[index]``."""
    return lambda index: torch.autograd.grad(call(index), inputs[index], grads[index])


def gradients_alone(call: Callable[[int], torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], grads):
    """The same, but that ``call`` has run before: each call goes back through the same recorded pass."""
    outs = [call(index) for index in range(len(inputs))]
    return lambda index: torch.autograd.grad(outs[index], inputs[index], grads[index], retain_graph=True)


def leaves(each: GateInputs, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """hidden, kv and weights as leaves that share the inputs' memory."""
    return [x.detach().requires_grad_() for x in (each.hidden, whole_kv(each.key, each.value), *weights)]


def prepare(model: str, variant: str, tokens: int, full: bool, bench: Workbench) -> Prepared:
    config = bench.config(model)
    branches, width = config.branches, config.hidden_size
    weights = norms(bench, model, 2)
    options = dict(eps=config.eps, zero_gate=config.zero_gate)
    nbytes = (5 * branches + 2) * width * tokens * 2
    sets = [GateInputs.random(bench, model, tokens, index) for index in range(bench.sets(nbytes))]
    grads = [bench.randn(tokens, branches, width, seed=500 + index) for index in range(len(sets))]
    inputs = [leaves(each, weights) for each in sets]

    def plain(hidden, kv, query_norm, key_norm):
        key, value = kv.split([branches * width, width], dim=-1)
        inputs = (hidden, key.unflatten(-1, (branches, width)), value, query_norm, key_norm)
        return reference.gate_residual(*inputs, **options)

    def op(index: int) -> torch.Tensor:
        hidden, kv, *rest = inputs[index]
        return gate_residual(hidden, *split_kv(kv, branches, width), *rest, **options)

    def check(result, index: int) -> str | None:
        """A chunk of tokens at a time: the gradients of the norms are the sums of the chunks'."""
        parts = []
        for begin in range(0, tokens, _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            part = [x.detach()[chunk].requires_grad_() for x in inputs[index][:2]]
            part += [x.detach().float().requires_grad_() for x in inputs[index][2:]]
            parts.append(torch.autograd.grad(plain(*part), part, grads[index][chunk]))
        hidden, kv, *of_norms = zip(*parts, strict=True)
        return disagreement(result, [torch.cat(hidden), torch.cat(kv), *(sum(each) for each in of_norms)])

    scalars = torch.empty(tokens, 3, branches, device="meta")
    # Backward: grad, the inputs and the scalars are read, and what is written is as large as the inputs.
    nbytes = tensor_bytes(grads[0], scalars, *inputs[0], *inputs[0])
    if variant == "both":
        nbytes += tensor_bytes(*inputs[0], grads[0], scalars)
    run = (gradients if variant == "both" else gradients_alone)(op, inputs, grads)
    calls = [partial(run, index) for index in range(len(sets))]
    prepared = Prepared(calls=calls, check=check, nbytes=nbytes, facts={"sets": len(sets)})
    if bench.peers and model == "v41":
        tensors, both = [each.tensors() for each in sets], variant == "both"
        prepared.baselines |= bench.peers.gate_gradients(tensors, grads, weights, config.eps, both)
    if variant == "both":
        prepared.baselines["eager"] = lambda: gradients(lambda index: plain(*inputs[index]), inputs, grads)
        if full or (model == "v41" and tokens == max(TOKENS)):
            prepared.baselines["compiled"] = lambda: gradients(baselines.compiled(plain, inputs), inputs, grads)
    return prepared
