"""What ranks of a world do in tests: called by name in every process of it (ranks.py), all results are plain data."""

import contextlib
import os
import time
from functools import partial

import torch
import torch._dynamo  # which torch's optimizers import when they are first used; here it is done once for all ranks
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from engram_kernels import (
    Engram,
    EngramConfig,
    EngramTable,
    HashPlan,
    RowAdagrad,
    RowAdam,
    RowSinkhorn,
    ShardedTable,
    hash_lookup,
    lookup,
    ngram_hash,
)
from engram_kernels.checkpoints import table_writer
from engram_kernels.testing import tables

OPTIMIZERS = {"adagrad": RowAdagrad, "adam": RowAdam, "sinkhorn": RowSinkhorn}
WIDTH, HIDDEN = 64, 16
PRIMES = EngramConfig.deepseek_demo().primes  # imports sympy, once for all ranks
HELD = {}  # what one case leaves for the next, by name


def config_of(kind="wide", format="float32"):
    """Layers of 8 columns and padded rows, or of 2 columns, where some of 8 ranks hold no row."""
    sizes = dict(heads=4, table_sizes=(40, 60), row_multiple=8) if kind == "wide" else dict(heads=1, table_sizes=(2, 2))
    options = dict(max_ngram=3, hidden_size=HIDDEN, branches=2, raw_vocab_size=50, window="eos", eos_id=3)
    return EngramConfig(layers=(1, 4), row_width=WIDTH, format=format, **sizes, **options)


def batches(ranks, tokens, seed=0):
    """Token ids of each rank: random, or by the case's name."""
    generator = torch.Generator().manual_seed(seed)
    counts = dict(uneven=[5 + 7 * rank for rank in range(ranks)], one_empty=[9] * (ranks - 1) + [0])
    counts |= dict(all_on_one=[0] * (ranks - 1) + [40], none=[0] * ranks)
    return [torch.randint(0, 50, (count,), generator=generator) for count in counts[tokens]]


def same(result, expected):
    """Equal bits, NaN and the sign of zero included."""
    return result.dtype == expected.dtype and torch.equal(
        result.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    )


def plan_of(config):
    return HashPlan.build(config)


def whole(config, layer):
    """(weight, scale) of the layer's table."""
    return tables.random_parts(config.rows_per_layer[config.layers.index(layer)], WIDTH, config.format)


def sharded(config, layer=4, **options):
    options = dict(placement="cpu", reduce="sum") | options
    parts = whole(config, layer)
    return ShardedTable.from_tensors(*parts, config=config, layer=layer, **tables.own_scale_of(*parts), **options)


def in_one_piece(config, layer=4, **options):
    """The whole table of a layer."""
    parts = whole(config, layer)
    return EngramTable.from_tensors(*parts, **tables.own_scale_of(*parts), **(dict(placement="cpu") | options))


