"""ngram_hash: row ids against golden data of published models and a scalar oracle, all equal."""

from collections.abc import Iterator
from functools import partial

import torch

from engram_kernels import HashPlan
from engram_kernels.geometry.config import EngramConfig

from ..golden import demo_layer, demo_plan, golden, qwen_wrapping_plan, v41_plan
from ..guards import Guarded
from ..inputs import oracle, ragged, small_plan
from .call import Call, Case, Place, require, require_bits, require_like

DIALECTS = ("map", "raw", "eos")
#: The least, some with a remainder of every kind, and one as large as those of DeepSeek-V4.1's layers.
PRIMES = (2, 3, 5, 2**31 - 1, 16_000_057, 1_999_999_973)


def cases() -> Iterator[Case]:
    def case(name: str, make, *arguments) -> Case:
        return Case("ngram_hash", f"ngram_hash/{name}", partial(make, *arguments))

    yield case("golden/deepseek_v41", golden_v41)
    yield case("golden/deepseek_v41/one_sequence", golden_v41_inside)
    yield case("golden/qwen", golden_qwen, False)
    yield case("golden/qwen/wrapping_products", golden_qwen, True)
    for layer in (1, 15):
        yield case(f"golden/demo/layer_{layer}", golden_demo, layer)
    for dialect in DIALECTS:
        for kind in ("plain", "wrapping"):
            options = dict(dialect=dialect, wrapping=kind == "wrapping")
            yield case(f"{dialect}/{kind}", small, options, 19, torch.int64)
            yield case(f"{dialect}/{kind}/int32_ids", small, options, 19, torch.int32)
            yield case(f"{dialect}/{kind}/sequences", sequences, options, False)
            yield case(f"{dialect}/{kind}/invalid_ids", sequences, options, True)
            yield case(f"{dialect}/{kind}/invalid_ids/one_sequence", invalid, options)
            yield case(f"{dialect}/{kind}/batch", batch, options, False)
        yield case(f"{dialect}/batch/history", batch, dict(dialect=dialect), True)
        yield case(f"{dialect}/all_dead", all_dead, dialect)
    for longest, heads, layers in ((2, 1, 1), (4, 3, 3), (5, 3, 2)):
        options = dict(max_ngram=longest, heads=heads, layers=layers)
        for tokens in (0, 1, 3, 17, 127):
            yield case(f"ngram_{longest}/heads_{heads}/tokens_{tokens}", small, options, tokens, torch.int64)
    for prime in PRIMES:
        yield case(f"huge_ids/prime_{prime}", huge_ids, prime)
    yield case("rows_beyond_int32", beyond_int32)
    yield case("padding_alone", padding)
    yield case("slots", by_slot)
    yield case("given_out", given_out)


def _equal(expected: torch.Tensor, place: Place):
    return lambda result: require_bits(result, expected, place.device)


def some_ids(tokens: int, vocab: int = 40) -> torch.Tensor:
    return torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens + vocab))


def golden_v41(place: Place) -> Call:
    """Five packed sequences of real text with history, an empty one and dead tokens."""
    data = golden("deepseek_v41_hash")
    options = dict(cu_seqlens=data["cu_seqlens"].int(), history=data["history"], dead=data["dead"])
    options = {name: place.put(value) for name, value in options.items()}
    arguments = place.put(data["token_ids"]), v41_plan().to(place.device)
    return Call(arguments, _equal(data["row_ids"].int(), place), options)


def golden_v41_inside(place: Place) -> Call:
    """The longest of these sequences as a lone one: tokens whose windows lie within it and hold no dead token."""
    data = golden("deepseek_v41_hash")
    cu, longest = data["cu_seqlens"].long(), v41_plan().max_ngram
    at = int(cu.diff().argmax())
    here = slice(int(cu[at]), int(cu[at + 1]))
    ids, expected = data["token_ids"][here], data["row_ids"][here].int()
    whole = ~data["dead"][here].unfold(0, longest, 1).any(1)
    whole = torch.cat([torch.zeros(longest - 1, dtype=torch.bool), whole])

    def check(result):
        require_like(result, expected.shape, expected.dtype, place.device)
        require_bits(result.cpu()[whole], expected[whole], torch.device("cpu"))

    return Call((place.put(ids), v41_plan().to(place.device)), check)


def golden_qwen(wrapping: bool, place: Place) -> Call:
    """The dialect in which an EOS blocks what is older, without a token map."""
    data = golden("qwen_ple_hash")
    plan = qwen_wrapping_plan() if wrapping else HashPlan.build(EngramConfig.qwen38_flash_next())
    expected = data["overflow_row_ids" if wrapping else "row_ids"][:, None].to(plan.index_dtype)
    return Call((place.put(data["token_ids"]), plan.to(place.device)), _equal(expected, place))


def golden_demo(layer: int, place: Place) -> Call:
    """A batch of two sequences."""
    data, plan = demo_layer(layer), demo_plan(layer)
    expected = (data["hash_without_offsets"] + data["offsets"])[:, :, None].to(plan.index_dtype)
    return Call((place.put(data["token_ids"]), plan.to(place.device)), _equal(expected, place))


