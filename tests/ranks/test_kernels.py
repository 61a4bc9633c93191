"""A table over ranks through the kernels: a group of one process, Gloo in the interpreter, NCCL on a GPU."""

import pytest
import torch
import torch.distributed as dist

from engram_kernels import Prefetcher, RowAdagrad, ShardedTable, hash_lookup, lookup, ngram_hash
from tests.gpu.test_kernels import graph_of
from tests.support.rank_cases import config_of, in_one_piece, plan_of, same, sharded, whole

WHERE = {"cpu": "cpu", "cuda": "host"}  # where a shard lies, by the device of the ids


@pytest.fixture
def group(device, tmp_path):
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def both(config, device, **options):
    """The table over one rank, and in one piece."""
    placement = WHERE[device.type]
    return sharded(config, placement=placement, **dict(reduce="mean") | options), in_one_piece(
        config, placement=placement
    )


@pytest.mark.kernel
@pytest.mark.parametrize("options", [{}, dict(capacity=300), dict(cache_bytes=10_000)], ids=str)
@pytest.mark.parametrize("format", ["e4m3_ue8m0", "e4m3", "bfloat16", "nvfp4"])
def test_lookups_have_the_bits_of_one_piece(group, device, format, options):
    config = config_of("wide", format)
    plan, ids = plan_of(config).to(device), torch.randint(0, 50, (6,), device=device)
    table, alone = both(config, device, **options)
    with table, alone:
        expected = hash_lookup(ids, plan.select(layers=[1]), [alone])[0]
        assert same(table.hash_lookup(ids, plan), expected)
        rows = ngram_hash(ids, plan)[:, 1].clone()
        rows[0, :3] = torch.tensor([-1, alone.rows, alone.rows - 1])
        stored, expected = table.lookup(rows, out_format="storage"), lookup(alone, rows, out_format="storage")
        for got, want in zip(stored, expected, strict=True):
            assert got is want is None or same(got, want)


@pytest.mark.kernel
@pytest.mark.parametrize("options", [dict(cache_bytes=10_000), dict(capacity=300)], ids=str)
def test_starts_have_the_bits_of_one_piece(group, device, options):
    """Two in flight, read after both have begun."""
    config = config_of("wide", "e4m3_ue8m0")
    plan = plan_of(config).to(device).select(layers=[1])
    table, alone = both(config, device, **options)
    with table, alone:
        prefetcher = Prefetcher(plan, [table], 8, depth=2)
        ids = [torch.randint(0, 50, (count,), device=device) for count in (6, 8)]
        for each, started in [(each, prefetcher.start(each)) for each in ids]:
            assert same(started.rows(0), hash_lookup(each, plan, [alone])[0])


@pytest.mark.kernel
def test_a_step_has_the_bits_of_one_piece(group, device):
    config = config_of("wide", "float32")
    plan, ids = plan_of(config).to(device), torch.randint(0, 50, (6,), device=device)
    table, alone = both(config, device)
    with table, alone:
        table.requires_row_grad_()
        alone.requires_row_grad_()
        ours, theirs = RowAdagrad(table.part, lr=0.1), RowAdagrad(alone, lr=0.1)
        for values in (table.hash_lookup(ids, plan), hash_lookup(ids, plan.select(layers=[1]), [alone])[0]):
            values.sin().sum().backward()
        ours.step()
        theirs.step()
        alone.wait_for_steps()
        assert same(table.part.weight, alone.weight) and not torch.equal(alone.weight, whole(config, 4)[0])
        ours.close()
        theirs.close()


@pytest.mark.gpu
def test_a_capacity_is_captured_in_a_graph(group, device):
    """Replays read other ids; one that needs too much is found by check_capacity, and the next is whole again."""
    config = config_of("wide", "e4m3_ue8m0")
    ids = torch.arange(40, device=device)[:, None].clone()
    table, alone = both(config, device, capacity=40)
    with table, alone:
        table.lookup(ids)  # what is made once is made here
        graph, rows = graph_of(lambda: table.lookup(ids))
        for first in (0, 100):
            ids.copy_(torch.arange(first, first + 40, device=device)[:, None])
            graph.replay()
            table.check_capacity()
            assert same(rows, lookup(alone, ids))
    with ShardedTable.from_tensors(*whole(config, 4), config=config, layer=4, placement="host", capacity=39) as small:
        rows = small.lookup(ids)
        with pytest.raises(ValueError, match="capacity must be at least 40"):
            small.check_capacity()
        assert rows.isnan().all(-1).sum() >= 1
        small.lookup(ids[:39])
        small.check_capacity()
