"""The registered ops: torch's own checks of schema and fake, and torch.compile without graph breaks.

In the interpret lane a compiled graph calls the interpreted kernel; backend "aot_eager" traces and functionalises as
inductor does, and generates no code.
"""

import pytest
import torch

from engram_kernels import (
    Engram,
    EngramTable,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    lookup,
    ngram_hash,
    split_kv,
)
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.ops.row_kernels import order as read_order
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from tests.nn.test_engram import FORMS, built

from .test_gate import inputs
from .test_gate_conv import conv_inputs, state
from .test_hash_rows import parts_of
from .test_hashing import ragged, small_plan

pytestmark = [pytest.mark.kernel, pytest.mark.graphs]
# What opcheck tries: schema, fake against real, dispatch under functionalisation. Gradients are the references'.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def hash_setting(device, name="e4m3_ue8m0", width=32):
    """Tokens, plan and tables; no row is NaN, which opcheck takes for a difference."""
    plan = small_plan()
    parts = [(weight.view(torch.uint8) & 0x3F, scale) for weight, scale in parts_of(plan, width, name)]
    parts = [(bits.view(FORMATS[name].dtype), scale & 127 if name == "e4m3_ue8m0" else scale) for bits, scale in parts]
    placed = [tables.place(*part, device) for part in parts]
    return [x.to(device) for x in ragged()], plan.to(device), placed


def slots_of(history):
    """Another row of history for each sequence."""
    return torch.arange(len(history), dtype=torch.int32, device=history.device).flip(0)


def check(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.engram, name).default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck_hash(device, packed):
    (ids, cu, history, dead), plan, _ = hash_setting(device)
    extra = (cu, history, dead, slots_of(history)) if packed else (None,) * 4
    check("ngram_hash", ids, *extra, *plan.parts())
    check("ngram_hash", ids[:0], None, None, None, None, *plan.parts())


@pytest.mark.parametrize(
    ("name", "storage"), [("e4m3_ue8m0", True), ("e4m3", False), ("bfloat16", True), ("nvfp4", True), ("mxfp4", False)]
)
def test_opcheck_rows(device, name, storage):
    (ids, cu, history, dead), plan, placed = hash_setting(device, name)
    row_ids = ngram_hash(ids, plan)[:, 1]
    assert not row_ids.is_contiguous()
    check("lookup", row_ids, *view_tables(placed[:1], device), None, storage, None, "address")
    check("lookup", row_ids[:0], *view_tables(placed[:1], device), None, storage, 1, "direct")
    options = (*view_tables(placed, device), None, storage, 2, "address" if storage else "head")
    check("hash_lookup", ids, cu, history, dead, None, *options, *plan.parts())


def test_opcheck_out_forms(device):
    """The ops that write to a tensor of the caller's."""
    (ids, cu, history, dead), plan, placed = hash_setting(device)
    row_ids = ngram_hash(ids, plan)
    check("ngram_hash_out", ids, cu, history, dead, slots_of(history), torch.zeros_like(row_ids), *plan.parts())
    rows, scales = lookup(placed[1], row_ids[:, 1], out_format="storage")
    rows = rows.view(torch.uint8)  # opcheck computes with what it is given
    check("lookup_out", row_ids[:, 1], *view_tables(placed[1:], device), rows, scales, True, None, "head")
    rows = hash_lookup(ids, plan, placed, cu_seqlens=cu, history=history, dead=dead)
    views = view_tables(placed, device)
    check("hash_lookup_out", ids, cu, history, dead, None, *views, rows, None, False, 2, None, *plan.parts())
    tensors = [x.to(device) for x in inputs(5, 4, 24)]
    check("gate_residual_out", *tensors, None, 1e-6, None, "sign", False, torch.zeros_like(tensors[0]))
    tensors = [x.to(device) for x in conv_inputs(6, 2, 16, 3)]
    options = (2, 1e-6, 1e-5, 1e-6, None, "sign", True, None, *(x.to(device) for x in state(1, 2, 16, 4)))
    results = [torch.zeros_like(x) for x in (tensors[0], *options[-2:])]
    check("gate_conv_residual_out", *tensors, *options, *results, None, None, None, None)


def test_what_is_kept_for_an_op_is_of_its_own_plan_and_tables(device):
    """Launches are found by what they read, also where memory was freed and is another plan's or table's now."""
    ids = ragged()[0].to(device)
    for layers in (2, 1, 2):
        for wrapping in (False, True):
            plan = small_plan(layers, wrapping=wrapping).to(device)
            placed = [tables.place(*part, device) for part in parts_of(small_plan(layers), 32, "float32")]
            tokens, view = (ids, None, None, None, None), view_tables(placed, device)
            for _ in range(2):
                row_ids = torch.ops.engram.ngram_hash(*tokens, *plan.parts())
                assert torch.equal(row_ids, ngram_hash(ids, plan))
                found = torch.ops.engram.hash_lookup(*tokens, *view, None, False, None, None, *plan.parts())[0]
                assert torch.equal(found, hash_lookup(ids, plan, placed))
                rows = torch.ops.engram.lookup(row_ids[:, 0], *view_tables(placed[:1], device), None, False, None, None)
                assert torch.equal(rows[0], found[0])
            del plan, placed, view