def small(options: dict, tokens: int, dtype: torch.dtype, place: Place) -> Call:
    """One sequence; with an EOS id now and then."""
    plan, ids = small_plan(**options), some_ids(tokens)
    ids[2::5] = 7
    return Call((place.put(ids.to(dtype)), plan.to(place.device)), _equal(oracle(ids, plan), place))


def sequences(options: dict, invalid_ids: bool, place: Place) -> Call:
    """Packed sequences, one of them empty, with history, dead tokens and padding."""
    plan, (ids, cu, history, dead) = small_plan(**options), ragged(invalid=invalid_ids)
    expected = oracle(ids, plan, cu, history, dead)
    given = dict(cu_seqlens=place.put(cu), history=place.put(history), dead=place.put(dead))
    return Call((place.put(ids), plan.to(place.device)), _equal(expected, place), given, invalid_ids)


def invalid(options: dict, place: Place) -> Call:
    """-1, one past the vocabulary and far beyond it: the columns that read them get -1, and no others."""
    plan, ids = small_plan(**options), some_ids(24)
    ids[3], ids[9], ids[15] = -1, 40, 2**40
    return Call((place.put(ids), plan.to(place.device)), _equal(oracle(ids, plan), place), invalid=True)


def batch(options: dict, with_history: bool, place: Place) -> Call:
    """Rows of a batch are sequences."""
    plan, ids, history = small_plan(**options), some_ids(15).view(3, 5), some_ids(6).view(3, 2)
    history[1, 0] = -1
    past = [history[row : row + 1] if with_history else None for row in range(3)]
    expected = torch.stack([oracle(ids[row], plan, None, past[row]) for row in range(3)])
    given = dict(history=place.put(history)) if with_history else {}
    return Call((place.put(ids), plan.to(place.device)), _equal(expected, place), given)


def all_dead(dialect: str, place: Place) -> Call:
    plan, ids, dead = small_plan(dialect=dialect), some_ids(7), torch.ones(7, dtype=torch.bool)
    expected = oracle(ids, plan, None, None, dead)
    return Call((place.put(ids), plan.to(place.device)), _equal(expected, place), dict(dead=place.put(dead)))


def huge_ids(prime: int, place: Place) -> Call:
    """Mixes 0, 1, multiples of the prime, their neighbours, and the last below 2^63 - 1.

    A batch of sequences of one id: with multipliers of one and pad 0 the mix is the id.
    """
    plan = HashPlan.from_parts(torch.tensor([[1, 1]]), torch.tensor([[prime]]), pad=0, vocab_size=2**63 - 1)
    near = [k * prime + step for k in (0, 1, 2**20, (2**63 - 1) // prime) for step in (-1, 0, 1)]
    mixes = [mix for mix in [*near, 2**62, 2**63 - 2] if 0 <= mix < 2**63 - 1]
    expected = torch.tensor([mix % prime for mix in mixes], dtype=plan.index_dtype).view(-1, 1, 1, 1)
    return Call((place.put(torch.tensor(mixes)[:, None]), plan.to(place.device)), _equal(expected, place))


def beyond_int32(place: Place) -> Call:
    """A layer of 2^31 rows or more has int64 row ids."""
    plan = HashPlan.from_parts(torch.tensor([[3, 2**40 + 1]]), torch.tensor([[2**32 + 15]]), pad=0, vocab_size=1000)
    ids = some_ids(9, 1000)
    return Call((place.put(ids), plan.to(place.device)), _equal(oracle(ids, plan), place))


def padding(place: Place) -> Call:
    """Two sequences, both empty: every token is padding, and gets -1 whatever it is."""
    plan, ids, cu = small_plan(), some_ids(5), torch.zeros(3, dtype=torch.int32)
    given = dict(cu_seqlens=place.put(cu))
    expected = torch.full((5, *plan.primes.shape), -1, dtype=plan.index_dtype)
    return Call((place.put(ids), plan.to(place.device)), _equal(expected, place), given)


def by_slot(place: Place) -> Call:
    """History kept by slot, read at each sequence's own; -1 is none."""
    plan, (ids, cu, *_) = small_plan(), ragged()
    slots = torch.tensor([6, 0, 3, -1, 5], dtype=torch.int32)
    kept = some_ids(16).view(8, 2)
    past = kept[slots.clamp(min=0).long()].masked_fill((slots < 0)[:, None], -1)
    given = dict(cu_seqlens=place.put(cu), history=place.put(kept), slots=place.put(slots))
    return Call((place.put(ids), plan.to(place.device)), _equal(oracle(ids, plan, cu, past), place), given)


def given_out(place: Place) -> Call:
    """All of ``out`` is written, and nothing around it."""
    plan, ids = small_plan(), some_ids(19)
    guarded = Guarded((19, *plan.primes.shape), plan.index_dtype, place.device)

    def check(result):
        require(result is guarded.tensor, "the result must be the tensor given as out")
        require_bits(guarded.check(), oracle(ids, plan), place.device)

    return Call((place.put(ids), plan.to(place.device)), check, dict(out=guarded.tensor))
