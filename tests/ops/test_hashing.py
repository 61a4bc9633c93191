"""ngram_hash: the reference against the scalar oracle and golden data, the kernel against the reference."""

import pytest
import torch

from engram_kernels import EngramConfig, HashPlan, ngram_hash, reference
from engram_kernels.ops.hash_kernels.row_ids import HashConfig, hash_config
from engram_kernels.testing.golden import demo_layer, demo_plan, golden, qwen_wrapping_plan
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.inputs import oracle, ragged, small_plan
from tests.support.launches import launch_ngram_hash


def test_reference_equals_golden_v41(v41_plan):
    data = golden("deepseek_v41_hash")
    rows = reference.ngram_hash(
        data["token_ids"], v41_plan, cu_seqlens=data["cu_seqlens"].int(), history=data["history"], dead=data["dead"]
    )
    assert rows.dtype == torch.int32
    assert torch.equal(rows.long(), data["row_ids"].long())


def test_reference_equals_golden_qwen():
    data = golden("qwen_ple_hash")
    plan = HashPlan.build(EngramConfig.qwen38_flash_next())
    assert torch.equal(reference.ngram_hash(data["token_ids"], plan)[:, 0].long(), data["row_ids"].long())


def test_reference_equals_golden_overflow():
    plan, data = qwen_wrapping_plan(), golden("qwen_ple_hash")
    assert not plan.non_negative
    assert torch.equal(reference.ngram_hash(data["token_ids"], plan)[:, 0].long(), data["overflow_row_ids"].long())


@pytest.mark.parametrize("layer", [1, 15])
def test_reference_equals_golden_demo(layer):
    data = demo_layer(layer)
    rows = reference.ngram_hash(data["token_ids"], demo_plan(layer))[:, :, 0].long()
    assert torch.equal(rows, data["hash_without_offsets"] + data["offsets"])


@pytest.mark.parametrize("dialect", ["map", "raw", "eos"])
@pytest.mark.parametrize("wrapping", [False, True])
@pytest.mark.parametrize("invalid", [False, True])
def test_reference_equals_oracle(dialect, wrapping, invalid):
    plan = small_plan(dialect=dialect, wrapping=wrapping)
    assert plan.non_negative != wrapping
    ids, cu, history, dead = ragged(invalid=invalid)
    rows = reference.ngram_hash(ids, plan, cu_seqlens=cu, history=history, dead=dead)
    assert torch.equal(rows, oracle(ids, plan, cu, history, dead))
    assert (rows == -1).any()  # padding at least
    assert torch.equal(reference.ngram_hash(ids, plan), oracle(ids, plan))


def test_reference_rows_of_a_batch_are_sequences():
    plan = small_plan()
    ids = torch.randint(0, 40, (3, 5))
    rows = reference.ngram_hash(ids, plan)
    assert rows.shape == (3, 5, 2, 4)
    for row, sequence in zip(rows, ids, strict=True):
        assert torch.equal(row, oracle(sequence, plan))


def test_cpu_runs_the_reference_and_raises_on_invalid_ids():
    plan = small_plan()
    ids, cu, history, dead = ragged()
    expected = oracle(ids, plan, cu, history, dead)
    assert torch.equal(ngram_hash(ids, plan, cu_seqlens=cu, history=history, dead=dead), expected)
    ids[3] = 40
    with pytest.raises(ValueError, match="ngram_hash: token_ids must be valid ids, 0 <= id < 40, got 40"):
        ngram_hash(ids, plan, cu_seqlens=cu, history=history, dead=dead)


def launched(ids, plan, device, cu=None, history=None, dead=None):
    """The kernel's own result, below the public check of ids."""
    ids, cu, history, dead = (None if x is None else x.to(device) for x in (ids, cu, history, dead))
    out = Guarded((*ids.shape, *plan.primes.shape), plan.index_dtype, device)
    launch_ngram_hash(ids, plan.to(device), cu, history, dead, out.tensor)
    return out.check().cpu()


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("dialect", "wrapping", "invalid", "dtype"),
    [
        ("map", False, False, torch.int32),
        ("map", True, True, torch.int64),
        ("raw", False, True, torch.int64),
        ("raw", True, False, torch.int32),
        ("eos", False, True, torch.int32),
        ("eos", True, False, torch.int64),
    ],
)
def test_kernel(device, dialect, wrapping, invalid, dtype):
    plan = small_plan(dialect=dialect, wrapping=wrapping)
    ids, cu, history, dead = ragged(invalid=invalid)
    ids, history = ids.to(dtype), history.to(dtype)
    expected = oracle(ids, plan, cu, history, dead)
    assert torch.equal(launched(ids, plan, device, cu, history, dead), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 127])
def test_kernel_lengths(device, tokens):
    plan = small_plan(max_ngram=4, heads=3, layers=3)
    ids = torch.randint(0, 40, (tokens,))
    assert torch.equal(launched(ids, plan, device), oracle(ids, plan))


@pytest.mark.kernel
def test_kernel_golden_v41(device, v41_plan):
    data = golden("deepseek_v41_hash")
    rows = launched(data["token_ids"], v41_plan, device, data["cu_seqlens"].int(), data["history"], data["dead"])
    assert torch.equal(rows.long(), data["row_ids"].long())


@pytest.mark.kernel
def test_kernel_golden_overflow(device):
    plan, data = qwen_wrapping_plan(), golden("qwen_ple_hash")
    rows = launched(data["token_ids"], plan, device)
    assert torch.equal(rows[:, 0].long(), data["overflow_row_ids"].long())


