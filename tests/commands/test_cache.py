"""``python -m engram_kernels cache``: rates against counts by hand, every preset, and mistakes."""

import importlib.util
import re

import numpy as np
import pytest
import torch

from engram_kernels import EngramConfig, HashPlan
from engram_kernels.__main__ import main
from engram_kernels.cache.prediction import (
    CacheRates,
    cache_bytes,
    entries_within,
    link_bytes,
    measure_rates,
    text_keys,
)
from engram_kernels.commands import cache as cache_command
from engram_kernels.commands import console
from engram_kernels.commands.presets import PRESETS
from engram_kernels.reference.cache.simulator import ngram_keys, scramble
from tests.ops.test_hashing import small_plan

V41 = EngramConfig.deepseek_v41_flash()


def test_rates_are_those_of_the_second_half():
    keys = scramble(np.array([[1, 2, 1, 3, 1, 1, 4, 4], [0, 5, 6, 7, 0, 5, 8, 9]]))
    keys[1, [0, 4]] = 0
    rates = measure_rates(keys, 64, 2, ways=8)
    # Calls of two tokens; the last four tokens count: 1 1 | 4 4 of one group, none 5 | 8 9 of the other.
    assert rates.hits == (2 / 4, 1 / 3) and rates.read == (1 / 4, 2 / 3)
    assert rates.hit == pytest.approx(5 / 12) and rates.gain == pytest.approx(2 / (1 / 4 + 2 / 3))
    without = measure_rates(keys, 0, 2)
    assert without.hits == (0, 0) and without.read == (2 / 4, 3 / 3)
    assert measure_rates(keys, 3, 2, ways=8).entries == 3 and measure_rates(keys, 21, 2, ways=8).entries == 16
    seen = []
    assert measure_rates(keys, 64, 3, tell=lambda *at: seen.append(at)).read == (1 / 3, 1 / 2)  # 3 1 1 and 7 - 5
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="at least two calls of 5 tokens, got 8"):
        measure_rates(keys, 64, 5)


def test_a_cache_larger_than_the_text_reads_each_ngram_once():
    """Whatever the policy: every n-gram that came before is a hit."""
    ids = np.random.default_rng(0).integers(0, 40, 600)
    keys = text_keys(ids, small_plan(layers=1))
    rates = measure_rates(keys, 1 << 16, 50)
    for order, of_order in enumerate(keys.tolist()):
        known, hits, read = set(), 0, 0
        for start in range(0, 600, 50):
            call = of_order[start : start + 50]
            if start >= 300:
                hits += sum(key in known for key in call)
                read += len(set(call) - known)
            known |= set(call)
        assert rates.hits[order] == hits / 300 and rates.read[order] == read / 300


def test_chunks_of_a_text_are_one_sequence(monkeypatch):
    plan = small_plan(layers=2, max_ngram=4)
    ids = torch.randint(0, 40, (100,), generator=torch.Generator().manual_seed(1))
    whole = ngram_keys(ids, plan.select(layers=[0]))
    for chunk in (2, 7, 100):
        monkeypatch.setattr("engram_kernels.cache.prediction._CHUNK", chunk)
        assert (text_keys(ids.numpy(), plan) == whole).all()


def test_bytes_of_v41():
    """1 M entries of 3 orders in 2 layers are 12.7 GB of rows and scales; 16 bytes beside each for key and stamp."""
    assert cache_bytes(V41, 10**6) == 10**6 * 3 * 2 * (2112 + 16)
    assert entries_within(V41, cache_bytes(V41, 77)) == 77 and entries_within(V41, cache_bytes(V41, 77) - 1) == 76
    assert link_bytes(V41, CacheRates(0, (0, 0, 0), (1, 1, 1))) == 2 * 6336
    assert link_bytes(V41, CacheRates(8, (0, 0, 0), (0.5, 0.25, 0.25))) == 2 * 2112


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode_batch(self, contents, add_special_tokens):
        assert add_special_tokens is False
        return [type("Encoding", (), {"ids": list(content.encode())}) for content in contents]


