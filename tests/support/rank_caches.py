"""What ranks of a world do in tests of rows that they keep of others (ranks.py calls them by name)."""

import os

import numpy as np
import torch
import torch.distributed as dist

from engram_kernels import MetricsCollector, Prefetcher, hash_lookup, lookup
from engram_kernels.reference.cache.simulator import WAYS, CacheSimulator, scramble

from .rank_cases import WIDTH, _by_owner, config_of, counted_bytes, in_one_piece, plan_of, same, sharded


def ids_of(step, rows, some=40):
    """Row ids of this rank in a step: often the same ones, some outside the table, in some steps none or all known."""
    rank, generator = dist.get_rank(), torch.Generator()
    if (step + rank) % 4 == 3:
        return torch.empty(0, 2, dtype=torch.int64)
    generator.manual_seed(0 if (step + rank) % 4 == 2 else 1 + 100 * step + rank)
    ids = (torch.rand(some, 2, generator=generator) ** 3 * (rows + 2)).long() - 1
    return ids


def kept(kind, format, split, entries, steps=12):
    """Steps of lookups: what has the bits of one process, what was exchanged, and what the specification says."""
    config = config_of(kind, format)
    alone, rank = in_one_piece(config), dist.get_rank()
    row_bytes = alone.format.stored_bytes(WIDTH)
    cache_bytes = (entries + 1) * (row_bytes + 16)
    found, moved, missed = [], [], []
    with sharded(config, split=split, cache_bytes=cache_bytes) as table:
        cache = table.cache.on(torch.device("cpu"))
        simulator = CacheSimulator(1, cache.sets, WAYS)
        for step in range(steps):
            ids = ids_of(step, alone.rows)
            with counted_bytes() as calls:
                rows = table.lookup(ids)
            found.append(same(rows, lookup(alone, ids)))
            by_owner = [set(part.tolist()) for part in _by_owner(table, ids)]
            others = torch.tensor(sorted(set().union(*by_owner) - by_owner[rank]), dtype=torch.int64)
            keys = table.map(others.device).keys(others, -1).numpy()
            hits = predicted(simulator, keys, sum(map(len, by_owner)))
            by_owner = [len(part & set(others[~hits].tolist())) for part in by_owner]
            missed.append(by_owner)
            moved.append([there for there, _ in calls])
        found.append(np.array_equal(simulator.stamps.reshape(-1), cache.stamps[:-1].numpy()))
        found.append(np.array_equal(simulator.keys.reshape(-1), cache.keys[:-1].numpy()))
        for options in (dict(out_dtype=torch.float32), dict(out_format="storage")):
            ours, theirs = table.lookup(ids, **options), lookup(alone, ids, **options)
            pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else zip(ours, theirs, strict=True)
            found.append(all(a is b is None or same(a, b) for a, b in pairs))
        return found, moved, missed, table.metrics(), cache_bytes


def predicted(simulator, keys, distinct):
    """Which of ascending row ``keys`` hit, in a call of ``distinct`` rows, this rank's own among them."""
    simulator.clock += distinct
    tags = np.sort(scramble(keys))
    hits = simulator.find(0, tags) >= 0
    simulator.keep(0, tags[~hits])
    return np.isin(scramble(keys), tags[hits])


def changed_alone(how):
    """One rank changes rows of its shard, with no word to others: what all read before, and after."""
    config = config_of("wide", "bfloat16")
    ids = torch.arange(config.rows_per_layer[1])[:, None]
    with sharded(config, cache_bytes=1 << 20) as table:
        before = [table.lookup(ids) for _ in range(2)]
        hits = table.metrics()["hits"]
        begin, end = table.sharding.ranges(1)[0]
        if dist.get_rank() == 1:
            rows = torch.full((end - begin, WIDTH), 7.0, dtype=torch.bfloat16)
            if how == "write_rows":
                table.part.write_rows(torch.arange(end - begin), rows)
            elif how == "torch":
                table.part.weight[: end - begin] = rows
            else:
                table.part.weight.view(torch.uint8).numpy()[: end - begin] = rows.view(torch.uint8).numpy()
                table.part.rows_changed()
        after, expected = table.lookup(ids), before[0].clone()
        expected[begin:end] = 7.0
        again = table.lookup(ids)
        others = table.rows - table.sharding.part_rows[dist.get_rank()]
        return (
            hits > 0.9 * others,
            same(*before),
            same(after, expected),
            same(again, expected),
            not same(after, before[0]),
        )


def trained():
    """The texts of errors where rows are to be trained and kept."""
    texts = []
    with sharded(config_of("wide", "bfloat16"), cache_bytes=1 << 20) as table:
        table.requires_row_grad_(False)
        try:
            table.requires_row_grad_()
        except ValueError as error:
            texts.append(str(error))
        table.part.requires_row_grad_()
        try:
            table.lookup(torch.arange(4)[:, None])
        except ValueError as error:
            texts.append(str(error))
    return texts


def refused(change):
    """A lookup whose arguments ``change`` spoils on this rank, then the next one; bits, and the error's text."""
    config = config_of("wide", "bfloat16")
    ids, text = torch.arange(50)[:, None], None
    with sharded(config, cache_bytes=1 << 20) as table:
        table.lookup(ids)
        if dist.get_rank() == 1:
            table.part.rows_changed()
        try:
            table.lookup(**dict(row_ids=ids) | change)
        except (ValueError, RuntimeError) as error:
            text = str(error)
        return same(table.lookup(ids), lookup(in_one_piece(config), ids)), text


