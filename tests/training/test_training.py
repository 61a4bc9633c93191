"""Training the Engram module with its table: AMP, checkpointing, torch.compile, clipping, accumulation, a sparse view.

In the interpret lane on kernels, in the cpu lane on the references.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from engram_kernels import RowAdagrad, RowAdam, lookup
from engram_kernels.testing.tables import place
from tests.nn.test_engram import built
from tests.ops.test_registration import same


def trainable(device, form="paper"):
    """Module, hidden and token ids; each of the 12 tokens reads rows that others read too."""
    module, *_ = built(form, device)
    module.table.requires_row_grad_()
    ids = torch.randint(0, 40, (6,), device=device).repeat(2).view(2, 6)
    return module, torch.randn(2, 6, 2, 24, device=device), ids


def dense_of(gradient):
    return gradient.to_sparse_coo().to_dense()


def gradients(module, hidden, call, *, scale=1.0):
    """Output, gradients of hidden and of every parameter, and the rows' by id."""
    leaf = hidden.detach().requires_grad_()
    module.zero_grad()
    module.table.zero_row_grad()
    out = call(leaf)
    (out.float().square().sum() * scale).backward()
    rows = module.table.row_grad
    parameters = [parameter.grad for parameter in module.parameters()]
    found = [out, leaf.grad, *parameters, rows.ids, dense_of(rows), module.table.anchor.grad.norm()]
    return [tensor.detach().clone() for tensor in found]  # clipping changes gradients in place


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def check_checkpointed(device, reentrant):
    """Computed again in the backward pass: each row's gradient once, and the same bits."""
    module, hidden, ids = trainable(device)
    expected = gradients(module, hidden, lambda x: module(x, ids))
    found = gradients(module, hidden, lambda x: checkpoint(module, x, ids, use_reentrant=reentrant))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True)) and expected[-1] > 0


def check_compiled(device):
    """One graph, forward and backward, the rows' gradient in it."""
    module, hidden, ids = trainable(device)
    torch.compiler.reset()
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = gradients(module, hidden, lambda x: module(x, ids))
    for a, b in zip(gradients(module, hidden, lambda x: run(x, ids)), expected, strict=True):
        close(a, b)


def check_scaled_steps(device, dtype):
    """Autocast and a GradScaler over module and rows: steps as without one, and none where a row overflows.

    Scales are powers of two. float16 has subnormals, of which a scaled loss keeps more: it is compared loosely.
    """
    runs = []
    for scaled in (True, False):
        torch.manual_seed(4)
        module, hidden, ids = trainable(device, "v41")
        optimizers = [torch.optim.SGD(module.parameters(), lr=1e-2), RowAdagrad(module.table, lr=1e-2)]
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=scaled)
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                out = module(hidden, ids)
            assert out.dtype == torch.float32
            before = module.table.weight.clone(), module.wkv.weight.detach().clone()
            scaler.scale(out.square().mean()).backward()
            if step == 1 and not scaled:
                continue
            if step == 1:
                module.table.accumulate_row_grad(ids[0, :1], torch.full((1, 8), float("inf"), device=device))
                module.wkv.weight.grad[0, 0] = float("inf")
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            moved = [
                not torch.equal(a, b) for a, b in zip(before, (module.table.weight, module.wkv.weight), strict=True)
            ]
            assert moved == [step != 1] * 2
        assert optimizers[1].skipped == 0 and optimizers[1].steps == 2
        assert not scaled or scaler.get_scale() == 2.0**7
        runs.append((module.table.weight.clone(), *(parameter.detach() for parameter in module.parameters())))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2.0**-9)


def check_clipped(device):
    """One norm over parameters and rows, and one factor for all of them, in any number of backward passes."""
    module, hidden, ids = trainable(device)
    found = gradients(module, hidden, lambda x: module(x, ids))
    *parameters, _, rows, norm = found[2:]
    total = torch.cat([x.flatten() for x in (*parameters, rows)]).norm()
    clipped = torch.nn.utils.clip_grad_norm_([*module.parameters(), module.table.anchor], 0.25)
    torch.testing.assert_close(clipped, total)
    factor = 0.25 / total
    torch.testing.assert_close(module.table.anchor.grad.norm(), norm * factor)
    torch.testing.assert_close(module.table.row_grad_factor(), factor)
    # A backward pass after that adds to what was clipped, as it does for parameters.
    module(hidden, ids).square().sum().backward()
    close(dense_of(module.table.row_grad), rows * (1 + factor))
    close(module.q_weight.grad, parameters[0] * (1 + factor))
    module.table.anchor.grad.zero_()
    module(hidden, ids).square().sum().backward()
    close(dense_of(module.table.row_grad), rows)
    module.table.anchor.grad = None
    module(hidden, ids).square().sum().backward()
    assert torch.equal(dense_of(module.table.row_grad), rows), "as any leaf whose gradient was set to None"


