"""Row gradients: the reference against a scalar sum, the kernel against both, and what autograd makes of them."""

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, HashPlan, hash_lookup, lookup, ngram_hash
from engram_kernels.reference.tables import gradient as reference
from engram_kernels.tables.gradient import RowGradient, launch_row_gradient, row_gradient, segments
from engram_kernels.testing import tolerances
from engram_kernels.testing.guards import Guarded
from engram_kernels.testing.tables import place
from tests.ops.test_hashing import ragged, small_plan

ROWS = 23


def oracle(row_ids, grad, num_rows):
    """``{row: (sum, sum of magnitudes, terms)}`` in float64, one entry at a time."""
    sums = {}
    for row, part in zip(row_ids.reshape(-1).tolist(), grad.double().reshape(-1, grad.shape[-1]).numpy(), strict=True):
        if 0 <= row < num_rows:
            total, size, terms = sums.get(row, (0.0, 0.0, 0))
            sums[row] = total + part, size + np.abs(part), terms + 1
    return dict(sorted(sums.items()))


def check(result, row_ids, grad, num_rows=ROWS):
    """Ids and count exactly, values within the bound of a float32 sum, squares within theirs."""
    wanted = oracle(row_ids, grad, num_rows)
    count = int(result.count)
    assert result.ids.dtype == torch.int64 and result.ids[:count].tolist() == list(wanted)
    assert (result.ids[count:] == -1).all() and (result.squares[count:] == 0).all()
    assert len(result.ids) == row_ids.numel() and result.values.shape == (row_ids.numel(), grad.shape[-1])
    if not wanted:
        return
    exact = np.stack([total for total, _, _ in wanted.values()])
    bound = np.stack([terms * tolerances.U32 * size for _, size, terms in wanted.values()])
    tolerances.assert_within(result.values[:count], exact, bound + 1e-30, spread=False)
    squares = result.values[:count].double().square().sum(1).cpu().numpy()
    tolerances.assert_within(
        result.squares[:count], squares, tolerances.chain(grad.shape[-1]) * tolerances.U32 * squares, spread=False
    )


def ids_of(kind, count=40, dtype=torch.int64):
    if kind == "one row":
        return torch.full((count,), 7, dtype=dtype)
    if kind == "none inside":
        return torch.tensor([-1, ROWS, -5, ROWS + 3], dtype=dtype).repeat(count // 4)
    if kind == "distinct":
        return torch.randperm(ROWS).to(dtype)
    return torch.randint(-2, ROWS + 2, (count // 5, 5), dtype=dtype)


KINDS = ("mixed", "one row", "none inside", "distinct")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_oracle(kind):
    ids = ids_of(kind)
    grad = torch.randn(*ids.shape, 6)
    check(RowGradient(*reference.row_gradient(ids, grad, ROWS), ROWS), ids, grad)
    assert reference.row_gradient(ids, grad.double(), ROWS)[1].dtype == torch.float64


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "dtype", "id_dtype"),
    [(4, torch.float32, torch.int64), (80, torch.bfloat16, torch.int32), (1024, torch.float16, torch.int64)],
)
def test_kernel(device, kind, width, dtype, id_dtype):
    ids = ids_of(kind, dtype=id_dtype)
    grad = torch.randn(*ids.shape, width).to(dtype)
    check(row_gradient(ids.to(device), grad.to(device), ROWS), ids, grad)


@pytest.mark.kernel
def test_kernel_writes_its_segments_alone(device):
    """Outputs start poisoned; what lies beyond the count stays so, and the margins too."""
    ids = torch.tensor([5, -1, 5, 2, 99, 2, 5], device=device)
    grad = torch.randn(7, 12, device=device)
    out = [
        Guarded((7,), torch.int64, device),
        Guarded((7, 12), torch.float32, device),
        Guarded((7,), torch.float32, device),
    ]
    launch_row_gradient(grad, *segments(ids, ROWS), *(each.tensor for each in out))
    assert out[0].tensor[:2].tolist() == [2, 5]
    torch.testing.assert_close(out[1].tensor[:2], torch.stack([grad[3] + grad[5], grad[0] + grad[2] + grad[6]]))
    for each in out:
        raw = each._raw().view(len(each._buffer), -1) == each._poison
        assert raw[:64].all() and raw[-64:].all(), "wrote outside the output"
        rest = each.tensor[2:].reshape(-1).view(torch.uint8)
        assert (rest == each._poison).all(), "wrote beyond the count"


@pytest.mark.kernel
def test_an_entry_beyond_2_32_elements(device):
    """The last of 2^22 + 5 gradients of 1,024 elements; 32-bit offsets would read one of the first."""
    ids = torch.full((2**22 + 5,), -1, dtype=torch.int32, device=device)
    grad = torch.empty(len(ids), 1024, dtype=torch.bfloat16, device=device)
    ids[-1], grad[-1], grad[:5] = 3, 2.0, 1.0
    row, values = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 1024, device=device)
    launch_row_gradient(grad, *segments(ids, ROWS), row, values, torch.zeros(1, device=device))
    assert int(row) == 3 and (values == 2).all()


