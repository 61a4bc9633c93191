"""``size --plan``: numbers by hand, bytes and pages as real tables count them, and what is chosen."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramConfig, EngramTable, lookup
from engram_kernels.__main__ import main
from engram_kernels.commands.plan import Job, choose, layer_ways, plan_facts
from engram_kernels.commands.presets import PRESETS
from engram_kernels.commands.traffic import LINKS, page_reads, row_cache_bytes
from engram_kernels.ranks.kept import KeptRows
from engram_kernels.tables.memory.direct import LEAST
from engram_kernels.testing import tables

V41 = EngramConfig.deepseek_v41_flash()
GIB = 2**30
ROWS, WIDTH = 40_000, 256


def ways_of(job, **options):
    return {(way.way, way.cache): way for way in layer_ways(V41, 0, job, **options)}


def test_a_layer_of_v41_by_hand():
    """24 rows of 256 B and 8 B of scales; three nodes of two ranks; a page of a file has 16 rows, the scales none."""
    ways = ways_of(Job(128 * GIB, nodes=3, ranks=2, tokens=1000, reads=1e6), hit_rate=0.9)
    none, large = (0.57 + 0.75 + 0.83) / 3, (0.11 + 0.39 + 0.59) / 3
    rows = V41.rows_per_layer[0]
    replicate, shard = ways["replicate", "no cache"], ways["shard", "cache of 1,048,576"]
    assert replicate.ram == rows * 264 and replicate.host_bytes == pytest.approx(none * 24 * 264)
    # A row is read in 3 requests with headers of 20 B and moves 288 B; 54.5 GB/s is 128 of 148 B on the wire.
    host = (288 + 60) * 128 / 148 / 54.5e9 / 2
    assert replicate.seconds["host"] == pytest.approx(none * 24 * host)
    assert replicate.seconds["drive"] == replicate.seconds["NVLink"] == replicate.exchange_bytes == 0
    assert rows * 264 / 3 <= shard.ram <= 1.001 * rows * 264 / 3  # whole columns, of a prime number of rows each
    assert shard.exchange_bytes == pytest.approx(large * 24 * 2 / 3 * (4 + 264) + 2 * 16 / 1000)
    assert shard.seconds["InfiniBand"] == pytest.approx(shard.exchange_bytes / 50e9 / 2)
    # A third of its rows is a rank's own, which it does not keep.
    assert shard.seconds["host"] == pytest.approx((none / 3 + large * 2 / 3) * 24 * host)
    disk = ways["disk", "cache of 262,144"]
    share = (0.18 + 0.54 + 0.69) / 3
    assert disk.reads == pytest.approx(share * 24) and disk.seconds["drive"] == pytest.approx(share * 24 / 1e6)
    assert disk.ram == 2 * (rows * 8 + LEAST + 262_144 * 24 * 272) and disk.host_bytes == 0
    assert ways["replicate", "hit rate 0.9"].host_bytes == pytest.approx(0.1 * 24 * 264)
    assert ("shard", "no cache") not in ways_of(Job(GIB))


def test_a_cache_takes_what_the_plan_says():
    """Rows one by one, with the entry more for what is not kept; what n-gram caches take is tests/cache's."""
    for entries in (64, 4096):
        stored = 264
        asked = row_cache_bytes(V41, entries, stored)
        kept = KeptRows(10**9, stored, asked + stored + 16, torch.device("cpu"))
        assert kept.nbytes == asked + stored + 16 and kept.entries == entries * V41.columns


@pytest.mark.parametrize("width", [256, 36])
def test_reads_are_those_of_a_real_file(tmp_path, width):
    """Pages that a table of a file has read, for the rows that its cache missed: few share one, of a large table."""
    path = tables.cpu_table(ROWS, width, "float32").save_safetensors(tmp_path / "table.safetensors")
    row = 4 * width
    with EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=LEAST) as table:
        for step in range(40):
            generator = torch.Generator().manual_seed(step % 30)
            lookup(table, torch.randint(0, ROWS, (1, 24), generator=generator))
        counts = table.metrics()
    missed = counts["file_distinct"] - counts["file_hits"]
    assert counts["file_hits"] >= 10 * 20 and missed > 600
    assert counts["file_pages"] == pytest.approx(page_reads(missed, row), rel=0.05)


def test_memory_of_a_file_is_what_it_needs(tmp_path):
    """A byte less is refused."""
    path = tables.cpu_table(2000, WIDTH, "e4m3_ue8m0").save_safetensors(tmp_path / "table.safetensors")
    least = 2000 * 8 + LEAST
    EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=least).close()
    with pytest.raises(ValueError, match="memory_bytes"):
        EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=least - 1)


