"""Adversarial inputs of the ops, and what their results must be: shared by the cases and by this project's own tests.

Everything is made on the CPU from fixed seeds. Expected values come from the oracles, bounds from tolerances.py.
"""

import numpy as np
import torch

from engram_kernels import HashPlan

from . import oracles, tolerances

EPS, CONV_EPS = 1e-6, 1e-5
WRAPPING = [2**61 + 5, 2**60 + 7, 2**62 + 9]  # multipliers whose products leave int64

# Widths: no power of two, more than one chunk, odd numbers of scale groups, one scale word of each size.
ROW_CASES = [
    ("float32", 4),
    ("float32", 1024),
    ("bfloat16", 80),
    ("bfloat16", 1024),
    ("float16", 160),
    ("e4m3", 16),
    ("e4m3", 160),
    ("e4m3", 1024),
    ("e4m3_ue8m0", 32),
    ("e4m3_ue8m0", 64),
    ("e4m3_ue8m0", 128),
    ("e4m3_ue8m0", 160),
    ("e4m3_ue8m0", 256),
    ("e4m3_ue8m0", 288),
    ("e4m3_ue8m0", 1024),
    ("mxfp4", 32),
    ("mxfp4", 160),
    ("mxfp4", 256),
    ("nvfp4", 32),
    ("nvfp4", 160),
    ("nvfp4", 256),
    ("nvfp4", 1024),
]
ROWS = 23


def ids_around(rows, shape=(5, 7), dtype=torch.int64):
    """Ids within the table, on both edges, just outside, and far outside."""
    ids = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(rows), dtype=dtype)
    far = 2**40 if dtype == torch.int64 else 2**31 - 1
    ids.view(-1)[:8] = torch.tensor([-1, 0, rows - 1, rows, -2, far, -far, 1], dtype=dtype)
    return ids


