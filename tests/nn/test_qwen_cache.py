"""A replaced Qwen layer and transformers' cache: pieces of any length, and all that transformers does with a cache."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tests.support.qwen import CACHES, CLOSE, layers, pair, token_ids


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("chunks", [(19,), (1, 1, 1, 1, 15), (2, 17), (12, 1, 1, 5), (10, 9)])
def test_chunked_prefill(models, cache, chunks):
    """Shorter and longer than the N - 1 = 2 ids and the 9 tokens that a layer looks back, with padding in the first."""
    ids = token_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[0, : min(chunks[0], 4)] = 0
    for padded in (False, True):
        caches = [CACHES[cache](model) for model in models]
        start = 0
        for size in chunks:
            part = slice(start, start + size)
            options = dict(attention_mask=mask[:, : part.stop]) if padded else {}
            with torch.no_grad():
                before, after = (
                    model(ids[:, part], cache=kept, **options).logits
                    for model, kept in zip(models, caches, strict=True)
                )
            live = mask[:, part].bool() if padded else slice(None)
            torch.testing.assert_close(after[live], before[live], **CLOSE)
            start += size


@pytest.mark.parametrize("prompt", [1, 2, 9, 25])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_goes_back(models, cache, prompt):
    """Recorded, cropped, reordered and copied: whatever transformers does with a cache."""
    (theirs, ours), streams = layers(models)
    caches = [CACHES[cache](models[0]) for _ in range(2)]

    @torch.no_grad()
    def step(length, seed):
        ids, hidden = token_ids(3, length, seed=seed), streams(3, length)
        before, after = (layer(hidden, ids, kept) for layer, kept in zip((theirs, ours), caches, strict=True))
        torch.testing.assert_close(after, before, **CLOSE)
        for kept in caches:  # what the rest of the layer keeps there
            kept.update_conv_state(torch.zeros(3, 1, length), 0, state_idx=0, conv_kernel_size=3)

    def change(what):
        for kept in caches:
            what(kept.layers[0])

    change(lambda layer: layer.activate_past_recording())
    step(prompt, 1)
    for drafts, rejected in ((4, 3), (11, 11), (1, 0), (2, 1)):
        step(drafts, drafts)
        change(lambda layer, rejected=rejected: layer.crop(-rejected))
    change(lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])))
    step(2, 2)
    copies = [copy.deepcopy(kept) for kept in caches]
    step(3, 3)
    caches = copies
    step(1, 4)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_is_emptied(models, cache):
    ids, caches = token_ids(2, 12), [CACHES[cache](model) for model in models]
    for part in (slice(0, 9), slice(9, 12), slice(0, 1), slice(1, 12)):
        if part.start == 0:
            for kept in caches:
                kept.reset()
        with torch.no_grad():
            before, after = (m(ids[:, part], cache=kept).logits for m, kept in zip(models, caches, strict=True))
        torch.testing.assert_close(after, before, **CLOSE)


def test_a_cache_of_the_old_module_is_refused(models):
    (theirs, ours), streams = layers(models)
    cache = CACHES["dynamic"](models[0])
    with torch.no_grad():
        theirs(streams(1, 4), token_ids(1, 4), cache)
        with pytest.raises(
            ValueError, match=r"layer 0 finds torch.float32 \[B, 64, span\] .* keeps .* \[B, 34, span\]"
        ):
            ours(streams(1, 1), token_ids(1, 1), cache)
    assert torch.equal(cache.layers[0].conv_states[2], token_ids(1, 4)[:, -2:])  # as it was


@pytest.mark.parametrize("cache", CACHES)
def test_gradients_end_at_the_cache(models, cache):
    """Tokens of a second piece read what the first left, which the cache may have overwritten by then, as numbers."""
    (_, ours), streams = layers(models)
    hidden, ids, kept = streams(2, 14), token_ids(2, 14), CACHES[cache](models[0])
    whole = ours(hidden, ids, None)
    pieces = [ours(hidden[:, part], ids[:, part], kept) for part in (slice(0, 9), slice(9, 11), slice(11, 14))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert not kept.layers[0].conv_states[1].requires_grad
    gradients = []
    for out in (whole[:, -1].sum(), pieces[-1][:, -1].sum()):
        ours.table.zero_row_grad()
        ours.zero_grad()
        out.backward()
        gradients.append((ours.norm_query.weight.grad, set(ours.table.row_grad.ids.tolist())))
    assert 0 < gradients[1][0].abs().max() and gradients[1][1] < gradients[0][1]
    ours.table.zero_row_grad()
    ours.zero_grad()


@pytest.mark.parametrize("cache", CACHES)
def test_half_precision_state_is_exact(cache):
    """In pieces through the cache and in one go: the same bits, since scales keep theirs."""
    models = pair(torch.bfloat16)
    (_, ours), streams = layers(models, torch.bfloat16)
    hidden, ids, kept = streams(2, 24), token_ids(2, 24), CACHES[cache](models[0])
    with torch.no_grad():
        whole = ours(hidden, ids, None)
        pieces = [ours(hidden[:, part], ids[:, part], kept) for part in (slice(0, 11), slice(11, 12), slice(12, 24))]
    assert torch.equal(torch.cat(pieces, 1), whole)
