"""The n-gram cache: what its benchmark looks up, counts and predicts; targets; the committed simulation."""

import json

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.cache import bench_cache, prediction
from bench.cache.report import cache_rows, missed_target
from bench.running import suite
from bench.running.cases import Case, Workbench
from bench.running.text import load_token_ids
from engram_kernels import reference
from engram_kernels.cache.prediction import text_keys
from engram_kernels.commands.traffic import layer_traffic
from engram_kernels.reference.cache.simulator import CacheSimulator

from .toys import CPU, LIMIT, FakeTimer, ample

TOKENS, ENTRIES = 32, 64
CALLS, FILLING, TIMED = 25, 12, 11  # besides one to check ahead of the timed ones, and one behind
TEXT = load_token_ids()[: CALLS * TOKENS + 5]


@pytest.fixture(scope="module")
def bench():
    with Workbench(CPU, LIMIT, LIMIT, say=lambda line: None, text=TEXT) as workbench:
        yield workbench


class Timer(FakeTimer):
    """Keeps the statistics of the last cache around the timed calls; ``before`` is run ahead of them."""

    def __init__(self, made, before=lambda cache: None):
        super().__init__()
        self.made, self.before, self.stats = made, before, []

    def once(self, calls):
        if not self.calls:
            self.stats.append(self.made[-1].stats())
            self.before(self.made[-1])
        measured = super().once(calls)
        self.stats.append(self.made[-1].stats())
        return measured


@pytest.fixture
def made(monkeypatch):
    """The caches that cases make."""
    found = []

    def make(*arguments, **options):
        found.append(correct(*arguments, **options))
        return found[-1]

    correct = bench_cache.NgramCache
    monkeypatch.setattr(bench_cache, "NgramCache", make)
    return found


def run(bench, timer, kind="text", entries=ENTRIES, tokens=TOKENS):
    def prepare(bench):
        return bench_cache.prepare(kind, entries, tokens, bench)

    return suite.run_case(Case("cache", "v41", f"host/{kind}", tokens, 0, prepare, "zero_copy"), bench, timer, ample())


def test_the_second_half_is_looked_up_once_in_its_order(bench, made, monkeypatch):
    seen = []

    def spy(token_ids, *arguments, history, cache=None, **options):
        if cache is not None:
            seen.append((token_ids.clone(), history.clone()))
        return correct(token_ids, *arguments, history=history, cache=cache, **options)

    correct = bench_cache.hash_lookup
    monkeypatch.setattr(bench_cache, "hash_lookup", spy)
    timer = Timer(made)
    record = run(bench, timer)
    assert record["status"] == "ok", record
    assert set(record["baselines"]) == {"direct", "address"}
    assert not any("failed" in entry for entry in record["baselines"].values())
    facts = record["facts"]
    assert (facts["filling_calls"], facts["timed_calls"], record["samples"]) == (FILLING, TIMED, TIMED)
    whole = torch.cat([token_ids for token_ids, _ in seen])
    assert len(seen) == CALLS and torch.equal(whole, torch.from_numpy(TEXT[: CALLS * TOKENS]))
    padded = torch.cat([torch.full((3,), -1), whole])
    assert all(history[0].tolist() == padded[at * TOKENS :][:3].tolist() for at, (_, history) in enumerate(seen))


