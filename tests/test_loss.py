import pytest
import torch

from graphmoe import loss
from graphmoe.nn.route import sort_routes
from graphmoe.typing import NEVER


def routing(expert, logits):
    expert = torch.tensor(expert)
    return sort_routes(expert, torch.full(expert.shape, 0.5, dtype=logits.dtype), logits)


def test_balance_is_one_when_uniform_and_larger_when_not(double):
    uniform = routing([[0, 1], [2, 3]], torch.zeros(2, 4))
    assert loss.balance(uniform).item() == pytest.approx(1)
    skewed = routing([[0, 1], [0, 1]], torch.tensor([[2.0, 2, 0, 0], [2, 2, 0, 0]]))
    by_hand = 4 * (0.5 * skewed.logits.softmax(-1)[0, 0] * 2)
    assert loss.balance(skewed).item() == pytest.approx(by_hand.item())
    assert loss.balance(skewed) > 1.5


def test_balance_ignores_experts_that_cannot_be_chosen(double):
    asleep = torch.full((2, 1), NEVER)
    with_ghost = routing([[0, 1], [2, 3]], torch.cat([torch.zeros(2, 4), asleep], dim=1))
    assert loss.balance(with_ghost).item() == pytest.approx(1)


def test_padding_does_not_count(double):
    logits = torch.randn(3, 4)
    mask = torch.tensor([True, True, False])
    padded = routing([[0, 1], [2, 3], [4, 4]], logits)  # expert 4 of 4: an absent edge
    alone = routing([[0, 1], [2, 3]], logits[:2])
    for function in (loss.balance, loss.router_z):
        torch.testing.assert_close(function(padded, mask), function(alone))
    assert loss.load(padded).sum() == 1
    nothing = torch.zeros(3, dtype=torch.bool)
    assert loss.balance(routing([[4, 4]] * 3, logits), nothing) == 0


def test_orthogonality_by_hand(double):
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    # cosines: 1/sqrt2, 0, 1/sqrt2; squared off-diagonal mean = 2 * (1/2 + 0 + 1/2) / 6
    assert loss.orthogonality(rows).item() == pytest.approx(1 / 3, rel=1e-6)
    live = torch.tensor([True, False, True])
    assert loss.orthogonality(rows, live).item() == pytest.approx(0, abs=1e-12)
    assert loss.orthogonality(rows, torch.tensor([True, False, False])).item() == 0


def test_gradient_at_a_zero_row_is_finite_and_small(double):
    rows = torch.stack([torch.zeros(4), torch.ones(4)]).requires_grad_()
    loss.orthogonality(rows).backward()
    assert rows.grad.abs().max() < 1


def test_losses_have_right_gradients(double):
    logits = torch.randn(5, 3, requires_grad=True)
    expert = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0], [2, 0]])

    def total(z):
        r = sort_routes(expert, torch.ones(5, 2), z)
        return loss.balance(r) + loss.router_z(r)

    assert torch.autograd.gradcheck(total, logits)
    assert torch.autograd.gradcheck(loss.orthogonality, torch.randn(3, 4, requires_grad=True))
