"""The Engram module in every form, against its ops called by hand."""

import dataclasses

import pytest
import torch

from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, hash_lookup, reference
from engram_kernels.checkpoints.convert import convert_table

SMALL = dict(
    max_ngram=3, heads=2, row_width=8, table_sizes=(30, 50), hidden_size=24, branches=2, raw_vocab_size=40, eps=1e-6
)
FORMS = {
    "v41": EngramConfig(layers=(1, 4), vocab_size=40, format="float32", **SMALL),
    "paper": EngramConfig(
        layers=(1, 4), vocab_size=40, format="float32", projection_bias=True, conv_kernel=4, conv_eps=0.05, **SMALL
    ),
    "qwen": EngramConfig(
        layers=(1,),
        window="eos",
        eos_id=7,
        multiplier_rule="splitmix64",
        format="float32",
        conv_kernel=3,
        conv_eps=1e-6,
        norm_offset=1.0,
        zero_gate="sign",
        **SMALL,
    ),
}
FORMS_WITHOUT_CONV = {"biased": dataclasses.replace(FORMS["v41"], projection_bias=True)}
NAMES = {
    "v41": {"wkv.weight", "q_weight", "k_weight"},
    "paper": {"wkv.weight", "wkv.bias", "q_weight", "k_weight", "conv_norm", "conv_weight"},
    "qwen": {"wkv.weight", "q_weight", "k_weight", "conv_norm", "conv_weight"},
}


