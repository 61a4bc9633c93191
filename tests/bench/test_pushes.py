"""The measurement of pushes to a serving copy: what it runs, and that a push is of the rows that it counts."""

from bench.training import pushes
from engram_kernels import EngramTable


def test_each_way_is_measured(monkeypatch):
    written = []
    original = EngramTable.rows_changed

    def watch(self, ids=None):
        written.append(None if ids is None else ids.numel())
        return original(self, ids)

    monkeypatch.setattr(EngramTable, "rows_changed", watch)
    for form in ("e4m3_ue8m0", "e4m3"):
        written.clear()
        costs = list(pushes.push_costs(rows=300, counts=(10, 70), form=form))
        assert [cost.rows for cost in costs] == [300, 300, 10, 10, 10, 70, 70, 70]
        assert all(cost.seconds > 0 and cost.rate == cost.rows / cost.seconds for cost in costs)
        # Three of each: all rows in memory, then of each count what the record is told, pushes, files, overlays twice.
        assert written == [300] * 3 + [10] * 13 + [70] * 13
