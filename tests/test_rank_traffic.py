"""The traffic model of tables over ranks: hand-computed numbers, crossovers, and the command."""

import pytest

from engram_kernels import EngramConfig
from engram_kernels.__main__ import main
from engram_kernels.rank_traffic import LINKS, SHARES, fetched_share, most_ranks, rank_sections
from engram_kernels.size import PRESETS


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
