"""metrics() of tables, caches and prefetchers: what is counted, by kernels and on a CPU, and Prometheus' text of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable, MetricsCollector, NgramCache, Prefetcher, hash_lookup, lookup
from engram_kernels.serving.prometheus import METRICS
from engram_kernels.tables.staging import StagingRing, stage
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import small_plan
from tests.support.documents import Document
from tests.tables.test_staging import LateRuntime

CPU = torch.device("cpu")


def setting(device, placement=None):
    plan = small_plan()
    parts = parts_of(plan, 32, "e4m3_ue8m0")
    return plan.to(device), [tables.place(*part, device, placement) for part in parts]


def check_tables(device):
    """Two calls of each op, of which the second is by what was kept; a table that is two layers' is read twice."""
    plan, placed = setting(device)
    ids, row_ids = torch.arange(5, device=device), torch.tensor([[0, -1, 0], [1, 2, 3]], device=device)
    columns = plan.primes.shape[1]
    for turn in (1, 2):
        lookup(placed[0], row_ids)
        hash_lookup(ids, plan, placed)
        hash_lookup(ids, plan, (placed[1],) * 2)
        assert placed[0].metrics()["rows_asked"] == turn * (6 + 5 * columns)
        assert placed[1].metrics()["rows_asked"] == turn * 3 * 5 * columns
    assert placed[0].metrics()["nbytes"] == placed[0].nbytes and placed[0].metrics()["rows"] == placed[0].rows
    assert not placed[0].metrics()["link_bytes"], "read where they are"


def test_tables_on_a_cpu():
    check_tables(CPU)


@pytest.mark.kernel
def test_tables_by_kernels(device):
    check_tables(device)


@pytest.mark.kernel
def test_bytes_over_the_link(device):
    """Of host tables, scales with the rows unless they are on the device."""
    plan, placed = setting(device, "host")
    ids = torch.arange(5, device=device)
    hash_lookup(ids, plan, placed)
    for table in placed:
        rows = 5 * plan.primes.shape[1] * (table.link != "unified")
        assert table.metrics()["link_bytes"] == 33 * rows
        table._scales = "device"
        assert table.metrics()["link_bytes"] == 32 * rows


def test_staging():
    """14 rows of 64 bytes, of which each of two slots holds 6 and ids: the third chunk finds a copy under way."""
    table = tables.place(*tables.random_parts(31, 32, "bfloat16"), CPU, "staged")
    table.rings[CPU] = StagingRing(LateRuntime(), slots=2, slot_bytes=256 * 3 + 6 * 68, threads=1)
    stage(table, torch.arange(14), "lookup")
    found = table.metrics()
    assert (found["staged_calls"], found["staged_rows"], found["staged_waits"]) == (1, 14, 1)
    assert found["staged_bytes"] == found["link_bytes"] == 256 + 256 + 4 * 256, "descriptor, ids, rows"
    stage(table, torch.arange(2), "lookup")
    found = table.metrics()
    assert (found["staged_calls"], found["staged_rows"], found["staged_waits"]) == (2, 16, 1), "all copies were done"
    table.close()
    assert table.metrics()["staged_rows"] == 0


def check_cache(device):
    plan, placed = setting(device)
    cache = NgramCache(plan, placed, entries=8, ways=2, min_tokens=4)
    for ids in (torch.arange(6), torch.arange(6), *torch.arange(48).view(4, 12) % 40, torch.arange(3)):
        hash_lookup(ids.to(device), plan, placed, cache=cache)
    stats, found = cache.stats(), cache.metrics()
    for name in ("asked", "hits", "read", "inserted", "evicted", "used"):
        assert found[name] == sum(map(sum, getattr(stats, name))) > 0, name
    assert found["saved_bytes"] == sum(map(sum, stats.bytes_saved))
    assert found["read_bytes"] == found["read"] * cache.entry_bytes
    assert (found["bypassed_calls"], found["bypassed_tokens"]) == (1, 3)
    assert found["entries"] == 8 * len(stats.asked) * len(stats.asked[0]) and found["nbytes"] == cache.nbytes
    assert placed[0].metrics()["rows_asked"] == 3 * plan.primes.shape[1], "those past the cache"


def test_a_cache_on_a_cpu():
    check_cache(CPU)


@pytest.mark.kernel
def test_a_cache_by_kernels(device):
    check_cache(device)