def modelled(tokens, steps, cached):
    """Bytes to others a token, and what the traffic model needs for them: a share by simulation of one stream."""
    config = config_of("wide", "bfloat16")
    size, generator = dist.get_world_size(), torch.Generator().manual_seed(dist.get_rank())
    simulator, read, sent = CacheSimulator(1, 2000, WAYS), 0, 0
    with sharded(config, cache_bytes=1 << 20 if cached else None) as table:
        for _ in range(steps):
            ids = (torch.rand(tokens, config.columns, generator=generator) * table.rows).long()
            distinct = np.unique(scramble(ids.numpy()))
            simulator.clock += len(distinct)
            missed = distinct[simulator.find(0, distinct) < 0]
            simulator.keep(0, missed)
            read += len(missed) if cached else len(distinct)
            with counted_bytes() as calls:
                table.lookup(ids)
            sent += sum(others for others, _ in calls)
    asked = steps * tokens * config.columns
    return sent / (steps * tokens), read / asked, (size, tokens, config.columns, 2 * WIDTH)


def both_layers(config, make, **options):
    return [make(config, layer, **options) for layer in config.layers]


def prefetched(format, options, depth, out_format="values"):
    """Starts ahead of what reads them, several in flight: which have the bits of whole tables; rows that were kept."""
    config, rank = config_of("wide", format), dist.get_rank()
    plan, found = plan_of(config), []
    alone = both_layers(config, in_one_piece)
    tables = both_layers(config, sharded, **options)
    given = dict(max_sequences=3, layers=config.layers, depth=depth, out_format=out_format)
    projections = None
    if out_format == "values":
        projections = [lambda rows, out: out.copy_(rows.float().sum((-2, -1))[..., None].expand(out.shape))] * 2
        given |= dict(projections=projections, kv_width=3, kv_dtype=torch.float32)
    prefetcher = Prefetcher(plan, tables, 40, **given)
    in_flight = []

    def read():
        started, expected = in_flight.pop(0)
        for layer, wanted in zip(config.layers, expected, strict=True):
            rows = started.rows(layer)
            pairs = zip(rows, wanted, strict=True) if isinstance(rows, tuple) else [(rows, wanted)]
            found.append(all(ours is theirs is None or same(ours, theirs) for ours, theirs in pairs))
            if projections:
                kv = wanted.float().sum((-2, -1))[..., None].expand(*wanted.shape[:-2], 3)
                found.append(same(started.kv(layer), kv.contiguous()))
        started.release()

    for step in range(7):
        generator = torch.Generator().manual_seed(10 * (step % 3) + rank)
        lengths = [[12], [3, 5], [0], [1, 0, 9]][(step + rank) % 4]  # ranks differ, and some have no tokens
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        ids = torch.randint(0, 50, (int(ends[-1]),), generator=generator)
        history = torch.randint(0, 50, (len(lengths), config.max_ngram - 1), generator=generator)
        packed = dict(cu_seqlens=ends, history=history)
        if len(in_flight) == depth:
            read()
        started = prefetcher.start(ids, **packed)
        wanted = [
            hash_lookup(ids, plan.select(layers=[place]), [table], out_format=out_format, **packed)
            for place, table in enumerate(alone)
        ]
        each = [it[0] if isinstance(it, torch.Tensor) else [None if x is None else x[0] for x in it] for it in wanted]
        in_flight.append((started, each))
        ids.fill_(0)  # which start() has copied
    while in_flight:
        read()
    metrics = prefetcher.metrics()
    return found, (metrics["starts"], metrics["in_flight"]), [table.metrics()["hits"] for table in tables]


def refused_start(change):
    """Starts, one of which this rank may spoil; then all read the next one: its bits, and the error's text."""
    config, text = config_of("wide", "bfloat16"), None
    plan, ids = plan_of(config), torch.arange(9)
    prefetcher = Prefetcher(plan, both_layers(config, sharded, cache_bytes=1 << 20), 20, layers=config.layers, depth=2)
    first = prefetcher.start(ids)
    try:
        prefetcher.start(**dict(token_ids=ids) | change)
    except (ValueError, RuntimeError, TypeError) as error:
        text = str(error)
    second = prefetcher.start(ids + 1)
    expected = [hash_lookup(each, plan, both_layers(config, in_one_piece)) for each in (ids, ids + 1)]
    found = [
        same(started.rows(layer), rows[place])
        for started, rows in zip((first, second), expected, strict=True)
        for place, layer in enumerate(config.layers)
    ]
    return found, text


def mixed_tables(what):
    """A Prefetcher of arguments that do not go together."""
    config = config_of("wide", "bfloat16")
    tables = both_layers(config, sharded)
    if what == "mixed":
        tables[1] = in_one_piece(config)
    options = {"order": dict(order="direct"), "programs": dict(programs=3)}.get(what, {})
    Prefetcher(plan_of(config), tables[:1] if what == "one" else tables, 20, **options)


def collected():
    """What a table counts, and what Prometheus is shown of it."""
    with sharded(config_of("wide", "bfloat16"), cache_bytes=1 << 20) as table:
        for _ in range(2):
            table.lookup(torch.arange(80)[:, None])
        families = MetricsCollector({"rows": {4: table}}).collect()
        samples = {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}
        return table.metrics(), samples


def die(dies):
    """A lookup of rows that are kept, in which one rank ends."""
    with sharded(config_of("wide", "bfloat16"), cache_bytes=1 << 20) as table:
        for _ in range(2):
            table.lookup(torch.arange(80)[:, None])
        if dies:
            os._exit(9)
        table.lookup(torch.arange(80)[:, None])
