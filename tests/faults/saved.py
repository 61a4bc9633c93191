"""What is saved in tests of failing saves: tables, keys of a cache, states, conversions, whole runs, edited rows."""

import torch
from torch import nn

from engram_kernels import EngramTable, HashPlan, NgramCache, RowAdam, load_training, save_training
from engram_kernels.checkpoints.convert import convert_table
from tests.support.checkpoints import V41

ROWS, WIDTH = 64, 32


def table_of(value):
    return EngramTable.from_tensors(torch.full((ROWS, WIDTH), float(value)), placement="cpu")


def value_in(folder):
    """What the table in ``folder`` was filled with."""
    with EngramTable.from_safetensors(folder, placement="cpu") as table:
        values = table.weight.unique().tolist()
    assert len(values) == 1, f"a mixture of tables: {values}"
    return values[0]


class Saved:
    def save(self, value):
        self.write(self.made(value))


class SavedTable(Saved):
    """A table in one file or in several: what a save of it must leave."""

    def __init__(self, folder, shard_bytes):
        self.folder, self.options = folder, dict(shard_bytes=shard_bytes)

    def made(self, value):
        return table_of(value)

    def write(self, table):
        table.save_safetensors(self.folder, **self.options)

    def value(self):
        return value_in(self.folder)


class SavedCache(Saved):
    """Keys of an n-gram cache; the value is how many tokens went through it."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "hot.npz"
        self.plan = HashPlan.build(V41, torch.arange(40))
        parts = [torch.randn(rows, V41.row_width) for rows in self.plan.rows_per_layer]
        self.tables = [EngramTable.from_tensors(part, placement="cpu") for part in parts]

    def cache(self):
        return NgramCache(self.plan, self.tables, entries=64, min_tokens=0)

    def made(self, value):
        cache = self.cache()
        cache.warm(torch.arange(10 + value) % 40)
        return cache

    def write(self, cache):
        cache.save(self.path)

    def value(self):
        cache = self.cache()
        cache.load(self.path)
        return int(cache.state.clock[0] - cache.state.lag) - 10


class SavedTraining(Saved):
    """A whole run; every part of it holds the value, so that a mixture of two shows."""

    def __init__(self, folder):
        self.folder = folder

    def made(self, value):
        module, table = nn.Linear(4, 4), table_of(value).requires_row_grad_()
        nn.init.constant_(module.weight, float(value))
        return value, module, table, RowAdam(table, lr=float(value))

    def write(self, made):
        value, module, table, rows = made
        save_training(self.folder, module, [rows], tables={"table": table}, step=value, extra=value)

    def value(self):
        _, module, table, rows = self.made(0)
        found = load_training(self.folder, module, [rows], tables={"table": table})
        values = {*found, *module.weight.unique().tolist(), *table.weight.unique().tolist(), rows.param_groups[0]["lr"]}
        assert len(values) == 1, f"a mixture of runs: {values}"
        return values.pop()


class SavedOverlay(Saved):
    """Edited rows of a table; the value is what they hold."""

    def __init__(self, folder):
        self.folder = folder

    def made(self, value):
        return table_of(0).overlay(torch.arange(5), torch.full((5, WIDTH), float(value)))

    def write(self, overlay):
        overlay.save_safetensors(self.folder)

    def value(self):
        table = table_of(0)
        table.load_overlay(self.folder)
        (value,) = table.weight[:5].unique().tolist()
        return value


class SavedStates(Saved):
    """States of a row optimizer: after a step from nothing the first moments of Adam are 0.1 times the gradient."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "states.safetensors"

    def made(self, value):
        table = table_of(0).requires_row_grad_()
        optimizer = RowAdam([table])
        table.accumulate_row_grad(torch.arange(ROWS), torch.full((ROWS, WIDTH), float(value)))
        optimizer.step()
        return optimizer

    def write(self, optimizer):
        optimizer.save_safetensors(self.path)

    def value(self):
        optimizer = RowAdam([table_of(0).requires_row_grad_()])
        optimizer.load_safetensors(self.path)
        values = optimizer.states()["first"].unique().tolist()
        assert len(values) == 1, f"a mixture of states: {values}"
        return round(values[0] * 10)


class SavedConversion(SavedTable):
    """A table that is converted to another format, from a file beside the folder."""

    def __init__(self, folder):
        super().__init__(folder, None)

    def made(self, value):
        return table_of(value).save_safetensors(f"{self.folder}-{value}.safetensors")

    def write(self, path):
        convert_table(path, self.folder, "convert", format="bfloat16")


KINDS = {
    "one file": lambda folder: SavedTable(folder, None),
    "several": lambda folder: SavedTable(folder, 3000),
    "cache": SavedCache,
    "optimizer": SavedStates,
    "conversion": SavedConversion,
    "training": SavedTraining,
    "overlay": SavedOverlay,
}