@pytest.mark.kernel
def test_strided_gradients_and_large_tables(device):
    """An expanded gradient, as sum() gives, ids that are a view, and a table whose ids need 64 bits."""
    ids = torch.randint(0, ROWS, (6, 4, 3))[:, 1].to(device)
    grad = torch.ones(1, 1, 1, device=device).expand(6, 3, 16)
    check(row_gradient(ids, grad, ROWS), ids.cpu(), grad.cpu())
    far = ids + 2**40
    assert torch.equal(
        row_gradient(far, grad, 2**41).ids, torch.where((own := row_gradient(ids, grad, ROWS).ids) < 0, -1, own + 2**40)
    )


@pytest.mark.kernel
def test_equal_bits_twice_and_in_any_company(device):
    """A row's sum depends on its own entries and their order alone."""
    ids, grad = torch.randint(0, ROWS, (64,)).to(device), torch.randn(64, 48, device=device)
    first, again = (row_gradient(ids, grad, ROWS) for _ in range(2))
    assert torch.equal(first.values[: int(first.count)], again.values[: int(first.count)])
    for row in first.ids[: int(first.count)].tolist():
        alone = row_gradient(ids[ids == row], grad[ids == row], ROWS)
        assert torch.equal(alone.values[0], first.values[first.ids == row][0])


@pytest.mark.kernel
def test_no_ids(device):
    empty = row_gradient(torch.empty(0, 3, dtype=torch.int32, device=device), torch.empty(0, 3, 8, device=device), ROWS)
    assert int(empty.count) == 0 and empty.norm() == 0 and empty.to_sparse_coo().shape == (ROWS, 8)
    # The lane wants a launch of every kernel test.
    assert int(row_gradient(torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, 8, device=device), 1).count)


def trainable(device, rows=ROWS, width=8, dtype=torch.float32):
    return place(torch.randn(rows, width).to(dtype), None, device).requires_row_grad_()


@pytest.mark.kernel
def test_autograd_accumulates(device):
    """Two lookups in one graph and two backward passes: the sum of all, as a dense table under autograd has it."""
    table = trainable(device)
    dense = table.weight.clone().requires_grad_()
    for _ in range(2):
        ids = [torch.randint(0, ROWS, shape, device=device) for shape in ((4, 3), (7,))]
        factors = [torch.randn(*each.shape, 8, device=device) for each in ids]
        sum((lookup(table, each) * f).sum() for each, f in zip(ids, factors, strict=True)).backward()
        sum((dense[each] * f).sum() for each, f in zip(ids, factors, strict=True)).backward()
    sparse = table.row_grad.to_sparse_coo()
    assert sparse.is_coalesced()
    torch.testing.assert_close(sparse.to_dense(), dense.grad)
    assert float(table.anchor.grad) == pytest.approx(float(dense.grad.norm()), rel=1e-5)
    table.zero_row_grad()
    assert table.row_grad is None and table.anchor.grad is None


