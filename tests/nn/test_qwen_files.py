"""Checkpoints of transformers' Qwen model and its replaced layers; modules that are nearly theirs; the document."""

import copy
import runpy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs  # noqa: E402

from engram_kernels import EngramTable, export_state, replace_engram  # noqa: E402
from tests.support.documents import ROOT, Document  # noqa: E402
from tests.support.qwen import config, pair, tiny_model, token_ids  # noqa: E402

ROWS = "model.layers.{}.ple.ple_embedding.ngram_embedding.weight"
PAGE = Document("docs/huggingface.md")


def generated(model, ids=None):
    ids = torch.arange(8)[None] if ids is None else ids
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()


def test_saved_after_replacing_it_is_the_model_that_it_was(tmp_path):
    """Names and rows in parts included: transformers alone reads it."""
    before, ours = pair()
    ours.save_pretrained(tmp_path, max_shard_size="100KB")
    again, report = theirs.Qwen4ExpForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state, read = before.state_dict(), again.state_dict()
    assert list(read) == list(state) and all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_example(tmp_path, capsys, monkeypatch, dtype):
    """Rows come from the files alone; transformers never makes an embedding for them."""
    model = tiny_model(dtype)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    monkeypatch.setattr("sys.argv", ["transformers_qwen.py", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = runpy.run_path(str(ROOT / "examples" / "transformers_qwen.py"))
    first, second, tokens = capsys.readouterr().out.splitlines()
    kind = str(dtype).removeprefix("torch.")
    assert first.startswith(f"layer 0: EngramTable(424 x 16 {kind}, cpu") and second.startswith(
        "layer 2: EngramTable(512 "
    )
    assert tokens == "tokens: " + " ".join(map(str, generated(model)))
    loaded = names["model"]
    assert not any("ngram_embedding" in name for name, _ in loaded.named_parameters())
    # Saved with its tables, it is a checkpoint as before.
    loaded.save_pretrained(tmp_path / "again", state_dict=export_state(loaded))
    again = theirs.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    state, read = model.state_dict(), again.state_dict()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_checkpoint_without_the_tensors_of_the_hash(tmp_path):
    """transformers computes them where a checkpoint has none; the plan is made of what it then has."""
    model = tiny_model()
    names = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
    state = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[2] not in names}
    model.save_pretrained(tmp_path, state_dict=state)
    tables = {layer: EngramTable.from_safetensors(tmp_path, placement="cpu", layer=layer) for layer in (0, 2)}

    class Lean(theirs.Qwen4ExpForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            replace_engram(self, tables=tables)

    assert generated(Lean.from_pretrained(tmp_path)) == generated(model)


def test_another_hash_is_loaded():
    """As checkpoints may hold one, and modules take it with their tensors."""
    before, ours = pair()
    state = before.state_dict()
    name = ROWS.format(0).replace("ngram_embedding.weight", "layer_multipliers")
    state[name] = state[name] // 3 | 1
    with torch.no_grad():
        old = ours(token_ids(2, 9)).logits
        for model in (before, ours):
            assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
        new = [model(token_ids(2, 9)).logits for model in (before, ours)]
    torch.testing.assert_close(*new, rtol=1e-4, atol=2e-5)
    assert not torch.equal(new[1], old)


class OtherLayer(theirs.Qwen4ExpTextPLELayer):
    def _short_conv(self, hidden_states, cache):
        return 0 * hidden_states


class OtherNorm(theirs.Qwen4ExpTextRMSNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Lookalike(nn.Module):
    """Of the same parts, by another name."""

    def __init__(self, layer):
        super().__init__()
        for name, part in layer.named_children():
            setattr(self, name, part)


def become(kind):
    return lambda layer: setattr(layer, "__class__", kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (become(OtherLayer), " must be a .*Qwen4ExpTextPLELayer with the methods of that class, got .*OtherLayer"),
        (lambda layer: become(OtherNorm)(layer.norm_conv), "norm_conv must be a .*Qwen4ExpTextRMSNorm .*OtherNorm"),
        (lambda layer: setattr(layer, "norm_key", nn.RMSNorm(64)), "norm_key must be .* got torch.*RMSNorm"),
        (lambda layer: delattr(layer, "norm_query"), "norm_query must be a .* got builtins.NoneType"),
        (lambda layer: setattr(layer.norm_key, "eps", 1e-3), "norm_key.eps must be 1e-06, got 0.001"),
        (lambda layer: setattr(layer.norm_conv, "group_size", None), "group_size must be .32., got ."),
        (lambda layer: setattr(layer.conv1d, "dilation", (2,)), r"conv1d.dilation must be \(3,\), got \(2,\)"),
        (
            lambda layer: setattr(layer.conv1d, "bias", nn.Parameter(torch.zeros(64))),
            "conv1d.bias must be None, got one",
        ),
        (lambda layer: setattr(layer, "conv1d", nn.Linear(2, 2)), "conv1d must be an nn.Conv1d, got Linear"),
        (lambda layer: setattr(layer, "hc_count", 9), "hc_count must be 8, got 9"),
        (
            lambda layer: layer.ple_embedding.ngram_heads_offsets.add_(1),
            r"ngram_heads_offsets must be \[0, .* got \[1, ",
        ),
        (lambda layer: setattr(layer.ple_embedding, "ngram_embedding", nn.Embedding(9, 16)), "at least .* rows, got 9"),
        (lambda layer: layer.conv1d.register_forward_pre_hook(print), "conv1d has hooks"),
        (lambda layer: layer.ple_embedding.compile(), "ple_embedding has a forward of its own"),
    ],
)
def test_near_misses_are_named_beside_what_is_right(change, message):
    model = tiny_model()
    change(model.model.layers[2].ple)
    modules = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=rf"model\.layers\.2\.ple.*{message}.*of the right kind: model\.layers\.0\.ple"
    ):
        replace_engram(model, placement="cpu")
    assert dict(model.named_modules()) == modules


def test_a_lookalike_is_named():
    model = tiny_model()
    model.model.layers[2].ple = Lookalike(model.model.layers[2].ple)
    with pytest.raises(
        ValueError, match=r"layers\.2\.ple must be a .*PLELayer with .* got tests.*Lookalike.*layers\.0"
    ):
        replace_engram(model, placement="cpu")


def test_rows_of_8_bytes_name_their_module():
    with pytest.raises(ValueError, match=r"layers\.0\.ple\.ple_embedding\.ngram_embedding\.weight cannot be .* = 8"):
        replace_engram(tiny_model(torch.bfloat16, ple_embed_dim=16), placement="cpu")


def test_a_model_that_was_moved_and_cast():
    """Rows stay where and what they are; they come as the projections take them."""
    before, ours = pair()
    with torch.no_grad():
        logits = [model.to(torch.bfloat16)(token_ids(2, 9)).logits.float() for model in (before, ours)]
    assert ours.model.layers[0].ple.table.format.name == "float32"
    assert (logits[1] - logits[0]).square().mean() < 1e-3 * logits[0].square().mean()


def test_the_page(tmp_path):
    """docs/huggingface.md: every block runs, and does what the text says."""
    assert PAGE.holds_python_alone() and len(PAGE.blocks()) == 5
    assert len(PAGE.blocks()[1].strip().splitlines()) == 5
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    names = dict(folder=tmp_path, input_ids=token_ids(1, 9))
    first = PAGE.run("Five lines", **names)
    assert first.tokens[0].tolist() == generated(saved, names["input_ids"])
    start = copy.deepcopy(first.model.state_dict())
    trained = PAGE.run("Training", model=first.model, replaced=first.replaced, **names)
    assert all(table.row_grad is not None for table in first.replaced.tables.values())
    moved = {name for name, tensor in trained.model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {ROWS.format(0), ROWS.format(2)} < moved
    loaded = PAGE.run("Loading large models", config=config(), **names)
    assert generated(loaded.model) == generated(saved)
    kept = PAGE.run(
        "State dicts and undoing",
        model=loaded.model,
        replaced=first.replaced,
        trained=first.model,
        out=tmp_path / "out",
    )
    assert generated(theirs.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "out")) == generated(saved)
    assert ROWS.format(0) in kept.state and ROWS.format(0) not in kept.model.state_dict()
    assert type(first.model.model.layers[0].ple) is theirs.Qwen4ExpTextPLELayer