@pytest.mark.parametrize(
    "job, expected",
    [
        (Job(256 * GIB, nodes=4), ["replicate", "replicate"]),
        (Job(128 * GIB, nodes=4), ["replicate", "shard"]),  # one copy and a quarter
        (Job(64 * GIB, nodes=4), ["shard", "shard"]),
        (Job(128 * GIB, reads=1e6), ["replicate", "disk"]),
        (Job(128 * GIB), ["replicate", "disk"]),  # at an unknown rate
        (Job(64 * GIB, reads=1e6), ["disk", "disk"]),
        (Job(20 * GIB, nodes=4), ["disk", "disk"]),
        (Job(128 * GIB, nodes=2, reads=1e6), ["shard", "shard"]),  # not a copy, which leaves a file for the other
        (Job(4 * GIB, nodes=4), ["disk", None]),
    ],
)
@pytest.mark.parametrize("link", LINKS)
def test_choices(job, expected, link):
    """Memory is never more than there is, and what comes first leaves the rest what it needs."""
    chosen = choose(V41, job, link)
    assert [way and way.way for way, _ in chosen] == expected
    assert sum(way.ram for way, _ in chosen if way) <= job.ram
    assert all(way is None or way.cache_bytes <= job.cache / 2 for way, _ in chosen)
    if expected[-1] is None:
        assert chosen[-1][1] == "the least is 2.9 GiB of memory, and 1.1 GiB are free"
    elif job.ram == 128 * GIB and job.nodes != 2:
        assert "replicate would need 94.4 GiB of 33.6 GiB" in chosen[1][1] or "disk" in expected


@pytest.mark.parametrize("ram", [30, 60, 100, 128, 200])
@pytest.mark.parametrize("nodes, ranks", [(1, 1), (2, 8), (4, 1)])
@pytest.mark.parametrize("reads", [3e5, 1.5e8])  # the latter are as fast as the host's link, beside which they go
def test_no_other_ways_are_faster(ram, nodes, ranks, reads):
    """Of all pairs of ways that fit, by the resource that is busy longest."""
    job, link = Job(ram * GIB, nodes=nodes, ranks=ranks, reads=reads), "InfiniBand"
    ways = [[way for way in layer_ways(V41, index, job) if way.cache_bytes <= job.cache // 2] for index in (0, 1)]
    pairs = [pair for pair in itertools.product(*ways) if sum(way.ram for way in pair) <= job.ram]

    def seconds(pair):
        return max(sum(way.seconds[resource] for way in pair) for resource in ("host", link, "drive"))

    chosen = [way for way, _ in choose(V41, job, link)]
    if pairs:
        assert seconds(chosen) == pytest.approx(min(map(seconds, pairs)), rel=1e-12)
    else:
        assert None in chosen


def test_more_memory_is_never_slower():
    rates = []
    for ram in range(50, 220, 10):
        facts = plan_facts(V41, Job(ram * GIB, nodes=4, ranks=8, reads=1e6, cache=16 * GIB))
        rates.append(facts["choices"]["InfiniBand"]["tokens_per_second"])
    assert rates == sorted(rates) and rates[0] < rates[-1]
    # Both layers go over the same link to the host.
    one = ways_of(Job(GIB, nodes=4, ranks=8))["replicate", "cache of 1,048,576"]
    assert rates[-1] == pytest.approx(1 / (2 * one.seconds["host"]), rel=1e-3)


def test_the_document_shows_these_choices():
    """docs/ranks.md: every row of its last table."""
    text = (Path(__file__).parents[2] / "docs/ranks.md").read_text().split("## Replicate, shard or read from disk")[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) GiB \| (\w+) \| (\w+) \| (\w+) \| ([\d,]+) thousand \|$", text, re.M)
    assert len(rows) == 5
    for nodes, ram, *layers, bound, rate in rows:
        choices = plan_facts(V41, Job(int(ram) * GIB, nodes=int(nodes), ranks=8, reads=1e6))["choices"]
        for choice in (choices["InfiniBand"], choices["NVLink"]):
            assert [each["way"] for each in choice["layers"]] == layers
            assert choice["bound_by"] == bound and f"{choice['tokens_per_second'] / 1e3:,.0f}" == rate


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name):
    config = getattr(EngramConfig, name)()
    facts = plan_facts(config, Job(512 * GIB, nodes=2, wanted=1.0))
    for choice in facts["choices"].values():
        assert choice["meets"] and choice["bound_by"] == "host" and math.isfinite(choice["tokens_per_second"])
        assert [each["layer"] for each in choice["layers"]] == list(config.layers)


def test_command(capsys):
    words = "--plan --nodes 4 --node-ranks 8 --ram-gib 128 --reads 1000000 --tokens-per-second 2e8".split()
    assert main(["size", *words]) == 0
    text = capsys.readouterr().out
    for fact in (
        "4 nodes of 8 ranks, 8,192 tokens a rank",
        "128.0 GiB of memory a node",
        "replicate would need 94.4 GiB of 33.6 GiB",
        "too few for 200,000,000",
        "shard, cache of 262,144",
    ):
        assert fact in text, fact
    assert main(["size", "--plan"]) == 0
    assert "1 node of 1 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nodes", "4"], "--nodes: expected --plan with it"),
        (["--tokens-per-second", "4"], "--tokens-per-second: expected --plan with it"),
        (["--plan", "--reads", "0"], "argument --reads: expected a positive number, got '0'"),
        (["--plan", "--nodes", "0"], "argument --nodes: expected a whole number of at least 1, got '0'"),
    ],
)
def test_mistakes_take_one_line(words, message, capsys):
    try:
        code = main(["size", *words])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
