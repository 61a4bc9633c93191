"""What only a GPU shows: reads over UVA, graphs, streams, generated code. The kernel tests run on it as well.

Written to need nothing but torch, Triton, numpy and pytest.
"""

import gc

import pytest
import torch

from engram_kernels import EngramTable, HashPlan, gate_conv_residual, gate_residual, hash_lookup, lookup, ngram_hash
from engram_kernels import reference as cpu
from engram_kernels.testing import tables, tolerances
from tests.ops.test_gate import EPS, check, inputs
from tests.ops.test_gate_conv import CONV_EPS, conv_inputs, exact_and_bound, state
from tests.ops.test_hash_rows import parts_of, wanted
from tests.ops.test_hashing import oracle, ragged, small_plan
from tests.ops.test_registration import same
from tests.ops.test_rows import CASES, ROWS, ids_around
from tests.support.gpu.room import need_host_memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "width"), CASES)
@pytest.mark.parametrize("placement", ["device", "host"])
def test_lookup_in_every_placement(device, name, width, placement):
    """Every format from device memory and from registered host memory: the oracle's values, and equal storage bytes."""
    weight, scale = tables.random_parts(ROWS, width, name)
    ids = ids_around(ROWS)
    expected = tables.expected_values(weight, scale, ids)
    with tables.place(weight, scale, device, placement) as table:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = lookup(table, ids.to(device), out_dtype=dtype)
            assert tables.same_bits(values, tables.rounded(expected, dtype), truncated=False)
        rows, _ = lookup(table, ids.to(device), out_format="storage")
        torch.cuda.synchronize()
    inside = (ids >= 0) & (ids < ROWS)
    assert torch.equal(rows.cpu().view(torch.uint8)[inside], weight.view(torch.uint8)[ids[inside]])


def test_hash_lookup_with_one_table_on_the_host(device):
    """Placements may differ from layer to layer; the kernel takes addresses."""
    plan = small_plan()
    parts = parts_of(plan, 64, "e4m3_ue8m0")
    ids, cu, history, dead = ragged()
    placed = [tables.place(*part, device, place) for part, place in zip(parts, ("device", "host"), strict=True)]
    options = dict(cu_seqlens=cu.to(device), history=history.to(device), dead=dead.to(device))
    rows = hash_lookup(ids.to(device), plan.to(device), placed, out_dtype=torch.float32, **options)
    assert tables.same_bits(rows, wanted(parts, oracle(ids, plan, cu, history, dead), torch.float32), truncated=False)