@pytest.mark.kernel
def test_reciprocal_at_its_limits(device):
    """Mixes 0, 1, multiples of the prime and their neighbours, and 2^63 - 1, against Python's own remainder."""
    primes = [2, 3, 5, 2**31 - 1, 16_000_057, 1_999_999_973]
    # With one id and multiplier 1 the mix is id[t] XOR id[t-1]; the second id is 0.
    for prime in primes:
        plan = HashPlan.from_parts(torch.tensor([[1, 1]]), torch.tensor([[prime]]), pad=0, vocab_size=2**63 - 1)
        assert plan.non_negative
        near = [k * prime + step for k in (0, 1, 2**20, (2**63 - 1) // prime) for step in (-1, 0, 1)]
        mixes = [mix for mix in [*near, 2**62, 2**63 - 2] if 0 <= mix < 2**63 - 1]
        rows = launched(torch.tensor(mixes)[:, None], plan, device)[:, 0, 0, 0]
        assert rows.tolist() == [mix % prime for mix in mixes]


@pytest.mark.kernel
def test_kernel_int64_rows(device):
    """A layer of 2^31 rows or more: primes above 2^31 take the division, row ids are int64."""
    plan = HashPlan.from_parts(torch.tensor([[3, 2**40 + 1]]), torch.tensor([[2**32 + 15]]), pad=0, vocab_size=1000)
    assert plan.index_dtype == torch.int64 and not plan.non_negative
    ids = torch.randint(0, 1000, (9,))
    rows = launched(ids, plan, device)
    assert torch.equal(rows, oracle(ids, plan))
    assert rows.max() >= 2**31


@pytest.mark.kernel
def test_kernel_batch_and_public_function(device):
    plan = small_plan()
    ids = torch.randint(0, 40, (3, 5))
    history = torch.randint(0, 40, (3, 2))
    expected = torch.stack([oracle(ids[b], plan, None, history[b : b + 1]) for b in range(3)])
    result = ngram_hash(ids.to(device), plan.to(device), history=history.to(device))
    assert torch.equal(result.cpu(), expected)


@pytest.mark.kernel
def test_kernel_ids_do_not_depend_on_place(device):
    """A token hashes alike alone (its past as history), in a batch, and in any chunk."""
    plan = small_plan(max_ngram=4, heads=2).to(device)
    ids = torch.randint(0, 40, (20,), device=device)
    whole = ngram_hash(ids, plan)
    for cut in (1, 7, 19):
        history = torch.full((1, 3), -1, device=device)
        past = ids[max(0, cut - 3) : cut]
        history[0, 3 - len(past) :] = past
        assert torch.equal(ngram_hash(ids[cut:], plan, history=history), whole[cut:])


def test_hash_config_holds_its_reason():
    """V4.1 takes 16 tokens and both layers a program, few tokens one; four ids a lane where an order has enough."""
    assert hash_config(8192, 8, 2) == HashConfig(16, 2, 8, False, 1)
    assert hash_config(16, 8, 2) == HashConfig(1, 2, 8, True, 1)
    for columns in (1, 4, 24, 100, 500, 3000):
        for tokens in (1, 17, 8192):
            for layers in range(1, 12):
                config = hash_config(tokens, columns, layers)
                assert config.block_c >= columns and config.block_t * config.block_c <= max(128, config.block_c)
                assert layers % config.block_l == 0 and config.block_l <= 4
                assert 32 * config.num_warps <= max(32, config.block_c)


@pytest.mark.kernel
def test_many_columns(device):
    """150 columns of an order: a program takes one token."""
    primes = torch.tensor([[97, 101, 103] * 100])
    plan = HashPlan.from_parts(torch.tensor([[3, 5, 7]]), primes, pad=0, vocab_size=40)
    ids = torch.randint(0, 40, (6,))
    assert torch.equal(launched(ids, plan, device), oracle(ids, plan))


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [5, 19])
@pytest.mark.parametrize(
    ("columns", "heads"),
    [
        ([0, 4, 8], (1, 1, 1)),
        ([0, 1, 2, 4, 8], (3, 1, 1)),  # as ranks have them that share columns unevenly
        ([6, 7, 8], (0, 0, 3)),
        ([3, 5], (0, 2, 0)),
        ([8, 0, 4], None),  # no order of their own
        ([4, 3, 5, 0, 8], None),
    ],
)
def test_selected_columns(device, columns, heads, tokens):
    plan = small_plan(layers=3, max_ngram=4, heads=3)
    ids, _, _, _ = ragged(invalid=True)
    dead = torch.arange(tokens) == 4
    part = plan.select(layers=[2, 0], columns=columns)
    assert part.heads == heads
    expected = oracle(ids[:tokens], plan, dead=dead)[:, [2, 0]][..., columns]
    assert torch.equal(launched(ids[:tokens], part, device, dead=dead), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("layers", [1, 4, 5, 6])
def test_layers_come_by_the_program(device, layers):
    """One, four, one and three layers a program; keys of layers as well, in either form of launch."""
    plan = small_plan(layers=layers)
    for tokens in (2, 17):
        ids = torch.randint(0, 40, (tokens,))
        expected = oracle(ids, plan)
        assert torch.equal(launched(ids, plan, device), expected)
        keys = Guarded((layers, tokens, 4), torch.int64, device)
        launch_ngram_hash(ids.to(device), plan.to(device), None, None, None, keys.tensor, key_stride=2**40)
        wanted = expected.transpose(0, 1) + 2**40 * torch.arange(layers)[:, None, None]
        assert torch.equal(keys.check().cpu(), wanted)
