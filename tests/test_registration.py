"""The registered ops: torch's own checks of schema and fake, and torch.compile without graph breaks.

In the interpret lane a compiled graph calls the interpreted kernel; backend "aot_eager" traces and functionalises as
inductor does, and generates no code.
"""

import pytest
import torch

from engram_kernels import Engram, gate_conv_residual, gate_residual, hash_lookup, lookup, ngram_hash
from engram_kernels.row_format import FORMATS
from engram_kernels.table import view_tables

from . import tables
from .test_gate import inputs
from .test_gate_conv import conv_inputs, state
from .test_hash_rows import parts_of
from .test_hashing import ragged, small_plan
from .test_module import FORMS, built

pytestmark = pytest.mark.kernel
# What opcheck tries: schema, fake against real, dispatch under functionalisation. Gradients are the references'.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def hash_setting(device, name="e4m3_ue8m0", width=32):
    """Tokens, plan and tables; no row is NaN, which opcheck takes for a difference."""
    plan = small_plan()
    parts = [(weight.view(torch.uint8) & 0x3F, scale) for weight, scale in parts_of(plan, width, name)]
    parts = [(bits.view(FORMATS[name].dtype), scale & 127 if name == "e4m3_ue8m0" else scale) for bits, scale in parts]
    placed = [tables.place(*part, device) for part in parts]
    return [x.to(device) for x in ragged()], plan.to(device), placed


def check(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.engram, name).default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck_hash(device, packed):
    (ids, cu, history, dead), plan, _ = hash_setting(device)
    extra = (cu, history, dead) if packed else (None, None, None)
    check("ngram_hash", ids, *extra, *plan.parts())
    check("ngram_hash", ids[:0], None, None, None, *plan.parts())


@pytest.mark.parametrize(("name", "storage"), [("e4m3_ue8m0", True), ("e4m3", False), ("bfloat16", True)])
def test_opcheck_rows(device, name, storage):
    (ids, cu, history, dead), plan, placed = hash_setting(device, name)
    row_ids = ngram_hash(ids, plan)[:, 1]
    assert not row_ids.is_contiguous()
    check("lookup", row_ids, *view_tables(placed[:1], device), None, storage, None, "address")
    check("lookup", row_ids[:0], *view_tables(placed[:1], device), None, storage, 1, "direct")
    options = (*view_tables(placed, device), None, storage, 2, "address" if storage else "head")
    check("hash_lookup", ids, cu, history, dead, *options, *plan.parts())


def test_opcheck_gates(device):
    hidden, key, value, *norms = (x.to(device) for x in inputs(5, 4, 24))
    kv = torch.cat([key.flatten(1), value], 1)
    views = kv[:, :-24].unflatten(1, (4, 24)), kv[:, -24:]
    mask = torch.arange(5, device=device) % 2 == 0
    check("gate_residual", hidden, *views, *norms, None, 1e-6, mask, "sign", False)
    check("gate_residual", hidden[:0], key[:0], value[:0], *norms, 1e-6, 1e-6, None, "copysign", True)


@pytest.mark.parametrize("carry", [True, False])
def test_opcheck_conv(device, carry):
    tensors = [x.to(device) for x in conv_inputs(6, 2, 16, 3)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    states = [x.to(device) for x in state(2, 2, 16, 4)] if carry else (None, None)
    check("gate_conv_residual", *tensors, 2, 1e-6, 1e-5, 1e-6, None, "sign", True, cu, *states)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


def same(result, expected):
    """Equal bits, through pairs and NaN."""
    if isinstance(expected, tuple):
        return all(same(a, b) for a, b in zip(result, expected, strict=True))
    if expected is None or result is None:
        return result is expected
    bits, wanted = (x.contiguous().view(-1).view(torch.uint8) for x in (result, expected))
    return (result.dtype, result.shape) == (expected.dtype, expected.shape) and torch.equal(bits, wanted)


@pytest.mark.parametrize("name", ["e4m3_ue8m0", "e4m3"])
@pytest.mark.parametrize("out_format", ["values", "storage"])
def test_compile_lookups(device, name, out_format):
    (ids, cu, history, dead), plan, placed = hash_setting(device, name)

    def step(ids, cu, history, dead):
        row_ids = ngram_hash(ids, plan, cu_seqlens=cu, history=history, dead=dead)
        rows = lookup(placed[0], row_ids[:, 0], out_format=out_format, order="head")
        options = dict(cu_seqlens=cu, history=history, dead=dead, out_format=out_format, order="address")
        return row_ids, rows, hash_lookup(ids, plan, placed, **options)

    expected = step(ids, cu, history, dead)
    assert same(compiled(step)(ids, cu, history, dead), expected)


def test_compile_gates_over_lengths(device):
    """One graph for every number of tokens, after the first two."""
    graphs = 0

    def counting(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()

    def step(tensors, convs):
        options = dict(eps=1e-6, conv_eps=None, dilation=2, residual=False)
        return gate_residual(*tensors, eps=1e-6), gate_conv_residual(*convs, **options)

    run = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 4, 9):
        tensors = [x.to(device) for x in inputs(tokens, 2, 16)]
        convs = [x.to(device) for x in conv_inputs(tokens, 2, 16, 3)]
        assert same(run(tensors, convs), step(tensors, convs))
    assert graphs <= 2


@pytest.mark.parametrize("form", FORMS)
def test_compile_module(device, form):
    module, _, _ = built(form, device)
    hidden, ids = torch.randn(10, 2, 24, device=device), torch.randint(0, 40, (10,), device=device)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    options = dict(cu_seqlens=cu, dead=torch.arange(10, device=device) == 2)
    with torch.no_grad():
        assert isinstance(module, Engram)
        torch.testing.assert_close(compiled(module)(hidden, ids, **options), module(hidden, ids, **options))


def test_compiled_functions_take_no_out(device):
    tensors = [x.to(device) for x in inputs(3, 2, 8)]
    gate_residual(*tensors, eps=1e-6, out=torch.empty_like(tensors[0]))
    with pytest.raises(Exception, match="out must be None under torch.compile"):
        compiled(lambda: gate_residual(*tensors, eps=1e-6, out=torch.empty_like(tensors[0])))()