@contextlib.contextmanager
def counted_bytes():
    """What all_to_all_single is handed in this process, by call: bytes that go to other ranks, and to this one."""
    calls, original = [], dist.all_to_all_single

    def count(output, input, output_splits=None, input_splits=None, group=None, **options):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        splits = input_splits or [len(input) // size] * size
        each = [split * input[:1].nbytes if split else 0 for split in splits]
        calls.append((sum(each) - each[rank], each[rank]))
        return original(output, input, output_splits, input_splits, group=group, **options)

    dist.all_to_all_single = count
    try:
        yield calls
    finally:
        dist.all_to_all_single = original


def lookups(kind, format, tokens, split="columns", capacity=None):
    """Whether every kind of output has the bits of one process; the table is padded, and some ids are outside."""
    config = config_of(kind, format)
    expected = in_one_piece(config)
    own = batches(dist.get_world_size(), tokens)[dist.get_rank()]
    row_ids = ngram_hash(own, plan_of(config))[:, 1]
    ids = torch.cat([row_ids, torch.tensor([[-1], [expected.rows - 1], [expected.rows]]).expand(3, config.columns)])
    found = {}
    with sharded(config, split=split, capacity=capacity) as table:
        for name, options in (("default", {}), ("float32", dict(out_dtype=torch.float32))):
            found[name] = same(table.lookup(ids, **options), lookup(expected, ids, **options))
        stored = [
            (x.lookup(ids, out_format="storage") if x is table else lookup(x, ids, out_format="storage"))
            for x in (table, expected)
        ]
        found["storage"] = all(a is b is None or same(a, b) for a, b in zip(*stored, strict=True))
        out = torch.full((*ids.shape, WIDTH), 7.0, dtype=torch.float32)
        found["out"] = table.lookup(ids, out=out, out_dtype=torch.float32) is out and same(
            out, lookup(expected, ids, out_dtype=torch.float32)
        )
        found["strided"] = same(table.lookup(ids.T), lookup(expected, ids.T.contiguous()))
        rows = table.hash_lookup(own, plan_of(config))
        found["hashed"] = same(rows, hash_lookup(own, plan_of(config).select(layers=[1]), [expected])[0])
        return found, (table.sharding.split, table.sharding.part_rows)


def traffic(kind, capacity=None, tokens=300, meshed=False):
    """What a lookup and its backward pass hand to all_to_all_single, and the rows that go to each owner."""
    options = dict(capacity=capacity)
    if meshed:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "table"))
        options |= dict(group=grid.get_group("table"), replicas=grid.get_group("data"))
    config = config_of(kind, "bfloat16")
    generator = torch.Generator().manual_seed(dist.get_rank())
    own = torch.randint(0, 50, (tokens,), generator=generator)
    row_ids = ngram_hash(own, plan_of(config))[:, 1]
    with sharded(config, **options) as table:
        table.requires_row_grad_()
        with counted_bytes() as forward:
            values = table.lookup(row_ids)
        with counted_bytes() as backward:
            values.sum().backward()
        entries = [part.tolist() for part in _by_owner(table, row_ids)]
    sent = [[others for others, _ in calls] for calls in (forward, backward)]
    return *sent, [len(set(part)) for part in entries], [len(part) for part in entries]


def held_rows(table, rows):
    """Of ``rows [all, ...]`` those that this rank holds, one range after the other."""
    return torch.cat([rows[:0], *(rows[begin:end] for begin, end in table.sharding.ranges(table.ranks.rank))])


def _by_owner(table, row_ids):
    """The ids that each rank holds, by its ranges alone."""
    for rank in range(table.ranks.size):
        mine = torch.zeros_like(row_ids, dtype=torch.bool)
        for begin, end in table.sharding.ranges(rank):
            mine |= (row_ids >= begin) & (row_ids < end)
        yield row_ids[mine]


def overflow():
    """Too small a capacity: the error, the rows that did fit, what those beyond read as, and the next lookup."""
    config = config_of("wide", "bfloat16")
    ids = torch.arange(100)[:, None] if dist.get_rank() == 1 else torch.arange(3)[:, None]
    with sharded(config, split="columns", capacity=20) as table:
        expected = lookup(in_one_piece(config), ids)
        checked, table.check_capacity = table.check_capacity, lambda: None
        rows = table.lookup(ids)
        fits = [bool(torch.equal(a, b)) for a, b in zip(rows, expected, strict=True)]
        lost = [bool(row.isnan().all()) for row in rows]
        message = None
        try:
            checked()
        except ValueError as error:
            message = str(error)
        table.check_capacity = checked
        again = same(table.lookup(ids[:3]), expected[:3])
        try:
            table.lookup(ids)
        except ValueError as error:
            return message, str(error), fits, lost, again


#: Ways to clip; elements of a batch's gradients reach 3.
CLIPPINGS = {
    "norm": partial(torch.nn.utils.clip_grad_norm_, max_norm=0.1),
    "sum": partial(torch.nn.utils.clip_grad_norm_, max_norm=0.1, norm_type=1),
    "largest": partial(torch.nn.utils.clip_grad_norm_, max_norm=0.1, norm_type=float("inf")),
    "value": partial(torch.nn.utils.clip_grad_value_, clip_value=0.5),
}


