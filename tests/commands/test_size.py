"""The traffic model against real tensors' bytes, and its command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramConfig, EngramTable
from engram_kernels.__main__ import main
from engram_kernels.commands import presets
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.size import TOKENS, size_sections
from engram_kernels.commands.traffic import LINK, floor_seconds, layer_traffic, spans
from engram_kernels.geometry.row_format import FORMATS
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
T = 3


def config_of(name):
    return getattr(EngramConfig, name)()


def nbytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_those_of_tensors(name):
    config = config_of(name)
    branches, width, columns = config.branches, config.hidden_size, config.columns
    table = EngramTable.empty(5, config.row_width, config.format, placement="cpu")
    ids = torch.zeros(T, columns, dtype=torch.int64)
    gathered = table.weight.view(torch.uint8)[ids]
    hidden = torch.empty(T, branches, width, dtype=torch.bfloat16)
    kv = torch.empty(T, (branches + 1) * width, dtype=torch.bfloat16)
    value = kv[:, -width:]
    stored = table.weight.dtype if table.weight.element_size() == 1 else torch.bfloat16
    traffic = layer_traffic(config, T)
    assert traffic.rows == ids.numel()
    assert traffic.row_bytes == nbytes(gathered)
    assert traffic.scale_bytes == (nbytes(table.scale[ids]) if table.format.group else 0)
    assert traffic.out_bytes == nbytes(torch.empty(T, columns, config.row_width, dtype=torch.bfloat16))
    assert traffic.weight_bytes == nbytes(torch.empty(kv.shape[1], columns * config.row_width, dtype=stored))
    assert traffic.projected_bytes == nbytes(kv)
    if config.conv_kernel:  # the first pass reads hidden and kv, the second hidden and value, and writes
        assert traffic.gate_bytes == nbytes(hidden, kv, hidden, value, hidden)
    else:
        assert traffic.gate_bytes == nbytes(hidden, kv, hidden)


def test_known_numbers_of_v41():
    traffic = layer_traffic(config_of("deepseek_v41_flash"), 1)
    assert traffic.gather_bytes == 6_336 and traffic.gate_bytes == 133_120 and traffic.weight_bytes == 157_286_400
    # Two requests of 128 B and one for the 8 scale bytes, which the link moves as a sector of 32.
    assert traffic.requests == 72
    rate = traffic.gather_bytes / floor_seconds(traffic)["gather"] / 1e9
    assert rate == pytest.approx(47.8, abs=0.05), "the third request costs an eighth of the link"
    unscaled = dataclasses.replace(traffic, scale_bytes=0, wire_bytes=24 * 2 * 148)
    assert unscaled.gather_bytes / floor_seconds(unscaled)["gather"] / 1e9 == pytest.approx(LINK)


@pytest.mark.parametrize(
    "size, line, expected", [(256, 128, 2), (160, 128, 2), (128, 128, 1), (8, 32, 1), (24, 32, 1.5), (2048, 128, 16)]
)
def test_lines_a_record_touches(size, line, expected):
    brute = [((k * size + size - 1) // line) - (k * size // line) + 1 for k in range(line)]
    assert spans(size, line) == pytest.approx(sum(brute) / len(brute)) == pytest.approx(expected)


def test_hits_leave_the_link():
    traffic = layer_traffic(config_of("deepseek_v41_flash"), 4096)
    none, half, all_ = (floor_seconds(traffic, hit_rate=rate)["gather"] for rate in (0, 0.5, 1))
    assert half == pytest.approx(none / 2)
    assert all_ == pytest.approx((traffic.gather_bytes + traffic.out_bytes) / 4300e9)
    assert floor_seconds(traffic, link=109.0)["gather"] == pytest.approx(none / 2)
    assert floor_seconds(traffic, memory=2150.0)["gate"] == pytest.approx(traffic.gate_bytes / 2150e9)


@pytest.mark.parametrize("name", PRESETS)
def test_sections_say_what_they_are(name):
    head, tables, traffic = size_sections(name)
    assert "counted, not measured" in head[0][1]
    config = config_of(name)
    assert len(tables) == len(config.layers) + 1
    assert f"{config.rows_per_layer[0]:,} rows" in tables[0][1]
    assert len(traffic) == len(TOKENS) + 2


def test_command(capsys):
    assert main(["size", "--config", "engram_27b", "--tokens", "2,048", "--link", "50", "--hit-rate", "0.5"]) == 0
    text = capsys.readouterr().out
    for fact in ("engram_27b", "36,199,972 rows", "2,048", "link 50 GB/s", "hit rate 0.5", "gate + conv", "2.621 MB"):
        assert fact in text, fact


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "gpt"], "engram-kernels size: argument --config: expected one of deepseek_v41_flash, "),
        (["--hit-rate", "2"], "argument --hit-rate: expected a number from 0 to 1, got '2'"),
        (["--link", "fast"], "argument --link: expected a positive number of GB/s, got 'fast'"),
        (["--tokens", "0"], "argument --tokens: expected a whole number of at least 1, got '0'"),
    ],
)
def test_mistakes_take_one_line(words, message, capsys):
    try:
        code = main(["size", *words])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["size", "info"])
def test_an_output_that_is_full(command):
    """One line and an exit code, whatever the command."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "engram_kernels", command],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"engram-kernels {command}: [Errno 28] No space left on device"]


def test_another_format_of_rows(capsys):
    """Half the bytes a row: the traffic that counting the bytes of such rows gives, at every hit rate."""
    assert set(presets.FORMATS) == set(FORMATS) - {"float64"}, "which no kernel reads"
    for name, row, scales in (("nvfp4", 128, 16), ("mxfp4", 128, 8), ("bfloat16", 512, 0)):
        assert main(["size", "--format", name, "--json", "--tokens", "64"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["format"] == name and facts["config"] == f"deepseek_v41_flash in {name}"
        assert facts["traffic"][0]["link_bytes"] == 64 * 24 * (row + scales)
        assert facts["layers"][0]["scale_bytes"] == 384_006_168 * scales
    assert main(["size", "--config", "engram_27b", "--format", "nvfp4"]) == 2
    assert "--format nvfp4: EngramConfig: bytes of a row must be a multiple of 16" in capsys.readouterr().err
