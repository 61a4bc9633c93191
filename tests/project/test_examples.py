"""Programs under examples/ run as they are, most in a process of their own, and the README's ten lines nearly so."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from engram_kernels import EngramState
from engram_kernels.serving.state import EngramStep
from engram_kernels.testing import oracles
from tests.support.documents import ROOT, Document
from tests.support.patience import HANG


def run(name, *arguments):
    """Output of one example. It sees no GPU: there its tables would be pinned, beside those of other tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"  # small tensors, and other tests beside it
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_quickstart():
    lines = run("quickstart.py").splitlines()
    assert len([line for line in lines if line.startswith("EngramTable(") and "x 32 bfloat16, cpu" in line]) == 2
    assert lines[2:] == [
        "rows   [2, 6, 8, 32] = layers, tokens, columns, row width",
        "hidden [6, 4, 256] = tokens, branches, hidden size",
    ]


def test_replace_demo():
    replaced, difference = run("replace_demo.py").splitlines()
    assert replaced == "replaced: engrams.1, engrams.3"
    assert float(re.match(r"largest difference: (\S+) at outputs up to \d", difference)[1]) < 1e-4


def test_tensor_parallel():
    """Ranks' rows are the whole's bit for bit, and fp8 rows go to the projection as they are."""
    rows, projected = run("tensor_parallel.py").splitlines()
    assert rows == "4 ranks of 4 columns: rows equal the whole's"
    assert float(re.match(r"layer 1's key and value from fp8 rows: largest error (\S+) of", projected)[1]) < 1e-5


def test_train_ranks():
    """Dense weights by DDP and FSDP2, tables as copies and sharded, which three ranks do not divide: each step is that
    of one process."""
    lines = run("train_ranks.py", "3").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{a}, {b}" for a in ("DDP", "FSDP2") for b in ("copies", "sharded")
    ]
    for line in lines:
        furthest, moved = re.search(r": (\S+) from one process at most; rows moved by (\S+)$", line).groups()
        assert float(furthest) < 1e-4 and float(moved) > 0.1


@pytest.mark.parametrize(("train", "moves"), [("all", True), ("engram", True), ("adapters", False)])
def test_train_transformers(monkeypatch, train, moves):
    """The whole model, the new layer in a frozen model, adapters beside a frozen layer: what learns and what not."""
    pytest.importorskip("transformers")
    program, kept = example("train_transformers"), {}
    optimizer, freeze = program.RowAdagrad, program.freeze

    def frozen(model, what):
        freeze(model, what)
        kept.update(model=model, before={name: x.detach().clone() for name, x in model.named_parameters()})
        kept["rows"] = model.engram.table.weight.clone()

    class Watched(optimizer):
        def close(self):
            kept["moved"] = not torch.equal(self.tables[0].weight, kept["rows"])
            super().close()

    monkeypatch.setattr(program, "freeze", frozen)
    monkeypatch.setattr(program, "RowAdagrad", Watched)
    losses = program.main(["--steps", "12", "--train", train])
    assert losses[-1] < losses[0] - 0.05 and kept["moved"] == moves
    changed = {name for name, x in kept["model"].named_parameters() if not torch.equal(x, kept["before"][name])}
    for name in kept["before"]:
        learns = {"all": True, "engram": name.startswith("engram."), "adapters": ".down." in name or ".up." in name}
        assert (name in changed) == learns[train], name


def test_serve():
    """A small engine, with drafts right and wrong, gives the tokens of generation without any state."""
    first, drafts, share, same = run("serve.py").splitlines()
    assert re.fullmatch(r"7 requests, 476 tokens in \S+ s on cpu: \d+ tokens/s", first)
    taken, drafted = map(int, re.fullmatch(r"drafts: (\d+) of (\d+) accepted", drafts).groups())
    assert 0 < taken < drafted
    assert re.fullmatch(r"Engram's share of a step of \d+ tokens: -?\d+%", share)
    assert same == "the tokens of one-shot generation: 7 of 7 requests"


@pytest.mark.parametrize("method", ["commit", "reset"])
def test_serve_needs_its_state(method, monkeypatch):
    """Negative control: where slots are never moved on, or never emptied, tokens are others."""
    serve, threads = example("serve"), torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(EngramStep if method == "commit" else EngramState, method, lambda *_: None)
    with torch.inference_mode():
        model = serve.Transformer()
        requests = [serve.Request([number, 2, 3], 9) for number in range(6)]
        serve.Engine(model).serve(requests)
        expected = [serve.one_shot(model, [number, 2, 3], 9) for number in range(6)]
    torch.set_num_threads(threads)
    assert all(len(request.tokens) == 9 for request in requests)
    assert [request.tokens for request in requests] != expected