def built(form, device=None, **options):
    config = (FORMS | FORMS_WITHOUT_CONV)[form]
    plan = HashPlan.build(config, None if config.window == "eos" else torch.arange(40))
    placement = "device" if device is not None and device.type == "cuda" else "cpu"
    tables = [
        EngramTable.from_tensors(torch.randn(rows, 8, device=device), placement=placement)
        for rows in plan.rows_per_layer
    ]
    module = Engram(config, config.layers[-1], plan, tables[-1], device=device, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2 + 0.5)
    return module, plan if device is None else plan.to(device), tables


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [True, False])
def test_forward_is_the_ops_by_hand(form, residual):
    module, plan, tables = built(form, residual=residual)
    assert set(module.state_dict()) == NAMES[form]
    hidden, ids = torch.randn(9, 2, 24), torch.randint(0, 40, (9,))
    packed = dict(cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), history=torch.randint(0, 40, (2, 2)))
    dead = torch.arange(9) == 6
    rows = hash_lookup(ids, plan, tables, **packed, dead=dead)[-1].flatten(1)
    kv = rows @ module.wkv.weight.T + (0 if module.wkv.bias is None else module.wkv.bias)
    config = module.config
    options = dict(eps=config.eps, zero_gate=config.zero_gate, residual=residual, mask=~dead)
    inputs = hidden, kv[:, :48].view(9, 2, 24), kv[:, 48:], module.q_weight, module.k_weight
    if config.conv_kernel:
        options |= dict(dilation=3, conv_eps=config.conv_eps, cu_seqlens=packed["cu_seqlens"])
        expected = reference.gate_conv_residual(*inputs, module.conv_norm, module.conv_weight, **options)
    else:
        expected = reference.gate_residual(*inputs, **options)
    torch.testing.assert_close(module(hidden, ids, **packed, dead=dead), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_looked_up_before(form):
    module, plan, tables = built(form)
    hidden, ids = torch.randn(2, 5, 2, 24), torch.randint(0, 40, (2, 5))
    rows = hash_lookup(ids, plan, tables)[-1]
    assert torch.equal(module(hidden, rows=rows), module(hidden, ids))


@pytest.mark.parametrize("form", [*FORMS, "biased"])
@pytest.mark.parametrize("residual", [True, False])
def test_padding_and_dead_tokens_pass_unchanged(form, residual):
    """Bit for bit, -0.0 and NaN included, from tokens or from rows, and they change no other token. To a dead one the
    convolution of the tokens before it is added, in the forms that have one.
    """
    module, plan, tables = built(form, residual=residual)
    ids, dead = torch.randint(0, 40, (8,)), torch.tensor([0, 0, 1, 0, 0, 0, 0, 0]).bool()
    options = dict(cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32), dead=dead)
    untouched = [6, 7] if module.config.conv_kernel else [2, 6, 7]
    hidden = torch.randn(8, 2, 24)
    calm = module(hidden, ids, **options)
    hidden[untouched, 0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    out = module(hidden, ids, **options)
    kept = hidden[untouched] if residual else torch.zeros(len(untouched), 2, 24)
    assert torch.equal(out[untouched].view(torch.int32), kept.view(torch.int32))
    others = [token for token in range(8) if token not in untouched]
    assert torch.equal(out[others], calm[others]) and calm[others].ne(hidden[others]).any()
    rows = hash_lookup(ids, plan, tables, **options)[-1]
    assert torch.equal(module(hidden, rows=rows, **options).view(torch.int32), out.view(torch.int32))
    with pytest.raises(ValueError, match=r"^Engram.forward: dead must have shape \[8\], got \[7\]"):
        module(hidden, rows=rows, dead=dead[1:])
    with pytest.raises(ValueError, match=r"hidden must have shape \[T, H, D\] or \[B, S, H, D\], got \[8, 48\]"):
        module(hidden.flatten(1), rows=rows, **options)


def test_conv_state_makes_chunks_equal_the_whole():
    module, _, _ = built("paper")
    hidden, ids = torch.randn(8, 2, 24), torch.randint(0, 40, (8,))
    whole = module(hidden, ids)
    first, state = module(hidden[:5], ids[:5], conv_state=module.new_conv_state(1))
    second, _ = module(hidden[5:], ids[5:], history=ids[None, 3:5], conv_state=state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-5, atol=1e-5)


def test_every_weight_trains():
    module, _, _ = built("paper")
    module(torch.randn(6, 2, 24), torch.randint(0, 40, (6,))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    module, _, _ = built("paper")
    module = module.to(dtype)
    hidden = torch.randn(4, 2, 24, dtype=dtype)
    out, state = module(hidden, torch.randint(0, 40, (4,)), conv_state=module.new_conv_state(1))
    assert out.dtype == dtype and state[0].dtype == dtype


def test_state_dict_round_trip():
    module, plan, tables = built("paper")
    other = Engram(module.config, 4, plan, tables[-1])
    other.load_state_dict(module.state_dict())
    hidden, ids = torch.randn(4, 2, 24), torch.randint(0, 40, (4,))
    assert torch.equal(other(hidden, ids), module(hidden, ids))


def test_a_table_remembers_the_token_map_it_was_made_with(tmp_path):
    """From the module into files, converted ones too, and back; None where nothing told it."""
    module, plan, tables = built("v41")
    assert tables[-1].token_map == plan.token_map_digest and tables[0].token_map is None
    path = tables[-1].save_safetensors(tmp_path, shard_bytes=500)
    convert_table(path, tmp_path / "b.safetensors", "test", format="bfloat16")
    other = HashPlan.build(module.config, torch.arange(40).flip(0))
    for placement, file, mapped in (
        ("cpu", path, False),
        ("host", path, False),
        ("cpu", tmp_path / "b.safetensors", True),
    ):
        with EngramTable.from_safetensors(file, placement=placement, mapped=mapped) as loaded:
            Engram(module.config, 4, plan, loaded)
            with pytest.raises(
                ValueError, match=r"^Engram: table was made with token map [0-9a-f]{12}, and the plan has"
            ):
                Engram(module.config, 4, other, loaded)
    with pytest.raises(ValueError, match="and the plan has none: is its tokenizer of another revision"):
        multipliers, primes = plan.multipliers, plan.primes
        Engram(module.config, 4, HashPlan.from_parts(multipliers, primes, pad=0, vocab_size=40), tables[-1])


def test_one_branch_has_a_dimension_of_its_own():
    """A model without branches keeps hidden as [B, S, D]; its error says what is wanted, and the result fits back."""
    config = dataclasses.replace(FORMS["v41"], branches=1)
    plan = HashPlan.build(config, torch.arange(40))
    table = EngramTable.from_tensors(torch.randn(plan.rows_per_layer[0], 8), placement="cpu")
    module = Engram(config, 1, plan, table)
    hidden, ids = torch.randn(2, 5, 24), torch.randint(0, 40, (2, 5))
    expected = (
        r"got \[2, 5, 24\]; for these tokens, H = 1 and D = 24 that is \[2, 5, 1, 24\]; hidden.unsqueeze\(-2\) has it"
    )
    with pytest.raises(ValueError, match=rf"^Engram.forward: hidden must have shape .*{expected}$"):
        module(hidden, ids)
    out = module(hidden.unsqueeze(-2), ids).squeeze(-2)
    assert out.shape == hidden.shape
    with pytest.raises(ValueError, match=r"got \[5, 24\]; .* that is \[5, 1, 24\]; hidden.unsqueeze"):
        module(hidden[0], ids[0])
    with pytest.raises(ValueError, match=r"got \[2, 1, 24\]; .* that is \[2, 1, 1, 24\]; hidden.unsqueeze"):
        module(hidden[:, :1], ids[:, :1].contiguous())  # as if it were two tokens of one branch
    with pytest.raises(ValueError, match=r"got \[5, 1, 23\]; for these tokens, H = 1 and D = 24 that is \[5, 1, 24\]$"):
        module(hidden[0, :, None, 1:], ids[0])


def test_bad_arguments():
    module, plan, tables = built("v41")
    config = module.config
    with pytest.raises(ValueError, match=r"layer must be one of the config's, \(1, 4\), got 2"):
        Engram(config, 2, plan, tables[0])
    with pytest.raises(ValueError, match="plan must have 1 or 2 layers of 4 columns, got 2 of 2"):
        Engram(config, 1, plan.select(columns=[0, 1]), tables[0])
    with pytest.raises(ValueError, match="table must have rows of 16 elements, got 8"):
        Engram(dataclasses.replace(config, row_width=16), 1, plan, tables[0])
    rows = plan.rows_per_layer
    for layer, table in ((1, tables[1]), (4, tables[0])):
        expected = f"table must have the {rows[config.layers.index(layer)]} rows of layer {layer}, got {table.rows}"
        with pytest.raises(ValueError, match=f"^Engram: {expected}$"):
            Engram(config, layer, plan, table)
    for more in (-1, 1, 100):
        table = EngramTable.empty(rows[0] + more, 8, "float32", placement="cpu")
        with pytest.raises(
            ValueError, match=f"^Engram: table must have the {rows[0]} rows of layer 1, got {table.rows}"
        ):
            Engram(config, 1, plan, table)
    with pytest.raises(ValueError, match="^Engram: plan must be of layer 1, got that of layer 4"):
        Engram(config, 1, plan.select(layers=[1]), tables[1])
    hidden, ids = torch.randn(3, 2, 24), torch.tensor([1, 2, 3])
    rows, kv = torch.zeros(3, 4, 8), torch.zeros(3, 72)
    for got, given in {
        "none": {},
        "token_ids and rows": dict(token_ids=ids, rows=rows),
        "rows and kv": dict(rows=rows, kv=kv),
        "token_ids and rows and kv": dict(token_ids=ids, rows=rows, kv=kv),
    }.items():
        with pytest.raises(ValueError, match=f"forward: expected one of token_ids, rows and kv, got {got}$"):
            module(hidden, **given)
    for error, words, given in (
        (ValueError, r"kv must have shape \[T, W\] .* = 72, got \[3, 48\]", kv[:, :48]),
        (ValueError, r"kv must have shape .* got \[\]", kv[0, 0]),
        (ValueError, r"hidden must have shape .* got \[3, 2, 24\].* that is \[2, 2, 24\]", kv[:2]),
        (ValueError, r"hidden must have shape .* that is \[1, 3, 2, 24\]", kv[None]),
        (TypeError, "kv must be a tensor of float32, got bfloat16", kv.bfloat16()),
        (TypeError, "kv must be a tensor of bfloat16, .* got int32", kv.int()),
    ):
        with pytest.raises(error, match=f"^Engram.forward: {words}"):
            module(hidden, kv=given)
    for words, out in ((r"shape \[3, 72\], got \[3, 48\]", kv[:, :48]), ("a tensor of float32, got", kv.bfloat16())):
        with pytest.raises((TypeError, ValueError), match=f"^Engram.project: out must (be|have) {words}"):
            module.project(rows, out)
    with pytest.raises(ValueError, match=r"^Engram.project: rows must have shape \[..., C, R\]"):
        module.project(kv)
    with pytest.raises(ValueError, match="has no convolution and takes no conv_state"):
        module(hidden, ids, conv_state=module.new_conv_state(1))
    with pytest.raises(ValueError, match=r"rows must have shape \[..., C, R\], C = 4 and R = 8, got \[3, 32\]"):
        module(hidden, rows=torch.zeros(3, 32))


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_kernels(device, form):
    """The same module on kernels, with the same bits where autograd records, and on the references."""
    module, plan, tables = built(form, device)
    hidden, ids = torch.randn(6, 2, 24, device=device), torch.randint(0, 40, (6,), device=device)
    rows = hash_lookup(ids, plan, tables)[-1]
    with torch.no_grad():
        result = module(hidden, ids)
    recorded = module(hidden, ids)
    assert recorded.requires_grad and torch.equal(result, recorded)
    assert torch.equal(module(hidden, kv=module.project(rows)), recorded)
    exact = module.double().cpu()(hidden.double().cpu(), rows=rows.double().cpu())
    torch.testing.assert_close(result.double().cpu(), exact, rtol=1e-5, atol=1e-5)
