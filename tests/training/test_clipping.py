"""torch's clipping over parameters and a table's anchor, against the same calls over a dense table.

In the interpret lane on kernels, in the cpu lane on the references.
"""

import copy
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from engram_kernels import RowAdagrad, RowAdam, lookup
from engram_kernels.testing.tables import place

ROWS, WIDTH = 20, 16


class Both:
    """A table beside the same rows as a dense parameter, each with another parameter; a backward pass of both."""

    def __init__(self, device, dtype=torch.float32):
        weight = torch.randn(ROWS, WIDTH, dtype=dtype)
        self.table = place(weight.clone(), None, device).requires_row_grad_()
        self.dense = weight.to(device).requires_grad_()
        self.beside = [torch.ones(5, device=device, requires_grad=True) for _ in range(2)]
        self.optimizer = RowAdagrad(self.table, lr=0.1)

    def backward(self, scale=1.0, bad=None):
        device, dtype = self.dense.device, self.dense.dtype
        ids = torch.randint(0, ROWS - 4, (40,), device=device)
        factor = 3 * torch.randn(40, WIDTH, device=device, dtype=dtype)
        if bad is not None:
            factor[7, 3] = bad
        ((lookup(self.table, ids) * factor).sum() * scale).backward()
        ((self.dense[ids] * factor).sum() * scale).backward()
        for each in self.beside:
            (each.square().sum() * scale).backward()
        return ids

    def both(self, call):
        """The results of one call over the table's anchor and over the dense table, with the parameters beside."""
        ours, theirs = self.table.anchor, self.dense
        return call([ours, self.beside[0]]), call([theirs, self.beside[1]])

    def check(self):
        found = self.table.row_grad.times(self.table.row_grad_factor()).to_sparse_coo().to_dense()
        torch.testing.assert_close(found, self.dense.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(self.beside[0].grad, self.beside[1].grad)
        assert float(self.table.anchor.grad) == pytest.approx(float(self.dense.grad.norm()), rel=1e-5)


def check_norms(device, order, foreach):
    """Twice, and then what a further backward pass adds to."""
    both = Both(device)
    both.backward()
    before = both.both(lambda grads: get_total_norm([each.grad for each in grads], order, foreach=foreach))
    torch.testing.assert_close(*before)
    for limit in (1.0, 0.3):
        torch.testing.assert_close(*both.both(lambda x, limit=limit: clip_grad_norm_(x, limit, order, foreach=foreach)))
        both.check()
    torch.testing.assert_close(both.beside[0].grad, both.beside[1].grad)
    both.backward()
    both.check()
    after = both.both(lambda x: clip_grad_norm_(x, 1e9, order, foreach=foreach))
    torch.testing.assert_close(*after)
    assert float(after[0]) > 1


def check_values(device, foreach):
    """Elements beyond the limit, before and after scaling; a backward pass adds to what is left."""
    both = Both(device)
    both.backward()
    for limit in (2.0, 0.5):
        both.both(lambda x, limit=limit: clip_grad_value_(x, limit, foreach=foreach))
        both.check()
        assert both.dense.grad.abs().max() == limit
        both.both(lambda x: clip_grad_norm_(x, 25.0, foreach=foreach))
        both.check()
    both.backward()
    both.check()
    both.both(lambda x: clip_grad_value_(x, 0.1, foreach=foreach))
    both.check()
    weight = both.table.weight.clone()
    both.optimizer.step()
    g = both.dense.grad
    expected = weight - 0.1 * g / (g.square().mean(1, keepdim=True).sqrt() + 1e-10)
    torch.testing.assert_close(both.table.weight, expected)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("order", [2.0, 1, 0.5, 3.0, math.inf])
def test_norms_on_a_cpu(order, foreach):
    check_norms(torch.device("cpu"), order, foreach)


@pytest.mark.kernel
@pytest.mark.parametrize("order", [1, math.inf])
def test_norms(device, order):
    check_norms(device, order, None)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_values_on_a_cpu(foreach):
    check_values(torch.device("cpu"), foreach)


@pytest.mark.kernel
def test_values(device):
    check_values(device, None)


@pytest.mark.parametrize("clip", [lambda x: clip_grad_norm_(x, 1.0, math.inf), lambda x: clip_grad_value_(x, 0.5)])
def test_what_a_scaler_has_unscaled(clip):
    """Limits are those of the gradient without the loss's scale, as for the dense table."""
    both, scaler = Both(torch.device("cpu")), torch.amp.GradScaler("cpu", init_scale=1024.0)
    dense = torch.optim.SGD([both.dense, both.beside[1]], lr=0.1)
    beside = torch.optim.SGD([both.beside[0]], lr=0.1)
    scaler.scale(torch.ones(()))
    both.backward(1024.0)
    for optimizer in (both.optimizer, beside, dense):
        scaler.unscale_(optimizer)
    both.check()
    both.both(clip)
    both.check()
    before = both.table.weight.clone()
    for optimizer in (both.optimizer, beside, dense):
        scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, both.table.weight) and scaler.get_scale() == 1024