def map_of(tokenizer):
    ids = torch.arange(129_280)
    return torch.where(ids < V41.vocab_size, ids, 0)


@pytest.fixture
def text(monkeypatch, tmp_path):
    """A text whose tokens are its bytes."""
    monkeypatch.setattr(console, "has_rich", lambda: False)
    monkeypatch.setattr(cache_command, "_tokenizer", lambda path: Bytes())
    monkeypatch.setattr(cache_command, "build_token_map", map_of)
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the rat sat on the cat; " * 6)
    return path


def run(capsys, *words):
    """(exit code, output, errors)."""
    code = main(["cache", *map(str, words)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_with_a_plot(text, tmp_path, capsys, name):
    config, picture = getattr(EngramConfig, name)(), tmp_path / "out.png"
    options = ("--config", name, "--tokens", "51", "--entries", "8", "--entries", "1,000", "--link", "50")
    plotted = name == PRESETS[0] and importlib.util.find_spec("matplotlib") is not None
    code, out, _ = run(capsys, "--text", text, *options, *(("--plot", picture) if plotted else ()))
    assert code == 0, out
    plan = HashPlan.build(config, None if config.window == "eos" else cache_command.build_token_map(None))
    keys = text_keys(np.frombuffer(text.read_bytes(), dtype=np.uint8), plan)
    for entries, shown in ((0, "none, read once"), (8, "8"), (1000, "1,000")):
        rates = measure_rates(keys, entries, 51)
        line = next(line for line in out.splitlines() if line.startswith(f"{shown}  "))
        assert f" {link_bytes(config, rates):,.0f} " in line and f" {rates.gain:.2f}x " in line
        assert "".join(f"{share:>9.3f}" for share in rates.hits) + f"{rates.hit:>7.3f}" in line
    assert "counted by simulation, not measured" in out and re.search(r"^link assumed +50 GB/s", out, re.M)
    assert name != PRESETS[0] or "0.00 GB" in out
    assert not plotted or picture.stat().st_size > 10_000


def test_memory_may_be_given_instead(text, capsys):
    code, out, _ = run(capsys, "--text", text, "--tokens", "51", "--bytes", "2MB", "--ways", "4")
    entries = 2_000_000 // cache_bytes(V41, 1) // 4 * 4
    assert code == 0 and re.search(rf"^{entries}  ", out, re.M) and "sets of 4 ways" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tokens", "500"], "text.txt has 306 tokens, and two calls of --tokens 500 need 1,000"),
        (["--bytes", "1KB"], "--bytes 1,000 holds no entry of each order; one of each takes 12,768"),
        (["--bytes", "99999GB"], "--bytes must hold fewer than 2^31 entries of each order, got 7,83"),
        (["--plot", "out.txt"], "--plot must end as an image does, such as .png, got 'out.txt'"),
        (["--text", "/"], "--text /: Is a directory"),
        (["--config", "TMP/config.json"], "/config.json: EngramConfig.from_hf: config has neither"),
    ],
)
def test_mistakes_take_one_line(text, tmp_path, capsys, words, message):
    (tmp_path / "config.json").write_text("{}")
    words = [word.replace("TMP", str(tmp_path)) for word in words]
    if words[0] == "--plot":
        pytest.importorskip("matplotlib")
    code, out, errors = run(capsys, "--text", text, *words)
    assert code == 2 and out == "" and errors.count("\n") == 1
    assert errors.startswith("engram-kernels cache: ") and message in errors


def test_texts_and_tokenizers_that_cannot_be_read(text, tmp_path, capsys, monkeypatch):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert run(capsys, "--text", latin)[2].endswith(f"--text {latin}: not UTF-8\n")
    monkeypatch.undo()
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    code, _, errors = run(capsys, "--text", text, "--tokenizer", broken)
    assert code == 2 and f"--tokenizer {broken}: " in errors and errors.count("\n") == 1
