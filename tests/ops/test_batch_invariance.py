"""A token's bits in every form of a launch: its place, how many tokens come with it, what is recorded, how it lies.

The order of a gate's sums over D is written in the kernel (launching/sums.py), so that no variant may differ: the
layout that Triton gives a variant and the products that LLVM would fuse have both been such differences. Triton's
interpreter has neither; what runs here counts in lanes machine and gpu. ``python -m tests.ops.test_batch_invariance``
takes every pair of dtypes, branches and widths, with eight seeds, on the machine code.
"""

import itertools
import sys

import pytest
import torch
import triton

from engram_kernels import gate_conv_residual, gate_residual, split_kv
from tests.support.launches import launch_gate_residual

from .test_gate import inputs
from .test_gate_conv import conv_inputs

TOKENS = 7  # more than programs of a branch on a stand-in's two multiprocessors, where a row takes four warps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (5, 7, 31, 64, 80, 320, 1000, 1001, 1536, 2560, 5120, 16_384)
BRANCHES = (8, 7, 6, 5, 4, 3, 2, 1, 2, 4, 1, 1)
# Every width, every number of branches and every pair of dtypes, each at least once.
CASES = [
    (width, branches, *pair)
    for width, branches, pair in zip(WIDTHS, BRANCHES, itertools.cycle(itertools.product(DTYPES, DTYPES)), strict=False)
]
INTERPRETED = CASES[:2] if triton.knobs.runtime.interpret else CASES  # it has no layouts, and takes minutes
ROWS = dict(eps=1e-6)
CONV = dict(dilation=2, eps=1e-6, conv_eps=1e-5)


def shifted(tensor):
    """The same values one element further on, so that no row starts where loads are wide."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def as_kv(key, value):
    """Key and value as views of one ``kv [T, (H + 1) * D]``."""
    kv = torch.cat([key.flatten(1), value], dim=1)
    return split_kv(kv, *key.shape[1:])


def gate_forms(tensors):
    """(what is special, tokens, their result) of every form of a launch."""
    hidden, key, value, *norms = tensors
    for first, last in ((0, 1), (3, 4), (2, TOKENS)):
        part = [x[first:last] for x in tensors[:3]]
        yield f"tokens {first}:{last}", slice(first, last), gate_residual(*part, *norms, **ROWS)
    every = slice(0, TOKENS)
    yield "recorded", every, gate_residual(hidden.clone().requires_grad_(), *tensors[1:], **ROWS).detach()
    yield "norms misaligned", every, gate_residual(hidden, key, value, *map(shifted, norms), **ROWS)
    yield "all misaligned", every, gate_residual(*map(shifted, tensors), **ROWS)
    yield "views of kv", every, gate_residual(hidden, *as_kv(key, value), *norms, **ROWS)
    mask = torch.arange(TOKENS, device=hidden.device) != 2
    masked = gate_residual(*tensors, **ROWS, mask=mask)
    assert torch.equal(masked[2], hidden[2])
    yield "masked", mask, masked[mask]
    own = hidden.clone()
    yield "in place", every, gate_residual(own, key, value, *norms, **ROWS, out=own)


def conv_forms(tensors):
    hidden, key, value, *norms = tensors
    every = slice(0, TOKENS)
    yield "recorded", every, gate_conv_residual(hidden.clone().requires_grad_(), *tensors[1:], **CONV).detach()
    yield "all misaligned", every, gate_conv_residual(*map(shifted, tensors), **CONV)
    yield "views of kv", every, gate_conv_residual(hidden, *as_kv(key, value), *norms, **CONV)
    mask = torch.ones(TOKENS, dtype=torch.bool, device=hidden.device)
    yield "masked", every, gate_conv_residual(*tensors, **CONV, mask=mask)
    span, (branches, width) = 2 * (tensors[-1].shape[-1] - 1), hidden.shape[1:]
    state = value.new_zeros(1, span, width), value.new_zeros(1, span, branches, dtype=torch.float32)
    for first, last in ((0, 1), (1, 4), (4, TOKENS)):
        part = [x[first:last] for x in tensors[:3]]
        result, state = gate_conv_residual(*part, *norms, **CONV, conv_state=state)
        yield f"chunk {first}:{last}", slice(first, last), result


def differing(op, make, forms, width, branches, dtype, norm_dtype, seed, device):
    """Forms in which bits differ from those of a plain call."""
    tensors = [x.to(device) for x in make(width, branches, dtype, norm_dtype, seed)]
    whole = op(*tensors, **(ROWS if op is gate_residual else CONV))
    assert whole.isfinite().all()
    return [name for name, tokens, result in forms(tensors) if not torch.equal(result, whole[tokens])]


def make_gate(width, branches, dtype, norm_dtype, seed):
    return inputs(TOKENS, branches, width, dtype, norm_dtype, seed)


def make_conv(width, branches, dtype, norm_dtype, seed):
    convolution = conv_inputs(TOKENS, branches, width, 4, dtype, norm_dtype)[5:]
    return *make_gate(width, branches, dtype, norm_dtype, seed), *convolution


OPS = {"gate": (gate_residual, make_gate, gate_forms), "gate_conv": (gate_conv_residual, make_conv, conv_forms)}


@pytest.mark.kernel
@pytest.mark.parametrize(("width", "branches", "dtype", "norm_dtype"), INTERPRETED)
@pytest.mark.parametrize("op", OPS)
def test_a_token_keeps_its_bits_in_every_form(device, op, width, branches, dtype, norm_dtype):
    assert differing(*OPS[op], width, branches, dtype, norm_dtype, 0, device) == []


@pytest.mark.kernel
@pytest.mark.parametrize("width", [case[0] for case in INTERPRETED if case[0] < 5120])
def test_a_row_has_one_gate(device, width):
    """Of a value of ones alone every element is the gate: all threads must have found the same."""
    hidden, key, value, *norms = (x.to(device) for x in inputs(TOKENS, 2, width))
    for recorded in (False, True):
        out, scalars = torch.empty_like(hidden), hidden.new_empty(TOKENS, 3, 2) if recorded else None
        options = (1e-6, 1e-6, None, "copysign", False, out, scalars)
        launch_gate_residual(hidden, key, torch.ones_like(value), *norms, *options)
        assert torch.equal(out, out[..., :1].expand_as(out))


def test_the_cases_have_everything_at_least_once():
    widths, branches, dtypes, norms = map(set, zip(*CASES, strict=True))
    assert (widths, branches) == (set(WIDTHS), set(range(1, 9)))
    assert {(case[2], case[3]) for case in CASES} == set(itertools.product(DTYPES, DTYPES)) and dtypes == norms


def main():
    """All pairs, of eight seeds each, on machine code: a line for each that differs, and a count."""
    from tests.machine.gpu import standing_in

    cases = list(itertools.product(OPS, WIDTHS, range(1, 9), DTYPES, DTYPES))
    wrong = 0
    with standing_in("sm_90"):
        for done, (op, *case) in enumerate(cases, 1):
            for seed in range(8):
                for form in differing(*OPS[op], *case, seed, torch.device("cpu")):
                    wrong += 1
                    print(f"{op} D={case[0]} H={case[1]} {case[2]} norms {case[3]} seed {seed}: {form} differs")
            print(f"\r{done} of {len(cases)} cases, {wrong} differ", end="", file=sys.stderr)
    print(f"{len(cases)} cases of 8 seeds: {wrong} forms differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
