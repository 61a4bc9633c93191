"""Steps that prefetch on simulated streams, whose work then runs in every order that events allow."""

import itertools

import torch

from engram_kernels import Prefetcher, hash_lookup
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import small_plan
from tests.ops.test_registration import same

from .fake_streams import FakeStreams
from .ordering import ordered_by

#: Elements of a token's projection.
WIDTH = 24
SCHEDULES = [list(names) for names in itertools.permutations(("main", "model", "side"))]
ORDERS = {
    "a lookup after the copy of its ids": ("side", "main"),
    "a copy after the lookups that read the ids before": ("main", "side"),
    "a reader after its layer's lookup": ("model", "side"),
    "a lookup after the readers of the rows before": ("side", "model"),
}


def setting(device="cpu", name="bfloat16", width=16, **options):
    plan = small_plan(**options)
    placed = [tables.place(*part, torch.device(device)) for part in parts_of(plan, width, name)]
    return plan.to(device), placed


def batches(count, tokens=6):
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 40, (tokens,), generator=generator) for _ in range(count)]


class Model:
    """Steps that prefetch on one stream and read on another, and what they read."""

    reads = "rows"

    def __init__(self, dropped=None, reading="model", **options):
        self.plan, self.tables = setting()
        self.streams = FakeStreams(dropped=dropped)
        with ordered_by(self.streams):
            self.prefetcher = Prefetcher(self.plan, self.tables, 8, **self.options(), **options)
        self.ids, self.reading, self.seen = torch.zeros(6, dtype=torch.int64), reading, []

    def options(self):
        """More arguments of the Prefetcher."""
        return {}

    def expected(self, batch):
        """What the layers are to read."""
        return hash_lookup(batch, self.plan, self.tables)

    def start(self, batch):
        """Ids appear in a buffer of the caller's, which is overwritten as soon as start() has returned."""
        ids = self.ids
        self.streams.run("main", lambda: ids.copy_(batch))
        started = self.prefetcher.start(ids)
        self.streams.run("main", lambda: ids.fill_(39))
        return started

    def read(self, layer, stream=None, started=None):
        with self.streams.stream(stream or self.reading):
            found = getattr(started or self.prefetcher, self.reads)(layer)
            self.streams.run(self.streams.current(), lambda: self.seen.append((layer, found.clone())))

    def step(self, batch):
        self.start(batch)
        for layer in range(2):
            self.read(layer)

    def right(self, given, schedule):
        """Whether, with all work run in the order of ``schedule``, each layer saw the rows of each batch."""
        try:
            self.streams.drain(schedule)
        except ValueError as error:  # a lookup of ids that nobody copied
            assert "must be valid ids" in str(error)
            return False
        expected = [self.expected(batch) for batch in given]
        for layer in range(2):
            seen = [found for at, found in self.seen if at == layer]
            if len(seen) != len(given) or not all(same(a, b[layer]) for a, b in zip(seen, expected, strict=True)):
                return False
        return True


def weights(columns=4, width=16, layers=2):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(columns * width, WIDTH, generator=generator) for _ in range(layers)]


def projections(device="cpu", **options):
    """As of an engine: of a precision of its own, by no module."""

    def projection(weight):
        return lambda rows, out: out.copy_(rows.flatten(-2).float() @ weight.to(device))

    return [projection(weight) for weight in weights(**options)]


def projected(ids, plan, placed, **options):
    rows = hash_lookup(ids, plan, placed, **options)
    return [each.flatten(-2).float() @ weight.to(each.device) for each, weight in zip(rows, weights(), strict=True)]


class Projecting(Model):
    """Steps that read projections."""

    reads = "kv"

    def options(self):
        return dict(projections=projections(), kv_width=WIDTH, kv_dtype=torch.float32)

    def expected(self, batch):
        return projected(batch, self.plan, self.tables)


KINDS = {"rows": Model, "kv": Projecting}


def noted(model):
    """Let ``model.running`` be the stream whose work runs."""
    give = model.streams._give

    def giving(stream, kind, *rest):
        if kind == "run":
            work = rest[0]

            def run():
                model.running = stream
                work()

            rest = (run,)
        return give(stream, kind, *rest)

    model.streams._give = giving


def in_flight(model, given, ahead_by=0):
    """Steps in which each start comes ``ahead_by`` steps before it is read."""
    started = []
    for number in range(len(given) + ahead_by):
        if number < len(given):
            started.append(model.start(given[number]))
        if number >= ahead_by:
            for layer in range(2):
                model.read(layer, started=started[number - ahead_by])
            with model.streams.stream(model.reading):
                started[number - ahead_by].release()


def replayed(model, given, graphs, schedule):
    """Whether replays of graphs, in turn and each on its stream, give the rows of each batch."""
    model.seen.clear()
    for batch in given:
        model.streams.run("main", lambda batch=batch: model.ids.copy_(batch))
        for replay, stream in graphs:
            replay(stream)
    return model.right(given, schedule)
