"""The programs under examples/ run as they are, in a process of their own, and the README's ten lines nearly so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from engram_kernels import EngramConfig, ngram_hash

from . import oracles, tables

ROOT = Path(__file__).parents[1]


def run(name):
    """Output of one example. It sees no GPU: there its tables would be pinned, beside those of other tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
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


def test_the_readmes_ten_lines(tmp_path):
    """As they stand, but for the device, on a checkpoint of the documented names and a tokenizer of 60 words."""
    sizes = dict(max_ngram=4, heads=2, row_width=32, table_sizes=(40,) * 3, hidden_size=16, branches=2)
    rows = EngramConfig(layers=(1, 4), raw_vocab_size=60, format="e4m3_ue8m0", **sizes).rows_per_layer
    engram = dict(layer_ids=[1, 4], num_embeddings=list(rows), max_ngram_size=4, n_heads=2, head_dim=32, vocab_size=40)
    engram |= dict(compressed_vocab_size=60, pad_token_id=2)
    config = {f"engram_{name}": value for name, value in engram.items()}
    config |= dict(hidden_size=16, hc_mult=2, vocab_size=60, rms_norm_eps=1e-6)
    names = dict(
        checkpoint_config=config,
        tokenizer=Tokenizer(models.WordLevel({f"word {n}": n for n in range(60)}, unk_token="word 0")),
        token_ids=torch.randint(0, 60, (7,)),
        hidden=torch.randn(7, 2, 16).bfloat16(),
        wkv=torch.randn(48, 192).bfloat16(),
        query_norm=torch.rand(2, 16),
        key_norm=torch.rand(2, 16),
        layer=1,
        H=2,
        D=16,
    )
    parts = [tables.random_parts(count, 32, "e4m3_ue8m0") for count in rows]
    before, given = names["hidden"], [(w.view(torch.uint8) & 0x3F, s & 0x7F) for w, s in parts]
    weights = [(weight.view(torch.float8_e4m3fn), scale) for weight, scale in given]
    names["folder"] = tmp_path
    stored = {}
    for number, (weight, scale) in zip([1, 4], weights, strict=True):
        embed = f"layers.{number}.engram.embed"
        stored |= {f"{embed}.weight": weight, f"{embed}.scale": scale.view(torch.float8_e8m0fnu)}
    save_file(stored, tmp_path / "model.safetensors")
    code = re.search(r"## In ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert '"cuda"' in code
    exec(code.replace('"cuda"', '"cpu"'), names)
    row_ids = ngram_hash(names["token_ids"], names["plan"])[:, 1]
    expected = tables.rounded(tables.expected_values(*weights[1], row_ids), torch.bfloat16)
    assert torch.equal(names["rows"][1], expected)
    read = (before, *(names[name] for name in ("key", "value", "query_norm", "key_norm")))
    exact = torch.from_numpy(oracles.gated(*(x.double().numpy() for x in read), eps=1e-6))
    torch.testing.assert_close(names["hidden"].double(), exact, rtol=2**-7, atol=1e-2)
