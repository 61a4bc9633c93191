"""python -m bench files: every way is measured, on a small file that is gone afterwards."""

import os
import re

import pytest

from bench.__main__ import main
from bench.serving import files


def test_every_way_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "SECONDS", 0.01)
    monkeypatch.setattr(files, "DEPTHS", (1, 8))
    monkeypatch.setattr(files, "BATCHES", (64,))
    assert main(["files", "--gib", "0.01", "--folder", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    rates = {
        name.strip(): int(rate.replace(",", "")) for name, rate in re.findall(r"^(.{44}) +([\d,]+) ", output, re.M)
    }
    drive = set() if "no direct I/O" in output else {"the drive, depth 1", "the drive, depth 8"}
    assert set(rates) == {*drive, "memory_bytes, 64 rows a call", "mapped, 64 rows a call"} and min(rates.values()) > 0
    assert os.listdir(tmp_path) == []


def test_a_size_of_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["files", "--gib", "0"])
    assert "--gib must be above 0, got 0.0" in capsys.readouterr().err
