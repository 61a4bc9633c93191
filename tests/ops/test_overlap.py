"""Outputs that lie over what a call reads are refused, in the first call of a signature and in later ones."""

import pytest
import torch

import engram_kernels
from engram_kernels import EngramTable, gate_residual, hash_lookup, lookup
from engram_kernels.launching.overlap import Apart, Extent

from . import test_arguments, test_arguments_gate
from .test_call import CHECKS, on, valid


def over(x: torch.Tensor, like: torch.Tensor, shift: int) -> torch.Tensor:
    """A contiguous tensor like ``like`` whose first byte is ``shift`` from the first of ``x``, in a storage of both."""
    store = torch.zeros(3 * (x.nbytes + like.nbytes) + 1024, dtype=torch.uint8, device=x.device)
    begin = like.nbytes + 512 - like.nbytes % 16
    moved = store[begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
    begin += shift
    return moved, store[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


@pytest.mark.kernel
@pytest.mark.parametrize("op", CHECKS)
def test_out_over_an_input(op, device):
    check_out_over_inputs(op, device)


@pytest.mark.parametrize("op", CHECKS)
def test_out_over_an_input_of_the_reference(op):
    check_out_over_inputs(op, torch.device("cpu"))


def check_out_over_inputs(op, device):
    few = test_arguments_gate.valid(op, (2,)) if "gate" in op else valid(op)
    call, given = getattr(engram_kernels, op), {name: on(device, x) for name, x in few.items()}
    expected = call(**given)
    extra = {"mask": torch.ones(expected.shape[0], dtype=torch.bool, device=device)} if "gate" in op else {}
    if op in ("ngram_hash", "hash_lookup", "gate_conv_residual"):
        ends = [0, given["hidden" if "gate" in op else "token_ids"].shape[0]]
        extra["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    given |= extra
    expected = call(**given)
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    for name, x in tensors.items():
        x = x.contiguous()
        call(**given, out=torch.zeros_like(expected))  # what is kept does not let it pass
        last, first = ((y.nbytes - 1) // 16 * 16 for y in (x, expected))
        for shift in {0, last, -first}:
            moved, out = over(x, expected, shift)
            if name == "hidden" and shift == 0:
                assert torch.equal(call(**(given | {name: moved}), out=moved), expected)
                moved.copy_(x)
                assert torch.equal(call(**(given | {name: moved}), out=out), expected), "by another name"
                continue
            with pytest.raises(ValueError, match=f"^{op}: out must not overlap .*got memory of {name}$"):
                call(**(given | {name: moved}), out=out)
            assert torch.equal(moved, x)
        for shift in (-first - 16, last + 16):
            moved, out = over(x, expected, shift)
            assert torch.equal(call(**(given | {name: moved}), out=out), expected), "beside it"


@pytest.mark.parametrize("format", ["float32", "e4m3_ue8m0"])
def test_out_over_a_table(format):
    table = EngramTable.empty(64, 32, format, placement="cpu")
    ids = torch.arange(table.rows).flip(0)[:, None]
    if format == "float32":
        out = table.weight.unsqueeze(1)
        with pytest.raises(ValueError, match=r"^lookup: out must not overlap .*table\.weight"):
            lookup(table, ids, out=out)
        return
    rows = torch.zeros(64, 1, 32, dtype=table.weight.dtype)
    scales = torch.zeros(64, 1, 1, dtype=torch.uint8)
    lookup(table, ids, out=(rows, scales), out_format="storage")
    for out, name in (
        ((table.weight.unsqueeze(1), scales), r"table\.weight"),
        ((rows, table.scale.unsqueeze(1)), r"table\.scale"),
        ((rows, rows.view(torch.uint8).view(-1)[:64].view(64, 1, 1)), "another part of it"),
    ):
        with pytest.raises(ValueError, match=f"^lookup: out must not overlap .*{name}"):
            lookup(table, ids, out=out, out_format="storage")


@pytest.mark.kernel
def test_out_over_tables_and_plan(device):
    given = {name: on(device, x) for name, x in test_arguments.valid("hash_lookup").items()}
    result = hash_lookup(**given)
    out = given["tables"][1].weight.flatten()[: result.numel()].view(result.shape)
    with pytest.raises(ValueError, match=r"^hash_lookup: out must not overlap .*tables\[1\]\.weight"):
        hash_lookup(**given, out=out.to(device))
    ids = test_arguments.valid("ngram_hash")
    expected, multipliers = engram_kernels.ngram_hash(**ids), ids["plan"].multipliers
    out = multipliers.view(expected.dtype).flatten()[: expected[:1].numel()].view(expected[:1].shape)
    with pytest.raises(ValueError, match=r"^ngram_hash: out must not overlap .*plan\.multipliers"):
        engram_kernels.ngram_hash(ids["token_ids"][:1], ids["plan"], out=out)


def test_out_over_a_state():
    given = test_arguments_gate.valid("gate_conv_residual")
    tokens, branches, width = given["hidden"].shape
    span = (given["conv_weight"].shape[2] - 1) * given["dilation"]
    store = torch.zeros(tokens * branches * width + span * width)
    state = store[-span * width :].view(1, span, width), torch.zeros(1, span, branches)
    out = store[4 : 4 + tokens * branches * width].view(given["hidden"].shape)
    with pytest.raises(ValueError, match="^gate_conv_residual: out must not overlap .*conv_state"):
        engram_kernels.gate_conv_residual(**given, conv_state=state, out=out)


@pytest.mark.kernel
def test_slices_side_by_side_are_apart(device):
    """hidden, key and value of one buffer, with hidden as its own output: nothing overlaps."""
    given = {name: on(device, x) for name, x in test_arguments_gate.valid("gate_residual").items()}
    expected, (tokens, branches, width) = gate_residual(**given), given["hidden"].shape
    buffer = torch.zeros(tokens, 2 * branches + 1, width, device=device)
    hidden, value, key = buffer[:, :branches], buffer[:, branches], buffer[:, branches + 1 :]
    for view, name in ((hidden, "hidden"), (value, "value"), (key, "key")):
        view.copy_(given[name])
    inputs = given | dict(hidden=hidden, key=key, value=value)
    assert torch.equal(gate_residual(**inputs, out=hidden), expected)
    with pytest.raises(ValueError, match="memory of key"):
        gate_residual(**(inputs | dict(key=buffer[:, 1 : branches + 1])), out=hidden)


@pytest.mark.parametrize(
    "shape, strides, extent",
    [
        ((0, 4), (4, 1), Extent(0)),
        ((3, 4), (4, 1), Extent(48)),
        ((3, 4), (10, 1), Extent(96, 40, 16)),
        ((4, 3), (1, 10), Extent(96, 40, 16)),
        ((1, 4), (999, 1), Extent(16)),
        ((2, 3, 4), (30, 10, 1), Extent(216, 40, 16)),
        ((2, 3, 4), (35, 10, 1), Extent(236)),  # rows are not one distance apart
        ((3, 4), (0, 1), Extent(16)),
    ],
)
def test_extents(shape, strides, extent):
    found = Extent.of(torch.zeros(1000).as_strided(shape, strides))
    assert found.length == extent.length and found.period == extent.period
    assert not extent.period or found == extent


def test_interleaved_rows_against_elements():
    """The verdict on strided tensors is that of their elements' addresses, or refuses more."""
    store, passed = torch.zeros(64), 0
    for width in (1, 2, 3):
        for offset in range(24):
            pair = first, other = store.as_strided((3, 2), (6, 1)), store.as_strided((3, width), (6, 1), offset)
            touched = [{x.storage_offset() + 6 * i + j for i in range(3) for j in range(x.shape[1])} for x in pair]
            try:
                Apart("op", (first,), [("x", other)])((first,), (other,))
            except ValueError:
                continue
            passed += 1
            assert not touched[0] & touched[1]
    assert passed > 30