def test_norms_of_float64_rows():
    both = Both(torch.device("cpu"), torch.float64)
    both.backward()
    norms = (each.grad.norm(3) for each in (both.table.anchor, both.dense))
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    clip_grad_value_([both.table.anchor, both.dense], 0.5)
    both.check()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite(bad):
    """An error where it was asked for. Infinity is brought to a limit, and else leaves all finite rows at rest."""
    for order in (1, 2, math.inf):
        both = Both(torch.device("cpu"))
        both.backward(bad=bad)
        for it in (both.table.anchor, both.dense):
            with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
                clip_grad_norm_([it], 1.0, order, error_if_nonfinite=True)
        if math.isinf(bad):
            both.both(lambda x, order=order: clip_grad_norm_(x, 1.0, order))
            before = both.table.weight.clone()
            both.optimizer.step()
            assert torch.equal(both.table.weight, before) and both.optimizer.skipped == 1
    both = Both(torch.device("cpu"))
    ids = both.backward(bad=bad)
    both.both(lambda x: clip_grad_value_(x, 0.5))
    torch.testing.assert_close(both.table.row_grad.to_sparse_coo().to_dense(), both.dense.grad, equal_nan=True)
    both.optimizer.step()
    assert both.optimizer.skipped == math.isnan(bad) and int((ids == ids[7]).sum()) >= 1


def test_forgetting():
    """Each way to empty a gradient, as torch's optimizers do it; then a backward pass starts anew."""
    ways = (
        lambda both: both.optimizer.zero_grad(set_to_none=False),
        lambda both: both.optimizer.zero_grad(),
        lambda both: setattr(both.table.anchor, "grad", None),
        lambda both: both.table.anchor.grad.zero_(),
        lambda both: torch._foreach_zero_([both.table.anchor.grad]),
    )
    for forget in ways:
        both = Both(torch.device("cpu"))
        both.backward()
        both.both(lambda x: clip_grad_value_(x, 0.5))
        forget(both)
        both.dense.grad = None
        for each in both.beside:
            each.grad = None
        both.backward()
        both.check()


def test_scaling_by_hand():
    """What users write themselves: in place, and into a new tensor."""
    both = Both(torch.device("cpu"))
    both.backward()
    for parameter in (both.table.anchor, both.dense):
        parameter.grad /= 4
        parameter.grad = parameter.grad * 3
        parameter.grad.data.mul_(0.5)
        parameter.grad.neg_()
        parameter.grad = (2 * parameter.grad).detach().clone()
        parameter.grad.data.clamp_(-2, 1)
        parameter.grad.data.clamp_(max=0.5)
        parameter.grad.clamp_min_(-0.25)
    both.check()
    ours, theirs = (each.grad.data.norm(2).item() for each in (both.table.anchor, both.dense))
    assert ours == pytest.approx(theirs) and "RowNorm" in repr(both.table.anchor.grad)
    norm = torch.tensor(8.0)
    for parameter in (both.table.anchor, both.dense):
        clip_grads_with_norm_([parameter], 1.0, norm)
    both.check()


@pytest.mark.parametrize(
    "use",
    [
        lambda g: g.add_(1),
        lambda g: g + 1,
        lambda g: g.abs().max(),
        lambda g: g.sum(),
        lambda g: g.sign_(),
        lambda g: g.copy_(torch.ones(1)),
        lambda g: torch.zeros_like(g),
        lambda g: g.clamp(-1, 1),
        lambda g: g * torch.ones(3),
        lambda g: g * g,
        lambda g: torch.ones(1).mul_(g),
        lambda g: g.norm(2, dim=0),
        lambda g: torch._foreach_clamp_min_([g], [-1.0]),
        lambda g: torch._foreach_add_([g], 1.0),
        lambda g: torch.cat([g, g]),
        lambda g: g.real,
        copy.deepcopy,
    ],
)
def test_what_one_element_cannot_stand_for(use):
    both = Both(torch.device("cpu"))
    both.backward()
    with pytest.raises(ValueError, match="^EngramTable.anchor.grad: expected a norm, multiplication by a number"):
        use(both.table.anchor.grad)
    both.check()


@pytest.mark.parametrize(
    "use", [lambda g: g.clamp_(1, 2), lambda g: g.clamp_max_(-1), lambda g: g.clamp_min_(math.nan)]
)
def test_limits_that_would_move_every_row(use):
    both = Both(torch.device("cpu"))
    both.backward()
    with pytest.raises(ValueError, match="^EngramTable.anchor.grad: limits must be on both sides of 0"):
        use(both.table.anchor.grad)
    with pytest.raises(ValueError, match="^EngramTable.anchor.grad: a norm's order must be above 0, got -inf"):
        both.table.anchor.grad.norm(-math.inf)
    both.check()


def test_a_gradient_that_another_took_the_place_of():
    """Its elements are no rows': neither a step nor a backward pass goes on from it, and nothing has moved."""
    both, other = Both(torch.device("cpu")), Both(torch.device("cpu"))
    other.backward()
    before, optimizer = both.table.weight.clone(), RowAdam([other.table, both.table])
    for grad, came in ((torch.ones(1), r"float32 \[1\] on cpu"), (other.table.anchor.grad, "that of another pass")):
        both.backward()
        both.table.anchor.grad = grad
        untouched = other.table.weight.clone()
        for use in (optimizer.step, both.backward):
            with pytest.raises(ValueError, match=f"anchor.grad must be what the backward pass left there, .*{came}"):
                use()
        both.table.zero_row_grad()
        assert torch.equal(both.table.weight, before) and torch.equal(other.table.weight, untouched)
    assert optimizer.steps == 0
