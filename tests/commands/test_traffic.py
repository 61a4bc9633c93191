"""The traffic model of tables over ranks: hand-computed numbers, crossovers, and the command."""

import re
from pathlib import Path

import pytest

from engram_kernels import EngramConfig
from engram_kernels.__main__ import main
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.size import rank_sections
from engram_kernels.commands.traffic import LINKS, SHARES, fetched_share, most_ranks


def test_a_step_of_v41_by_hand():
    """8,192 tokens of 24 rows; 7 of 8 rows are another rank's; a row is 264 B and its id 4 B."""
    sections = rank_sections("deepseek_v41_flash", 8, 8192)
    share = (0.57 + 0.75 + 0.83) / 3
    exchanged = share * 8192 * 24 * 7 / 8 * 268 + 8 * 7
    line = dict.fromkeys(sections[1][1][1].split())
    assert {f"{exchanged / 1e6:.2f}", f"{exchanged / 450e3:.1f}", f"{exchanged / 50e3:.1f}"} <= set(line)
    # A row is read in 3 requests with headers of 20 B and moves 288 B; 54.5 GB/s is 128 of 148 B on the wire.
    assert f"{share * 8192 * 24 * (288 + 60) * 128 / 148 / 54.5e3:.1f}" in line
    gradients = 8192 * 24 * 7 / 8 * 516 + 8 * 7
    assert f"{gradients / 1e6:.2f}" in sections[2][0][1]
    assert f"{(8192 * 24 * 516 + 8) * 7 / 1e6:.2f}" in sections[2][1][1]


def test_the_document_shows_these_numbers():
    """docs/ranks.md: every number of its table, of its crossovers and of a part's size."""
    text = (Path(__file__).parents[2] / "docs/ranks.md").read_text()
    _, lookups, gradients, crossovers = rank_sections("deepseek_v41_flash", 8, 8192)
    cells = [re.findall(r"[\d.]+(?= MB| us)", line) for _, line in (*lookups[1:], *gradients)]
    copy, cached, sharded, copies = cells[0][:2], cells[2][:2], cells[3], cells[4]
    rows = {
        "lookup, a copy per host": copy,
        "the same behind a cache of 1,048,576": cached,
        "lookup, sharded": cells[0][2:],
        "the same with `cache_bytes` for 1,048,576": cells[2][2:],
        "bfloat16 gradients, sharded": sharded,
        "bfloat16 gradients, every rank a copy": copies,
    }
    for label, (moved, *times) in rows.items():
        (line,) = re.findall(rf"^\| {label} \|(.*)\|$", text, re.M)
        shown = [f"{moved} MB", *(f"{float(time):,.0f} us" for time in times)]
        assert [cell.strip() for cell in line.split("|") if cell.strip()] == shown, label
    lines = dict(crossovers[1:])
    assert all(line.startswith("faster for any number of ranks") for line in lines.values())
    misses = [re.search(r"misses (\d+)%", line)[1] for line in lines.values()]
    assert f"miss less than {misses[0]} %" in text
    tokens = [re.search(r"(\d+) tokens earn", line)[1] for line in lines.values()]
    assert f"takes {tokens[0]} tokens over NVLink to earn back, {tokens[1]} over PCIe, {tokens[2]} over Infini" in text
    times = [float(time) for time in (copy[1], cells[0][3], cells[0][4])]
    assert (
        f"read {times[0] / times[1]:.1f} times as fast" in text and f"at best {times[0] / times[2]:.1f} times" in text
    )
    for ranks, size in ((8, "23.6 GiB"), (16, "11.8 GiB")):
        part = rank_sections("deepseek_v41_flash", ranks)[0][1][1]
        assert f"all layers {size} of 188.8 GiB" in part and f"{size} at {ranks}" in text


@pytest.mark.parametrize("ranks", [2, 3, 9, 12])
def test_the_most_ranks_are_where_both_take_as_long(ranks):
    exchange, host = 6.0, 6.0 * (ranks - 1) / ranks
    assert most_ranks(host, exchange) == pytest.approx(ranks)
    assert most_ranks(host * 0.999, exchange) < ranks < most_ranks(host * 1.001, exchange)
    assert most_ranks(6.0, exchange) == most_ranks(7.0, exchange) == float("inf")


def test_shares_follow_the_orders():
    """Fewer rows with a larger cache, more with a higher order; a model of two orders takes the first two."""
    for by_order in SHARES.values():
        assert list(by_order) == sorted(by_order)
        assert fetched_share(EngramConfig.engram_27b(), by_order) == pytest.approx(sum(by_order[:2]) / 2)
        assert fetched_share(EngramConfig.deepseek_v41_flash(), by_order) == pytest.approx(sum(by_order) / 3)
    means = [fetched_share(EngramConfig.deepseek_v41_flash(), by_order) for by_order in SHARES.values()]
    assert means == sorted(means, reverse=True)
    assert 1 / means[-1] == pytest.approx(2.76, abs=0.01)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ranks", [2, 1000])
def test_sections_say_what_they_are(name, ranks):
    sections = rank_sections(name, ranks, hit_rate=0.25)
    assert "counted, not measured" in sections[0][0][1]
    assert any("hit rate 0.25" in text for _, text in sections[1])
    assert [label for label, _ in sections[3]] == ["crossovers", *LINKS]


def test_command(capsys):
    assert main(["size", "--config", "engram_27b", "--ranks", "16", "--tokens", "2,048"]) == 0
    text = capsys.readouterr().out
    for fact in ("16 ranks", "2,048 tokens a rank", "NVLink 450", "cache of 1,048,576", "by columns", "crossovers"):
        assert fact in text, fact


@pytest.mark.parametrize("words", ["1", "2.5", "many", "70000"])
def test_mistakes_take_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["size", "--ranks", words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"argument --ranks: expected a whole number from 2 to 65536, got '{words}'" in error
