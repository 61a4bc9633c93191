"""docs/migrate.md for models: Qwen's layer and LongCat's embedding, against transformers and plain PyTorch."""

import pytest
import torch
from torch import nn

import engram_kernels
from engram_kernels import HashPlan

from .test_migrate import EPS, MIGRATE, V_RAW, D, close


def qwen_layer():
    """A layer of transformers with random weights: N = 3, two heads, two branches, rows beyond the last column's."""
    from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4

    sizes = dict(vocab_size=V_RAW, hidden_size=D, num_hidden_layers=4, hc_count=2, eos_token_id=5, rms_norm_eps=EPS)
    sizes |= dict(ple_layer_ids=[2], ple_embed_dim=4 * 16, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=40)
    config = qwen4.Qwen4ExpTextConfig(**sizes)
    ple = qwen4.Qwen4ExpTextPLELayer(config, 1, 0)
    for parameter in ple.parameters():
        nn.init.normal_(parameter, std=0.5)
    return config, ple


def run_transformers(ple, hidden, ids, mask):
    return MIGRATE.run("transformers", ple=ple, hidden=hidden, input_ids=ids, conv_mask=mask, eps=EPS, H=2, D=D)


@torch.no_grad()
def test_transformers():
    """In a batch with left padding, and with an EOS within a document."""
    _, ple = qwen_layer()
    hidden, ids = torch.randn(2, 9, 2 * D), torch.randint(6, V_RAW, (2, 9))
    ids[0, 4] = 5
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    result = run_transformers(ple, hidden, ids, mask)
    masked = torch.where(mask, ids, 5)  # as the model does before its layers
    close(result.rows[mask], ple.ple_embedding(masked, None)[mask].numpy(), 0)
    close(result.out, (hidden + ple(hidden, masked, None, mask)).double().numpy(), 1e-4)
    assert torch.equal(result.out[~mask], hidden[~mask])
    assert result.table.rows > result.plan.rows_per_layer[0]


@torch.no_grad()
def test_transformers_cache_is_history():
    """Of a chunk longer than the window, and of one shorter, before which the cache has EOS."""
    from transformers import DynamicCache

    config, ple = qwen_layer()
    ids, hidden = torch.randint(0, V_RAW, (3, 8)), torch.randn(3, 8, 2 * D)
    plan = run_transformers(ple, hidden, ids, torch.ones_like(ids, dtype=torch.bool)).plan
    whole = engram_kernels.ngram_hash(ids, plan)
    for first in (1, 5):
        cache = DynamicCache(config=config)
        ple(hidden[:, :first], ids[:, :first], cache)
        history = cache.get_conv_state(ple.layer_idx, state_idx=2)
        assert history.shape == (3, 2) and torch.equal(history[:, -first:], ids[:, max(first - 2, 0) : first])
        assert torch.equal(
            engram_kernels.ngram_hash(ids[:, first:].contiguous(), plan, history=history), whole[:, first:]
        )
        assert cache.get_conv_state(ple.layer_idx, state_idx=1).shape == (3, 2 * D, 9)


def test_sglang_qwen():
    """Contexts oldest first, in which an EOS hides what is before it."""
    eos, multipliers, sizes = 5, [2**40 + 1, 2**41 + 3, 2**39 + 7], [101, 103, 107, 109]
    contexts = torch.randint(0, V_RAW, (12, 3))
    contexts[2, 0] = contexts[4, 1] = contexts[6, 2] = eos
    options = dict(pad=eos, eos=eos, vocab_size=V_RAW)
    plan = HashPlan.from_parts(torch.tensor([multipliers]), torch.tensor([sizes]), **options)
    row_ids = engram_kernels.ngram_hash(contexts, plan)[:, -1, 0]
    expected = []
    for oldest, middle, newest in contexts.tolist():
        oldest = eos if middle == eos else oldest
        mixes = [newest * multipliers[0] ^ middle * multipliers[1]] * 2
        mixes += [mixes[0] ^ oldest * multipliers[2]] * 2
        expected.append([mix % size + sum(sizes[:c]) for c, (mix, size) in enumerate(zip(mixes, sizes, strict=True))])
    assert row_ids.tolist() == expected


@pytest.mark.parametrize("chunk", [9, 1, 2])
@torch.no_grad()
def test_longcat(chunk):
    """Against whole numbers in base V, of any size, and one nn.Embedding and one nn.Linear for each column."""
    vocab, base, max_ngram, heads, eos, width = 131_072, 151, 4, 2, 2, 16
    columns = (max_ngram - 1) * heads
    hidden_size = columns * width
    embedders = [nn.Embedding(base + 2 * column + 1, width) for column in range(columns)]
    post_projs = [nn.Linear(width, hidden_size, bias=False) for _ in range(columns)]
    ids = torch.randint(3, vocab, (2, 9))
    ids[0, 4], ids[1, 0], ids[1, 6] = eos, vocab - 1, -1  # the last is one that takes no part
    words = torch.randn(hidden_size)

    def word_embeddings(ids):
        return (ids[..., None] % 7) * words

    def column_row(sequence, place, column):
        number = 0
        for shift in range(column // heads + 2):
            token = sequence[place - shift] if shift <= place else -1
            if token < 0 or (shift and token == eos):
                break
            number += token * vocab**shift
        return number % (base + 2 * column + 1)

    chosen = torch.tensor(
        [[[column_row(row, place, c) for c in range(columns)] for place in range(9)] for row in ids.tolist()]
    )
    expected = word_embeddings(ids)
    for column in range(columns):
        expected = expected + post_projs[column](embedders[column](chosen[..., column]))
    sizes = torch.tensor([len(part.weight) for part in embedders])
    history = torch.full((2, max_ngram - 1), -1)
    for first in range(0, 9, chunk):
        part = ids[:, first : first + chunk]
        options = dict(M=base, V=vocab, N=max_ngram, E=heads, eos_token_id=eos, embedders=embedders)
        options |= dict(post_projs=post_projs, word_embeddings=word_embeddings, history=history, input_ids=part)
        result = MIGRATE.run("LongCat-Flash-Lite", **options)
        assert torch.equal(result.row_ids, chosen[:, first : first + chunk] + sizes.cumsum(0) - sizes)
        close(result.out, (expected[:, first : first + chunk] / (columns + 1)).double().numpy())
        history = torch.cat([history, part], 1)[:, 1 - max_ngram :]
