"""What ranks do with a training run that is saved, and goes on: "run_cases.f"."""

import torch
import torch.distributed as dist

from engram_kernels import EngramTable, RowAdagrad, RowAdam, ShardedTable, load_training, save_training

from .rank_cases import config_of, plan_of, whole
from .replica_cases import Model

OPTIMIZERS = {"adagrad": RowAdagrad, "adam": RowAdam}


class Run:
    """A model, its table and optimizers, by one process or ranks; gradients add up exactly in any order."""

    def __init__(self, kind, optimizer="adam", format="float32", seed=0):
        config = config_of("wide", format)
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        weight, _ = whole(config, 4)
        weight = weight + seed
        self.sharded = kind == "sharded" and several
        if self.sharded:
            self.table = ShardedTable.from_tensors(weight, config=config, layer=4, placement="cpu", reduce="sum")
        else:
            self.table = EngramTable.from_tensors(weight, placement="cpu")
        self.table.requires_row_grad_()
        torch.manual_seed(seed)
        self.model = Model(config, plan_of(config), self.table)
        part = self.table.part if self.sharded else self.table
        options = dict(reduce="sum") if several and not self.sharded else {}
        self.rows = OPTIMIZERS[optimizer](part, lr=0.1 + seed, seed=7 + seed, **options)
        self.dense = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.rows, 0.5)

    def steps(self, begin, end):
        """Each rank has some of a step's row gradients, which are small integers; dense ones are alike."""
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, self.table.rows, (60,), generator=generator)
            grads = torch.randint(-8, 8, (60, self.table.width), generator=generator).float()
            mine = torch.arange(60) % self.size == self.rank
            self.rows.zero_grad()
            self.table.accumulate_row_grad(ids[mine], grads[mine])
            self.rows.step()
            self.schedule.step()
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.dense.step()
        return self

    def bits(self):
        """Rows, their states and dense weights, those of the whole table on every rank."""
        found = dict(rows=self.table.part.weight if self.sharded else self.table.weight, **self.rows.states())
        found = {name: value.float() for name, value in found.items()}
        if self.sharded:
            every = [None] * self.size
            mine = self.table.sharding.ranges(self.rank)
            dist.all_gather_object(every, (mine, found))
            for name in found:
                whole_tensor = found[name].new_zeros(self.table.rows, *found[name].shape[1:])
                for ranges, parts in every:
                    at = 0
                    for begin, end in ranges:
                        whole_tensor[begin:end] = parts[name][at : at + end - begin]
                        at += end - begin
                found[name] = whole_tensor
        found |= {name: value.clone() for name, value in self.model.state_dict().items()}
        found |= {f"dense {i}": state["exp_avg"] for i, state in self.dense.state_dict()["state"].items()}
        facts = self.rows.facts()
        return {name: value.tolist() for name, value in found.items()}, (
            facts["steps"],
            facts["seed"],
            self.rows.param_groups[0]["lr"],
        )

    def save(self, folder, step):
        return save_training(
            folder, self.model, [self.rows], [self.dense], schedulers=[self.schedule], step=step, extra=dict(note=step)
        )

    def load(self, folder):
        return load_training(folder, self.model, [self.rows], [self.dense], schedulers=[self.schedule])


def begin(kind, folder, **options):
    """Three steps, saved; then two more that are not."""
    run = Run(kind, **options).steps(0, 3)
    run.save(folder, 3)
    return run.steps(3, 5).bits()


def resume(kind, folder, **options):
    """Another start, which becomes the saved run and goes on; what was loaded, and what came of it."""
    run = Run(kind, seed=1, **options)
    step, extra = run.load(folder)
    loaded = run.bits()
    return (step, extra), loaded, run.steps(step, 5).bits()


def fail_on_one(folder):
    """A save that fails on rank 1 alone."""
    run = Run("copies" if dist.get_world_size() == 1 else "sharded").steps(0, 1)
    if dist.get_rank() == 1:
        run.rows.save_safetensors = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    run.save(folder, 1)