def test_host_table_larger_than_4_gib(device):
    """Rows on both sides of 2^31 and 2^32 bytes of a registered host table, exact in size and given back on close."""
    rows = (5 << 30) // 256
    need_host_memory(6 << 30)
    with EngramTable.empty(rows, 256, "e4m3_ue8m0", placement="host") as table:
        picked = torch.tensor([0, 2**31 // 256 - 1, 2**31 // 256, 2**32 // 256, rows - 1])
        for place, row in enumerate(picked.tolist()):
            table.weight.view(torch.uint8)[row] = place + 0x30
            table.scale[row] = 127 + place
        values = lookup(table, picked.to(device), out_dtype=torch.float32)
        assert torch.equal(values.cpu(), cpu.lookup(table, picked, out_dtype=torch.float32))
        assert len(values.unique()) == 5


def test_a_row_beyond_2_31_elements_of_an_output(device):
    """An output of more than 2^31 elements: 32-bit offsets would write elsewhere."""
    table = EngramTable.from_tensors(torch.randn(7, 1024, dtype=torch.bfloat16, device=device), placement="device")
    ids = torch.arange(2**21 + 5, device=device) % 7
    values = lookup(table, ids)
    assert torch.equal(values[-9:], table.weight[ids[-9:]])
    assert torch.equal(values[:9], table.weight[ids[:9]])


def test_gpu_refuses_a_cpu_table(device):
    table = EngramTable.from_tensors(torch.randn(7, 8), placement="cpu")
    with pytest.raises(ValueError, match="need a table on cuda:0 or a registered host table"):
        lookup(table, torch.tensor([1], device=device))


def test_invalid_ids_do_not_fault(device):
    """Ids outside the vocabulary or the table, on the device, where nothing can raise."""
    plan = small_plan().to(device)
    ids = torch.tensor([1, -5, 2**40, 3, 40, 7], device=device)
    assert torch.equal(ngram_hash(ids, plan).cpu(), oracle(ids.cpu(), small_plan()))
    table = EngramTable.from_tensors(torch.ones(5, 8, device=device), placement="device")
    assert lookup(table, torch.tensor([-1, 5, 2**62, -(2**62)], device=device)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "branches", "width"), [(301, 4, 5120), (64, 4, 2560), (33, 8, 16_384), (50, 3, 777)]
)
def test_gate_at_size(device, dtype, tokens, branches, width):
    tensors = inputs(tokens, branches, width, dtype)
    check(gate_residual(*(x.to(device) for x in tensors), eps=EPS), tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_conv_at_size(device, dtype):
    tensors = conv_inputs(130, 4, 2560, 4, dtype, dtype)
    result = gate_conv_residual(*(x.to(device) for x in tensors), dilation=3, eps=EPS, conv_eps=CONV_EPS)
    exact, bound = exact_and_bound(tensors, dtype, dilation=3)
    tolerances.assert_within(result, exact, bound)


def test_batch_invariance_over_lengths(device):
    """One token's bits at every length from 1 to 4,097, alone and last: tiles over T vary, sums over D do not."""
    tensors = [x.to(device) for x in conv_inputs(4097, 4, 640, 4, torch.bfloat16, torch.bfloat16)]
    options = dict(dilation=3, eps=EPS, conv_eps=CONV_EPS)
    gate, conv = gate_residual(*tensors[:5], eps=EPS), gate_conv_residual(*tensors, **options)
    for tokens in (1, 2, 3, 5, 8, 17, 32, 33, 100, 1000):
        part = [x[:tokens] for x in tensors[:3]]
        assert torch.equal(gate_residual(*part, *tensors[3:5], eps=EPS), gate[:tokens])
        assert torch.equal(gate_conv_residual(*part, *tensors[3:], **options), conv[:tokens])


def graph_of(step, warm_up=3):
    """A captured graph of ``step`` and what it returns, after warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # within the capture it would unregister tables, which the driver refuses there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("placement", ["device", "host"])
def test_graph_replay_with_changing_inputs(device, placement):
    """Hash, rows, gate and conv with its state in one graph; ids and lengths change between replays."""
    plan = small_plan().to(device)
    placed = [tables.place(*part, device, placement) for part in parts_of(plan, 64, "e4m3_ue8m0")]
    ids = torch.zeros(19, dtype=torch.int64, device=device)
    cu = torch.tensor([0, 4, 9, 19], dtype=torch.int32, device=device)
    tensors = [x.to(device) for x in conv_inputs(19, 2, 64, 4)]
    states = tuple(x.to(device) for x in state(3, 2, 64, 9))
    options = dict(dilation=3, eps=EPS, conv_eps=CONV_EPS)

    def step():
        rows = hash_lookup(ids, plan, placed, cu_seqlens=cu)
        row_ids = ngram_hash(ids, plan, cu_seqlens=cu)
        gated = gate_residual(*tensors[:5], eps=EPS)
        conv, (value, scale) = gate_conv_residual(*tensors, **options, cu_seqlens=cu, conv_state=states)
        return rows, row_ids, lookup(placed[0], row_ids[:, 0]), gated, conv, value, scale

    graph, captured = graph_of(step)
    for ends in ([0, 4, 9, 19], [0, 0, 18, 19], [0, 7, 7, 8]):
        ids.copy_(torch.randint(0, 40, (19,)))
        cu.copy_(torch.tensor(ends))
        tensors[0].normal_()
        graph.replay()
        torch.cuda.synchronize()
        kept = [x.clone() for x in captured]
        assert all(same(a, b) for a, b in zip(kept, step(), strict=True))


def test_concurrent_streams(device):
    """Two streams look up and gate at once; each gets what it gets alone."""
    plan = small_plan().to(device)
    placed = [tables.place(*part, device, "host") for part in parts_of(plan, 64, "bfloat16")]
    ids = [torch.randint(0, 40, (4096,), device=device) for _ in range(2)]
    tensors = [x.to(device) for x in inputs(512, 4, 1024, torch.bfloat16)]
    alone = [hash_lookup(x, plan, placed) for x in ids]
    gated = gate_residual(*tensors, eps=EPS)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in ids]
    results = [[], []]
    for _ in range(8):
        for stream, tokens, kept in zip(streams, ids, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append((hash_lookup(tokens, plan, placed, programs=8), gate_residual(*tensors, eps=EPS)))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, results, strict=True):
        assert all(same(rows, expected) and same(out, gated) for rows, out in kept)


def test_launches_follow_the_tensors_device_and_stream(device):
    """A launch is ordered after earlier work of the current stream, and before later work."""
    plan = HashPlan.from_parts(torch.tensor([[3, 5]]), torch.tensor([[101]]), pad=0, vocab_size=50).to(device)
    stream = torch.cuda.Stream()
    ids = torch.zeros(1 << 20, dtype=torch.int64, device=device)
    ngram_hash(ids, plan)  # compiled: that takes longer than the sleep
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        ids.fill_(7)
        rows = ngram_hash(ids, plan)
        ids.zero_()
    torch.cuda.synchronize()
    assert rows[1:].unique().tolist() == [((7 * 3) ^ (7 * 5)) % 101]


@pytest.mark.parametrize("placement", ["device", "host"])
def test_compiled_code(device, placement):
    """torch.compile with inductor, whole graph, over two lengths: equal bits to eager calls."""
    plan = small_plan().to(device)
    placed = [tables.place(*part, device, placement) for part in parts_of(plan, 32, "e4m3_ue8m0")]
    norms = [x.to(device) for x in inputs(1, 4, 32)[3:]]

    def step(ids, hidden):
        rows = hash_lookup(ids, plan, placed, out_dtype=torch.float32)[0]
        value = rows.sum(1)
        return gate_residual(hidden, hidden * 2, value, *norms, eps=EPS), value

    run = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (5, 12):
        ids = torch.randint(0, 40, (tokens,), device=device)
        hidden = torch.randn(tokens, 4, 32, device=device)
        for compiled, eager in zip(run(ids, hidden), step(ids, hidden), strict=True):
            torch.testing.assert_close(compiled, eager, equal_nan=True)


def test_no_allocation_beyond_the_output(device):
    """hash_lookup and gate_residual in place: after a warm-up nothing is allocated."""
    plan = small_plan().to(device)
    placed = [tables.place(*part, device) for part in parts_of(plan, 32, "bfloat16")]
    ids = torch.randint(0, 40, (64,), device=device)
    out = torch.empty(2, 64, 4, 32, dtype=torch.bfloat16, device=device)
    tensors = [x.to(device) for x in inputs(64, 4, 256)]

    def step():
        hash_lookup(ids, plan, placed, out=out)
        gate_residual(*tensors, eps=EPS, out=tensors[0])

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
