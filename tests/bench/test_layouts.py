"""python -m bench layouts: pages that a file of copies would save, on texts whose answer is known."""

import numpy as np

from bench.__main__ import main
from bench.cache import layouts
from engram_kernels import EngramConfig

CONFIG = EngramConfig.deepseek_v41_flash()


def test_a_text_that_never_repeats_saves_nothing():
    ids = np.random.default_rng(0).integers(1000, 90_000, 2000).astype(np.int32)
    (found,) = layouts.simulate(ids, CONFIG, (1 << 30,))
    assert found.file_bytes == 0 and found.rows == found.together == 3 * 8 and found.best == 3


def test_what_was_frequent_is_one_page_where_the_cache_forgot_it():
    """One sentence again and again, too long for a cache of one set an order."""
    sentence = np.random.default_rng(0).permutation(np.arange(1000, 1400)).astype(np.int32)
    ids = np.tile(sentence, 10)
    smallest = 3 * 8 * (8 * 264 + 16)
    (found,) = layouts.simulate(ids, CONFIG, (smallest,))
    assert 0.9 * 24 < found.rows <= 24 and found.together == found.rows / 8 == found.best
    assert found.index_bytes == 12 * (found.file_bytes // 4096) and found.file_bytes // 4096 >= 3 * 400
    (kept,) = layouts.simulate(ids, CONFIG, (1 << 30,))
    assert kept.rows == kept.together == 0


def test_duplicates_of_a_call_are_read_once():
    keys = np.array([[5, 5, 0, 7, 5]], dtype=np.int64)
    assert layouts.missed(keys, 0, 1).tolist() == [[True, False, False, True, False]]


def test_the_command_prints_a_line_for_each_size(capsys):
    assert main(["layouts", "--tokens", "3000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["64", "256", "1,024"]
