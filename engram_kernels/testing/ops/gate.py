"""gate_residual: within derived bounds of a float64 oracle; what a mask hides comes back bit for bit."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from ..guards import Guarded
from ..inputs import EPS, check_gate, gate_inputs
from .call import Call, Case, Place, require, require_like

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
#: Tokens, branches, width, dtype and that of the norms. Widths: no power of two, odd, one, and models' own.
SHAPES = (
    (0, 4, 64, FLOAT32, FLOAT32),
    (1, 4, 64, FLOAT32, FLOAT32),
    (7, 4, 80, BFLOAT16, FLOAT32),
    (5, 3, 300, FLOAT16, BFLOAT16),
    (3, 1, 1000, FLOAT32, FLOAT16),
    (9, 8, 48, BFLOAT16, BFLOAT16),
    (4, 5, 7, FLOAT32, FLOAT32),
    (4, 2, 1, FLOAT32, FLOAT32),
    (5, 4, 5120, BFLOAT16, BFLOAT16),
    (127, 4, 64, BFLOAT16, BFLOAT16),
)


def cases() -> Iterator[Case]:
    def case(name: str, make, *arguments, **options) -> Case:
        return Case("gate_residual", f"gate_residual/{name}", partial(make, *arguments, **options))

    for shape in SHAPES:
        tokens, branches, width, dtype, norms = shape
        kind = str(dtype).removeprefix("torch.")
        name = f"{kind}/tokens_{tokens}/branches_{branches}/width_{width}"
        yield case(name, plain, shape)
        yield case(f"{name}/sign", plain, shape, zero_gate="sign")
        yield case(f"{name}/addend", plain, shape, residual=False)
    some = (5, 2, 64, FLOAT32, FLOAT32)
    for dtype in (FLOAT32, BFLOAT16):
        kind = str(dtype).removeprefix("torch.")
        yield case(f"{kind}/views_of_kv", views, dtype)
        yield case(f"{kind}/mask", masked, dtype, True)
        yield case(f"{kind}/mask/addend", masked, dtype, False)
        yield case(f"{kind}/given_out", given_out, dtype)
        yield case(f"{kind}/in_place", in_place, dtype)
    yield case("batch", batch)
    yield case("clamp_9", plain, some, clamp=9.0)
    yield case("eps_none", eps_none)
    yield case("inputs_of_the_size_of_eps", scaled, 1e-3)
    for power in (-130, -60, 60):
        yield case(f"hidden_times_2_to_the_{'minus_' * (power < 0)}{abs(power)}", scaled_hidden, power)
    for zero_gate in ("copysign", "sign"):
        given = {} if zero_gate == "copysign" else dict(zero_gate=zero_gate)
        yield case(f"zero_product/{zero_gate}", zero_product, given)
        yield case(f"nan_and_infinity/{zero_gate}", nan_and_infinity, given)


def _checked(tensors, dtype: torch.dtype, place: Place, **options):
    def check(result):
        require_like(result, tensors[0].shape, dtype, place.device)
        check_gate(result, tensors, dtype, **options)

    return check


def _call(tensors, place: Place, **options) -> Call:
    """``options`` as they are passed; EPS for eps."""
    check = _checked(tensors, tensors[0].dtype, place, **options)
    return Call(place.put(tensors), check, dict(eps=EPS) | options)


def plain(shape: tuple, place: Place, **options) -> Call:
    """Keys that equal, oppose and ignore the hidden state among them."""
    return _call(gate_inputs(*shape), place, **options)


def batch(place: Place) -> Call:
    """Hidden states ``[B, S, H, D]``."""
    hidden, key, value, *norms = tensors = gate_inputs(6, 2, 32)
    flat = _checked(tensors, hidden.dtype, place)

    def check(result):
        require_like(result, (2, 3, 2, 32), hidden.dtype, place.device)
        flat(result.reshape(6, 2, 32))

    shaped = hidden.view(2, 3, 2, 32), key.view(2, 3, 2, 32), value.view(2, 3, 32), *norms
    return Call(place.put(shaped), check, dict(eps=EPS))


def views(dtype: torch.dtype, place: Place) -> Call:
    """Key and value as views of one kv whose rows start misaligned, hidden a slice of a wider stream."""
    hidden, key, value, *norms = tensors = gate_inputs(6, 4, 72, dtype)
    wide = torch.zeros(6, 5 * 72 + 3, dtype=dtype, device=place.device)
    wide[:, 3:] = place.put(torch.cat([key.flatten(1), value], 1))
    stream = torch.full((6, 9, 72), 7.0, dtype=dtype, device=place.device)
    stream[:, 2:6] = place.put(hidden)
    arguments = stream[:, 2:6], wide[:, 3:-72].unflatten(1, (4, 72)), wide[:, -72:]
    return Call((*arguments, *place.put(tuple(norms))), _checked(tensors, dtype, place), dict(eps=EPS))


def given_out(dtype: torch.dtype, place: Place) -> Call:
    """All of ``out`` is written, and nothing around it."""
    tensors = gate_inputs(7, 4, 80, dtype)
    guarded = Guarded(tensors[0].shape, dtype, place.device)

    def check(result):
        require(result is guarded.tensor, "the result must be the tensor given as out")
        _checked(tensors, dtype, place)(guarded.check())

    return Call(place.put(tensors), check, dict(eps=EPS, out=guarded.tensor))


def in_place(dtype: torch.dtype, place: Place) -> Call:
    """``out`` is hidden itself, a slice of a stream of which nothing else changes."""
    hidden, *rest = tensors = gate_inputs(6, 4, 72, dtype)
    stream = torch.full((6, 9, 72), 7.0, dtype=dtype, device=place.device)
    here = stream[:, 2:6]
    here.copy_(place.put(hidden))

    def check(result):
        require(result is here, "the result must be the tensor given as out")
        _checked(tensors, dtype, place)(here)
        require(bool(stream[:, :2].eq(7).all() and stream[:, 6:].eq(7).all()), "wrote outside the output")

    return Call((here, *place.put(tuple(rest))), check, dict(eps=EPS, out=here))


def masked(dtype: torch.dtype, residual: bool, place: Place) -> Call:
    """NaN in key and value of masked tokens does not spread; hidden, -0.0 and NaN in it, comes back bit for bit."""
    hidden, key, value, *norms = gate_inputs(7, 4, 48, dtype)
    mask = torch.tensor([True, False, True, True, False, True, False])
    hidden[1, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    spoiled = key.clone(), value.clone()
    for part in spoiled:
        part[~mask] = math.nan
    live = hidden[mask], key[mask], value[mask], *norms
    kept = hidden[~mask] if residual else torch.zeros_like(hidden[~mask])

    def check(result):
        require_like(result, hidden.shape, dtype, place.device)
        result = result.cpu()
        same = torch.equal(result[~mask].view(torch.uint8), kept.view(torch.uint8))
        require(same, f"masked tokens must come back as {'hidden, bit for bit' if residual else 'zeros'}")
        check_gate(result[mask], live, dtype, residual=residual)

    options = dict(eps=EPS, mask=place.put(mask)) | ({} if residual else dict(residual=False))
    return Call(place.put((hidden, *spoiled, *norms)), check, options)


def eps_none(place: Place) -> Call:
    """The machine epsilon of float32, of inputs whose mean square is about as large: a gate of 0.55 or of 0.6."""
    hidden, key, *rest = gate_inputs(5, 2, 64, FLOAT16)
    tensors = 3e-4 * hidden, 3e-4 * key, *rest
    check = _checked(tensors, FLOAT16, place, eps=2.0**-23)
    return Call(place.put(tensors), check, dict(eps=None))


def scaled(factor: float, place: Place) -> Call:
    """Hidden and key whose mean square is eps: where eps enters the norm decides the gate."""
    hidden, key, *rest = gate_inputs(5, 4, 96)
    return _call((factor * hidden, factor * key, *rest), place)


def scaled_hidden(power: int, place: Place) -> Call:
    """Subnormal, tiny and huge hidden states, on their addend, which hidden itself would hide."""
    hidden, *rest = gate_inputs(6, 2, 80)
    return _call((hidden * 2.0**power, *rest), place, residual=False)


def zero_product(given: dict, place: Place) -> Call:
    """d = 0 exactly, of -0.0 too: a gate of 1e-3 before the sigmoid with "copysign", of one half with "sign"."""
    hidden, key, value, *norms = gate_inputs(4, 2, 16)
    hidden, key = torch.zeros_like(hidden), torch.zeros_like(key)
    key[1] = -0.0
    return _call((hidden, key, value, *norms), place, **given)


def nan_and_infinity(given: dict, place: Place) -> Call:
    """NaN in d makes the gate NaN, in its own token and branch alone; an infinite hidden state or key does so too."""
    hidden, key, value, *norms = gate_inputs(6, 2, 24)
    hidden[1, 0, 3], key[2, 1, 5], hidden[3, 1, 0], key[4, 0, 1] = math.nan, math.nan, math.inf, -math.inf
    spoiled = torch.zeros(6, 2, dtype=torch.bool)
    spoiled[1, 0] = spoiled[2, 1] = spoiled[3, 1] = spoiled[4, 0] = True

    def check(result):
        require_like(result, hidden.shape, hidden.dtype, place.device)
        wrong = result.isnan().cpu() != spoiled[..., None]
        require(not wrong.any(), f"NaN at the wrong places, as at {wrong.nonzero()[:1].tolist()}")
        fine = [0, 5]
        parts = hidden[fine], key[fine], value[fine], *norms
        check_gate(result[fine], parts, hidden.dtype)

    return Call(place.put((hidden, key, value, *norms)), check, dict(eps=EPS) | given)