def test_autograd_knows_what_an_op_has_written(device):
    hidden, key, value, *norms = (x.to(device) for x in inputs(5, 4, 24))
    out = torch.zeros_like(hidden)
    weight = torch.ones_like(hidden, requires_grad=True)
    product = weight * out  # keeps out for the backward pass
    torch.ops.engram.gate_residual_out(hidden, key, value, *norms, None, 1e-6, None, "sign", True, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        out = torch.zeros_like(hidden)
        torch.ops.engram.gate_residual_out(hidden, key, value, *norms, None, 1e-6, None, "sign", True, out)
    assert torch.equal(out, gate_residual(hidden, key, value, *norms, eps=None, zero_gate="sign"))


def test_dynamo_traces_no_function_of_an_op(device):
    """What a compiled graph calls is run as it is: nothing of it becomes a graph of its own."""
    (ids, *_), plan, placed = hash_setting(device)
    counters, expected = torch._dynamo.utils.counters, hash_lookup(ids, plan, placed)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(lambda ids: hash_lookup(ids, plan, placed) + 0, backend=backend, fullgraph=True)
        assert all(torch.equal(run(ids), expected) for _ in range(2))
        assert counters["stats"]["unique_graphs"] == 1


def test_opcheck_gates(device):
    hidden, key, value, *norms = (x.to(device) for x in inputs(5, 4, 24))
    kv = torch.cat([key.flatten(1), value], 1)
    views = split_kv(kv, 4, 24)
    mask = torch.arange(5, device=device) % 2 == 0
    check("gate_residual", hidden, *views, *norms, None, 1e-6, mask, "sign", False)
    check("gate_residual", hidden[:0], key[:0], value[:0], *norms, 1e-6, 1e-6, None, "copysign", True)


@pytest.mark.parametrize("carry", [True, False])
def test_opcheck_conv(device, carry):
    tensors = [x.to(device) for x in conv_inputs(6, 2, 16, 3)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    states = [x.to(device) for x in state(2, 2, 16, 4)] if carry else (None, None)
    check("gate_conv_residual", *tensors, 2, 1e-6, 1e-5, 1e-6, None, "sign", True, cu, *states)


@pytest.mark.parametrize("conv", [False, True])
def test_opcheck_with_gradients(device, conv):
    """The ops that autograd records, and their formulas traced too."""
    tensors = [x.to(device) for x in (conv_inputs(6, 2, 16, 3) if conv else inputs(5, 4, 24))]
    for tensor in tensors:
        tensor.requires_grad_()
    if conv:
        name, options = "gate_conv_residual_scalars", (2, 1e-6, 1e-5, 1e-6, None, "sign", True, None)
    else:
        name, options = "gate_residual_scalars", (None, 1e-6, None, "copysign", True)
    op = getattr(torch.ops.engram, name).default
    torch.library.opcheck(op, (*tensors, *options), test_utils=(*CHECKS, "test_autograd_registration"))


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


@pytest.mark.parametrize("name", ["e4m3_ue8m0", "e4m3", "nvfp4"])
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


def counted(function):
    """``function`` compiled without a backend, and the list that its graphs go to."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    return torch.compile(function, backend=keep, fullgraph=True, dynamic=True), graphs


def test_one_graph_of_gates_for_all_lengths(device):
    def step(tensors, convs):
        options = dict(eps=1e-6, conv_eps=None, dilation=2, residual=False)
        return gate_residual(*tensors, eps=1e-6), gate_conv_residual(*convs, **options)

    run, graphs = counted(step)
    for tokens in (7, 5, 4, 9):  # 7: torch takes equal sizes of the first call for one
        tensors = [x.to(device) for x in inputs(tokens, 2, 16)]
        convs = [x.to(device) for x in conv_inputs(tokens, 2, 16, 3)]
        assert same(run(tensors, convs), step(tensors, convs))
    assert len(graphs) == 1


@pytest.mark.parametrize("warm", [True, False])
def test_one_graph_of_lookups_for_all_lengths(device, monkeypatch, warm):
    """Read orders included, which change with the count. Addresses are its input, once they have been on the device."""
    plan = small_plan().to(device)
    placement = "host" if device.type == "cpu" else "device"
    placed = [EngramTable.from_tensors(torch.randn(r, 16), placement=placement) for r in plan.rows_per_layer]
    if placement == "host":
        monkeypatch.setattr(read_order, "_REACH", 0)
        monkeypatch.setattr(read_order, "_IN_FLIGHT", 100)
        monkeypatch.setattr(read_order, "_SORTED_FROM", 4000)

    def step(ids):
        return lookup(placed[0], ngram_hash(ids, plan)[:, 0]), hash_lookup(ids, plan, placed)

    run, graphs = counted(step)
    if warm:
        step(torch.zeros(2, dtype=torch.int64, device=device))
    for tokens in (7, 5, 40, 9):
        ids = torch.randint(0, 40, (tokens,), device=device)
        assert same(run(ids), step(ids))
    makes = [any(node.target is torch.tensor for node in graph.graph.nodes) for graph in graphs]
    assert makes == ([False] if warm else [True, False])


@pytest.mark.parametrize("form", FORMS)
def test_compile_module(device, form):
    module, _, _ = built(form, device)
    hidden, ids = torch.randn(10, 2, 24, device=device), torch.randint(0, 40, (10,), device=device)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    options = dict(cu_seqlens=cu, dead=torch.arange(10, device=device) == 2)
    with torch.no_grad():
        assert isinstance(module, Engram)
        torch.testing.assert_close(compiled(module)(hidden, ids, **options), module(hidden, ids, **options))


def test_compiled_functions_write_to_out(device):
    """In all public functions, in place too; the tensors given are the ones that come back."""
    (ids, cu, history, dead), plan, placed = hash_setting(device)
    tokens = dict(cu_seqlens=cu, history=history, dead=dead)
    tensors, convs = ([x.to(device) for x in given] for given in (inputs(3, 2, 8), conv_inputs(6, 2, 16, 3)))
    options = dict(eps=1e-6, conv_eps=None, dilation=2, conv_state=tuple(x.to(device) for x in state(1, 2, 16, 4)))

    def step(hidden, out=None, rows=None, stored=None, ids_out=None, conv=None):
        ids_out = ngram_hash(ids, plan, **tokens, out=ids_out)
        rows = hash_lookup(ids, plan, placed, **tokens, out=rows)
        stored = lookup(placed[0], ids_out[:, 0], out=stored, out_format="storage")
        out = gate_residual(hidden, *tensors[1:], eps=1e-6, out=out)
        return out, rows, *stored, ids_out, *gate_conv_residual(*convs, **options, out=conv)

    expected = step(tensors[0])
    out, rows, weight, scale, ids_out, conv, _ = (torch.empty_like(x) if torch.is_tensor(x) else x for x in expected)
    hidden = tensors[0].clone()
    results = compiled(step)(hidden, hidden, rows, (weight, scale), ids_out, conv)
    assert same(results, expected)
    assert same((hidden, rows, weight, scale, ids_out, conv), expected[:-1])


def test_eager_calls_bypass_the_dispatcher(device, monkeypatch):
    """They launch at once: no registered op is called, which costs tens of microseconds a call."""
    (ids, *_), plan, placed = hash_setting(device)
    tensors = [x.to(device) for x in inputs(3, 2, 8)]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        lookup(placed[0], ngram_hash(ids, plan)[:, 0])
        hash_lookup(ids, plan, placed)
        gate_residual(*tensors, eps=1e-6)
    assert seen and not [op for op in seen if op.startswith("engram")]


@pytest.mark.parametrize("form", FORMS)
def test_export_of_the_module(device, form, tmp_path):
    """With rows given, for any number of tokens, saved and loaded; tables stay out, whose addresses are a process's."""
    module, _, _ = built(form, device)
    module.requires_grad_(False)

    def arguments(tokens):
        hidden = torch.randn(tokens, 2, 24, device=device)
        rows = torch.randn(tokens, module.config.columns, 8, device=device)
        cu = torch.tensor([0, 2, tokens - 1], dtype=torch.int32, device=device)
        return (hidden,), dict(rows=rows, cu_seqlens=cu, dead=torch.arange(tokens, device=device) == 1)

    positional, named = arguments(6)
    tokens = torch.export.Dim("tokens", max=4096)
    shapes = dict(hidden={0: tokens}, rows={0: tokens}, cu_seqlens=None, dead={0: tokens})
    program = torch.export.export(module, positional, named, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "engram.pt2")
    loaded = torch.export.load(tmp_path / "engram.pt2").module()
    op = "gate_conv_residual" if module.config.conv_kernel else "gate_residual"
    assert f"engram.{op}.default" in {str(node.target) for node in program.graph.nodes}
    for count in (3, 17):
        positional, named = arguments(count)
        assert same(loaded(*positional, **named), module(*positional, **named))
    with pytest.raises(ValueError, match="hash_lookup: tables must stay out of torch.export"):
        torch.export.export(module, positional, dict(token_ids=torch.zeros(17, dtype=torch.int64, device=device)))
