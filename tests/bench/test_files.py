"""python -m bench files: every way is measured, on a small file that is gone afterwards."""

import os
import re

import pytest

from bench.__main__ import main
from bench.serving import confined, files

WAYS = ("memory_bytes", "mapped", "torch.from_file", "numpy.memmap")


def rates(output):
    found = re.findall(r"^((?!memory after).{46,}?) +([\d,]+)(?: +[\d,.]+)* *$", output, re.M)
    return {name.strip(): int(rate.replace(",", "")) for name, rate in found}


def test_every_way_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "SECONDS", 0.01)
    monkeypatch.setattr(files, "DEPTHS", (1, 8))
    monkeypatch.setattr(files, "BATCHES", (64, 128))
    monkeypatch.setattr(files, "CACHES", (files.LEAST,))
    monkeypatch.setattr(files, "TEXT", 200)
    monkeypatch.setattr(files, "apart", lambda function, **arguments: function(**arguments))
    parts = ["drive", "cold", "warm", "text"]
    assert main(["files", "--gib", "0.01", "--folder", str(tmp_path), "--rows", "1000", "--only", *parts]) == 0
    output = capsys.readouterr().out
    found = rates(output)
    drive = {"the drive, 1 under way", "the drive, 8 under way", "the drive, 64 at once", "the drive, 128 at once"}
    lookups = {f"cold, {way}, {batch} rows a call" for way in WAYS for batch in (64, 128)}
    lookups |= {f"warm, {way}, {batch} rows a call" for way in WAYS[1:] for batch in (64, 128)}
    text = {name for name in found if name.startswith("text, 64 MiB: ")}
    assert set(found) == lookups | text | (set() if "no direct I/O" in output else drive)
    assert len(text) == 1 and min(found.values()) > 0
    assert re.search(r"memory after 1,000 rows is [+-][\d.]+ MiB more than after 100$", output, re.M)
    assert os.listdir(tmp_path) == []


def test_memory_is_limited_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "SECONDS", 0.01)
    monkeypatch.setattr(files, "BATCHES", (64, 128))
    assert main(["files", "--gib", "0.01", "--folder", str(tmp_path), "--only", "limit"]) == 0
    output = capsys.readouterr().out
    if "no control group" in output:
        pytest.skip("control groups are not this user's to make")
    assert len(rates(output)) == 3 and min(rates(output).values()) > 0


def test_a_group_takes_pages_of_files_back(tmp_path):
    """A process that reads more than its group may have keeps to the limit."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 20))
    files.give_back(path)
    try:
        with confined.group(16 << 20) as group:
            child = os.fork()
            if child == 0:
                group.enter()
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert group.used() <= 16 << 20 and (group.most() is None or group.most() <= 16 << 20)
    except OSError as error:
        pytest.skip(f"control groups are not this user's to make: {error}")


def test_a_size_of_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["files", "--gib", "0"])
    assert "--gib must be above 0, got 0.0" in capsys.readouterr().err
