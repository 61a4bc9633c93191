"""Rows exchanged in place: the kernel against the reference, and against indexing written by hand."""

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.reference.tables.editing import exchange as reference
from engram_kernels.tables.editing.exchange import StoredRows, exchange_config, exchange_rows, launch_exchange_rows
from engram_kernels.testing import tables


def parts(rows, name, width, seed=0):
    """(rows as bytes, scale bytes or None) of a random table."""
    weight, scale = tables.random_parts(rows, width, name, seed)
    return weight.view(torch.uint8), scale if isinstance(scale, torch.Tensor) else None


FORMS = [
    ("e4m3_ue8m0", 256),
    ("e4m3_ue8m0", 32),
    ("e4m3_ue8m0", 96),
    ("e4m3", 16),
    ("nvfp4", 160),
    ("mxfp4", 32),
    ("bfloat16", 80),
    ("float32", 1024),
]


@pytest.mark.kernel
@pytest.mark.parametrize("name, width", FORMS)
@pytest.mark.parametrize("count", [1, 3, 37])
def test_kernel_equals_reference(device, name, width, count):
    """Table and buffer have each other's rows, and no other row has moved; rows of a block and beyond it."""
    weight, scale = tables.random_parts(50, width, name)
    table = tables.place(weight.clone(), scale.clone() if isinstance(scale, torch.Tensor) else scale, device)
    rows, scales = parts(count, name, width, seed=1)
    ids = torch.randperm(50)[:count]
    stored = StoredRows(*(None if x is None else x.clone().to(device) for x in (ids, rows, scales)))
    assert exchange_config(256, 8).block_rows * 3 < 37 < 50
    exchange_rows(table, stored)
    expected = weight.clone().view(torch.uint8)
    mine = rows.clone()
    reference.exchange_rows(ids, mine, expected)
    assert torch.equal(table.weight.view(torch.uint8).cpu(), expected)
    assert torch.equal(stored.rows.cpu(), mine) and torch.equal(mine, weight.view(torch.uint8)[ids])
    assert torch.equal(expected[ids], rows)
    if scales is not None:
        wanted = scale.clone()
        wanted[ids] = scales
        assert torch.equal(table.scale.cpu(), wanted) and torch.equal(stored.scales.cpu(), scale[ids])
    exchange_rows(table, stored)
    assert torch.equal(table.weight.view(torch.uint8).cpu(), weight.view(torch.uint8))
    assert torch.equal(stored.rows.cpu(), rows)


@pytest.mark.kernel
def test_a_row_beyond_2_to_the_32_words(device):
    """Its place in the table is a product of 64 bits; a mapping of which two pages are touched."""
    rows, width = 2**32 // 64 + 9, 256
    table = EngramTable.empty(rows, width, "e4m3_ue8m0", placement="host")
    ids = torch.tensor([rows - 1, 1], device=device)
    new = torch.randint(0, 256, (2, width), dtype=torch.uint8)
    scales = torch.randint(0, 256, (2, 8), dtype=torch.uint8)
    stored = StoredRows(ids, new.clone().to(device), scales.clone().to(device))
    launch_exchange_rows(table.weight, table.scale, stored)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(table.weight.view(torch.uint8)[ids.cpu()], new) and torch.equal(table.scale[ids.cpu()], scales)
    assert not stored.rows.any() and not table.weight.view(torch.uint8)[0].any()
    table.close()


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host"])
def test_replays_of_a_graph_read_edited_rows(device, placement):
    """A captured lookup knows the table by address; to edit rows is no part of a capture."""
    table = tables.place(*tables.random_parts(50, 64, "bfloat16"), device, placement)
    ids, edit = torch.arange(50, device=device), (torch.tensor([3, 9]), torch.ones(2, 64))
    lookup(table, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lookup(table, ids)
        with pytest.raises(ValueError, match="^EngramTable.overlay: a CUDA graph is being captured"):
            table.overlay(*edit)

    def replayed():
        graph.replay()
        return out.clone()

    plain = replayed()
    with table.overlay(*edit):
        edited = replayed()
    assert edited[[3, 9]].eq(1).all() and torch.equal(edited[10:], plain[10:])
    assert torch.equal(replayed(), plain)
    table.close()