def test_bytes_are_those_of_the_statistics_and_the_prediction_is_the_simulators(bench, made):
    timer = Timer(made)
    record = run(bench, timer)
    before, after = timer.stats[:2]
    counted = {name: np.array(getattr(after, name)) - getattr(before, name) for name in ("asked", "hits", "read")}
    facts = record["facts"]
    assert record["link_bytes"] == int(counted["read"].sum() * 2112 / TIMED)
    assert facts["hits"] == counted["hits"].sum() / counted["asked"].sum() > 0
    # Each layer alone, from keys of the whole text rather than of calls with history.
    plan, calls = bench.plan("v41", "host"), [slice(at * TOKENS, (at + 1) * TOKENS) for at in range(CALLS)]
    read, asked, distinct = 0, 0, 0
    for layer in range(2):
        keys, simulator = text_keys(TEXT, plan.select(layers=[layer])), CacheSimulator(3, ENTRIES // 8, 8)
        for number, call in enumerate(calls[:-1]):
            if number == FILLING + 1:
                read, asked = read - simulator.read.sum(), asked - simulator.asked.sum()
            simulator.look_up(keys[:, call])
        read, asked = read + simulator.read.sum(), asked + simulator.asked.sum()
        distinct += sum(len(set(order[call].tolist())) for call in calls[FILLING + 1 : -1] for order in keys)
    assert (counted["read"].sum(), counted["asked"].sum()) == (read, asked)
    assert facts["predicted_gain"] == {"direct": asked / read, "address": distinct / read}
    # Entries of hits and of what is kept, besides the link's, the rows and the ids.
    inserted = (np.array(after.inserted) - before.inserted).sum()
    device = (counted["hits"].sum() + inserted) / TIMED * 2112
    assert record["nbytes"] == pytest.approx(record["link_bytes"] + device + TOKENS * (2 * 24 * 256 * 2 + 4), abs=2)
    traffic = layer_traffic(bench.config("v41"), TOKENS)
    assert record["wire_bytes"] == pytest.approx(2 * traffic.wire_bytes * read / asked)
    assert json.loads(json.dumps(record)) == record


def test_uniform_ids_hit_nothing_in_a_full_cache(bench, made, monkeypatch):
    monkeypatch.setattr(bench_cache, "MOST_TIMED", 5)
    timer = Timer(made)
    record = run(bench, timer, "uniform")
    before = timer.stats[0]
    assert record["status"] == "ok" and all(used == ENTRIES for layer in before.used for used in layer)
    assert record["facts"]["hits"] == 0 and record["facts"]["predicted_gain"]["direct"] == 1
    assert record["facts"]["timed_calls"] == 5


@pytest.mark.parametrize(("number", "reason"), [(FILLING, "differ"), (CALLS - 1, "after the timed calls")])
def test_a_wrong_row_has_no_time(bench, made, monkeypatch, number, reason):
    correct, count = reference.hash_lookup, iter(range(1000))

    def spoilt(*arguments, **options):
        out = correct(*arguments, **options)
        if next(count) == number:
            out[-1, -1, -1, -1] += 1
        return out

    monkeypatch.setattr("engram_kernels.reference.hash_lookup", spoilt)
    record = run(bench, Timer(made))
    assert record["status"] == "failed" and reason in record["reason"] and "1 of" in record["reason"]
    assert "median" not in record and not record["baselines"]


def test_counts_that_are_not_the_simulators_have_no_time(bench, made):
    record = run(bench, Timer(made, before=lambda cache: cache.clear()))
    assert record["status"] == "failed" and "the cache counted" in record["reason"] and "median" not in record


def test_a_text_too_short_is_said_to_be(bench):
    record = run(bench, FakeTimer(), tokens=len(TEXT) // 4)
    assert "has 4 calls of 201; five are needed" in record["reason"]


def test_the_measured_gain_is_held_against_the_predicted_one():
    def record(kind, median, **baselines):
        facts = dict(kind=kind, cache_bytes=3.2e9, hits=0.25, rows=10**6, predicted_gain=dict(direct=2.0, address=1.5))
        found = dict(name=f"cache/{kind}", op="cache", tokens=8192, status="ok", link_bytes=8_192_000, facts=facts)
        return found | dict(median=median, baselines={name: dict(median=value) for name, value in baselines.items()})

    (row,) = cache_rows([record("text", 1e-3, direct=1.802e-3, address=1.2e-3)])
    assert row[1:] == [
        *("3.20 GB", "0.250", "1,000", "1,000.0", "2.00x", "1.80x", "1.50x", "1.20x"),
        "held: 0.901 of the predicted gain, target 0.9",
    ]
    assert missed_target(record("text", 1e-3, direct=1.798e-3)) == "0.899 of the predicted gain, target 0.9"
    # On ids that do not come again, against the faster baseline.
    assert missed_target(record("uniform", 1.04e-3, direct=1e-3, address=2e-3)) is None
    assert missed_target(record("uniform", 1.06e-3, direct=2e-3, address=1e-3)) == "costs 6.0%, target below 5%"
    assert cache_rows([record("uniform", 1e-3)])[0][-1] == "", "nothing to compare with"


def test_the_committed_prediction_is_what_the_command_gives(monkeypatch, tmp_path, capsys):
    """Its smallest cache, again; the whole takes half a minute."""
    committed = json.loads(prediction.RESULT.read_text())
    assert committed["kind"] == "simulated, not measured"
    assert len(committed["points"]) == len(prediction.TOKENS) * (1 + len(prediction.ENTRIES))
    again = json.loads(json.dumps(prediction.predict(load_token_ids(), (1 << 14,), (8192,))))
    assert all(point in committed["points"] for point in again) and len(again) == 2
    for point in committed["points"]:
        assert np.isclose(point["link_bytes"], 2 * 2112 * sum(point["read"]))
        assert np.isclose(point["gain"], 3 / sum(point["read"]))
    prediction.print_prediction(TEXT, "mine.txt")
    assert "fewer than two calls of 8,192" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    correct = prediction.predict
    monkeypatch.setattr(prediction, "predict", lambda ids: correct(ids[:5000], (64, 256), (512, 1024)))
    assert main(["cache", "--out", str(tmp_path / "found" / "cache.json")]) == 0
    content = json.loads((tmp_path / "found" / "cache.json").read_text())
    assert [point["entries"] for point in content["points"]] == [0, 64, 256] * 2
    assert (tmp_path / "found" / "cache.png").stat().st_size > 10_000
