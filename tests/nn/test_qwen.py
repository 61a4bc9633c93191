"""transformers' Qwen PLE layers replaced: what a model computes, generates and learns is what it was before."""

import copy

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from engram_kernels import RowAdam, replace_engram  # noqa: E402
from tests.support import oracles, tolerances  # noqa: E402
from tests.support.qwen import CACHES, EOS, pair, tiny_model, token_ids  # noqa: E402

CLOSE = dict(rtol=1e-4, atol=2e-5)  # float32, through three layers


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and other tests beside these
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    return pair()


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :1] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
def test_logits(models, padded, embeds):
    theirs, ours = models
    ids = token_ids(2, 19)
    inputs = dict(inputs_embeds=theirs.get_input_embeddings()(ids)) if embeds else dict(input_ids=ids)
    mask = left_padded(ids) if padded else None
    with torch.no_grad():
        before, after = (model(attention_mask=mask, **inputs).logits for model in (theirs, ours))
        silent = copy.deepcopy(theirs)
        for layer in (0, 2):
            silent.model.layers[layer].ple.ple_embedding.ngram_embedding.weight.zero_()
        without = silent(attention_mask=mask, **inputs).logits
    live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(after[live], before[live], **CLOSE)
    assert (without - before)[live].abs().mean() > 0.1 * before[live].abs().mean()  # the layers count


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=True, top_k=20),
        dict(num_beams=3, do_sample=False),
        dict(num_beams=2, do_sample=True, num_return_sequences=2),
        dict(do_sample=False, cache_implementation="static"),
        dict(do_sample=False, use_cache=False),
        dict(do_sample=False, prefill_chunk_size=4),
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(models, options, padded):
    ids = token_ids(2, 11)
    options = dict(options, max_new_tokens=12, attention_mask=left_padded(ids) if padded else torch.ones_like(ids))
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(model.generate(ids, output_logits=True, return_dict_in_generate=True, **options))
    before, after = results
    assert torch.equal(after.sequences, before.sequences)
    for ours, theirs in zip(after.logits, before.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_generate_from_embeddings(models):
    ids = token_ids(1, 9)
    tokens = [
        m.generate(inputs_embeds=m.get_input_embeddings()(ids), max_new_tokens=9, do_sample=False) for m in models
    ]
    assert torch.equal(*tokens)


def test_assisted_decoding(models):
    """As the assistant of another model its cache is cropped after every round of drafts."""
    torch.manual_seed(1)
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    ids = dict(vocab_size=97, pad_token_id=0, eos_token_id=EOS, bos_token_id=1)
    target = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **ids)).eval()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cut = []
    tokens, lengths = [], []
    for model in models:
        handle = model.register_forward_pre_hook(
            lambda _, args, inputs: cut.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        tokens.append(target.generate(token_ids(1, 9), assistant_model=model, max_new_tokens=16, do_sample=False))
        handle.remove()
        lengths.append(cut.copy())
        cut.clear()
    assert torch.equal(*tokens) and lengths[0] == lengths[1] and len(lengths[0]) > 10
    # As the target, transformers refuses it: linear attention cannot go back. Then as now.
    for model in models:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(token_ids(1, 9), assistant_model=models[0], max_new_tokens=4)


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


def layers(models, dtype=torch.float32):
    """The first PLE layer of both, and random streams for as many tokens as are asked for."""
    generator = torch.Generator().manual_seed(4)
    return [model.model.layers[0].ple for model in models], lambda *shape: torch.randn(
        *shape, 64, generator=generator, dtype=torch.float32
    ).to(dtype)


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


def test_a_gate_at_zero_is_a_half(models):
    (theirs, ours), streams = layers(models)
    hidden, ids = streams(2, 12), token_ids(2, 12)
    hidden[:, ::2] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden, ids, None), theirs(hidden, ids, None), **CLOSE)


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


def test_bfloat16_layer_is_within_the_roundings_of_both():
    """Ours rounds once, transformers after every step; key and value, which both read, have the same bits."""
    models = pair(torch.bfloat16)
    (theirs, ours), streams = layers(models, torch.bfloat16)
    hidden, ids, read = streams(1, 24), token_ids(1, 24), {}
    for name in ("key_proj", "value_proj"):
        getattr(ours, name).register_forward_hook(lambda *call, name=name: read.update({name: call[2]}))
    with torch.no_grad():
        before, after = theirs(hidden, ids, None), ours(hidden, ids, None)
    arrays = [x.double().reshape(24, 2, 32).numpy() for x in (hidden, read["key_proj"])]
    value = read["value_proj"].double()[0].numpy()
    norms = [
        1 + getattr(ours, f"norm_{n}").weight.detach().double().view(2, 32).numpy() for n in ("query", "key", "conv")
    ]
    weight = ours.conv1d.weight.detach().double().view(2, 32, 4).numpy()
    d, magnitude = oracles.gate_parts(*arrays, *norms[:2], 1e-6)
    gate = oracles.gate_of(d, zero_gate="sign")
    options = dict(dilation=3, conv_eps=1e-6, starts=[0] * 24, magnitude=True)
    exact, size = oracles.gate_conv(0 * arrays[0], gate, value, norms[2], weight, **options)
    error = tolerances.gate_bound(d, magnitude, 32, 1e-6, "sign")
    bound = tolerances.conv_bound(exact, 0 * exact, value, gate, error, size, 32, 4, torch.bfloat16)
    tolerances.assert_within(after[0].view(24, 2, 32), exact, bound, spread=False)
    stepwise = tolerances.eager_conv_bound(exact, value, gate, d, magnitude, size, "sign", torch.bfloat16)
    tolerances.assert_within(before[0].view(24, 2, 32), exact, stepwise)
    assert (after - before).abs().max() <= (bound + stepwise).max()


