"""Memory that is moved or freed under a table: an error wherever its rows are read, and never a fault."""

import pytest
import torch

from engram_kernels import EngramTable, HashPlan, NgramCache, hash_lookup, lookup

HOW = {
    "set": lambda x: x.set_(),
    "data": lambda x: setattr(x, "data", x.data.clone()),
    "transpose": lambda x: x.t_(),
    "resize": lambda x: x.resize_(4 * x.numel()),
    "storage": lambda x: x.untyped_storage().resize_(0),
}


def tensors(format):
    if format == "float32":
        return (torch.randn(64, 32),)
    return torch.randn(64, 32).to(torch.float8_e4m3fn), torch.full((64, 1), 127, dtype=torch.uint8)


def spoil(how, x):
    try:
        HOW[how](x)
    except RuntimeError as error:  # of memory that torch did not allocate; the shape has changed nevertheless
        assert "resizable" in str(error)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("placement", ["cpu", "staged", "host"])
@pytest.mark.parametrize(("format", "part"), [("float32", "weight"), ("e4m3_ue8m0", "weight"), ("e4m3_ue8m0", "scale")])
def test_tensors_that_a_table_hands_out(how, placement, format, part):
    """The table has tensors of its own over that memory; only memory that is gone is gone for it too."""
    table = EngramTable.from_tensors(*tensors(format), placement=placement)
    ids, plan = torch.arange(4)[:, None], HashPlan.from_parts(torch.ones(1, 2).long(), torch.tensor([[61]]), pad=0)
    expected, cache = lookup(table, ids), NgramCache(plan, [table], entries=8)
    before = getattr(table, part)
    spoil(how, getattr(table, part))
    if placement == "host" or how not in ("resize", "storage"):
        assert torch.equal(lookup(table, ids), expected)
        assert torch.equal(getattr(table, part).view(torch.uint8), before.view(torch.uint8))
        return
    for name, call in (
        ("lookup", lambda: lookup(table, ids)),
        ("hash_lookup", lambda: hash_lookup(torch.arange(4), plan, [table])),
        ("hash_lookup", lambda: hash_lookup(torch.arange(4), plan, [table], cache=cache)),
        ("EngramTable.memory_report", table.memory_report),
        ("EngramTable", lambda: table.weight),
    ):
        with pytest.raises(ValueError, match=f"^{name}: the memory of the table's rows or scales was moved or freed"):
            call()
    table.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("format", ["float32", "e4m3_ue8m0"])
def test_tensors_that_were_given(how, format):
    for part in range(len(tensors(format))):
        given = tensors(format)
        table, ids = EngramTable.from_tensors(*given, placement="cpu"), torch.arange(64)[:, None]
        expected = lookup(table, ids)
        spoil(how, given[part])
        if how in ("resize", "storage"):
            with pytest.raises(ValueError, match="^lookup: the memory of the table's .* was moved or freed"):
                lookup(table, ids)
        else:
            assert torch.equal(lookup(table, ids), expected)


def test_views_outlive_a_closed_table():
    for placement in ("cpu", "host"):
        table = EngramTable.from_tensors(torch.ones(64, 32), placement=placement)
        view = table.weight[3:5]
        table.close()
        assert view.sum() == 64