def train(optimizer, tokens, split="columns", format="float32", clip=None, table=None):
    """Steps over all ranks' batches, against one process over the batches one after the other; what differs."""
    config, size = config_of("wide", format), dist.get_world_size()
    table = (sharded(config, split=split) if table is None else table).requires_row_grad_()
    alone = in_one_piece(config).requires_row_grad_()
    options = dict(lr=0.1, stochastic_rounding=False, reduce=None) | (
        dict(weight_decay=0.01) if optimizer != "sinkhorn" else {}
    )
    made = {it: OPTIMIZERS[optimizer](it, **options) for it in (table.part, alone) if not it.attached}
    ours, theirs = made.get(table.part), made[alone]
    plan, norms = plan_of(config), []
    for step in range(3):
        every = batches(size, tokens, seed=step)
        ends = torch.tensor([0, *(len(part) for part in every)]).cumsum(0).to(torch.int32)
        row_ids = ngram_hash(torch.cat(every), plan, cu_seqlens=ends)[:, 1].clone()
        row_ids[::7, 0], row_ids[3::7, 1] = -1, alone.rows  # outside the table, and nobody's
        mine = slice(*ends[dist.get_rank() :][:2])
        rows, expected = table.lookup(row_ids[mine]), lookup(alone, row_ids)
        # Entries of one row have gradients of their own: what is added in another order has other bits.
        factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(step))
        for values, factor, one in ((rows, factors[mine], table), (expected, factors, alone)):
            one.zero_row_grad()
            (values.float() * factor).sum().backward(retain_graph=True)
            # which adds to what the first pass left
            values.float().square().sum().backward(retain_graph=clip is not None)
        norms.append((float(table.anchor.grad), float(alone.anchor.grad)))
        if clip:  # and one more pass, which adds to what clipping left
            for values, anchor in ((rows, table.anchor), (expected, alone.anchor)):
                CLIPPINGS[clip]([anchor])
                values.float().sum().backward()
        if ours is not None:
            ours.step()
        theirs.step()
        dist.barrier()
    expected = held_rows(table, alone.weight)
    moved = table.part.weight[: len(expected)]
    changed = not torch.equal(whole(config, 4)[0], alone.weight)
    result = dict(equal=same(moved, expected), norms=norms, changed=changed)
    result["furthest"] = float((moved.float() - expected.float()).abs().amax()) if len(expected) else 0.0
    for it in (*made.values(), table):
        it.close()
    return result


def module():
    """The Engram module over a sharded table: output and gradients against the module over a whole one."""
    config = config_of("wide", "float32")
    own = batches(dist.get_world_size(), "uneven")[dist.get_rank()]
    plan, outputs = plan_of(config), []
    alone = in_one_piece(config)
    with sharded(config) as table:
        for it in (table, alone):
            torch.manual_seed(1)
            engram = Engram(config, 4, plan, it.requires_row_grad_())
            hidden = torch.randn(len(own), config.branches, HIDDEN, requires_grad=True)
            out = engram(hidden, own)
            out.sum().backward()
            outputs.append((out.detach(), hidden.grad, engram.wkv.weight.grad))
        try:
            Engram(config, 1, plan, table)
        except ValueError as error:
            refused = str(error)
        return [same(a, b) for a, b in zip(*outputs, strict=True)], table.part.row_grad is not None, refused


def save(path, kind, format, split="columns", fault=None, struck=1, **options):
    """Saves; ``fault`` strikes on rank ``struck`` while it writes its rows."""
    if fault and dist.get_rank() == struck:
        strike = dict(error=_no_space, death=lambda *_: os._exit(9), hang=lambda *_: time.sleep(3600))[fault]
        original, table_writer.RowsFiles.write = table_writer.RowsFiles.write, strike
    try:
        with sharded(config_of(kind, format), split=split) as table:
            table.token_map = "0" * 64
            return str(table.save_safetensors(path, **options))
    finally:
        if fault and dist.get_rank() == struck:
            table_writer.RowsFiles.write = original


def _no_space(*_):
    raise OSError(28, "No space left on device")


def load(path, kind, format, split="columns"):
    """Whether the shard has the bits of the saved table's rows, and whether its bytes are all that was read."""
    config, read = config_of(kind, format), []
    weight, scale = whole(config, 4)
    options = dict(config=config, layer=4, placement="cpu", split=split)
    with ShardedTable.from_safetensors(path, progress=lambda *call: read.append(call), **options) as table:
        expected = held_rows(table, weight)
        rows = len(expected)
        equal = [same(table.part.weight[:rows], expected), table.token_map == "0" * 64]
        if table.format.group:
            equal.append(same(table.part.scale[:rows], held_rows(table, scale)))
        if table.format.table_scale:
            own = tables.TABLE_SCALE if table.format.group else scale
            equal.append(table.part.own_scale == float(torch.tensor(own)))
        return all(equal), read[-1] == (rows * table.format.stored_bytes(WIDTH),) * 2


