"""What a model keeps when its modules are replaced: training, ties, hooks, ids of any kind, state dicts; and undo."""

import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from engram_kernels import EngramTable, RowAdam, export_state, replace_engram
from engram_kernels.nn.demo import DemoEngram

from .test_replacement import demo

LAYERS = ("1", "3")


def randomised(seed=3):
    """A stand-in whose every parameter is random: its convolutions and norms count."""
    model = demo.Model(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def pair(change=lambda model: None, **options):
    theirs = randomised()
    change(theirs)
    ours = copy.deepcopy(theirs)
    return theirs, ours, replace_engram(ours, **({"placement": "cpu"} | options))


def embedding(model, layer="1"):
    return model.engrams[layer].multi_head_embedding.embedding


def freeze_a_key(model):
    model.engrams["1"].key_projs[0].requires_grad_(False)
    embedding(model, "3").requires_grad_(False)


def tie(model):
    first, third = (model.engrams[layer] for layer in LAYERS)
    first.key_projs[1].weight = first.key_projs[0].weight
    third.value_proj = first.value_proj


@pytest.mark.parametrize("change", [lambda model: None, freeze_a_key, tie])
def test_training_step(change):
    """Mixed freezing and ties as they were, and one step of Adam that was made before."""
    theirs, ours = randomised(), randomised()
    ids, optimizers = torch.randint(0, 500, (2, 9)), []
    for model in (theirs, ours):
        change(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers.append(torch.optim.Adam(trained, lr=1e-2, eps=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = replace_engram(ours, placement="cpu").tables.values()
    trainable = [table for table in tables if table.requires_row_grad]
    assert len(trainable) == sum(embedding(theirs, layer).weight.requires_grad for layer in LAYERS)
    for model in (theirs, ours):
        model(ids).square().mean().backward()
    for optimizer in (*optimizers, RowAdam(trainable, lr=1e-2, eps=1e-4)):
        optimizer.step()
    after, before = ours.state_dict(), theirs.state_dict()
    assert list(after) == list(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4, msg=name)
    moved = ours.engrams["1"].key_projs[0].weight
    assert torch.equal(moved, randomised().engrams["1"].key_projs[0].weight) == (change is freeze_a_key)


def test_embeddings_that_are_one_stay_one():
    def same(model):
        model.engrams["1"] = nn.Module.__new__(type(model.engrams["3"]))
        model.engrams["1"].__dict__.update(vars(model.engrams["3"]), _modules=dict(model.engrams["3"]._modules))

    _, ours, replaced = pair(same, placement="host")
    assert len(replaced) == 2 and len({id(table) for table in replaced.tables.values()}) == 1

    elsewhere = randomised()
    elsewhere.other = nn.Embedding(*embedding(elsewhere).weight.shape)
    elsewhere.other.weight = embedding(elsewhere).weight
    with pytest.raises(ValueError, match="engrams.1.*embedding.weight is other.weight too, and cannot be a table"):
        replace_engram(elsewhere, placement="cpu")


@pytest.mark.parametrize("reason", ["optimizer", "gradient"])
def test_what_an_optimizer_no_longer_trains_is_said(reason):
    model, options = randomised(), {}
    before = copy.deepcopy(model)
    if reason == "optimizer":
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=1)
        embedding(model, "3").requires_grad_(False)
    else:
        model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    with pytest.warns(UserWarning) as caught:
        replace_engram(model, placement="cpu", **options)
    why = {"optimizer": "is a parameter of the optimizer", "gradient": "had a gradient"}[reason]
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and all(why in text and "RowAdagrad or RowAdam" in text for text in texts)
    assert caught[0].filename == __file__
    # Where warnings are errors, nothing is replaced.
    again = copy.deepcopy(before)
    modules = dict(again.named_modules())
    options = dict(optimizer=[torch.optim.SGD(again.parameters(), lr=1)])
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="is a parameter of the optimizer"):
        warnings.simplefilter("error")
        replace_engram(again, placement="cpu", **options)
    assert dict(again.named_modules()) == modules


def test_a_gradient_that_a_placement_cannot_have_is_an_error():
    model = randomised()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="engrams.1.*weight requires a gradient .freeze it .*'staged'"):
        replace_engram(model, placement="staged")
    assert dict(model.named_modules()) == before
    model.requires_grad_(False)
    assert replace_engram(model, placement="staged").tables["engrams.1"].placement == "staged"


def test_rows_that_are_no_multiple_of_16_bytes_name_their_module():
    model = demo.Model(row_width=6)
    with pytest.raises(ValueError, match="engrams.1.multi_head_embedding.embedding.weight cannot .* 6 x float32 = 24"):
        replace_engram(model, placement="cpu")


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_stay():
    """Of the module itself, and of the projections that it calls; a handle removes them from either module."""
    theirs, calls, handles = randomised(), [], []
    module = theirs.engrams["1"]
    handles.append(module.register_forward_pre_hook(lambda *_: calls.append("before")))
    handles.append(module.register_forward_hook(lambda module, args, out: 2 * out))
    handles.append(module.register_full_backward_hook(lambda *_: calls.append("backward")))
    handles.append(module.key_projs[2].register_forward_hook(lambda module, args, out: -out))
    module.value_proj = nn.Linear(64, 64, bias=False)  # a projection is any module
    ids = torch.randint(0, 500, (2, 5))
    before = theirs(ids)
    replaced = replace_engram(theirs, placement="cpu")
    after = theirs(ids)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.sum().backward()
    assert calls == ["before", "before", "backward"]
    for handle in handles:
        handle.remove()
    theirs(ids)
    replaced.undo()
    theirs(ids)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "kind",
    [
        lambda ids: ids[:, :-1],
        lambda ids: ids[:, :-1].numpy(),
        lambda ids: ids[:, :-1].tolist(),
        lambda ids: ids.numpy()[:, ::-1][:, 1:][:, ::-1],
        lambda ids: ids[:, :-1].to(torch.int16),
        lambda ids: ids[:, :-1].numpy().astype(np.uint16),
        lambda ids: ids.t().contiguous().t()[:, :-1].int(),
    ],
)
def test_ids_of_any_kind(kind):
    module = pair()[1].engrams["1"]
    ids, hidden = torch.randint(0, 500, (3, 9)), torch.randn(3, 9, 4, 64)
    with torch.no_grad():
        expected = module(hidden[:, :-1].contiguous(), ids[:, :-1].contiguous())
        assert torch.equal(module(hidden_states=hidden[:, :-1], input_ids=kind(ids)), expected)


