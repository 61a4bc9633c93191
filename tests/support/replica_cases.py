"""What ranks do with copies of a table, and with a table over them, under DistributedDataParallel."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engram_kernels import Engram, EngramTable, RowAdagrad, RowAdam, RowSinkhorn, ShardedTable, lookup

from .rank_cases import HIDDEN, OPTIMIZERS, batches, config_of, held_rows, plan_of, same, whole


def copy_of(format="float32", change=None):
    """A trainable copy of layer 4's table; ``change`` is added to one of its rows."""
    weight, _ = whole(config_of("wide", format), 4)
    if change:
        weight[7] += change
    return EngramTable.from_tensors(weight, placement="cpu").requires_row_grad_()


def everywhere(tensor):
    """Whether all ranks have the same bits."""
    found = tensor.contiguous().view(torch.uint8)
    others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(others, found)
    return all(torch.equal(found, other) for other in others)


def train_copies(optimizer, tokens, format, reduce, clip=None):
    """Steps on copies against one process over the ranks' batches; rows of bfloat16 round stochastically."""
    size, table, alone = dist.get_world_size(), copy_of(format), copy_of(format)
    options = dict(lr=0.1, weight_decay=0.01, seed=5)
    ours = OPTIMIZERS[optimizer](table, reduce=reduce, **options)
    theirs = OPTIMIZERS[optimizer](alone, reduce=None, **options)
    before, norms = table.weight.clone(), []
    for step in range(3):
        every = batches(size, tokens, seed=step)
        ends = torch.tensor([0, *(len(part) for part in every)]).cumsum(0)
        row_ids = torch.cat(every)[:, None] * torch.tensor([1, 7, 3]) + torch.tensor([0, -3, 60])  # some are no rows
        mine = slice(*ends[dist.get_rank() :][:2])
        factors = torch.randn(*row_ids.shape, table.width, generator=torch.Generator().manual_seed(step))
        for one, ids, factor in ((table, row_ids[mine], factors[mine]), (alone, row_ids, factors)):
            one.zero_row_grad()
            share = 1 / size if reduce == "mean" and one is alone else 1
            for _ in range(2):  # the second pass adds to what clipping left of the first
                (lookup(one, ids).float() * factor * share).sum().backward()
                if clip:
                    norms.append(float(torch.nn.utils.clip_grad_norm_([one.anchor], clip)))
            one.accumulate_row_grad(ids[:, 0], factor[:, 0].to(one.weight.dtype) * share)
        ours.step()
        theirs.step()
    states = [same(ours.states()[name], value) for name, value in theirs.states().items()]
    result = dict(equal=same(table.weight, alone.weight), states=all(states), norms=norms)
    result |= dict(everywhere=everywhere(table.weight), moved=not same(table.weight, before))
    result["furthest"] = float((table.weight.float() - alone.weight.float()).abs().amax())
    ours.close()
    return result


class Model(torch.nn.Module):
    """Two dense layers around Engram's."""

    def __init__(self, config, plan, table):
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(HIDDEN, config.branches * HIDDEN)
        self.engram = Engram(config, 4, plan, table)
        self.last = torch.nn.Linear(config.branches * HIDDEN, 5)

    def forward(self, x, ids):
        hidden = self.first(x).unflatten(-1, (-1, HIDDEN))
        return self.last(self.engram(hidden, ids).flatten(-2))


def data_parallel(kind, reduce, clip=None, scaler=False, tokens=6):
    """DDP against one process over the global batch, step by step: what differs, and the largest differences.

    kind: "copies" or "sharded". The loss is the mean over a rank's tokens, as recipes write it.
    """
    config, size, rank = config_of("wide", "float32"), dist.get_world_size(), dist.get_rank()
    plan = plan_of(config)
    if kind == "sharded":
        options = dict(config=config, layer=4, placement="cpu") | ({} if reduce is None else dict(reduce=reduce))
        table = ShardedTable.from_tensors(*whole(config, 4), **options).requires_row_grad_()
    else:
        table = copy_of()
    alone = copy_of()
    models = [Model(config, plan, it) for it in (table, alone)]
    part = table.part if kind == "sharded" else table
    rows = RowAdagrad(part, lr=0.1, weight_decay=0.01, eps=1e-3, reduce=None if kind == "sharded" else reduce)
    optimizers = [(rows, torch.optim.SGD(models[0].parameters(), lr=0.01, momentum=0.9))]
    rows = RowAdagrad(alone, lr=0.1, weight_decay=0.01, eps=1e-3, reduce=None)
    optimizers.append((rows, torch.optim.SGD(models[1].parameters(), lr=0.01, momentum=0.9)))
    wrapped = DistributedDataParallel(models[0])
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in models]
    differences, norms = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, ids = torch.randn(size * tokens, HIDDEN, generator=generator), torch.randint(0, 50, (size, tokens))
        ids = torch.randint(0, 50, (size, tokens), generator=generator)
        wanted = torch.randn(size * tokens, 5, generator=generator)
        if scaler and step == 1:
            x[0] = float("inf")  # of rank 0's tokens alone; every rank has to leave the step out
        mine = slice(rank * tokens, (rank + 1) * tokens)
        found = []
        for at, (model, run) in enumerate(((wrapped, (mine,)), (models[1], range(size)))):
            for optimizer in optimizers[at]:
                optimizer.zero_grad()
            # One process goes through the ranks' sequences one by one, as their tokens are no neighbours.
            for part in run:
                part = part if isinstance(part, slice) else slice(part * tokens, (part + 1) * tokens)
                loss = (model(x[part], ids.view(-1)[part]) - wanted[part]).square().mean() / len(run)
                (scalers[at].scale(loss) if scaler else loss).backward()
            if scaler:
                for optimizer in optimizers[at]:
                    scalers[at].unscale_(optimizer)
            parameters = [*models[at].parameters(), (table if at == 0 else alone).anchor]
            found.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip or 1e9)))
            for optimizer in optimizers[at]:
                scalers[at].step(optimizer) if scaler else optimizer.step()
            if scaler:
                scalers[at].update()
        norms.append(found)
        ours = held_rows(table, alone.weight) if kind == "sharded" else alone.weight
        pairs = [((part := table.part if kind == "sharded" else table).weight[: len(ours)], ours)]
        pairs += [(a.detach(), b.detach()) for a, b in zip(*(model.parameters() for model in models), strict=True)]
        differences.append(max(float((a - b).abs().amax()) for a, b in pairs))
    first = whole(config, 4)[0]
    result = dict(differences=differences, norms=norms, moved=float((alone.weight - first).abs().amax()))
    result["equal"] = kind == "sharded" or everywhere(table.weight)
    result["scales"] = [one.get_scale() for one in scalers] if scaler else [1, 1]
    for one in (optimizers[0][0], table, alone):
        one.close()
    return result


