"""Every documented constraint of gate_residual and gate_conv_residual: what is refused, in which words, what is not."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import engram_kernels
from engram_kernels import split_kv

META = "meta"
T, H, D, K, DILATION = 6, 2, 8, 3, 2
SPAN = (K - 1) * DILATION
OPS = ("gate_residual", "gate_conv_residual")


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape) * 100 + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def valid(op, tokens=(T,)):
    """Arguments of an op that are all right, so that a case changes one thing."""
    arguments = {"hidden": randn(*tokens, H, D), "key": randn(*tokens, H, D) + 1, "value": randn(*tokens, D)}
    arguments |= {"query_norm": randn(H, D), "key_norm": randn(H, D) + 1, "eps": 1e-6}
    if op == "gate_conv_residual":
        arguments |= {"conv_norm": randn(H, D), "conv_weight": randn(H, D, K), "dilation": DILATION, "conv_eps": 1e-5}
    return arguments


def call(op, tokens=(T,), **changes):
    return getattr(engram_kernels, op)(**(valid(op, tokens) | changes))


def ends(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def state_of(batch, dtype=torch.float32):
    return randn(batch, SPAN, D, dtype=dtype), randn(batch, SPAN, H)


def off(*shape, dtype=torch.float32):
    """Of ``shape``, every second element of a buffer: its last dimension is not dense."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


SHAPES = r"hidden must have shape \[T, H, D\] or \[B, S, H, D\], got"
LIMITS = "hidden must have 1 to [0-9]+ branches and a D of at most [0-9]+, got"
NUMBER = "must be a finite number of at least 0.*, got"
GATE_CASES = [
    (TypeError, "hidden must be a tensor of .*float32.*, got int64", {"hidden": randn(T, H, D).long()}),
    (TypeError, "hidden must be a tensor of .*, got float8_e4m3fn", {"hidden": randn(T, H, D).to(torch.float8_e4m3fn)}),
    (TypeError, "hidden must be a tensor of .*, got list", {"hidden": [0.0]}),
    (ValueError, rf"{SHAPES} \[6, 8\]", {"hidden": randn(T, D)}),
    (ValueError, rf"{SHAPES} \[1, 1, 6, 2, 8\]", {"hidden": randn(1, 1, T, H, D)}),
    (ValueError, rf"{LIMITS} \[6, 0, 8\]", {"hidden": randn(T, 0, D)}),
    (ValueError, rf"{LIMITS} \[6, 2, 0\]", {"hidden": randn(T, H, 0)}),
    (ValueError, rf"{LIMITS} \[1, 1000, 8\]", {"hidden": randn(1, 1000, D)}),
    (ValueError, rf"{LIMITS} \[1, 1, 1048576\]", {"hidden": torch.zeros(1, 1, 2**20)}),
    (ValueError, "the last dimension of hidden must be dense, got strides", {"hidden": off(T, H, D)}),
    *(
        case
        for name, shape in (("key", (T, H, D)), ("value", (T, D)))
        for case in (
            (TypeError, f"{name} must be a tensor of float32, got float16", {name: randn(*shape).half()}),
            (TypeError, f"{name} must be a tensor of float32, got NoneType", {name: None}),
            (ValueError, rf"{name} must have shape \[6, .*8\], got \[5, .*8\]", {name: randn(5, *shape[1:])}),
            (ValueError, f"{name} must have shape", {name: randn(*shape[:-1], D + 1)}),
            (ValueError, f"{name} must be on cpu, got meta", {name: randn(*shape).to(META)}),
            (ValueError, f"the last dimension of {name} must be dense, got strides", {name: off(*shape)}),
        )
    ),
    (ValueError, r"value must have shape \[6, 8\], got \[6, 2, 8\]", {"value": randn(T, H, D)}),
    *(
        case
        for name in ("query_norm", "key_norm")
        for case in (
            (TypeError, f"{name} must be a tensor of .*, got int64", {name: torch.ones(H, D).long()}),
            (ValueError, rf"{name} must have shape \[2, 8\], got \[8\]", {name: randn(D)}),
            (ValueError, rf"{name} must have shape \[2, 8\], got \[1, 8\]", {name: randn(1, D)}),
            (ValueError, f"{name} must be on cpu, got meta", {name: randn(H, D).to(META)}),
            (ValueError, f"{name} must be contiguous, got strides", {name: randn(D, H).T}),
        )
    ),
    (TypeError, "mask must be a tensor of bool, got float32", {"mask": torch.ones(T)}),
    (ValueError, r"mask must have shape \[6\], got \[6, 2\]", {"mask": torch.ones(T, H).bool()}),
    (ValueError, "mask must be on cpu, got meta", {"mask": torch.ones(T, device=META).bool()}),
    (ValueError, "mask must be contiguous", {"mask": torch.ones(2 * T).bool()[::2]}),
    *(
        (ValueError, f"{name} {NUMBER} {bad}", {name: bad})
        for name in ("eps", "clamp")
        for bad in (-1e-6, math.nan, math.inf, -math.inf)
    ),
    (ValueError, f"clamp {NUMBER} None", {"clamp": None}),
    *(
        (TypeError, rf"{name} must be a finite number.*, got float32 \[\] on cpu", {name: torch.tensor(0.5)})
        for name in ("eps", "clamp")
    ),
    (ValueError, "zero_gate must be one of 'copysign', 'sign', got 'sgn'", {"zero_gate": "sgn"}),
    (ValueError, "zero_gate must be one of 'copysign', 'sign', got None", {"zero_gate": None}),
    (TypeError, "out must be a tensor of float32, got bfloat16", {"out": randn(T, H, D).bfloat16()}),
    (TypeError, "out must be a tensor of float32, got list", {"out": [1.0]}),
    (ValueError, r"out must have shape \[6, 2, 8\], got \[5, 2, 8\]", {"out": randn(5, H, D)}),
    (ValueError, "out must be on cpu, got meta", {"out": randn(T, H, D).to(META)}),
    (ValueError, "out must be contiguous, got strides", {"out": randn(T, H, D + 1)[..., :D]}),
]  # fmt: skip