def test_asking_a_cache_leaves_its_order_alone(monkeypatch):
    """Another thread may ask: no event is recorded that the next lookup would wait for instead of the last one."""
    cache = NgramCache(*setting(CPU), entries=8)
    monkeypatch.setattr(cache, "in_order", None)
    assert cache.metrics()["used"] == 0
    cache._state.keys.set_()
    with pytest.raises(ValueError, match="^NgramCache.metrics: "):
        cache.metrics()


@pytest.mark.kernel
def test_a_prefetcher(device):
    plan, placed = setting(device)
    cache = NgramCache(plan, placed, entries=8, ways=2, min_tokens=4)
    prefetcher = Prefetcher(plan, placed, 8, cache=cache, depth=2)
    starts = []
    for length in (3, 5, 5):
        if len(starts) == 2:
            starts[0].release()
        starts.append(prefetcher.start(torch.arange(length, device=device)))
        starts[-1].rows(0), starts[-1].rows(1)
    starts[0].release()  # whose buffers another start has taken: it ends nothing
    expected = dict(starts=3, tokens=13, cached_tokens=10, waits=6, releases=1, in_flight=2, nbytes=prefetcher.nbytes)
    assert prefetcher.metrics() == expected
    assert placed[0].metrics()["rows_asked"] == 3 * plan.primes.shape[1]


def sources():
    """Of each class one that has counted something."""
    plan, placed = setting(CPU)
    cache = NgramCache(plan, placed, entries=8, ways=2, min_tokens=0)
    prefetcher = Prefetcher(plan, placed, 8, layers=(1, 14))
    prefetcher.start(torch.arange(5))
    hash_lookup(torch.arange(6), plan, placed, cache=cache)
    return dict(draft=cache, serving=prefetcher, rows=dict(zip((1, 14), placed, strict=True)))


def test_keys_are_plain_and_described():
    """By docs/metrics.md too, in the order of metrics(), with the names that Prometheus shows."""
    named = sources()
    for each in (named["draft"], named["serving"], named["rows"][1]):
        prefix, counters, gauges = METRICS[type(each)]
        found = each.metrics()
        assert found.keys() == counters.keys() | gauges.keys() and not counters.keys() & gauges.keys()
        assert {type(value) for value in found.values()} <= {int, float}
        written = Document("docs/metrics.md").text.split(f"\n## `{type(each).__name__}.metrics()`")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", written, re.M)
        shown = [f"{prefix}_{key}".replace("nbytes", "bytes") + ("_total" if key in counters else "") for key in found]
        assert rows == list(zip(found, shown, strict=True))


def test_prometheus():
    prometheus_client = pytest.importorskip("prometheus_client", reason="of the extra metrics")
    from prometheus_client.parser import text_string_to_metric_families

    named, registry = sources(), prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(MetricsCollector(named))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(MetricsCollector(named))
    text = prometheus_client.generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {}
    for family in families.values():
        assert family.documentation and family.type in ("counter", "gauge")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            found[sample.labels["name"], sample.labels["layer"], family.name] = sample.value
    wanted = {}
    for name, layer, each in (
        ("draft", "", named["draft"]), ("serving", "", named["serving"]),
        ("rows", "1", named["rows"][1]), ("rows", "14", named["rows"][14]),
    ):  # fmt: skip
        prefix = METRICS[type(each)][0]
        for key, value in each.metrics().items():
            wanted[name, layer, f"{prefix}_{key}".replace("nbytes", "bytes")] = value
    assert found == wanted and len(families) == 13 + 12 + 7
    assert found["serving", "", "engram_prefetcher_tokens"] == 5 and found["draft", "", "engram_cache_asked"] > 0


def test_families_of_nothing_are_left_out():
    pytest.importorskip("prometheus_client", reason="of the extra metrics")
    table = EngramTable.empty(3, 8, "bfloat16", placement="cpu")
    assert {family.name.split("_")[1] for family in MetricsCollector(dict(only=table)).collect()} == {"table"}
    assert not list(MetricsCollector({}).collect())


def test_without_the_library():
    code = """
import sys
sys.modules["prometheus_client"] = None
import engram_kernels
try:
    engram_kernels.MetricsCollector({})
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("MetricsCollector: expected the library prometheus_client")
    assert "engram_kernels[metrics]" in done.stdout
