"""The benchmarks of read orders and of the Prefetcher on a CPU: what they count, and that wrong rows have no time."""

import pytest
import torch

from bench import suite
from bench.cases import Case, Workbench, load_cases
from bench.ops import bench_read_order
from bench.serving import bench_prefetch
from engram_kernels import reference
from engram_kernels.ops.row_kernels.order import ORDERS

from .test_bench import CPU, LIMIT, FakeTimer, ample

TOKENS = 16


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None) as workbench:
        yield workbench


def run(bench, prepare, *arguments):
    case = Case("it", "v41", "host", TOKENS, 0, lambda bench: prepare(*arguments, TOKENS, bench))
    return suite.run_case(case, bench, FakeTimer(), ample())


def test_cases_come_last_and_cover_what_is_to_be_chosen():
    for full in (False, True):
        found = load_cases(full)
        ours = [case for case in found if case.op in ("read_order", "prefetch")]
        assert found[-len(ours) :] == ours or full
        variants = {case.variant.split("/")[2] for case in ours if case.op == "read_order"}
        assert variants == set(ORDERS)
        assert all(case.roof == "zero_copy" and case.variant.startswith("host/") for case in ours)
    names = {case.name for case in load_cases()}
    assert "read_order/v41/host/text/address/scales=device/T=8192" in names
    assert "read_order/v41/host/uniform/address/scales=host/programs=32/T=8192" in names


@pytest.mark.parametrize("kind", ["uniform", "text"])
@pytest.mark.parametrize(("order", "scales"), [("direct", "host"), ("head", "host"), ("address", "device")])
def test_read_orders(bench, kind, order, scales):
    record = run(bench, bench_read_order.prepare, kind, order, scales, None)
    assert record["status"] == "ok", record
    facts, table = record["facts"], bench.table("v41", "host")
    plan = bench.plan("v41", "host")
    distinct = []
    for index in range(facts["sets"]):
        row_ids = reference.ngram_hash(bench.token_ids(kind, "v41", TOKENS, index), plan)
        distinct.append(sum(len(set(row_ids[:, layer].flatten().tolist())) for layer in range(2)))
    assert facts["rows_asked_for"] == 2 * TOKENS * 24
    expected = sum(distinct) / len(distinct) if order == "address" else 2 * TOKENS * 24
    assert facts["rows_read"] == int(expected)
    assert record["link_bytes"] == int(expected * (256 if scales == "device" else 264))
    assert record["nbytes"] == record["link_bytes"] + 2 * TOKENS * 24 * table.width * 2 + 4 * TOKENS


def test_prefetch_with_its_baselines(bench, monkeypatch):
    monkeypatch.setattr(bench_prefetch, "HIDDEN", 64)
    record = run(bench, bench_prefetch.prepare)
    assert record["status"] == "ok", record
    assert set(record["baselines"]) == {"ready", "inline"}
    assert not any("failed" in entry for entry in record["baselines"].values())
    assert record["link_bytes"] == 2 * TOKENS * 24 * 264


@pytest.mark.parametrize("module", [bench_read_order, bench_prefetch])
def test_a_wrong_result_has_no_time(bench, module, monkeypatch):
    correct = reference.hash_lookup

    def spoilt(token_ids, *arguments, **options):
        return correct(token_ids.roll(1), *arguments, **options)

    monkeypatch.setattr("engram_kernels.reference.hash_lookup", spoilt)
    monkeypatch.setattr(bench_prefetch, "HIDDEN", 64)
    arguments = ("text", "address", "host", None) if module is bench_read_order else ()
    record = run(bench, module.prepare, *arguments)
    assert record["status"] == "failed" and "differ from the reference" in record["reason"] and "median" not in record


def test_distinct_rows_are_counted_by_layer(monkeypatch):
    row_ids = torch.tensor([[[1, 2], [1, 2]], [[1, 3], [4, 4]]])
    monkeypatch.setattr("engram_kernels.reference.ngram_hash", lambda *_: row_ids)
    assert bench_read_order._distinct_rows(torch.zeros(2), None) == 3 + 3