MANY = torch.empty(2**31, 1, 1, device=META)
B3 = ends(0, 2, 2, 5)
CU = "cu_seqlens must"
TAPS = r"conv_weight must have shape \[H, D, K\] = \[2, 8, K >= 1\], got"
DILATIONS = "dilation must be a positive int.*, got"
CONV_CASES = [
    (TypeError, "conv_norm must be a tensor of .*, got int64", {"conv_norm": torch.ones(H, D).long()}),
    (ValueError, r"conv_norm must have shape \[2, 8\], got \[16\]", {"conv_norm": randn(H * D)}),
    (ValueError, "conv_norm must be on cpu, got meta", {"conv_norm": randn(H, D).to(META)}),
    (ValueError, "conv_norm must be contiguous", {"conv_norm": randn(D, H).T}),
    (TypeError, "conv_weight must be a tensor of .*, got int64", {"conv_weight": torch.ones(H, D, K).long()}),
    (ValueError, "conv_weight must be on cpu, got meta", {"conv_weight": randn(H, D, K).to(META)}),
    *(
        (ValueError, rf"{TAPS} \[{', '.join(map(str, shape))}\]", {"conv_weight": randn(*shape)})
        for shape in ((H, D), (D, H, K), (H * D, 1, K), (H, D, 0), (H, D, K, 1))
    ),
    *((ValueError, f"{DILATIONS} {bad!r}", {"dilation": bad}) for bad in (0, -2, True, 1.5, None)),
    *((ValueError, f"conv_eps {NUMBER} {bad}", {"conv_eps": bad}) for bad in (-1e-6, math.nan, math.inf)),
    (TypeError, f"{CU} be a tensor of int32, got int64", {"cu_seqlens": ends(0, 6, dtype=torch.int64)}),
    (ValueError, f"{CU} be on cpu, got meta", {"cu_seqlens": ends(0, 6).to(META)}),
    (ValueError, f"{CU} be contiguous", {"cu_seqlens": ends(0, 9, 6)[::2]}),
    (ValueError, rf"{CU} have shape \[B \+ 1\] with B >= 1, got \[1\]", {"cu_seqlens": ends(0)}),
    (ValueError, rf"{CU} rise from 0 to at most T = 6, got \[1, 6\]", {"cu_seqlens": ends(1, 6)}),
    (ValueError, rf"{CU} rise from 0 to at most T = 6, got \[0, 4, 3\]", {"cu_seqlens": ends(0, 4, 3)}),
    (ValueError, rf"{CU} rise from 0 to at most T = 6, got \[0, 7\]", {"cu_seqlens": ends(0, 7)}),
    (ValueError, r"cu_seqlens is for packed tokens \[T\]; with \[2, 3\]", {"cu_seqlens": ends(0, 6), "tokens": (2, 3)}),
    (ValueError, r"hidden must have below 2\^31 tokens, got \[2147483648, 1, 1\]",
     {"hidden": MANY, "key": MANY, "value": MANY[:, 0], "query_norm": MANY[0], "key_norm": MANY[0]}),
]  # fmt: skip

