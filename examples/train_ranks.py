"""Training over ranks against one process, step by step: dense weights by DDP or FSDP2, tables as copies or sharded.

    python examples/train_ranks.py [ranks]

Each rank is a process of this machine under Gloo. With a copy of the table on every rank the optimizer is told so
(``reduce="mean"``); a ShardedTable holds one table over all of them, and takes the mean by itself. Rows, loss and the
norm that clips are those of one process over the global batch, but for the order in which dense gradients are added.
"""

import contextlib
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, RowAdagrad, ShardedTable

STEPS, SEQUENCE, WIDTH, LIMIT = 5, 24, 32, 0.5
CONFIG = EngramConfig(
    layers=(1,),
    max_ngram=3,
    heads=4,
    row_width=16,
    table_sizes=(500, 500),
    hidden_size=WIDTH,
    branches=1,
    raw_vocab_size=64,
    format="float32",
)


class Model(torch.nn.Module):
    """Token embedding, Engram, and logits ``[tokens, vocabulary]`` of the next token."""

    def __init__(self, table):
        super().__init__()
        torch.manual_seed(1)
        plan = HashPlan.build(CONFIG, torch.arange(CONFIG.raw_vocab_size))
        self.embed = torch.nn.Embedding(CONFIG.raw_vocab_size, WIDTH)
        self.engram = Engram(CONFIG, 1, plan, table)
        self.head = torch.nn.Linear(WIDTH, CONFIG.raw_vocab_size)

    def forward(self, ids):
        return self.head(self.engram(self.embed(ids).unsqueeze(-2), ids).flatten(0, 2))


def loss_of(model, ids):
    logits = model(ids[:, :-1].contiguous())
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def clip(parameters, anchor):
    """clip_grad_norm_ over parameters, which may be FSDP2's, and rows: one norm over all, and all scaled alike."""
    norms = [torch.nn.utils.get_total_norm([each.grad for each in parameters])]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norms.append(torch.nn.utils.get_total_norm([anchor.grad]))
    total = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, LIMIT, total)
    torch.nn.utils.clip_grads_with_norm_([anchor], LIMIT, total)
    return float(total)


def train(model, table, rows, batches):
    """(loss, norm before clipping) of each step."""
    dense = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for ids in batches:
        dense.zero_grad()
        rows.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        norm = clip(list(model.parameters()), table.anchor)
        dense.step()
        rows.step()
        yield loss.detach(), norm


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def compare(dense, kind, weight, batches):
    """The largest difference from one process, of losses, norms, dense weights and rows after any step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    alone = EngramTable.from_tensors(weight.clone(), placement="cpu").requires_row_grad_()
    # One process within a job of several: this table is none that the other ranks' are to equal.
    reference = Model(alone), alone, RowAdagrad(alone, lr=0.1, reduce=None)
    if kind == "sharded":
        table = ShardedTable.from_tensors(weight, config=CONFIG, layer=1, placement="cpu").requires_row_grad_()
        part, rows = table.part, RowAdagrad(table.part, lr=0.1)
        held = torch.cat([torch.arange(*each) for each in table.sharding.ranges(rank)])
    else:
        part = table = EngramTable.from_tensors(weight.clone(), placement="cpu").requires_row_grad_()
        rows, held = RowAdagrad(table, lr=0.1, reduce="mean"), torch.arange(table.rows)
    model = Model(table)
    if dense == "FSDP2":
        mesh = init_device_mesh("cpu", (ranks,))
        for module in (model.engram, model):
            fully_shard(module, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    own = [ids.chunk(ranks)[rank] for ids in batches]
    furthest, start = 0.0, weight[held]
    steps = zip(train(model, table, rows, own), train(*reference, batches), strict=True)
    for (loss, norm), (expected_loss, expected_norm) in steps:
        dist.all_reduce(loss)
        pairs = [(loss / ranks, expected_loss), (torch.tensor(norm), torch.tensor(expected_norm))]
        pairs += [(whole(a), b.detach()) for a, b in zip(model.parameters(), reference[0].parameters(), strict=True)]
        pairs.append((part.weight, alone.weight[held]))
        furthest = max([furthest, *(float((a - b).abs().max()) for a, b in pairs)])
    moved = float((part.weight - start).abs().max())
    found = torch.tensor([furthest, -moved])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    rows.close()
    return found.tolist()


def work(rank, ranks, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CONFIG.rows_per_layer[0], CONFIG.row_width, generator=generator)
    shape = (2 * ranks, SEQUENCE)
    batches = [torch.randint(0, CONFIG.raw_vocab_size, shape, generator=generator) for _ in range(STEPS)]
    for dense in ("DDP", "FSDP2"):
        for kind in ("copies", "sharded"):
            furthest, moved = compare(dense, kind, weight, batches)
            if rank == 0:
                print(
                    f"{dense}, {kind}: {furthest:.1e} from one process at most; rows moved by {-moved:.2f}", flush=True
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        torch.multiprocessing.spawn(work, (ranks, f"{folder}/store"), nprocs=ranks)