@pytest.mark.parametrize("ids", [torch.zeros(1, 2), np.zeros((1, 2)), [[0.0, 1.0]], [[True, False]]])
def test_ids_that_are_none(ids):
    with pytest.raises(TypeError, match="token ids must be integers, got"):
        pair()[1].engrams["1"](torch.randn(1, 2, 4, 64), ids)


def test_state_dict_goes_both_ways():
    theirs, ours, _ = pair()
    other, ids = demo.Model(seed=3), torch.randint(0, 500, (2, 9))
    assert str(other.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    with torch.no_grad():
        torch.testing.assert_close(other(ids), theirs(ids))
    fresh = demo.Model(seed=3)
    replace_engram(fresh, placement="host")
    assert str(fresh.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    for layer in LAYERS:
        assert torch.equal(fresh.engrams[layer].table.weight, embedding(theirs, layer).weight)
        assert fresh.engrams[layer].table.version > 0
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids), ours(ids))


def test_loading_never_says_that_other_rows_matched(tmp_path):
    theirs, ours, _ = pair()
    rows = "engrams.1.multi_head_embedding.embedding.weight"
    state = theirs.state_dict()
    given = {
        int(layer): EngramTable.from_tensors(embedding(theirs, layer).weight.detach().clone(), placement="cpu")
        for layer in LAYERS
    }
    loaded = randomised()
    replace_engram(loaded, tables=given)
    assert rows not in loaded.state_dict() and list(export_state(loaded)) == list(state)
    assert rows not in loaded.state_dict()
    for model in (ours, loaded):
        without = {name: tensor for name, tensor in state.items() if name != rows}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{rows}"'):
            model.load_state_dict(without)
        assert model.load_state_dict(without, strict=False).missing_keys == [rows]
        with pytest.raises(RuntimeError, match=rf"{rows} must have shape \[2138, 8\], got \[3, 8\]"):
            model.load_state_dict(dict(state, **{rows: torch.zeros(3, 8)}))
        with pytest.raises(RuntimeError, match="Unexpected key.*embedding.scale"):
            model.load_state_dict(dict(state, **{rows.replace("weight", "scale"): torch.ones(1)}))
    # Rows that lie in a file are not written to; the same rows match.
    path = given[1].save_safetensors(tmp_path / "rows.safetensors")
    mapped = randomised()
    replace_engram(mapped, tables=dict(given) | {1: EngramTable.from_safetensors(path, placement="cpu", mapped=True)})
    mapped.load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"{rows} holds other rows than EngramTable"):
        mapped.load_state_dict(dict(state, **{rows: state[rows] + 1}))


