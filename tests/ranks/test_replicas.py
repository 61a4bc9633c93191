"""Copies of a table on all ranks, and a table over ranks, under DistributedDataParallel, against one process."""

import re

import pytest
import torch
import torch.distributed as dist

from engram_kernels import EngramTable, RowAdagrad
from engram_kernels.training.replicas import digest
from tests.support.ranks import World


@pytest.fixture(scope="module", params=(2, 3), ids=lambda size: f"{size} ranks")
def world(request, tmp_path_factory):
    made = World(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "optimizer, tokens, format",
    [
        ("adagrad", "uneven", "float32"),
        ("adam", "one_empty", "bfloat16"),  # whose rows round stochastically, as those of one process
        ("adagrad", "none", "float32"),
    ],
)
def test_copies_have_the_bits_of_one_process(world, optimizer, tokens, format):
    """Over the ranks' batches one after the other, clipping and further passes included."""
    for answer in world.run("replica_cases.train_copies", optimizer, tokens, format, "sum", clip=0.5):
        assert answer["equal"] and answer["states"] and answer["everywhere"], answer
        assert answer["moved"] == (tokens != "none")
        assert answer["norms"][:2] == answer["norms"][2:4]


def test_the_mean_of_copies(world):
    """It rounds where 1 / ranks is no power of two."""
    for answer in world.run("replica_cases.train_copies", "adagrad", "uneven", "float32", "mean"):
        assert answer["everywhere"] and answer["furthest"] < 1e-6 and answer["moved"]
        assert answer["equal"] or world.size == 3


@pytest.mark.parametrize("clip, scaler", [(None, False), (0.05, False), (0.05, True)], ids=["", "clip", "scaler"])
@pytest.mark.parametrize("kind", ["copies", "sharded"])
def test_data_parallel_training_is_that_of_one_process(world, kind, clip, scaler):
    """Loss, the norm that clips, eps, weight decay and a GradScaler's skipped step; dense weights by DDP.

    Rows move by 0.01 and more, 500 times what is allowed: DDP and one process add dense gradients in other orders.
    """
    reduce = "mean" if kind == "copies" else None  # a ShardedTable's own
    for answer in world.run("replica_cases.data_parallel", kind, reduce, clip, scaler):
        assert max(answer["differences"]) < 2e-5 and answer["moved"] > 0.01 and answer["equal"], answer
        for step, (ours, alone) in enumerate(answer["norms"]):
            if not (scaler and step == 1):
                assert ours == pytest.approx(alone, rel=1e-4) and ours > 0.05
        assert answer["scales"] == ([512.0 * 2, 512.0 * 2] if scaler else [1, 1])


@pytest.mark.parametrize("kind, reduce", [("copies", "sum"), ("copies", None), ("sharded", "sum")])
def test_what_other_reductions_do_shows(world, kind, reduce):
    """Negative control: sums are other steps, and copies that do not meet differ."""
    answers = world.run("replica_cases.data_parallel", kind, reduce)
    assert min(max(answer["differences"]) for answer in answers) > 1e-3
    assert all(answer["equal"] for answer in answers) == (reduce == "sum")


REFUSED = {
    "plain": "ValueError: RowAdagrad: reduce must say what EngramTable(.*) is to the other ranks, for there are .* got",
    "sinkhorn": "ValueError: RowSinkhorn: reduce must be one of 'alone' or None, got 'mean'",
    "sinkhorn of replicas": "ValueError: RowSinkhorn: tables must have no replicas, .* got a part with [23]",
    "group": "ValueError: RowAdagrad: group is for reduce 'mean' and 'sum', got one with None",
    "no group": "TypeError: RowAdagrad: group must be .*ProcessGroup.* got str",
    "shared": "ValueError: RowAdagrad: reduce='mean' takes no table of placement 'shared', .* a copy per node",
    "kind": "ValueError: RowAdagrad|RowAdam: .* must be the same on all",
    "rows": "ValueError: RowAdagrad: digest of table 0's rows must be the same on all .* ranks, got ",
    "lr": "ValueError: RowAdagrad: lr of group 0 must be the same on all .* ranks, got 0.1 on rank 0 and 0.2 on rank 1",
    "seed": "ValueError: RowAdagrad: seed must be the same on all .* ranks, got 0 on rank 0 and 1 on rank 1",
    "another": r"ValueError: RowAdam: EngramTable\(.*\) has an optimizer with reduce='mean' over ranks .*close that",
    "no lookup": "RankError: .*: rank 1 of .* is at step 1, rank 0 at backward pass 1 of table 0: every rank has to",
    "schedule": "ValueError: RowAdagrad.step: lr of group 0 must be the same on all .* ranks, got 0.5 on rank 0 and",
    "drift": "ValueError: RowAdagrad.check_replicas: digest of table 0's rows must be the same on all .* ranks",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_on_all_ranks(world, what):
    for error in world.errors("replica_cases.refused", what):
        assert re.search(REFUSED[what], error), error


def test_tables_that_are_different_ones(world):
    ranks = world.size
    for rank, answer in enumerate(world.run("replica_cases.apart")):
        assert answer == (True, ranks, 1, 1 + (ranks - 1) / 2, 1.0 + rank)


def test_a_rank_without_tokens_may_have_another_dtype(world):
    assert world.run("replica_cases.mixed_dtypes") == [(True, 1.5 * (world.size - 1))] * world.size


def test_digests():
    """Of a tensor, and of what is like it but for two rows' places, one bit or two signs."""
    tensor = torch.randn(1000, 33)
    swapped, changed, signs = tensor.clone(), tensor.clone(), tensor.clone()
    swapped[[3, 900]] = tensor[[900, 3]]
    changed[999, 32] += 2**-20
    signs[0, :2] *= -1
    assert digest(tensor) == digest(tensor.clone())
    assert (
        len({digest(one) for one in (tensor, swapped, changed, signs, tensor[:999], tensor.view(torch.uint8)[0, :3])})
        == 6
    )
    big = torch.zeros(2**22 + 5, dtype=torch.int64)
    assert digest(big) != digest(big[:-1]) != digest(torch.zeros(3))


def test_a_job_that_begins_after_its_optimizer(monkeypatch):
    """Each step asks how many ranks there are."""
    table = EngramTable.from_tensors(torch.ones(4, 8), placement="cpu").requires_row_grad_()
    optimizer = RowAdagrad(table)
    table.accumulate_row_grad(torch.tensor([1]), torch.ones(1, 8))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="^RowAdagrad.step: reduce must say what EngramTable.* there are 2 and"):
        optimizer.step()
    assert (table.weight == 1).all() and optimizer.steps == 0