@pytest.mark.kernel
def test_hash_lookup_reaches_each_layer(device):
    """Two layers of which one is trainable: its gradient is that of a lookup by ngram_hash's ids."""
    plan = HashPlan.from_parts(
        torch.tensor([[3, 5, 7], [9, 11, 13]]), torch.tensor([[11, 13], [17, 19]]), pad=0, vocab_size=40
    ).to(device)
    tables = [place(torch.randn(rows, 8), None, device) for rows in plan.rows_per_layer]
    tables[1].requires_row_grad_()
    ids = torch.randint(0, 40, (9,), device=device)
    options = dict(
        cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32, device=device),
        history=torch.randint(0, 40, (2, 2), device=device),
        dead=(torch.arange(9) == 6).to(device),
    )
    factor = torch.randn(2, 9, 2, 8, device=device)
    (hash_lookup(ids, plan, tables, **options) * factor).sum().backward()
    got = tables[1].row_grad
    wanted = row_gradient(ngram_hash(ids, plan, **options)[:, 1], factor[1], tables[1].rows)
    assert torch.equal(got.ids, wanted.ids) and torch.equal(
        got.to_sparse_coo().to_dense(), wanted.to_sparse_coo().to_dense()
    )
    assert tables[0].row_grad is None


def test_gradient_of_a_float64_table_is_its_difference_quotient():
    """The loss is linear in the rows, so that a difference of any step is the derivative."""
    weight, ids = torch.randn(5, 2, dtype=torch.float64), torch.tensor([[1, 4], [1, -1], [0, 7]])
    factor = torch.randn(3, 2, 2, dtype=torch.float64)
    table = EngramTable.from_tensors(weight, placement="cpu").requires_row_grad_()
    (lookup(table, ids) * factor).sum().backward()
    quotient = torch.zeros_like(weight)
    for place_ in np.ndindex(tuple(weight.shape)):
        losses = []
        for side in (0.5, -0.5):
            moved = weight.clone()
            moved[place_] += side
            losses.append((lookup(EngramTable.from_tensors(moved, placement="cpu"), ids) * factor).sum())
        quotient[place_] = losses[0] - losses[1]
    torch.testing.assert_close(table.row_grad.to_sparse_coo().to_dense(), quotient)


def test_what_is_not_recorded(device):
    table, ids = trainable(device), torch.tensor([1, 2])
    with torch.no_grad():
        assert not lookup(table, ids).requires_grad
    assert lookup(table, ids).requires_grad
    assert lookup(table, ids, out_format="storage")[0].grad_fn is None
    table.requires_row_grad_(False)
    assert not lookup(table, ids).requires_grad and table.anchor is None


def test_a_graph_that_does_not_need_the_rows_leaves_them_alone(device):
    table, other = trainable(device), torch.ones((), requires_grad=True)
    loss = (lookup(table, torch.tensor([1, 2])) * other).sum()
    assert torch.autograd.grad(loss, other)[0] is not None and table.row_grad is None


def test_compiled_and_checkpointed(device):
    """torch.compile has the lookup in its graph; activation checkpointing runs it twice. Equal gradients."""
    table, linear, ids = trainable(device), torch.nn.Linear(24, 4), torch.randint(0, ROWS, (5, 3))

    def loss():
        return linear(lookup(table, ids).flatten(1)).tanh().sum()

    gradients = []
    for run in (
        loss,
        torch.compile(loss, backend="aot_eager", fullgraph=True),
        lambda: torch.utils.checkpoint.checkpoint(loss, use_reentrant=False),
    ):
        table.zero_row_grad()
        run().backward()
        gradients.append(table.row_grad)
    for other in gradients[1:]:
        assert torch.equal(other.ids, gradients[0].ids) and torch.equal(other.values, gradients[0].values)