PAIR = r"conv_state must be a pair \(value, scale\), got"
VALUES, SCALES = state_of(1)
# error, words, the state, what else is given
STATE_CASES = [
    (TypeError, f"{PAIR} Tensor", VALUES, {}),
    (TypeError, f"{PAIR} tuple", (VALUES,), {}),
    (TypeError, f"{PAIR} list", [VALUES, SCALES], {}),
    (ValueError, r"conv_state\[0\] must have shape \[1, 4, 8\], got \[2, 4, 8\]", state_of(2), {}),
    (ValueError, r"conv_state\[0\] must have shape \[3, 4, 8\], got \[1, 4, 8\]", state_of(1), {"cu_seqlens": B3}),
    (ValueError, r"conv_state\[0\] must have shape \[2, 4, 8\], got \[1, 4, 8\]", state_of(1), {"tokens": (2, 3)}),
    (ValueError, r"conv_state\[0\] must have shape \[1, 2, 8\], got \[1, 4, 8\]", state_of(1), {"dilation": 1}),
    (ValueError, r"conv_state\[1\] must have shape \[1, 4, 2\], got \[1, 4, 8\]", (VALUES, VALUES), {}),
    (TypeError, r"conv_state\[0\] must be a tensor of float32, got bfloat16", state_of(1, torch.bfloat16), {}),
    (TypeError, r"conv_state\[1\] must be a tensor of float32, got bfloat16", (VALUES, SCALES.bfloat16()), {}),
    (TypeError, r"conv_state\[1\] must be a tensor of float32, got NoneType", (VALUES, None), {}),
    (ValueError, r"conv_state\[0\] must be on cpu, got meta", (VALUES.to(META), SCALES), {}),
    (ValueError, r"conv_state\[1\] must be contiguous", (VALUES, off(1, SPAN, H)), {}),
]


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_that_cases_start_from_are_valid(op):
    for tokens in ((T,), (2, 3)):
        assert call(op, tokens).shape == (*tokens, H, D)
    if op == "gate_conv_residual":
        call(op, cu_seqlens=B3, conv_state=state_of(3))
        call(op, (2, 3), conv_state=state_of(2))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("error, words, changes", GATE_CASES)
def test_gates(op, error, words, changes):
    with pytest.raises(error, match=f"^{op}: {words}"):
        call(op, **changes)


@pytest.mark.parametrize("error, words, changes", CONV_CASES)
def test_convolution(error, words, changes):
    with pytest.raises(error, match=f"^gate_conv_residual: {words}"):
        call("gate_conv_residual", **changes)


@pytest.mark.parametrize("error, words, state, changes", STATE_CASES)
def test_state_of_the_convolution(error, words, state, changes):
    with pytest.raises(error, match=f"^gate_conv_residual: {words}"):
        call("gate_conv_residual", conv_state=state, **changes)


@pytest.mark.parametrize("op", OPS)
def test_float64_on_a_gpu(op):
    """Refused by its type alone, before anything is launched: a fake tensor says where it would be."""
    with FakeTensorMode():
        given = {
            name: torch.empty(x.shape, dtype=torch.float64, device="cuda") if isinstance(x, torch.Tensor) else x
            for name, x in valid(op).items()
        }
        words = "hidden must be bfloat16, float16 or float32 on a GPU, float64 is for the CPU; got float64 on cuda:0"
        with pytest.raises(TypeError, match=f"^{op}: {words}"):
            getattr(engram_kernels, op)(**given)


