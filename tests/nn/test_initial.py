"""New layers: a plan, a table and a module from a config, whose rows and weights begin alike wherever they are."""

import dataclasses
import os
import re

import pytest
import torch

from engram_kernels import Engram, EngramConfig, HashPlan, RowAdagrad, build_token_map, lookup
from engram_kernels.checkpoints import parallel
from engram_kernels.nn import initial
from tests.nn.test_engram import FORMS
from tests.support.checkpoints import raw
from tests.support.documents import ROOT

PLAIN = EngramConfig(
    layers=(1, 3), max_ngram=3, heads=2, row_width=32, table_sizes=(500, 700), hidden_size=16, branches=1,
    raw_vocab_size=50, window="eos", eos_id=3, format="float32", conv_kernel=4,
)  # fmt: skip


def build(config=PLAIN, layer=1, *arguments, placement="cpu", **options):
    return Engram.build(config, layer, *arguments, placement=placement, **options)


def test_what_a_new_layer_begins_with():
    module = build(trainable=True)
    weight = module.table.weight
    plan = HashPlan.build(PLAIN)
    assert len(weight) == plan.rows_per_layer[0] and module.table.requires_row_grad
    assert weight.std() == pytest.approx(0.02, rel=0.02) and abs(float(weight.mean())) < 1e-4
    assert module.wkv.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert not module.conv_weight.any() and module.q_weight.eq(1).all() and module.conv_norm.eq(1).all()
    hidden, ids = torch.randn(7, 1, 16), torch.randint(0, 50, (7,))
    out = module(hidden, ids)
    assert out.shape == hidden.shape and torch.isfinite(out).all()
    rows = RowAdagrad(module.table)
    out.sum().backward()
    rows.step()
    assert not torch.equal(module.table.weight, build().table.weight)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16", "e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4"])
def test_rows_depend_on_seed_and_layer_alone(monkeypatch, format):
    """Not on placement nor on threads; in every format they are the same values, rounded."""
    monkeypatch.setattr(initial, "CHUNK", 4 * 32 * 100)  # a dozen chunks
    config = dataclasses.replace(PLAIN, format=format)
    first, again = build(config), build(config, placement="host")
    assert torch.equal(raw(first.table.weight), raw(again.table.weight))
    monkeypatch.setattr(parallel, "THREADS", 1)
    plain = build().table.weight
    values = lookup(first.table, torch.arange(first.table.rows), out_dtype=torch.float32)
    # Between two numbers of four bits there is a quarter of the greater one, of its group's greatest at least 1 / 12.
    close = dict(rtol=2**-2, atol=0.02) if "fp4" in format else dict(rtol=2**-4, atol=2e-5)
    torch.testing.assert_close(values, plain, **close)
    others = build(config, seed=1), build(config, layer=3)
    for other in others:
        assert not torch.equal(raw(other.table.weight[:100]), raw(first.table.weight[:100]))
    # No two chunks are alike.
    chunks = plain[: len(plain) // 100 * 100].view(-1, 100, 32)
    assert len({tuple(chunk[0].tolist()) for chunk in chunks}) == len(chunks) > 5


def test_a_function_that_begins_otherwise():
    def ones(module):
        module.table.weight.fill_(1)
        torch.nn.init.zeros_(module.wkv.weight)

    module = build(init=ones)
    assert module.table.weight.eq(1).all() and not module.wkv.weight.any()
    assert build(init=0).table.weight.eq(0).all()


def test_token_maps_and_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    config = dataclasses.replace(FORMS["paper"], vocab_size=None)
    layer = config.layers[0]
    module = build(config, layer, tokenizer)
    other = build(config, layer, build_token_map(tokenizer))
    assert module.table.token_map == other.table.token_map is not None
    with pytest.raises(ValueError, match=r"^HashPlan.build: this config needs the token map of its tokenizer"):
        build(config, layer)


def test_shared_tables_are_published():
    module = build(placement="shared", name=f"initial-{os.getpid()}")
    with module.table:
        assert module.table.weight.any() and module.table.page_bytes


def test_the_guides_block():
    """As it stands, after the page's first, whose names it uses."""
    text = (ROOT / "docs/training.md").read_text()
    block = re.search(r"## Beginning.*?```python\n(.*?)```", text, re.S)[1]
    names = dict(RowAdagrad=RowAdagrad, torch=torch)
    exec(block, names)
    assert names["hidden"].shape == (2, 9, 64) and names["engram"].table.requires_row_grad
    names["hidden"].sum().backward()
    names["optimizer"].step()


def test_errors_leave_nothing(monkeypatch):
    closed = []
    close = initial.EngramTable.close
    monkeypatch.setattr(initial.EngramTable, "close", lambda self: (closed.append(self), close(self)))

    def fails(module):
        raise RuntimeError("init failed")

    for call, error, words in (
        (lambda: build(layer=2), ValueError, r"^Engram.build: layer must be one of the config's, \(1, 3\), got 2"),
        (lambda: build(init=fails), RuntimeError, "init failed"),
        (lambda: build(init=-1), ValueError, "^Engram.build: init must be .*, got -1"),
        (lambda: build(dataclasses.replace(PLAIN, format="e4m3_ue8m0"), trainable=True), ValueError, "train a master"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert len(closed) == 2 and all(table.closed for table in closed)
