"""transformers' Qwen PLE layers replaced: what a model computes, generates and learns is what it was before."""

import copy

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from engram_kernels import RowAdam, replace_engram  # noqa: E402
from engram_kernels.testing import oracles, tolerances  # noqa: E402
from tests.support.qwen import CACHES, CLOSE, EOS, config, layers, pair, tiny_model, token_ids  # noqa: E402


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
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
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


def test_a_gate_at_zero_is_a_half(models):
    (theirs, ours), streams = layers(models)
    hidden, ids = streams(2, 12), token_ids(2, 12)
    hidden[:, ::2] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden, ids, None), theirs(hidden, ids, None), **CLOSE)


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


def test_with_images():
    """The same layers in the model that sees: an image's tokens have ids as well."""
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32, patch_size=4)
    tokens = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    options = dict(text_config=config().to_dict(), vision_config=dict(vision, num_position_embeddings=16))
    torch.manual_seed(0)
    theirs = transformers.Qwen4ExpForConditionalGeneration(transformers.Qwen4ExpConfig(**options, **tokens)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(theirs)
    names = ["model.language_model.layers.0.ple", "model.language_model.layers.2.ple"]
    assert list(replace_engram(ours, placement="cpu")) == names
    ids = torch.cat([token_ids(1, 3), torch.tensor([[92, 90, 90, 90, 90, 93]]), token_ids(1, 4)], 1)
    image = dict(pixel_values=torch.randn(16, 96), image_grid_thw=torch.tensor([[1, 4, 4]]))
    image |= dict(mm_token_type_ids=(ids == 90).int(), max_new_tokens=8, do_sample=False)
    assert torch.equal(*[model.generate(ids, **image) for model in (theirs, ours)])


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
