"""gate_conv_residual: within derived bounds of a float64 oracle, and of the published demo's own output."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from ..golden import demo_kv, demo_layer
from ..guards import Guarded
from ..inputs import CONV_EPS, EPS, conv_inputs, exact_and_bound, packed, state
from ..tolerances import assert_within
from .call import Call, Case, Place, require, require_bits, require_like

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
#: Tokens, branches, width, taps, dilation, dtype and that of the norms.
SHAPES = (
    (0, 2, 48, 4, 3, FLOAT32, FLOAT32),
    (1, 4, 48, 4, 3, FLOAT32, FLOAT16),
    (3, 2, 7, 1, 5, FLOAT32, FLOAT32),
    (12, 3, 80, 4, 2, BFLOAT16, FLOAT32),
    (12, 1, 100, 2, 1, FLOAT16, BFLOAT16),
    (40, 2, 160, 3, 4, FLOAT32, FLOAT32),
    (3, 4, 2560, 4, 3, BFLOAT16, BFLOAT16),
)


def cases() -> Iterator[Case]:
    def case(name: str, make, *arguments, **options) -> Case:
        return Case("gate_conv_residual", f"gate_conv_residual/{name}", partial(make, *arguments, **options))

    for layer in (1, 15):
        yield case(f"golden/demo/layer_{layer}", golden_demo, layer)
    for shape in SHAPES:
        tokens, branches, width, taps, dilation, dtype, _ = shape
        kind = str(dtype).removeprefix("torch.")
        name = f"{kind}/tokens_{tokens}/branches_{branches}/width_{width}/taps_{taps}/dilation_{dilation}"
        yield case(name, plain, shape)
        yield case(f"{name}/addend", plain, shape, residual=False)
    for dtype in (FLOAT32, BFLOAT16):
        shape = (12, 3, 80, 4, 2, dtype, FLOAT32)
        kind = str(dtype).removeprefix("torch.")
        yield case(f"{kind}/sequences", plain, shape, pack=True)
        yield case(f"{kind}/mask", plain, shape, masked=True)
        yield case(f"{kind}/state", plain, shape, carry=True)
        yield case(f"{kind}/sequences/mask/state", plain, shape, pack=True, masked=True, carry=True)
        yield case(f"{kind}/given_out", plain, shape, guarded=True)
    some = (12, 2, 64, 3, 2, FLOAT32, FLOAT32)
    yield case("sign", plain, some, zero_gate="sign")
    yield case("clamp_1", plain, some, clamp=1.0)
    yield case("batch", batch)


def plain(
    shape: tuple, place: Place, *, pack=False, masked=False, carry=False, guarded=False, residual=True, **options
) -> Call:
    """pack: sequences and padding. masked: NaN in key and value of masked tokens. carry: after a state, to a new one.

    guarded: into an ``out`` that has margins.
    """
    tokens, branches, width, taps, dilation, dtype, norms = shape
    tensors = conv_inputs(tokens, branches, width, taps, dtype, norms)
    span, cu = (taps - 1) * dilation, packed() if pack else None
    old = state(4 if pack else 1, branches, width, span, dtype) if carry else None
    mask = torch.arange(tokens) % 5 != 3 if masked else None
    given = [part.clone() for part in tensors]
    if masked:
        given[1][~mask], given[2][~mask] = math.nan, math.nan
    known = dict(dilation=dilation, cu=cu, conv_state=old, mask=mask, residual=residual, **options)
    exact, bound = exact_and_bound(tensors, dtype, **known)
    passed = dict(options, dilation=dilation, eps=EPS, conv_eps=CONV_EPS)
    passed |= dict(residual=False) if not residual else {}
    for name, value in (("cu_seqlens", cu), ("mask", mask), ("conv_state", old)):
        passed |= {} if value is None else {name: place.put(value)}
    out = Guarded(tensors[0].shape, dtype, place.device) if guarded else None
    passed |= dict(out=out.tensor) if guarded else {}

    def check(result):
        if carry:
            require(isinstance(result, tuple) and len(result) == 2, "the result must be a pair (out, new state)")
            result, new = result
            _check_state(new, old, tensors, cu, mask, place)
        require_like(result, tensors[0].shape, dtype, place.device)
        if guarded:
            require(result is out.tensor, "the result must be the tensor given as out")
            out.check()
        assert_within(result[: len(exact)], exact, bound)
        rest = tensors[0][len(exact) :] if residual else torch.zeros_like(tensors[0][len(exact) :])
        require_bits(result[len(exact) :], rest, place.device)

    return Call(place.put(tuple(given)), check, passed)


def _check_state(new, old, tensors, cu, mask, place: Place) -> None:
    """Values of each sequence's last tokens as they are, zeros where masked, after what is left of the old ones."""
    require(isinstance(new, tuple) and len(new) == 2, "the new state must be a pair (value, scale)")
    value = tensors[2] if mask is None else tensors[2].where(mask[:, None], 0)
    ends = [0, len(value)] if cu is None else cu.tolist()
    pairs = list(zip(ends, ends[1:], strict=False))
    span = old[0].shape[1]
    expected = torch.stack([torch.cat([old[0][at], value[a:b]])[-span:] for at, (a, b) in enumerate(pairs)])
    require_bits(new[0], expected, place.device)
    require_like(new[1], old[1].shape, torch.float32, place.device)
    for at, (a, b) in enumerate(pairs):
        kept = old[1][at, b - a :]
        require_bits(new[1][at, : len(kept)], kept, place.device)


def batch(place: Place) -> Call:
    """Rows of a batch ``[B, S]`` are sequences: no tap reaches the row before."""
    hidden, key, value, *rest = tensors = conv_inputs(8, 2, 32, 3)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32)
    exact, bound = exact_and_bound(tensors, FLOAT32, dilation=2, cu=cu)

    def check(result):
        require_like(result, (2, 4, 2, 32), FLOAT32, place.device)
        assert_within(result.reshape(8, 2, 32), exact, bound)

    shaped = hidden.view(2, 4, 2, 32), key.view(2, 4, 2, 32), value.view(2, 4, 32), *rest
    return Call(place.put(shaped), check, dict(dilation=2, eps=EPS, conv_eps=CONV_EPS))


def golden_demo(layer: int, place: Place) -> Call:
    """The demo's output, of inputs rounded to float32: off by a kernel's bound and by what the rounding changes."""
    data, (key, value) = demo_layer(layer), demo_kv(layer)
    weights = *(data[name] for name in ("query_norm", "key_norm", "conv_norm")), data["conv_weight"].view(4, 64, 4)
    tensors = [part.float() for part in (data["hidden"], key, value, *weights)]
    flat = [part.flatten(0, 1) for part in tensors[:3]] + tensors[3:]
    tokens = data["hidden"].shape[1]
    options = dict(dilation=3, zero_gate="sign", residual=False)
    cu = torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32)
    rounded, bound = exact_and_bound(flat, FLOAT32, cu=cu, eps=2.0**-23, conv_eps=1e-5, **options)
    exact = data["output"].flatten(0, 1).numpy()

    def check(result):
        require_like(result, tensors[0].shape, FLOAT32, place.device)
        assert_within(result.flatten(0, 1), exact, bound + np.abs(rounded - exact), spread=False)

    return Call(place.put(tuple(tensors)), check, dict(options, eps=None, conv_eps=1e-5))
