"""Exported programs from token ids, with tables as inputs: run by another process, with a table of its own."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from engram_kernels import EngramTable, hash_lookup, lookup, ngram_hash
from engram_kernels.tables.view import view_tables
from tests.nn.test_engram import built

from .test_hashing import small_plan


class ByAddress(nn.Module):
    """Rows ``[L, T, C, R]`` where kernels run: the descriptors of the tables are an input."""

    def __init__(self, plan, tables, device):
        super().__init__()
        _, *self.layout = view_tables(tables, device)
        *parts, self.rest = plan.parts()[:6], plan.parts()[6:]
        for place, part in enumerate(parts[0]):
            self.register_buffer(f"plan_{place}", part)

    def forward(self, token_ids, descriptors):
        plan = (*(getattr(self, f"plan_{place}") for place in range(6)), *self.rest)
        options = (torch.float32, False, None, None)
        tokens = (token_ids, None, None, None, None)
        return torch.ops.engram.hash_lookup(*tokens, descriptors, *self.layout, *options, *plan)[0]


class ByWeight(nn.Module):
    """Rows ``[T, C, R]`` of one layer on a CPU, where rows are tensors: a dense weight is an input."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan

    def forward(self, token_ids, weight):
        row_ids = ngram_hash(token_ids, self.plan)[:, 0]
        return torch.where(row_ids[..., None] < 0, 0, functional.embedding(row_ids.clamp_min(0), weight))


class Layer(nn.Module):
    """A layer from token ids, with tables as an input."""

    def __init__(self, rows, engram):
        super().__init__()
        self.rows, self.engram = rows, engram

    def forward(self, token_ids, given, hidden):
        rows = self.rows(token_ids, given)
        return self.engram(hidden, rows=rows[-1] if isinstance(self.rows, ByAddress) else rows)


def exported(module, arguments, path):
    """The program for any number of tokens, saved."""
    shapes = {"token_ids": {0: torch.export.Dim("tokens", min=2, max=4096)}}
    names = ("token_ids", "descriptors" if isinstance(module, ByAddress) else "weight")
    program = torch.export.export(module, arguments, dynamic_shapes={name: shapes.get(name) for name in names})
    torch.export.save(program, path)


@pytest.mark.kernel
@pytest.mark.graphs
def test_by_address(device, tmp_path):
    plan, path = small_plan().to(device), tmp_path / "rows.pt2"
    placement = "host" if device.type == "cpu" else "device"
    made, others = (
        [EngramTable.from_tensors(torch.randn(rows, 16), placement=placement) for rows in plan.rows_per_layer]
        for _ in range(2)
    )
    ids = torch.randint(0, 40, (7,), device=device)
    exported(ByAddress(plan, made, device), (ids, view_tables(made, device).descriptors), path)
    loaded = torch.export.load(path).module()
    for tables in (others, made):
        for count in (2, 33):
            ids = torch.randint(0, 40, (count,), device=device)
            found = loaded(ids, view_tables(tables, device).descriptors)
            assert torch.equal(found, hash_lookup(ids, plan, tables, out_dtype=torch.float32))


@pytest.mark.kernel
@pytest.mark.graphs
@pytest.mark.parametrize("form", ["v41", "paper"])
def test_a_layer_by_address(device, form, tmp_path):
    """The whole of Engram.forward(token_ids): hash, rows, projection, gate and convolution in one program."""
    module, plan, made = built(form, device)
    others = [EngramTable.from_tensors(torch.randn_like(table.weight), placement=table.placement) for table in made]
    ids, hidden = torch.randint(0, 40, (7,), device=device), torch.randn(7, 2, 24, device=device)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    arguments = ids, view_tables(made, device).descriptors, hidden
    shapes = ({0: tokens}, None, {0: tokens})
    layer = Layer(ByAddress(plan, made, device), module.requires_grad_(False))
    torch.export.save(torch.export.export(layer, arguments, dynamic_shapes=shapes), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for tables in (made, others):
        for count in (3, 20):
            ids, hidden = torch.randint(0, 40, (count,), device=device), torch.randn(count, 2, 24, device=device)
            found = loaded(ids, view_tables(tables, device).descriptors, hidden)
            rows = hash_lookup(ids, plan, tables, out_dtype=torch.float32)[-1]
            assert torch.equal(found, module(hidden, rows=rows))


OTHER = """
import sys, torch
from engram_kernels import ops
program, inputs, output = sys.argv[1:]
torch.save(torch.export.load(program).module()(*torch.load(inputs)), output)
"""


def test_by_weight_in_another_process(tmp_path):
    plan, (program, given, result) = small_plan(), (tmp_path / name for name in ("rows.pt2", "inputs", "output"))
    rows = plan.rows_per_layer[0]
    exported(ByWeight(plan), (torch.arange(7), torch.randn(rows, 16)), program)
    weight, ids = torch.randn(rows, 16), torch.randint(0, 40, (33,))
    torch.save((ids, weight), given)
    subprocess.run([sys.executable, "-c", OTHER, program, given, result], check=True, timeout=300)
    table = EngramTable.from_tensors(weight, placement="cpu")
    assert torch.equal(torch.load(result), lookup(table, ngram_hash(ids, plan)[:, 0]))
