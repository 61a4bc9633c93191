"""python -m bench loading: every roof and every way is measured, on small files that are gone afterwards."""

import os
import re

import pytest

from bench.__main__ import main
from bench.serving import loading

WAYS = {
    "load, cold": 6,
    "load, warm": 6,
    "save": 3,
    "convert, same format, cold": 2,
    "convert to bfloat16, cold": 1,
    "verify, cold": 2,
    "verify, warm": 2,
}


def test_every_way_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "DEPTHS", ((2, 1 << 20),))
    monkeypatch.setattr(loading, "others", lambda files: [])
    assert main(["loading", "--gib", "0.01", "--rounds", "1", "--folder", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    found = dict(re.findall(r"^(\w.*?) +GB/s .*\n((?:  .*\n)*)", output, re.M))
    roofs = {title: re.findall(r"^  roof: .*?(?:  +)([\d.]+) +([\d.]+)", text, re.M) for title, text in found.items()}
    ways = {
        title: re.findall(r"^  (?!roof)\S.*?(?:  +)([\d.]+) +([\d.]+)", text, re.M) for title, text in found.items()
    }
    assert {title: len(each) for title, each in ways.items()} == WAYS
    for title in WAYS:
        assert roofs[title] and min(float(rate) for rate, _ in roofs[title] + ways[title]) > 0
        # The roof is the lowest of the best of each kind: one of them has all of it, and the others more or less.
        assert "1.00" in [share for _, share in roofs[title]]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--gib", "0"], "--gib must be above 0, got 0.0"), (["--rounds", "0"], "--rounds must be at least 1, got 0")],
)
def test_sizes_of_nothing_are_errors(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["loading", *arguments])
    assert text in capsys.readouterr().err