def check_accumulated(device):
    """Two halves of a batch in two backward passes, each half a sequence's rows: the gradient of the whole."""
    module, hidden, ids = trainable(device, "v41")
    whole = gradients(module, hidden, lambda x: module(x, ids))
    module.zero_grad()
    module.table.zero_row_grad()
    for half in range(2):
        module(hidden[half : half + 1], ids[half : half + 1]).square().sum().backward()
    close(dense_of(module.table.row_grad), whole[-2])
    for parameter, expected in zip(module.parameters(), whole[2:-3], strict=True):
        close(parameter.grad, expected)


def check_one_row(device, dtype, id_dtype):
    """Every token reads one row, by ids of either width: its gradient is the sum of all, and it takes one step."""
    table = place(torch.randn(9, 8), None, device).requires_row_grad_()
    optimizer, before = RowAdam(table, lr=0.5), table.weight.clone()
    ids, factor = torch.full((50, 3), 4, dtype=id_dtype, device=device), torch.randn(50, 3, 8, device=device)
    (lookup(table, ids, out_dtype=dtype).float() * factor).sum().backward()
    assert int(table.row_grad.count) == 1 and table.row_grad.ids[0] == 4
    expected = factor.to(dtype).double().sum((0, 1))
    torch.testing.assert_close(table.row_grad.values[0].double(), expected, rtol=1e-4, atol=1e-5)
    optimizer.step()
    assert optimizer.states()["steps"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_on_a_cpu(reentrant):
    check_checkpointed(torch.device("cpu"), reentrant)


@pytest.mark.kernel
def test_checkpointed(device):
    check_checkpointed(device, reentrant=True)


def test_compiled_on_a_cpu():
    check_compiled(torch.device("cpu"))


@pytest.mark.kernel
@pytest.mark.graphs
def test_compiled(device):
    check_compiled(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_steps_on_a_cpu(dtype):
    check_scaled_steps(torch.device("cpu"), dtype)


@pytest.mark.kernel
def test_scaled_steps(device):
    check_scaled_steps(device, torch.float16)


def test_clipped_on_a_cpu():
    check_clipped(torch.device("cpu"))


@pytest.mark.kernel
def test_clipped(device):
    check_clipped(device)


def test_accumulated_on_a_cpu():
    check_accumulated(torch.device("cpu"))


@pytest.mark.kernel
def test_accumulated(device):
    check_accumulated(device)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_one_row_on_a_cpu(id_dtype):
    check_one_row(torch.device("cpu"), torch.float32, id_dtype)


@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "id_dtype"), [(torch.bfloat16, torch.int32), (torch.float32, torch.int64)])
def test_one_row(device, dtype, id_dtype):
    check_one_row(device, dtype, id_dtype)


def test_a_sparse_view_for_other_optimizers(device):
    """SparseAdam over the rows' own memory, against SparseAdam over an embedding with a sparse gradient."""
    table = place(torch.randn(23, 8), None, device).requires_row_grad_()
    embedding = torch.nn.Embedding.from_pretrained(table.weight.clone(), freeze=False, sparse=True)
    rows = torch.nn.Parameter(table.weight)
    optimizers = [torch.optim.SparseAdam([weight], lr=0.1) for weight in (rows, embedding.weight)]
    for _ in range(3):
        ids, factor = torch.randint(-1, 23, (4, 5)), torch.randn(4, 5, 8)
        table.zero_row_grad()
        (lookup(table, ids) * factor).sum().backward()
        rows.grad = table.row_grad.to_sparse_coo()
        embedding.weight.grad = None
        (embedding(ids.clamp(0)) * factor * (ids >= 0)[..., None]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(table.weight, embedding.weight.detach())
    assert rows.data_ptr() == table.weight.data_ptr()
