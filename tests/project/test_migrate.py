"""docs/migrate.md: its code blocks run, on tensors in each peer's layout, and give what the oracles expect."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import engram_kernels
from engram_kernels import EngramTable, HashPlan, gate_residual, lookup
from engram_kernels.testing import oracles
from tests.support.documents import ROOT, Document

MIGRATE = Document("docs/migrate.md")

L, N, E, R, H, D, K = 2, 4, 2, 64, 4, 32, 4
V_RAW, PAD, IMAGE = 60, 7, 50
MULTIPLIERS = [[3001, 777_777, 12_345, 99_991], [51, 1_234_567, 999, 7_654_321]]
PRIMES = [[[11, 13], [17, 19], [23, 29]], [[31, 37], [41, 43], [47, 53]]]
FLAT_PRIMES = [[prime for order in layer for prime in order] for layer in PRIMES]
TOKEN_MAP = [(7 * raw) % 41 for raw in range(V_RAW)]
EPS = 1e-6


def expected_rows(ids, **options):
    """Row ids ``[T, L, C]`` by the oracle, in the DeepSeek dialect."""
    return oracles.hash_rows(ids, MULTIPLIERS, FLAT_PRIMES, pad=TOKEN_MAP[PAD], token_map=TOKEN_MAP, **options)


def plan():
    return HashPlan.from_parts(
        torch.tensor(MULTIPLIERS),
        torch.tensor(FLAT_PRIMES),
        pad=TOKEN_MAP[PAD],
        token_map=torch.tensor(TOKEN_MAP),
    )


def close(result, expected, tolerance=1e-5):
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def gate_tensors(tokens):
    """hidden, flattened kv, and norms of the two sides, float32."""
    hidden, kv = torch.randn(tokens, H, D), torch.randn(tokens, (H + 1) * D)
    return hidden, kv, torch.rand(H, D) + 0.5, torch.rand(H, D) + 0.5


def expected_gate(hidden, kv, query_norm, key_norm, **options):
    key, value = kv[:, : H * D].reshape(-1, H, D), kv[:, H * D :]
    arrays = (tensor.double().numpy() for tensor in (hidden, key, value, query_norm, key_norm))
    return oracles.gated(*arrays, eps=EPS, **options)


def test_every_block_is_run_here():
    assert MIGRATE.holds_python_alone() and len(MIGRATE.blocks()) == 7 and len(MIGRATE.text.splitlines()) < 300


def test_demo():
    spec = importlib.util.spec_from_file_location("demo_engram", ROOT / "examples" / "demo_engram.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    model = demo.Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    engram = model.engrams["1"]
    hidden, ids = torch.randn(2, 9, 4, 64), torch.randint(0, 390, (2, 9))
    with torch.no_grad():
        result = MIGRATE.run("The demo", engram=engram, hidden=hidden, input_ids=ids)
        close(result.addend, engram(hidden_states=hidden, input_ids=ids).double().numpy(), 1e-4)

    # Row ids without offsets, and a lookup that adds them itself.
    without = torch.from_numpy(engram.hash_mapping.hash(ids)[engram.layer_id])
    assert torch.equal(engram_kernels.ngram_hash(ids, result.plan)[:, :, 0] - result.plan.offsets[0], without)
    rows = lookup(result.table, without + result.plan.offsets[0])
    assert torch.equal(rows, engram.multi_head_embedding(without))


def vllm_batch():
    """Three requests of one packed batch, the second empty: ids, query_start_loc, lookback newest first, dead marks."""
    ids = torch.randint(0, V_RAW, (12,), dtype=torch.int32)
    lookback = torch.tensor([[5, 9, 21], [8, -1, -1], [33, 4, -1]], dtype=torch.int32)
    lookback_dead = torch.tensor([[False, False, False], [False, False, False], [False, True, False]])
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 8]] = True
    return ids, torch.tensor([0, 5, 5, 12], dtype=torch.int32), lookback, lookback_dead, dead


def test_vllm():
    ids, starts, lookback, lookback_dead, dead = vllm_batch()
    rows = sum(FLAT_PRIMES[0])
    weight = torch.randint(0, 256, (rows, R), dtype=torch.uint8)
    scales = torch.randint(110, 140, (rows, R // 32), dtype=torch.uint8)
    hidden, kv, q_weight, k_weight = gate_tensors(12)
    mask = ~dead
    result = MIGRATE.run(
        "vLLM",
        state=SimpleNamespace(
            multipliers=torch.tensor(MULTIPLIERS),
            primes=torch.tensor(PRIMES),
            pad_id=TOKEN_MAP[PAD],
            token_map=torch.tensor(TOKEN_MAP, dtype=torch.int32),
        ),
        embed_tokens=SimpleNamespace(weight=weight.view(torch.float8_e4m3fn), weight_scale_inv=scales),
        input_ids=ids,
        query_start_loc=starts,
        lookback_token_ids=lookback,
        lookback_dead_mask=lookback_dead,
        dead_mask=dead,
        hidden=hidden,
        kv=kv,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=EPS,
        token_mask=mask,
        H=H,
        D=D,
    )
    oldest_first = [[21, 9, 5], [-1, -1, 8], [-1, -1, 33]]  # the dead one, and what is older, count as none
    expected = expected_rows(ids.tolist(), cu=starts.tolist(), history=oldest_first, dead=dead.tolist())
    assert result.row_ids.dtype == torch.int32 and result.row_ids.tolist() == expected

    chosen = np.array(expected)[:, 0]
    values = oracles.fp8_rows(weight.numpy(), scales.numpy(), chosen)
    assert torch.equal(result.rows.nan_to_num(), torch.from_numpy(values).to(torch.bfloat16).nan_to_num())
    assert torch.equal(result.packed, torch.cat([weight, scales], 1)[chosen])

    assert result.key.untyped_storage().data_ptr() == result.value.untyped_storage().data_ptr() == kv.data_ptr()
    close(result.out[mask], expected_gate(hidden, kv, q_weight, k_weight)[mask.numpy()])
    assert torch.equal(result.out[dead], hidden[dead])


def test_vllm_qwen():
    heads, max_ngram, eos = 2, 3, 5
    sizes, multipliers = [101, 103, 107, 109], [2**62 + 1, 2**61 + 3, 2**60 + 7]  # products wrap
    ids = torch.randint(0, V_RAW, (10,), dtype=torch.int32)
    ids[6] = eos
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    context = torch.tensor([[eos, eos], [eos, 12]], dtype=torch.int32)  # the first request begins here
    hidden, key, value = torch.randn(10, H * D), torch.randn(10, H * D), torch.randn(10, D)
    norms = [0.3 * torch.randn(H * D) for _ in range(3)]
    weight = torch.randn(H * D, 1, K)
    result = MIGRATE.run(
        "vLLM",
        1,
        layer_multipliers=torch.tensor(multipliers),
        vocab_sizes=torch.tensor(sizes),
        eos_token_id=eos,
        vocab_size=V_RAW,
        input_ids=ids,
        query_start_loc=starts,
        ngram_context=context,
        hidden=hidden,
        key=key,
        value=value,
        norm_query=norms[0],
        norm_key=norms[1],
        norm_conv=norms[2],
        conv1d_weight=weight,
        eps=EPS,
        H=H,
        D=D,
    )
    assert result.row_ids.shape == (10, (max_ngram - 1) * heads)
    options = dict(cu=starts.tolist(), history=[[-1, -1], [eos, 12]], vocab=V_RAW)
    expected = oracles.hash_rows(ids.tolist(), [multipliers], [sizes], pad=eos, eos=eos, **options)
    assert result.row_ids.tolist() == [row[0] for row in expected]

    query, key, conv_norm = ((1 + norm).double().view(H, D).numpy() for norm in norms)
    arrays = [hidden.double().view(-1, H, D).numpy(), result.key.double().view(-1, H, D).numpy()]
    gate = oracles.gate_of(oracles.gate_parts(*arrays, query, key, EPS)[0], zero_gate="sign")
    expected = oracles.gate_conv(
        arrays[0],
        gate,
        value.double().numpy(),
        conv_norm,
        weight.double().view(H, D, K).numpy(),
        dilation=max_ngram,
        conv_eps=EPS,
        starts=[0] * 4 + [4] * 6,
    )
    close(result.out, expected.reshape(10, -1), 1e-4)


def test_sglang():
    shift = 1000
    table = torch.tensor([[1, 2, 3], [0, 0, 44], [IMAGE, 8, 9], [0, 0, 0]], dtype=torch.int32)
    slots, first = torch.tensor([2, 0, 1]), torch.tensor([30, 3, 1])
    ids = torch.tensor([4, IMAGE, 6, 7, 11, 13, 17, 0, 0])  # the last two are graph padding
    verify = torch.tensor([[21, 22, 23], [24, shift + 5, 26], [27, 28, 29]])
    result = MIGRATE.run(
        "SGLang",
        history_table=table,
        req_slots=slots,
        first_position=first,
        starts=torch.tensor([0, 4, 5]),
        lengths=torch.tensor([4, 1, 2]),
        input_ids=ids,
        image_token_id=IMAGE,
        mm_pad_shift=shift,
        verify_ids=verify,
        accepted=torch.tensor([1, 3, 2]),
        plan=plan(),
        N=N,
    )
    history = [[-1, 8, 9], [1, 2, 3], [-1, -1, 44]]
    assert result.history.tolist() == history
    dead = [place == 1 for place in range(9)]
    assert result.row_ids.tolist() == expected_rows(ids.tolist(), cu=[0, 4, 5, 7], history=history, dead=dead)
    assert (result.row_ids[7:] == -1).all()
    assert result.next_history.tolist() == [[8, 9, 21], [24, -1, 26], [44, 27, 28]]

    # One token a request, and equal blocks.
    decode = engram_kernels.ngram_hash(ids[:3, None], plan(), history=result.history)[:, 0]
    options = dict(cu=[0, 1, 2, 3], history=history)
    assert decode.tolist() == expected_rows(ids[:3].tolist(), **options)
    block_rows = engram_kernels.ngram_hash(ids[:6].view(3, 2), plan(), history=result.history)
    assert block_rows.flatten(0, 1).tolist() == expected_rows(ids[:6].tolist(), cu=[0, 2, 4, 6], history=history)


def test_sglang_shards_add_up():
    weight = torch.randint(0, 127, (40, R), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (40, R // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    ids = torch.tensor([[0, 39, 17], [16, -1, 25]], dtype=torch.int32)
    whole = lookup(EngramTable.from_tensors(weight, scale, placement="cpu"), ids)
    parts = []
    for low, high in ((0, 17), (17, 40)):
        shard = [tensor.view(torch.uint8)[low:high].clone().view(tensor.dtype) for tensor in (weight, scale)]
        parts.append(lookup(EngramTable.from_tensors(*shard, placement="cpu"), ids - low))
    assert torch.equal(parts[0] + parts[1], whole)
    assert not whole[1, 1].any()


def test_tilekernels():
    windows = torch.randint(0, 41, (9, N), dtype=torch.int32)  # mapped ids, current token first
    hidden, kv, weight_hidden, weight_embed = gate_tensors(9)
    result = MIGRATE.run(
        "TileKernels",
        ngram_token_ids=windows,
        multipliers=torch.tensor(MULTIPLIERS),
        vocab_sizes=torch.tensor(PRIMES, dtype=torch.int32),
        hidden=hidden,
        kv=kv.view(9, H + 1, D),
        weight_fused=weight_hidden * weight_embed,
        eps=EPS,
        clamp_value=1e-6,
    )
    expected = np.zeros((L, 9, (N - 1) * E), dtype=np.int64)
    for layer, token, column in np.ndindex(expected.shape):
        order = column // E
        mix = 0
        for shift in range(order + 2):
            mix ^= int(windows[token, shift]) * MULTIPLIERS[layer][shift]
        expected[layer, token, column] = mix % FLAT_PRIMES[layer][column] + sum(FLAT_PRIMES[layer][:column])
    assert result.row_ids.tolist() == expected.tolist()
    assert result.plan.offsets.tolist() == [[sum(layer[:c]) for c in range(len(layer))] for layer in FLAT_PRIMES]
    close(result.out, expected_gate(hidden, kv, weight_hidden, weight_embed))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gate_at_zero(zero):
    hidden, key, value = torch.full((1, 1, 16), zero), torch.ones(1, 1, 16), torch.full((1, 16), 2.0)
    norm = torch.ones(1, 16)
    addends = [
        gate_residual(hidden, key, value, norm, norm, eps=EPS, zero_gate=name, residual=False)[0, 0, 0].item()
        for name in ("copysign", "sign")
    ]
    assert addends[0] > 1.0 and addends[1] == 1.0  # twice a gate above 0.5, and of 0.5


def test_scale_bytes_at_the_ends():
    weight = torch.ones(2, 32).to(torch.float8_e4m3fn)
    table = EngramTable.from_tensors(weight, torch.tensor([[0], [255]], dtype=torch.uint8), placement="cpu")
    values = lookup(table, torch.tensor([0, 1]), out_dtype=torch.float32)
    assert (values[0] == 2.0**-127).all() and values[1].isnan().all()


def test_table_loaded_in_slices():
    weight = torch.randn(6, 256).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (6, 8), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with EngramTable.empty(6, 256, "e4m3_ue8m0", placement="host") as table:
        for part in (slice(0, 2), slice(2, 6)):
            table.weight[part].copy_(weight[part])
            table.scale[part].copy_(scale[part].view(torch.uint8))
        expected = EngramTable.from_tensors(weight, scale, placement="cpu")
        ids = torch.arange(6)
        assert torch.equal(lookup(table, ids), lookup(expected, ids))