def refused(what):
    """Optimizers that cannot be made, and steps that cannot be taken, on any rank."""
    rank = dist.get_rank()
    options = {"lr": dict(lr=0.1 + 0.1 * rank), "seed": dict(seed=rank), "eps": {}}.get(what, {})
    if what == "plain":
        RowAdagrad(copy_of())
    elif what == "sinkhorn":
        RowSinkhorn(copy_of(), reduce="mean")
    elif what == "sinkhorn of replicas":
        alone = dist.new_group([rank], use_local_synchronization=True)
        with ShardedTable.from_tensors(
            *whole(config_of(), 4), config=config_of(), layer=4, group=alone, replicas=dist.group.WORLD, placement="cpu"
        ) as table:
            RowSinkhorn(table.requires_row_grad_().part)
    elif what == "group":
        RowAdagrad(copy_of(), reduce=None, group=dist.group.WORLD)
    elif what == "no group":
        RowAdagrad(copy_of(), reduce="mean", group="world")
    elif what == "shared":
        weight, _ = whole(config_of(), 4)
        with EngramTable.from_tensors(weight, placement="shared", name=f"replica-{rank}-{id(weight)}") as table:
            RowAdagrad(table.requires_row_grad_(), reduce="mean")
    elif what == "kind":
        (RowAdagrad, RowAdam)[rank % 2](copy_of(), reduce="mean")
    elif what == "rows":
        RowAdagrad(copy_of(change=rank / 1024), reduce="mean")
    elif what in ("lr", "seed"):
        RowAdagrad(copy_of(), reduce="mean", **options)
    elif what == "another":
        table = copy_of()
        first = RowAdagrad(table, reduce="mean")
        RowAdam(table, reduce="sum")
        first.close()
    else:
        table = copy_of()
        made = RowAdagrad(table, reduce="mean")
        if what == "no lookup" and rank == 1:
            made.step()
        if what == "schedule":
            made.param_groups[0]["lr"] = 0.5 + rank
        if what == "drift" and rank == 1:
            table.weight[3, 3] += 1
            made.check_replicas()
        elif what == "drift":
            made.check_replicas()
        table.accumulate_row_grad(torch.arange(3), torch.ones(3, table.width))
        made.step()


def apart():
    """reduce=None trains tables that differ; a closed optimizer leaves a table whose gradient is this rank's alone."""
    table, rank = copy_of(), dist.get_rank()
    made = RowAdagrad(table, reduce=None)
    table.accumulate_row_grad(torch.tensor([rank]), torch.ones(1, table.width))
    made.step()
    differ = not everywhere(table.weight)
    table = copy_of()
    made = RowAdagrad(table, reduce="sum")
    table.accumulate_row_grad(torch.tensor([rank]), torch.ones(1, table.width))
    together = int(table.row_grad.count)
    made.close()
    table.zero_row_grad()
    table.accumulate_row_grad(torch.tensor([rank]), torch.ones(1, table.width))
    left = int(table.row_grad.count)
    del made
    other = RowAdam(table, reduce="mean")  # which takes the place of the one that was closed
    table.zero_row_grad()
    table.accumulate_row_grad(torch.tensor([3]), torch.full((1, table.width), 1.0 + rank))
    mean = float(table.row_grad.values[0, 0])
    del other
    RowAdam(table, reduce=None)  # which forgets replicas whose optimizer is gone
    table.zero_row_grad()
    table.accumulate_row_grad(torch.tensor([3]), torch.full((1, table.width), 1.0 + rank))
    return differ, together, left, mean, float(table.row_grad.values[0, 0])


def mixed_dtypes():
    """A rank without tokens, whose empty gradient is of another dtype, beside ranks of half precision."""
    table, rank = copy_of("bfloat16"), dist.get_rank()
    made = RowAdagrad(table, reduce="sum")
    dtype, count = (torch.float32, 0) if rank == 0 else (torch.bfloat16, 4)
    table.accumulate_row_grad(torch.arange(count), torch.full((count, table.width), 1.5, dtype=dtype))
    made.step()
    return everywhere(table.weight), float(table.row_grad.values[0, 0])