def test_compiled_lookups_of_the_same_rows(device):
    """Each adds its gradient, though torch takes equal calls in a graph for one; a second pass adds to the first."""
    table, linear = trainable(device), torch.nn.Linear(24, 4)

    def loss(ids):
        return sum(linear(lookup(table, ids).flatten(1)).tanh().sum() for _ in range(2))

    torch.compiler.reset()
    run, found = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True), []
    for function in (loss, run):
        table.zero_row_grad()
        for seed in (5, 9, 3):
            ids = torch.randint(0, ROWS, (seed, 3), generator=torch.Generator().manual_seed(seed))
            function(ids).backward()
        gradient = table.row_grad
        found.append((gradient.ids, gradient.values, table.anchor.grad.norm(), table.row_grad_factor()))
    assert all(map(torch.equal, *found)) and found[0][3] == 1


@pytest.mark.parametrize("slotted", [False, True])
def test_compiled_hash_lookup(device, slotted):
    """Of two layers the one that is trainable; tokens with all that lies beside them."""
    plan = small_plan()
    tables = [place(torch.randn(rows, 8), None, device) for rows in plan.rows_per_layer]
    tables[1].requires_row_grad_()
    ids, cu, history, dead = ragged()
    options = dict(cu_seqlens=cu, history=history, dead=dead)
    if slotted:
        slots = torch.arange(len(history), dtype=torch.int32).flip(0)
        options |= dict(history=history[slots.long()].contiguous(), slots=slots)

    def loss(ids):
        return hash_lookup(ids, plan, tables, **options).sin().square().sum()

    torch.compiler.reset()
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)):
        tables[1].zero_row_grad()
        value = function(ids)
        value.backward()
        found.append((value, tables[1].row_grad.ids, tables[1].row_grad.values))
    assert all(map(torch.equal, *found)) and tables[0].row_grad is None


def test_opcheck_of_recorded_lookups(device):
    plan = small_plan()
    tables = [place(torch.randn(rows, 8), None, device).requires_row_grad_() for rows in plan.rows_per_layer]
    anchors, numbers = [table.anchor for table in tables], ",".join(table.number for table in tables)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    row_ids, (ids, *others) = torch.tensor([[1, 2], [3, 1]]), ragged()
    arguments = (row_ids, anchors[0], tables[0].number, None, None, None)
    torch.library.opcheck(torch.ops.engram.lookup_recorded.default, arguments, test_utils=tests)
    arguments = (ids, *others, anchors, numbers, None, None, None, *plan.parts())
    torch.library.opcheck(torch.ops.engram.hash_lookup_recorded.default, arguments, test_utils=tests)
    with pytest.raises(ValueError, match="lookup: the trainable table of this compiled graph is no longer there"):
        torch.ops.engram.lookup_recorded(row_ids, anchors[0], "none", None, None, None)


def test_errors(device):
    table, ids = trainable(device), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="lookup: out must be None for a trainable table"):
        lookup(table, ids, out=torch.empty(2, 8))
    with pytest.raises(ValueError, match="train a master table in bfloat16 or float32"):
        EngramTable.empty(4, 32, "e4m3_ue8m0", placement="cpu").requires_row_grad_()
    with pytest.raises(ValueError, match="accumulate_row_grad: the table is not trainable"):
        place(torch.randn(3, 8), None, device).accumulate_row_grad(ids, torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"grad must have shape \[2, 8\].*, got \[3, 8\]"):
        table.accumulate_row_grad(ids, torch.randn(3, 8))
    with pytest.raises(TypeError, match="row_ids must be a tensor of int32 or int64"):
        table.accumulate_row_grad(ids.float(), torch.randn(2, 8))
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.requires_row_grad_()