def test_bfloat16_logits_are_no_further_from_float32():
    """With the same weights. All experts and all blocks are used: which are chosen may change with any rounding."""
    theirs, ours = pair(torch.bfloat16, num_experts_per_tok=4, indexer_budget=64)
    ids = token_ids(4, 24)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).float()(ids).logits
        errors = [(model(ids).logits - exact).square().mean().sqrt() for model in (theirs, ours)]
    assert 0 < errors[1] <= 1.05 * errors[0] < 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_training_step(checkpointing, use_cache):
    """Gradients and one step of Adam; rows by RowAdam. With a cache, which fills as it does in a plain forward pass."""
    theirs, ours = pair()
    ids = token_ids(3, 17)
    optimizers, losses = [], []
    for model in (theirs, ours):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tables = {layer: getattr(model.model.layers[layer].ple, "table", None) for layer in (0, 2)}
        optimizers.append(torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4))
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    ours_by_name, rows = dict(ours.named_parameters()), RowAdam(list(tables.values()), lr=1e-2, eps=1e-4)
    for name, parameter in theirs.named_parameters():
        if "ngram_embedding" in name:
            layer = int(name.split(".")[2])
            grad = torch.zeros_like(parameter)
            found = tables[layer].row_grad
            grad[found.ids[: found.count]] = found.values[: found.count]
            assert name not in ours_by_name
        else:
            grad = ours_by_name[name].grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)
    for optimizer in (*optimizers, rows):
        optimizer.step()
    after, before = ours.state_dict(), theirs.state_dict()
    assert list(after) == list(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-2, atol=1e-3)


def test_autocast(models):
    ids = token_ids(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = (model(ids).logits.float() for model in models)
    assert (after - before).square().mean() < 1e-3 * before.square().mean()


def test_compiled_without_graph_breaks():
    models = pair()
    (theirs, ours), streams = layers(models)
    ours.table.requires_row_grad_(False)
    compiled, caches = (
        torch.compile(ours, backend="eager", fullgraph=True),
        [CACHES["static"](models[0]) for _ in range(2)],
    )
    with torch.no_grad():
        for length in (5, 1, 1):
            hidden, ids = streams(2, length), token_ids(2, length)
            torch.testing.assert_close(compiled(hidden, ids, caches[1]), theirs(hidden, ids, caches[0]), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        dict(ngram_size=2, ple_embed_dim=32),
        dict(ngram_size=4, ple_embed_dim=144, heads_per_ngram=3, ple_conv_kernel_size=2),
        dict(hc_count=3, eos_token_id=[EOS, 7]),
    ],
    ids=lambda options: ",".join(options),
)
def test_other_shapes(options):
    theirs, ours = pair(**options)
    ids = token_ids(2, 9)
    tokens = [model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None) for model in (theirs, ours)]
    assert torch.equal(*tokens)


class Adapted(torch.nn.Module):
    """A projection with a low-rank addition, as adapters wrap one."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, torch.nn.Parameter(torch.randn(2, linear.in_features))
        self.up = torch.nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def test_projections_stay_modules():
    """Adapters, quantised linear layers and hooks of the projections are called as before."""
    theirs, called = tiny_model(), []
    ple = theirs.model.layers[0].ple
    ple.key_proj = Adapted(ple.key_proj)
    ple.value_proj.register_forward_hook(lambda module, args, out: called.append(1) or 2 * out)
    ple.register_forward_hook(lambda module, args, out: called.append(2) or -out)
    ids = token_ids(2, 8)
    with torch.no_grad():
        before = theirs(ids).logits
        replace_engram(theirs, placement="cpu")
        torch.testing.assert_close(theirs(ids).logits, before, **CLOSE)
    assert called == [1, 2, 1, 2]


@pytest.mark.kernel
def test_kernels(device):
    """A layer on kernels through a static cache, padding and all, and its gradients."""
    theirs, ours = tiny_model().to(device), tiny_model().to(device)
    replace_engram(ours, placement="device" if device.type == "cuda" else "cpu")
    (before, after), streams = layers((theirs, ours))
    hidden, ids = streams(2, 11).to(device), token_ids(2, 11).to(device)
    mask, caches = left_padded(ids), [CACHES["static"](theirs) for _ in range(2)]
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
            results = [
                layer(hidden[:, part], ids[:, part], cache, conv_mask=mask[:, part])
                for layer, cache in zip((before, after), caches, strict=True)
            ]
            torch.testing.assert_close(*results, **CLOSE)
    for layer in (before, after):
        layer(hidden, ids, None).square().sum().backward()
    found = after.table.row_grad
    grad = torch.zeros_like(after.table.weight)
    grad[found.ids[: found.count]] = found.values[: found.count]
    torch.testing.assert_close(grad, before.ple_embedding.ngram_embedding.weight.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter.grad, before.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