def construct(change=None):
    """A table of arguments that ``change`` spoils on this rank."""
    config = config_of("wide", "bfloat16")
    options = dict(config=config, layer=4, placement="cpu") | (change or {})
    weight = options.pop("weight", whole(config, 4)[0])
    if options.pop("cut", False):
        weight = weight[:-1].contiguous()
    ShardedTable.from_tensors(weight, **options).close()


def construct_filled(fails):
    """A table whose rows are written by a function that raises on some rank."""

    def fill(shard, ranges):
        HELD["shard"] = shard
        if fails:
            raise KeyError("no rows here")

    try:
        ShardedTable(config_of(), 4, placement="cpu", fill=fill)
    finally:
        assert HELD.pop("shard").closed


def keep(path=None):
    HELD["table"], HELD["path"] = sharded(config_of()), path
    if path is not None:
        HELD["table"].save_safetensors(path)


def ask(call, change=None):
    """A call of the table that was kept, with arguments that ``change`` spoils on this rank."""
    loading = dict(paths=HELD["path"], config=config_of(), layer=4, placement="cpu")
    arguments = dict(lookup=dict(row_ids=torch.arange(10)[:, None]), from_safetensors=loading, node_groups={})
    arguments |= dict(hash_lookup=dict(token_ids=torch.arange(10), plan=plan_of(config_of())))
    arguments |= dict(save_safetensors=dict(path=HELD["path"]))
    getattr(HELD["table"], call)(**arguments[call] | (change or {}))


def use(step, what="work"):
    """One step of a table's life, after all that come before it; a rank may end or hang instead."""
    table, ids = HELD["table"].requires_row_grad_(), torch.arange(10)[:, None]
    values = table.lookup(ids) if step == "backward" else None
    if what == "die":
        os._exit(9)
    if what == "hang":
        time.sleep(3600)
    if step == "construct":
        sharded(config_of())
    elif step == "lookup":
        table.lookup(ids)
    else:
        values.sum().backward()


def nodes(name, optimizer, path, copies=False):
    """Two nodes of two ranks, each with one shard, or one copy, in shared memory: what is shared, and training."""
    label = "ab"[dist.get_rank() // 2]
    inside, across = ShardedTable.node_groups(node=label)
    config = config_of("wide", "float32")
    options = dict(group=across, node=inside, placement="shared", name=f"{name}-{label}")
    if copies:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        options |= dict(group=alone, replicas=dist.group.WORLD)
    table = sharded(config, **options)
    members = [dist.get_process_group_ranks(group) for group in (inside, across)]
    expected = in_one_piece(config)
    ids = torch.arange(expected.rows)[:, None]
    equal = same(table.lookup(ids), lookup(expected, ids))
    dist.barrier()
    if dist.get_rank(inside) == 0:
        table.part.weight[5] = 9.0
    dist.barrier()
    seen = bool((table.part.weight[5] == 9).all())
    dist.barrier()
    if dist.get_rank(inside) == 0:
        begin = table.sharding.ranges(table.ranks.rank)[0][0]
        table.part.weight[5] = expected.weight[begin + 5]
    dist.barrier()
    if not table.part.attached and not (copies and label == "b"):
        table.save_safetensors(path)
    dist.barrier()
    return members, equal, seen, train(optimizer, "uneven", table=table)


def ill_matched(kind):
    """Replicas that hold other shards, one of which fails, or tables of different nodes' configs."""
    if kind == "parts":
        return sharded(config_of("wide"), replicas=dist.group.WORLD)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "table"))
    options = dict(group=grid.get_group("table"), replicas=grid.get_group("data"))
    split = "rows" if kind == "split" and dist.get_rank() > 1 else "columns"
    change = dict(placement="device") if kind == "memory" and dist.get_rank() == 3 else {}
    return sharded(config_of("wide"), split=split, **options, **change)


def uneven_nodes():
    ShardedTable.node_groups(node="a" if dist.get_rank() == 0 else "b")


def mesh(optimizer):
    """Data x table, 2 x 2: each half of the data has a table of its own over two ranks, kept equal in training."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "table"))
    options = dict(group=grid.get_group("table"), replicas=grid.get_group("data"))
    config = config_of("wide", "float32")
    expected = in_one_piece(config)
    own = ngram_hash(batches(4, "uneven")[dist.get_rank()], plan_of(config))[:, 1]
    table = sharded(config, **options)
    equal = same(table.lookup(own), lookup(expected, own))
    return equal, table.ranks.size, train(optimizer, "uneven", table=table)