@pytest.mark.parametrize("op", OPS)
def test_arguments_of_tokens_in_rows(op):
    """``[B, S]`` tokens: value and mask follow."""
    call(op, (2, 3), mask=torch.ones(2, 3).bool())
    for name, wrong, words in (
        ("mask", torch.ones(6).bool(), r"\[2, 3\], got \[6\]"),
        ("value", randn(6, D), r"\[2, 3, 8\], got \[6, 8\]"),
        ("key", randn(6, H, D), r"\[2, 3, 2, 8\], got \[6, 2, 8\]"),
        ("out", randn(6, H, D), r"\[2, 3, 2, 8\], got \[6, 2, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"^{op}: {name} must have shape {words}"):
            call(op, (2, 3), **{name: wrong})


@pytest.mark.parametrize("op", OPS)
def test_limits_are_inclusive(op):
    for eps in (0.0, 0, None, 1e30):
        call(op, eps=eps)
    call(op, clamp=0)
    call(op, zero_gate="sign")
    if op == "gate_conv_residual":
        call(op, conv_eps=None)
        call(op, conv_eps=0)
        one = call(op, conv_weight=randn(H, D, 1), conv_state=(randn(1, 0, D), randn(1, 0, H)))
        assert torch.equal(one[0], call(op, conv_weight=randn(H, D, 1)))
        assert [part.shape for part in one[1]] == [(1, 0, D), (1, 0, H)]


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (0,)])
def test_split_kv(tokens):
    """Views of kv's memory, in its order: keys of all branches, then the value; of any strides."""
    for kv in (torch.randn(*tokens, (H + 1) * D), torch.randn(*tokens, (H + 1) * D, 2)[..., 0]):
        key, value = split_kv(kv, H, D)
        assert key.shape == (*tokens, H, D) and value.shape == (*tokens, D)
        assert torch.equal(torch.cat([key.flatten(-2), value], -1), kv)
        assert key.data_ptr() == kv.data_ptr() and value.stride() == kv.stride()
    for wrong in (torch.randn(3, H * D), torch.randn(())):
        with pytest.raises(ValueError, match=rf"^split_kv: kv must have shape .* ends with {(H + 1) * D}, got \["):
            split_kv(wrong, H, D)


@pytest.mark.parametrize("op", OPS)
def test_views_and_mixed_weights_are_taken(op):
    """key and value as views of one projection, hidden as a slice, norm weights of any float type."""
    plain = valid(op)
    kv = torch.cat([plain["key"].flatten(1), plain["value"]], dim=1)
    sliced = torch.cat([plain["hidden"], randn(T, 1, D)], dim=1)[:, :H]
    changes = dict(zip(("key", "value"), split_kv(kv, H, D), strict=True), hidden=sliced)
    assert not changes["value"].is_contiguous() and not sliced.is_contiguous()
    assert torch.equal(call(op, **changes), call(op))
    norms = [name for name in plain if name.endswith("norm") or name == "conv_weight"]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        weights = {name: plain[name].to(dtype) for name in norms}
        assert call(op, **weights).dtype == torch.float32
    if op == "gate_conv_residual":
        turned = plain["conv_weight"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torch.equal(call(op, conv_weight=turned), call(op))


@pytest.mark.parametrize("op", OPS)
def test_out_is_returned_and_may_be_hidden(op):
    expected = call(op)
    out = torch.full((T, H, D), math.nan)
    assert call(op, out=out) is out and torch.equal(out, expected)
    hidden = torch.cat([valid(op)["hidden"], randn(T, 1, D)], dim=1)[:, :H]  # even where it is not contiguous
    assert call(op, hidden=hidden, out=hidden) is hidden and torch.equal(hidden, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [(0,), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_tokens(op, tokens, dtype):
    empty = {name: torch.empty(*tokens, *rest, dtype=dtype) for name, rest in
             (("hidden", (H, D)), ("key", (H, D)), ("value", (D,)), ("out", (H, D)))}  # fmt: skip
    for changes in ({}, {"mask": torch.empty(tokens, dtype=torch.bool)}, {"residual": False}):
        result = call(op, **(empty | changes))
        assert result.shape == (*tokens, H, D) and result.dtype == dtype
    if op == "gate_conv_residual":
        batch = tokens[0] if len(tokens) == 2 else 1
        state = (randn(batch, SPAN, D, dtype=dtype), randn(batch, SPAN, H))
        result, after = call(op, **empty, conv_state=state)
        assert result.shape == (*tokens, H, D)
        for old, new in zip(state, after, strict=True):
            assert torch.equal(old, new) and new is not old and (not batch or new.data_ptr() != old.data_ptr())


def test_empty_sequences():
    op, state = "gate_conv_residual", state_of(4)
    kept = [part.clone() for part in state]
    result, after = call(op, cu_seqlens=ends(0, 0, 6, 6, 6), conv_state=state)
    alone, advanced = call(op, conv_state=tuple(part[1:2] for part in state))
    assert torch.equal(result, alone)
    for old, new, one, before in zip(state, after, advanced, kept, strict=True):
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]]) and torch.equal(new[1:2], one)
        assert torch.equal(old, before)  # the input state is never written
    arguments = valid(op)
    padding = call(op, cu_seqlens=ends(0, 0))
    assert torch.equal(padding, arguments["hidden"])
    none = {name: arguments[name][:0] for name in ("hidden", "key", "value")}
    assert call(op, **none, cu_seqlens=ends(0, 0, 0)).shape == (0, H, D)