@pytest.fixture(scope="module")
def gemma():
    """The example's small models run on one thread, and see no GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield example("gemma_per_layer")
    torch.set_num_threads(threads)


def test_gemma_per_layer(gemma, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gemma.main()
    first, same, second, as_well = capsys.readouterr().out.splitlines()
    assert first.startswith("Gemma3nForCausalLM: EngramTable(1,200 x 16 bfloat16, cpu")
    assert second.startswith("Gemma4ForCausalLM: EngramTable(1,280 x 16 bfloat16, cpu")
    assert same == as_well == "logits and generated tokens equal"


@pytest.mark.parametrize(("dtype", "placement"), [(torch.float32, "cpu"), (torch.bfloat16, "host")])
@pytest.mark.parametrize("family", [0, 1], ids=["gemma3n", "gemma4"])
@torch.no_grad()
def test_gemma_per_layer_keeps_every_bit(gemma, family, dtype, placement):
    """Of the padding row, which holds numbers here, and of a scale, sqrt(8), that half precision rounds."""
    model = gemma.small_models(width=8)[family].to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.get_per_layer_input_embeddings().embed_scale.data = torch.tensor(8**0.5)  # float32 in any model
    rows, vocab = model.config.vocab_size_per_layer_input, model.config.vocab_size
    ids = torch.tensor([[0, 1, rows - 1, vocab - 1], [vocab - 2, 0, 7, 7]])
    ids = ids if family == 0 else ids.clamp(max=rows - 1)
    text = model.model
    logits, inputs = model(ids).logits, text.get_per_layer_inputs(ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert inputs.any(-1).all()

    table = gemma.move_per_layer_embeddings(model, placement)
    assert table.placement == placement
    assert torch.equal(text.get_per_layer_inputs(ids), inputs) and torch.equal(model(ids).logits, logits)
    assert parameters - sum(parameter.numel() for parameter in model.parameters()) == table.rows * table.width
    table.weight[7 * 4 : 8 * 4] += 1  # the four layers' rows of token 7
    changed = (model(ids).logits != logits).any(-1)
    assert changed.tolist() == [[False] * 4, [False, False, True, True]]


@torch.no_grad()
def test_gemma_per_layer_ids_outside(gemma):
    """Gemma-3n reads row 0 for them, as before; Gemma-4, where transformers fails, zeros."""
    first, second = gemma.small_models()
    ids = torch.tensor([[-1, -(2**40), 299, 300, 319, 2**40]])
    expected = first.model.get_per_layer_inputs(ids)
    gemma.move_per_layer_embeddings(first, "cpu")
    assert torch.equal(first.model.get_per_layer_inputs(ids), expected)
    with pytest.raises(IndexError):
        second.model.get_per_layer_inputs(ids)
    gemma.move_per_layer_embeddings(second, "cpu")
    read = second.model.get_per_layer_inputs(ids).flatten(-2).any(-1)
    assert read.tolist() == [[False, False, True, True, True, False]]


def test_gemma_per_layer_needs_16_bytes(gemma):
    model = gemma.small_models(width=4)[0].bfloat16()
    embedding = model.get_per_layer_input_embeddings()
    with pytest.raises(ValueError, match="multiple of 16, got 4 x bfloat16 = 8"):
        gemma.move_per_layer_embeddings(model, "cpu")
    assert model.get_per_layer_input_embeddings() is embedding


def example(name):
    """A program under examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks
    spec.loader.exec_module(module)
    return module


def test_the_readmes_fifteen_lines():
    """Rows by the oracle's ids, and the gate in float64."""
    lines, last = Document("README.md").blocks()[0].rsplit("\nhidden = ", 1)
    names: dict = {}
    exec(lines, names)
    before, plan = names["hidden"], names["plan"]
    constants = (plan.multipliers.tolist(), plan.primes.tolist())
    row_ids = oracles.hash_rows(names["token_ids"].tolist(), *constants, pad=0, eos=0)
    for layer, table in enumerate(names["tables"]):
        assert torch.equal(names["rows"][layer], table.weight[torch.as_tensor(row_ids)[:, layer]])
    exec(f"hidden = {last}", names)
    read = (before, *(names[name] for name in ("key", "value", "norm", "norm")))
    exact = oracles.gated(*(x.double().numpy() for x in read), eps=names["config"].eps or 2.0**-23)
    torch.testing.assert_close(names["hidden"].double(), torch.from_numpy(exact), rtol=1e-5, atol=1e-5)