def test_rows_in_fp8_are_exported_as_values():
    theirs = randomised()
    weights = {int(layer): embedding(theirs, layer).weight.detach() for layer in LAYERS}
    wide = {layer: torch.zeros(len(weight), 16, dtype=torch.float8_e4m3fn) for layer, weight in weights.items()}
    for layer in LAYERS:
        module = theirs.engrams[layer]
        shape = (len(weights[int(layer)]), 16)
        module.multi_head_embedding.embedding = nn.Embedding(*shape, device="meta")
        for projection in (*module.key_projs, module.value_proj):
            projection.weight = nn.Parameter(torch.randn(64, 8 * 16))
    wide[1][5] = torch.full((16,), 1.5).to(torch.float8_e4m3fn)
    tables = {layer: EngramTable.from_tensors(rows, 2.0, placement="cpu") for layer, rows in wide.items()}
    with pytest.raises(ValueError, match="is on the meta device and has no rows: pass tables="):
        replace_engram(theirs, placement="cpu")
    replace_engram(theirs, tables=tables)
    assert theirs(torch.randint(0, 500, (2, 9))).isfinite().all()
    values = export_state(theirs)["engrams.1.multi_head_embedding.embedding.weight"]
    assert values.dtype == torch.bfloat16 and values[5].eq(3).all() and values[6].eq(0).all()
    theirs.load_state_dict(export_state(theirs))
    with pytest.raises(RuntimeError, match="holds other rows"):
        theirs.load_state_dict(
            dict(export_state(theirs), **{"engrams.1.multi_head_embedding.embedding.weight": values + 1})
        )


def test_tables_must_fit():
    model = randomised()
    table = EngramTable.empty(7, 8, "float32", placement="cpu")
    with pytest.raises(ValueError, match=r"tables must be of layers \[1, 3\], got \[1\]"):
        replace_engram(model, tables={1: table})
    with pytest.raises(ValueError, match="engrams.1 needs a table of 2138 rows of 8 elements, got EngramTable"):
        replace_engram(model, tables={1: table, 3: table})


def test_the_old_embedding_is_freed_with_the_result():
    _, ours, replaced = pair(placement="host")
    weight = weakref.ref(replaced["engrams.1"].multi_head_embedding.embedding.weight)
    assert weight() is not None
    del replaced
    assert weight() is None and ours(torch.zeros(1, 2, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_undo(placement):
    """The old modules are back, with what was trained since, and in the model's mode."""
    _, ours, replaced = pair(placement=placement)
    modules, ids = dict(replaced), torch.randint(0, 500, (2, 9))
    ours(ids).square().mean().backward()
    RowAdam(list(replaced.tables.values()), lr=0.1).step()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    ours.eval()
    with torch.no_grad():
        trained = ours(ids)
        replaced.undo()
        assert {name: ours.get_submodule(name) for name in modules} == modules
        assert not any(module.training for module in ours.modules())
        torch.testing.assert_close(ours(ids), trained, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="engrams.1 is no longer the module that replace_engram put there"):
        replaced.undo()
    assert isinstance(replace_engram(ours, placement=placement)["engrams.3"], demo.Engram)
    assert isinstance(ours.engrams["3"], DemoEngram)
