"""HashPlan: golden layouts of published models, constants by second formulations, selections, and every refusal."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels import EngramConfig, HashPlan, ngram_hash
from engram_kernels.testing.golden import golden

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "deepseek_v41_layout.json").read_text())
QWEN = {name: part.numpy() for name, part in golden("qwen_ple_hash").items()}
TENSORS = ("multipliers", "primes", "offsets", "reciprocals", "orders", "token_map")


def small_config(**changes):
    fields = {"layers": (0, 3), "max_ngram": 3, "heads": 2, "row_width": 16, "table_sizes": (10, 12)}
    fields |= {"hidden_size": 32, "branches": 2, "raw_vocab_size": 50, "vocab_size": 20, "pad_id": 4}
    return EngramConfig(**(fields | changes))


def small_map(raw=50, distinct=20):
    return torch.arange(raw) % distinct


def small_plan(multipliers=((3, 5, 7), (9, 11, 13)), primes=((11, 13, 17, 19), (23, 29, 31, 37)), **options):
    options = {"pad": 0, "vocab_size": 50} | options
    return HashPlan.from_parts(torch.as_tensor(multipliers), torch.as_tensor(primes), **options)


def assert_same(plan, other):
    for name in TENSORS:
        ours, theirs = getattr(plan, name), getattr(other, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    for name in ("pad", "eos", "vocab_size", "rows_per_layer", "non_negative"):
        assert getattr(plan, name) == getattr(other, name), name


def test_golden_layout_of_deepseek_v41(v41_plan, v41_token_map):
    assert v41_plan.multipliers.tolist() == GOLDEN["multipliers"]
    primes = [sum(layer, []) for layer in GOLDEN["primes"]]
    assert v41_plan.primes.tolist() == primes
    assert list(v41_plan.rows_per_layer) == GOLDEN["rows_per_layer"]
    for layer, offsets in zip(primes, v41_plan.offsets.tolist(), strict=True):
        assert offsets == [sum(layer[:column]) for column in range(24)]
    assert v41_plan.orders.tolist() == [2] * 8 + [3] * 8 + [4] * 8
    assert (v41_plan.pad, v41_plan.eos) == (GOLDEN["compressed_pad_id"], None)
    assert v41_plan.vocab_size == GOLDEN["raw_vocab_size"] == len(v41_token_map)
    assert v41_plan.non_negative and v41_plan.max_ngram == 4 and v41_plan.index_dtype == torch.int32


def test_golden_layout_of_qwen():
    plan = HashPlan.build(EngramConfig.qwen38_flash_next())
    assert plan.multipliers.tolist() == [QWEN["multipliers"].tolist()]
    assert plan.primes.tolist() == [QWEN["primes"].ravel().tolist()]
    assert plan.rows_per_layer == (320_001_536,)  # 320,001,446 rows, padded
    assert (plan.pad, plan.eos, plan.vocab_size, plan.token_map) == (int(QWEN["eos"]), int(QWEN["eos"]), 248_320, None)
    assert plan.non_negative


def test_multipliers_of_every_splitmix_layer_differ():
    """Layer 0 of Qwen is golden; a second layer must restart the generator 10007 further on, layer 0 unchanged."""
    two = EngramConfig.qwen38_flash_next().__dict__ | {"layers": (1, 7)}
    two = EngramConfig(**{name: value for name, value in two.items() if name in EngramConfig.__dataclass_fields__})
    plan = HashPlan.build(two)
    assert plan.multipliers[0].tolist() == QWEN["multipliers"].tolist()
    mask, bound = 2**64 - 1, (2**63 - 1) // 248_320 // 2
    expected = []
    for step in (2, 3, 4):
        x = (1234 + 10007 + step * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        expected.append(2 * ((x ^ x >> 31) % bound) + 1)
    assert plan.multipliers[1].tolist() == expected


def test_multipliers_derive_from_seed_layer_and_vocabulary():
    base = HashPlan.build(small_config(), small_map()).multipliers
    for layer, number in enumerate((0, 3)):
        draws = np.random.default_rng(10007 * number).integers(0, (2**63 - 1) // 20 // 2, 3)
        assert base[layer].tolist() == [2 * int(draw) + 1 for draw in draws]
    assert not torch.equal(base, HashPlan.build(small_config(seed=1), small_map()).multipliers)
    assert not torch.equal(base, HashPlan.build(small_config(vocab_size=19), small_map(distinct=19)).multipliers)
    # Where the config leaves V open, the token map decides it.
    assert torch.equal(base, HashPlan.build(small_config(vocab_size=None), small_map()).multipliers)


def test_build_maps_the_pad_id_and_pads_the_rows():
    token_map = small_map().flip(0)
    config = small_config(row_multiple=64)
    plan = HashPlan.build(config, token_map)
    assert plan.pad == int(token_map[4]) != 4
    assert plan.rows_per_layer == config.rows_per_layer and all(rows % 64 == 0 for rows in plan.rows_per_layer)
    assert plan.token_map.dtype == torch.int32 and plan.token_map.tolist() == token_map.tolist()


@pytest.mark.parametrize(
    "config, token_map, expected",
    [
        (small_config(), None, "this config needs the token map of its tokenizer .* got None"),
        (small_config(), small_map(49), "one entry per raw id, 50, got 49"),
        (small_config(), small_map(51), "one entry per raw id, 50, got 51"),
        (small_config(), small_map(4), "one entry per raw id, 50, got 4"),  # shorter than the pad id reaches
        (small_config(), small_map(distinct=19), "must give 20 compressed ids, as the config says, got 19"),
        (small_config(), small_map(distinct=21), "must give 20 compressed ids, as the config says, got 21"),
        # 15 distinct ids, though the largest is 19
        (small_config(), torch.where(small_map() < 14, small_map(), 19), "must give 20 compressed ids.* got 15"),
        (small_config(), small_map() - 1, "token_map must hold at least one id, all within 0 <= id < 2\\^31"),
        (small_config(), small_map() + 2**31, "token_map must hold at least one id, all within 0 <= id < 2\\^31"),
        (small_config(), small_map()[:0], "token_map must hold at least one id"),
        (small_config(window="eos", eos_id=3), small_map(), "window 'eos' hashes raw ids and takes no token_map"),
    ],
)
def test_build_refuses_a_token_map_that_does_not_fit(config, token_map, expected):
    with pytest.raises(ValueError, match=f"^HashPlan.build: .*{expected}"):
        HashPlan.build(config, token_map)


@pytest.mark.parametrize("token_map", [[0, 1], small_map().float(), small_map()[None], np.zeros(50, dtype=np.int32)])
def test_build_refuses_a_token_map_of_another_type(token_map):
    with pytest.raises(TypeError, match="^HashPlan.build: token_map must be a 1-dimensional integer tensor.*, got"):
        HashPlan.build(small_config(), token_map)


def test_from_parts_agrees_with_build():
    token_map = small_map()
    config = small_config()
    built = HashPlan.build(config, token_map)
    parts = HashPlan.from_parts(built.multipliers, torch.tensor(config.primes), pad=4, token_map=token_map)
    assert_same(parts, built)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_from_parts_takes_any_integer_type(dtype):
    plan = HashPlan.from_parts(torch.tensor([[3, 5, 7]], dtype=dtype), torch.tensor([[11, 13]], dtype=dtype), pad=0)
    assert plan.multipliers.dtype == plan.primes.dtype == plan.offsets.dtype == plan.reciprocals.dtype == torch.int64
    assert (plan.orders.dtype, plan.orders.tolist(), plan.offsets.tolist()) == (torch.int32, [2, 3], [[0, 11]])
    assert plan.vocab_size is None and plan.device == torch.device("cpu")


@pytest.mark.parametrize(
    "max_ngram, columns, expected",
    [(2, 3, [2, 2, 2]), (3, 4, [2, 2, 3, 3]), (4, 3, [2, 3, 4]), (5, 8, [2, 2, 3, 3, 4, 4, 5, 5])],
)
def test_orders_are_order_major(max_ngram, columns, expected):
    plan = HashPlan.from_parts(torch.ones(1, max_ngram).long(), torch.full((1, columns), 7), pad=0)
    assert plan.orders.tolist() == expected
    assert plan.heads == tuple(expected.count(order) for order in range(2, max_ngram + 1))


PRIMES = [2, 3, 5, 65_537, 16_000_057, 2**31 - 1, 2**31 + 11, 2**61 - 1]


def test_reciprocals_are_unsigned_floors():
    plan = small_plan([(1, 1)], [PRIMES])
    words = plan.reciprocals.numpy().view(np.uint64)[0]
    assert [int(word) for word in words] == [2**64 // prime for prime in PRIMES]
    assert plan.reciprocals[0, 0] == -(2**63)  # 2^63 in the bits of an int64


@settings(max_examples=200, deadline=None)
@given(mix=st.integers(0, 2**63 - 1), prime=st.sampled_from(PRIMES[:-2]))
def test_a_reciprocal_is_exact_within_its_range(mix, prime):
    """What ``non_negative`` promises: the estimated quotient is right or one too small, the residue below 2^32."""
    plan = small_plan([(1, 1)], [[prime]])
    residue = mix - (mix * (int(plan.reciprocals) % 2**64) >> 64) * prime
    assert residue in (mix % prime, mix % prime + prime) and residue < 2**32


INT64_MAX = 2**63 - 1


@pytest.mark.parametrize(
    "expected, changes",
    [
        (True, {}),
        (True, {"multipliers": [(0, 0, 0)] * 2}),
        (True, {"multipliers": [(INT64_MAX // 49, 1, 1)] * 2}),  # the largest product is just below 2^63
        (False, {"multipliers": [(INT64_MAX // 49 + 1, 1, 1)] * 2}),
        (False, {"multipliers": [(3, 5, 7), (9, -11, 13)]}),
        (False, {"multipliers": [(INT64_MAX // 49, 1, 1)] * 2, "pad": 50}),  # the pad id is hashed too
        (True, {"multipliers": [(INT64_MAX // 50, 1, 1)] * 2, "pad": 50}),
        (False, {"pad": -1}),
        (False, {"vocab_size": None}),  # ids have no upper bound
        (True, {"primes": [(11, 13, 17, 19), (23, 29, 31, 2**31 - 1)]}),
        (False, {"primes": [(11, 13, 17, 19), (23, 29, 31, 2**31 + 11)]}),
        (True, {"token_map": torch.tensor([0, 3]), "multipliers": [(INT64_MAX // 3, 1, 1)] * 2}),
        (False, {"token_map": torch.tensor([0, 4]), "multipliers": [(INT64_MAX // 3, 1, 1)] * 2}),
        (True, {"eos": 49, "pad": 49, "multipliers": [(INT64_MAX // 49, 1, 1)] * 2}),
    ],
)
def test_non_negative(expected, changes):
    assert small_plan(**changes).non_negative is expected


def test_golden_overflowing_multipliers_are_not_non_negative():
    primes = torch.from_numpy(QWEN["primes"]).view(1, -1)
    eos = int(QWEN["eos"])
    for name, expected in (("multipliers", True), ("overflow_multipliers", False)):
        multipliers = torch.from_numpy(QWEN[name])[None]
        plan = HashPlan.from_parts(multipliers, primes, pad=eos, eos=eos, vocab_size=248_320)
        assert plan.non_negative is expected


@pytest.mark.parametrize(
    "error, expected, changes",
    [
        (TypeError, "multipliers must be a 2-dimensional integer tensor.*, got float32", {"multipliers": [[1.5]]}),
        (
            TypeError,
            "multipliers must be a 2-dimensional integer tensor.*, got int64 \\[2\\]",
            {"multipliers": [1, 2]},
        ),
        (TypeError, "primes must be a 2-dimensional integer tensor.*, got float32", {"primes": [[2.0]]}),
        (TypeError, "primes must be a 2-dimensional integer tensor.*, got int64 \\[1\\]", {"primes": [2]}),
        (ValueError, "expected multipliers \\[L, N >= 2\\].*got \\[2, 1\\]", {"multipliers": [[1], [1]]}),
        (ValueError, "got \\[1, 3\\] and \\[2, 4\\]", {"multipliers": [[1, 3, 5]]}),
        (ValueError, "got \\[2, 3\\] and \\[2, 3\\]", {"primes": [[2, 3, 5]] * 2}),
        (ValueError, "got \\[2, 3\\] and \\[2, 0\\]", {"primes": torch.empty(2, 0, dtype=torch.int64)}),
        (ValueError, "primes must be at least 2, got 1", {"primes": [[11, 13, 17, 1]] * 2}),
        (ValueError, "primes must be at least 2, got -7", {"primes": [[11, 13, 17, -7]] * 2}),
        (ValueError, "with eos=4, pad must equal it and token_map be None, got pad=0", {"eos": 4}),
        (
            ValueError,
            "with eos=4, pad must equal it and token_map be None",
            {"eos": 4, "pad": 4, "token_map": small_map()},
        ),
        (
            TypeError,
            "token_map must be a 1-dimensional integer tensor.*, got float32",
            {"token_map": torch.ones(3)},
        ),
        (TypeError, "token_map must be a 1-dimensional integer tensor.*, got list", {"token_map": [0]}),
        (ValueError, "token_map must hold at least one id", {"token_map": -torch.ones(3).long()}),
    ],
)
def test_from_parts_refuses(error, expected, changes):
    changes = {key: torch.as_tensor(v) if key in ("multipliers", "primes") else v for key, v in changes.items()}
    parts = {"multipliers": torch.ones(2, 3).long(), "primes": torch.full((2, 4), 7), "pad": 0}
    with pytest.raises(error, match=f"^HashPlan.from_parts: .*{expected}"):
        HashPlan.from_parts(**(parts | changes))


def test_from_parts_names_the_type_of_what_is_no_tensor():
    for name in ("multipliers", "primes"):
        parts = {"multipliers": torch.ones(2, 3).long(), "primes": torch.full((2, 4), 7), name: [[1]]}
        with pytest.raises(TypeError, match=f"HashPlan.from_parts: {name} must be .* got list"):
            HashPlan.from_parts(**parts, pad=0)


@pytest.fixture
def default_device():
    """What a model that is built inside ``torch.device(...)`` has around it; "meta" stands for a GPU."""
    with torch.device("meta"):
        yield


def test_build_and_from_parts_ignore_the_default_device(default_device):
    """All of a plan is on the CPU, and as it is without a default device."""
    token_map = torch.arange(50, device="cpu") % 20
    config = small_config()
    plans = [HashPlan.build(config, token_map), HashPlan.build(EngramConfig.qwen38_flash_next())]
    primes = torch.tensor(config.primes, device="cpu")
    plans.append(HashPlan.from_parts(plans[0].multipliers, primes, pad=4, token_map=token_map))
    plans.append(plans[0].select(layers=[1], columns=[3, 0]))
    for plan in plans:
        assert {tensor.device.type for name in TENSORS if (tensor := getattr(plan, name)) is not None} == {"cpu"}
    assert_same(plans[0], plans[2])
    with torch.device("cpu"):
        assert_same(plans[0], HashPlan.build(config, token_map))
    with pytest.raises(ValueError, match="token_map must hold numbers, and a tensor on the meta device has none"):
        HashPlan.build(config, torch.arange(50))


def test_ids_may_be_numbers_of_numpy():
    plan = small_plan(pad=np.int64(3), vocab_size=np.int32(50))
    assert (type(plan.pad), plan.pad, type(plan.vocab_size), plan.vocab_size) == (int, 3, int, 50)


@pytest.mark.parametrize(
    "changes", [{"pad": "0"}, {"pad": 0.5}, {"pad": None}, {"vocab_size": 50.0}, {"eos": True, "pad": 1}]
)
def test_from_parts_refuses_ids_that_are_no_integers(changes):
    with pytest.raises(ValueError, match="^HashPlan.from_parts: (pad|vocab_size|eos) must be an?.* int.*, got "):
        small_plan(**changes)


@pytest.mark.parametrize(
    "positions", ["01", ["0"], [0.0], [1.9], [True, False], np.array([True]), torch.tensor([True])]
)
@pytest.mark.parametrize("what", ["layers", "columns"])
def test_select_refuses_what_is_no_position(what, positions):
    with pytest.raises(TypeError, match=f"^HashPlan.select: {what} must be (integers|a sequence or None), got "):
        small_plan().select(**{what: positions})
    with pytest.raises(TypeError, match=f"^HashPlan.select: {what} must be a sequence or None, got int 0"):
        small_plan().select(**{what: 0})


def test_the_digest_tells_token_maps_apart():
    plan = small_plan(token_map=small_map())
    assert plan.token_map_digest == hashlib.sha256(small_map().to(torch.int32).numpy().tobytes()).hexdigest()
    assert plan.select(layers=[0]).token_map_digest == plan.to("cpu").token_map_digest == plan.token_map_digest
    other = small_map()
    other[7] = 8
    assert small_plan(token_map=other).token_map_digest != plan.token_map_digest
    assert small_plan().token_map_digest is None


IDS = torch.tensor([3, 49, 0, 7, 7, 12, 31, 49])


@pytest.mark.parametrize(
    "layers, columns",
    [
        (None, None),
        ([1], None),
        ([1, 0], [3, 0]),
        (None, range(0, 4, 2)),  # every other head of each order
        (None, range(1, 4, 2)),
        ((0,), (2,)),
        (torch.tensor([1]), torch.tensor([0, 1, 2])),
    ],
)
def test_select_hashes_to_the_columns_of_the_whole_plan(layers, columns):
    whole = small_plan()
    chosen = whole.select(layers, columns)
    kept_layers = [0, 1] if layers is None else [int(layer) for layer in layers]
    kept_columns = [0, 1, 2, 3] if columns is None else [int(column) for column in columns]
    expected = ngram_hash(IDS, whole)[:, kept_layers][:, :, kept_columns]
    assert torch.equal(ngram_hash(IDS, chosen), expected)
    assert chosen.rows_per_layer == tuple(whole.rows_per_layer[layer] for layer in kept_layers)
    primes = [[whole.primes[layer, column].item() for column in kept_columns] for layer in kept_layers]
    assert chosen.primes.tolist() == primes
    assert chosen.reciprocals.tolist() == [[2**64 // prime for prime in layer] for layer in primes]
    assert all(getattr(chosen, name).is_contiguous() for name in TENSORS if name != "token_map")
    assert_same(whole, small_plan())  # the plan selected from is as it was


def test_select_of_a_selection():
    whole = small_plan()
    twice = whole.select(columns=[3, 1, 0]).select(layers=[1], columns=[2, 0])
    assert_same(twice, whole.select(layers=[1], columns=[0, 3]))


def test_select_keeps_padded_rows_and_dialect():
    plan = HashPlan.build(EngramConfig.qwen38_flash_next()).select(columns=[15])
    assert plan.rows_per_layer == (320_001_536,) and plan.eos == plan.pad == int(QWEN["eos"])
    assert int(plan.offsets) == sum(QWEN["primes"].ravel()[:15].tolist())


@pytest.mark.parametrize("what, size", [("layers", 2), ("columns", 4)])
@pytest.mark.parametrize("positions", [[], [-1], [0, 0], [9]])
def test_select_refuses_bad_positions(what, size, positions):
    with pytest.raises(ValueError, match=f"^HashPlan.select: {what} must be distinct positions within 0..{size - 1}"):
        small_plan().select(**{what: positions})


def test_to_returns_a_new_plan():
    plan = small_plan(token_map=small_map())
    moved = plan.to("meta")
    for name in TENSORS:
        assert getattr(moved, name).device.type == "meta" and getattr(plan, name).device.type == "cpu", name
    assert (moved.device.type, plan.device.type) == ("meta", "cpu")
    assert (moved.pad, moved.rows_per_layer, moved.vocab_size) == (plan.pad, plan.rows_per_layer, plan.vocab_size)
    assert small_plan().to("meta").token_map is None
    assert plan.to("cpu") is not plan and plan.to(torch.device("cpu")).token_map.tolist() == plan.token_map.tolist()


@pytest.mark.parametrize("last, expected", [(2**31 - 8, torch.int32), (2**31 - 7, torch.int64), (2**40, torch.int64)])
def test_index_dtype_widens_at_2_31_rows(last, expected):
    plan = small_plan([(1, 1)], [[7, last]])
    assert plan.index_dtype == expected
    assert ngram_hash(IDS, plan).dtype == expected
    both = HashPlan.from_parts(torch.ones(2, 2).long(), torch.tensor([[7, 11], [7, last]]), pad=0)
    assert both.index_dtype == expected
    assert both.select(layers=[0]).index_dtype == torch.int32
