"""docs/engines.md: its code blocks run, on tensors in vLLM's and SGLang's layouts, against oracles of whole texts."""

import numpy as np
import pytest
import torch

from engram_kernels import EngramConfig, EngramState, EngramTable, Prefetcher
from tests.support.documents import Document

from .test_migrate import (
    EPS,
    FLAT_PRIMES,
    IMAGE,
    V_RAW,
    D,
    H,
    L,
    N,
    R,
    close,
    expected_gate,
    expected_rows,
    gate_tensors,
    plan,
    vllm_batch,
)

ENGINES = Document("docs/engines.md")
SHIFT = 1000  # of SGLang's ids of multimodal padding
SIZES = dict(heads=2, row_width=R, table_sizes=(9,) * (N - 1), hidden_size=D, branches=H, raw_vocab_size=V_RAW)


def state(slots=6):
    return EngramState(EngramConfig(layers=(1, 14), max_ngram=N, **SIZES), slots, "cpu")


def is_image(ids):
    return (ids == IMAGE) | (ids >= SHIFT)


def fp8_tables():
    """(weight, scales) of each layer in uint8, and the tables."""
    parts = [
        (torch.randint(0, 127, (sum(primes), R)).byte(), torch.randint(110, 140, (sum(primes), R // 32)).byte())
        for primes in FLAT_PRIMES
    ]
    float8 = torch.float8_e4m3fn
    return parts, [EngramTable.from_tensors(rows.view(float8), scales, placement="cpu") for rows, scales in parts]


def test_every_block_is_run_here():
    assert ENGINES.holds_python_alone() and len(ENGINES.blocks()) == 4


def test_vllm_without_a_state():
    """Lookback newest first, row ids into an int32 buffer, and rows packed as bytes of values and scales."""
    ids, starts, lookback, lookback_dead, dead = vllm_batch()
    parts, tables = fp8_tables()
    result = ENGINES.run(
        "vLLM",
        input_ids=ids,
        query_start_loc=starts,
        lookback_token_ids=lookback,
        lookback_dead_mask=lookback_dead,
        dead_mask=dead,
        plan=plan(),
        tables=tables,
        row_ids=(row_ids := torch.full((12, L, (N - 1) * 2), -7, dtype=torch.int32)),
    )
    options = dict(cu=starts.tolist(), history=[[21, 9, 5], [-1, -1, 8], [-1, -1, 33]], dead=dead.tolist())
    expected = np.array(expected_rows(ids.tolist(), **options))
    assert row_ids.tolist() == expected.tolist()
    for layer, (rows, scales) in enumerate(parts):
        assert torch.equal(result.packed[layer], torch.cat([rows, scales], 1)[expected[:, layer]])


def test_vllm_with_a_state():
    """Three requests over three steps: a chunk, then drafts of which some are rejected, beside a request of padding."""
    texts = [torch.randint(0, V_RAW, (length,)) for length in (9, 7, 8)]
    engram_state, (_, tables) = state(), fp8_tables()
    prefetcher = Prefetcher(plan(), tables, 32, layers=(1, 14))
    slots, done = torch.tensor([4, 0, -1, 2], dtype=torch.int32), [0, 0, 0]
    for counts, rejected in (((4, 1, 3), (0, 0, 0)), ((3, 4, 2), (2, 3, 0)), ((4, 2, 3), (0, 0, 1))):
        pieces = [text[first : first + count] for text, first, count in zip(texts, done, counts, strict=True)]
        ids = torch.cat([*pieces[:2], torch.zeros(1, dtype=torch.int64), pieces[2], torch.zeros(2).long()])
        starts = torch.tensor([0, counts[0], counts[1], 1, counts[2]]).cumsum(0).int()
        hidden, kv, q_weight, k_weight = gate_tensors(len(ids))
        dead = torch.zeros(len(ids), dtype=torch.bool)
        history = engram_state.begin(ids, slots, cu_seqlens=starts).history
        result = ENGINES.run(
            "vLLM",
            1,
            state=engram_state,
            prefetcher=prefetcher,
            input_ids=ids,
            idx_mapping=slots,
            query_start_loc=starts,
            dead_mask=dead,
            projected={1: kv},
            hidden=hidden,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=EPS,
            token_mask=~dead,
            num_rejected=torch.tensor([*rejected[:2], 0, rejected[2]], dtype=torch.int32),
            H=H,
            D=D,
        )
        close(result.hidden, expected_gate(hidden, kv, q_weight, k_weight))
        for request, place in enumerate((0, 1, 3)):
            before = [-1] * N + texts[request][: done[request]].tolist()
            assert history[place].tolist() == before[len(before) - N + 1 :]
            ids_so_far = texts[request][: done[request] + counts[request]]
            row_ids = np.array(expected_rows(ids_so_far.tolist()))[done[request] :]
            here = slice(int(starts[place]), int(starts[place + 1]))
            for index, layer in enumerate((1, 14)):
                assert torch.equal(prefetcher.rows(layer)[here], rows_of(tables[index], row_ids[:, index]))
            done[request] += counts[request] - rejected[request]
    assert history[2].tolist() == [-1] * (N - 1)


def rows_of(table, row_ids):
    """Values of rows, by dequantising the whole table."""
    scales = table.scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    return (table.weight.float() * scales).bfloat16()[row_ids]


@pytest.mark.parametrize("drafts", [0, 2])
def test_sglang(drafts):
    """Extension from lengths, then decode or verification in equal blocks, with images and a padded request."""
    texts = [torch.randint(0, 40, (length,)) for length in (8, 7)]
    texts[0][[1, 2]], texts[1][[1, 4]] = torch.tensor([IMAGE, SHIFT + 3]), IMAGE
    engram_state, pool = state(), torch.tensor([3, 5, 0])
    names = dict(state=engram_state, is_image=is_image, plan=plan(), req_pool_indices=pool)
    live = torch.tensor([True, True, False])
    ids = torch.cat([texts[0][:4], texts[1][:3], torch.zeros(2).long()])
    lengths = dict(starts=torch.tensor([0, 4, 7]), lengths=torch.tensor([4, 3, 1]))
    result = ENGINES.run("SGLang", **names, live=live, input_ids=ids, block=None, commit_lens=None, **lengths)
    whole = [expected_rows(text.tolist(), dead=is_image(text).tolist()) for text in texts]
    assert result.row_ids[:7].tolist() == whole[0][:4] + whole[1][:3] and (result.row_ids[8:] == -1).all()

    done, taken = [4, 3], torch.tensor([1, 1 + drafts, 1], dtype=torch.int32)
    for _ in range(2):
        wrong = [torch.randint(0, 40, (drafts,)) for _ in range(3)]
        right = texts[1][done[1] : done[1] + 1 + drafts] if drafts and done[1] + 1 + drafts <= 7 else None
        blocks = [torch.cat([text[first : first + 1], w]) for text, first, w in zip(texts, done, wrong, strict=False)]
        blocks = [blocks[0], blocks[1] if right is None else right, torch.zeros(1 + drafts).long()]
        lens = taken if right is not None else torch.ones(3, dtype=torch.int32)
        options = dict(block=1 + drafts, commit_lens=lens if drafts else None)
        result = ENGINES.run("SGLang", **names, live=live, input_ids=torch.cat(blocks), **options)
        rows = result.row_ids.unflatten(0, (3, -1)).tolist()
        for request, count in enumerate(lens[:2].tolist()):
            assert rows[request][:count] == whole[request][done[request] : done[request] + count]
            done[request] += count
    assert engram_state.begin(ids[:1, None], torch.zeros(1).int()).history.tolist() == [[-1] * (N - 1)]


def test_sglang_history_is_taken_over():
    """Of requests of 1, 0 and 30 tokens, of which the last ends with an image."""
    table = torch.tensor([[1, 2, 3], [0, 0, 44], [7, 8, SHIFT + 9], [0, 0, 0]], dtype=torch.int32)
    pool, engram_state = torch.tensor([1, 3, 2]), state()
    engram_state.begin(table, torch.arange(4).int()).commit()  # slots in use
    names = dict(history_table=table, req_pool_indices=pool, seq_lens=torch.tensor([1, 0, 30]), N=N, is_image=is_image)
    ENGINES.run("SGLang", 1, **names, state=engram_state)
    step = engram_state.begin(torch.zeros(3, 1).long(), pool.int())
    assert step.history.tolist() == [[-1, -1, 44], [-1, -1, -1], [7, 8, -1]]