def small_plan(layers=2, max_ngram=3, heads=2, vocab=40, dialect="map", wrapping=False):
    """A plan of odd primes that fit no tile, with or without a token map, in either dialect."""
    generator = torch.Generator().manual_seed(layers * 100 + max_ngram)
    primes = torch.tensor([101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157][: (max_ngram - 1) * heads])
    primes = primes + 100 * torch.arange(layers)[:, None]  # layers differ, as models' do; any divisor will do
    multipliers = torch.randint(1, 2**40, (layers, max_ngram), generator=generator) * 2 + 1
    if wrapping:
        multipliers = torch.tensor(WRAPPING[:max_ngram]).expand(layers, -1)
    options = dict(pad=7, vocab_size=vocab)
    if dialect == "map":
        options = dict(pad=3, token_map=torch.randint(0, vocab // 2, (vocab,), generator=generator))
    elif dialect == "eos":
        options = dict(pad=7, eos=7, vocab_size=vocab)
    return HashPlan.from_parts(multipliers, primes, **options)


def oracle(ids, plan, cu=None, history=None, dead=None):
    """Row ids ``[T, L, C]`` of ids ``[T]`` by the scalar oracle."""
    rows = oracles.hash_rows(
        ids.tolist(),
        plan.multipliers.tolist(),
        plan.primes.tolist(),
        pad=plan.pad,
        token_map=None if plan.token_map is None else plan.token_map.tolist(),
        eos=plan.eos,
        vocab=plan.vocab_size,
        cu=None if cu is None else cu.tolist(),
        history=None if history is None else history.tolist(),
        dead=None if dead is None else dead.tolist(),
    )
    return torch.tensor(rows, dtype=plan.index_dtype).view(len(ids), *plan.primes.shape)


def ragged(vocab=40, invalid=False):
    """19 tokens: sequences of 1, 0, 9, 2 and 3, four of padding; history, dead tokens, and EOS 7 here and there."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocab, (19,), generator=generator)
    ids[[2, 5, 10]] = 7
    cu = torch.tensor([0, 1, 1, 10, 12, 15], dtype=torch.int32)
    history = torch.randint(-1, vocab, (5, 2), generator=generator)
    history[0], history[3] = torch.tensor([4, 7]), torch.tensor([-1, 9])
    dead = torch.zeros(19, dtype=torch.bool)
    dead[[4, 11]] = True
    if invalid:
        # Read at once, one place back, and by 3-grams alone two places back.
        ids[3], ids[6], ids[9], ids[13], history[3, 1] = -1, -1, vocab, 2**30, -5
        ids[4] = -77  # dead: may hold anything
    return ids, cu, history, dead


def gate_inputs(tokens, branches, width, dtype=torch.float32, norm_dtype=torch.float32, seed=0):
    """hidden, key, value, query_norm, key_norm on the CPU; the first keys oppose, repeat or ignore the hidden state."""
    generator = torch.Generator().manual_seed(seed + tokens * 100 + branches * 10 + width)
    hidden, key = torch.randn(2, tokens, branches, width, generator=generator)
    query_norm, key_norm = torch.rand(2, branches, width, generator=generator) + 0.5
    if tokens > 3:
        key[0], key[1], key[2] = hidden[0], -3 * hidden[1], 0  # saturation on both sides, and d = 0
    value = torch.randn(tokens, width, generator=generator)
    return *(x.to(dtype) for x in (hidden, key, value)), *(x.to(norm_dtype) for x in (query_norm, key_norm))


def doubles(tensors):
    return [x.double().cpu().numpy() for x in tensors]


def check_gate(result, tensors, dtype, *, zero_gate="copysign", clamp=1e-6, residual=True, eps=EPS):
    """Within the derived bound of the float64 oracle."""
    hidden, key, value, query_norm, key_norm = doubles(tensors)
    d, magnitude = oracles.gate_parts(hidden, key, query_norm, key_norm, eps)
    exact = oracles.gate_of(d, clamp, zero_gate)[..., None] * value[:, None]
    base = hidden if residual else np.zeros_like(hidden)
    error = tolerances.gate_bound(d, magnitude, hidden.shape[-1], clamp, zero_gate)
    tolerances.assert_within(result, base + exact, tolerances.gated_bound(base + exact, base, value, error, dtype))


def conv_inputs(tokens, branches, width, taps, dtype=torch.float32, norm_dtype=torch.float32):
    tensors = gate_inputs(tokens, branches, width, dtype, norm_dtype)
    generator = torch.Generator().manual_seed(tokens + width)
    conv_norm = torch.rand(branches, width, generator=generator) + 0.5
    weight = torch.randn(branches, width, taps, generator=generator)
    return *tensors, conv_norm.to(norm_dtype), weight.to(norm_dtype)


def state(batch, branches, width, span, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + width)
    value = torch.randn(batch, span, width, generator=generator).to(dtype)
    scale = torch.rand(batch, span, branches, generator=generator)
    return value, scale.double() if dtype == torch.float64 else scale


def starts_of(tokens, cu):
    if cu is None:
        return [0] * tokens
    ends = cu.tolist()
    return [
        max(start for start in ends[:-1] if start <= t and t < ends[-1]) if t < ends[-1] else None
        for t in range(tokens)
    ]


def owners(tokens, cu):
    """Sequence of each token that has one."""
    ends = [0, tokens] if cu is None else cu.tolist()
    return [next(b for b in range(len(ends) - 1) if ends[b] <= t < ends[b + 1]) for t in range(min(tokens, ends[-1]))]


def exact_and_bound(
    tensors,
    dtype,
    *,
    dilation,
    cu=None,
    conv_state=None,
    mask=None,
    residual=True,
    eps=EPS,
    conv_eps=CONV_EPS,
    clamp=1e-6,
    zero_gate="copysign",
):
    """float64 oracle of the tokens that are no padding, and the bound on a kernel's error there."""
    hidden, key, value, query_norm, key_norm, conv_norm, weight = doubles(tensors)
    live = len(hidden) if cu is None else int(cu[-1])
    hidden, key, value = hidden[:live], key[:live], value[:live]
    on = np.ones(live, bool) if mask is None else mask.numpy()[:live]
    key, value = np.where(on[:, None, None], key, 1.0), np.where(on[:, None], value, 0.0)
    d, magnitude = oracles.gate_parts(hidden, key, query_norm, key_norm, eps)
    gate = oracles.gate_of(d, clamp, zero_gate)
    base = hidden if residual else np.zeros_like(hidden)
    past = None if conv_state is None else [part.double().numpy()[owners(len(tensors[0]), cu)] for part in conv_state]
    options = dict(dilation=dilation, conv_eps=conv_eps, starts=starts_of(live, cu), state=past, magnitude=True)
    exact, size = oracles.gate_conv(base, gate, value, conv_norm, weight, **options)
    error = tolerances.gate_bound(d, magnitude, hidden.shape[-1], clamp, zero_gate)
    bound = tolerances.conv_bound(exact, base, value, gate, error, size, hidden.shape[-1], weight.shape[-1], dtype)
    return exact, bound


def packed():
    """Twelve tokens: sequences of 5, 0, 1 and 4, then two of padding."""
    return torch.tensor([0, 5, 5, 6, 10], dtype=torch.int32)
