import math

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


def test_counts_of_other_processes_enter_the_balance(double):
    """The mean of two halves' gradients, each with the counts of both, is the gradient of the whole."""
    logits = torch.randn(6, 4, requires_grad=True)
    expert = [[0, 1], [0, 1], [0, 2], [3, 1], [2, 3], [0, 3]]
    (whole,) = torch.autograd.grad(loss.balance(routing(expert, logits)), logits)
    halves = [routing(expert[i : i + 3], logits[i : i + 3]) for i in (0, 3)]
    counts = sum(half.ptr.diff() for half in halves)
    shared = sum(loss.balance(half, counts=counts) for half in halves) / 2
    torch.testing.assert_close(torch.autograd.grad(shared, logits)[0], whole)
    alone = sum(loss.balance(routing(expert[i : i + 3], logits[i : i + 3])) for i in (0, 3)) / 2
    assert (torch.autograd.grad(alone, logits)[0] - whole).abs().max() > 1e-3
    assert torch.equal(loss.over_ranks(counts), counts)  # nobody else is there


def test_diversity_is_the_negative_entropy_of_those_who_listen(double):
    even, sharp = torch.full((2, 1, 3, 3), 1 / 3), torch.eye(3).expand(2, 1, 3, 3)
    torch.testing.assert_close(loss.diversity(even), torch.tensor(-math.log(3)))
    assert loss.diversity(sharp).item() == pytest.approx(0, abs=1e-12)
    absent = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(loss.diversity(absent), torch.tensor(-math.log(2)))
    assert loss.diversity(torch.zeros(2, 3, 3)) == 0


def test_gradient_of_diversity_is_finite_where_nobody_is_heard(double):
    scores = torch.randn(4, 3, 3, requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0])

    def attention(z):
        share = z.exp() * mask
        return share / share.sum(dim=-1, keepdim=True)

    loss.diversity(attention(scores)).backward()
    assert scores.grad.isfinite().all() and scores.grad.abs().max() > 0
    assert torch.autograd.gradcheck(
        lambda z: loss.diversity(z.softmax(dim=-1)), scores.detach().requires_grad_()
    )


def test_effective_edges_count_equal_weights_fully_and_absent_ones_not(double):
    logits = torch.zeros(4, 4)
    expert = torch.tensor([[0, 1], [2, 3], [1, 4], [4, 4]])
    weight = torch.tensor([[0.5, 0.5], [0.9, 0.1], [2.0, 0.0], [0.0, 0.0]])
    found = loss.effective_edges(sort_routes(expert, weight, logits))
    torch.testing.assert_close(found, torch.tensor([1, 1 / (2 * 0.82), 0.5, 0]))
    weight = torch.tensor([[0.6, 0.4], [0.9, 0.1]], requires_grad=True)
    edges = lambda w: loss.effective_edges(sort_routes(expert[:2], w, logits[:2]))  # noqa: E731
    assert torch.autograd.gradcheck(edges, weight)


def test_budget_is_the_formula(double):
    usage, allowed = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([0.5, 0.2, 1.0])
    assert loss.budget(usage, allowed, 0.3).item() == pytest.approx((0.6 + 0.16 + 0.3 + 0.16) / 3)
    mask = torch.tensor([False, True, False])
    assert loss.budget(usage, allowed, 0.3, mask) == 0


def test_collision_is_the_expected_number_of_others_in_the_slot(double):
    logits = torch.randn(7, 5, requires_grad=True)
    sequence = torch.tensor([0, 0, 0, 2, 2, 2, 2])  # nobody is in the second one
    mask = torch.tensor([True, True, False, True, True, True, True])
    p = logits.softmax(dim=-1)
    met = []
    for members in ((0, 1), (3, 4, 5, 6)):
        pairs = [p[i] @ p[j] for i in members for j in members if i != j]
        met.append(sum(pairs) / len(members))
    torch.testing.assert_close(loss.collision(logits, sequence, 3, mask), sum(met) / 2)
    apart = 50 * torch.eye(5)
    assert loss.collision(apart, torch.zeros(5, dtype=torch.long), 1).item() == pytest.approx(0, abs=1e-12)
    assert loss.collision(0 * apart, torch.zeros(5, dtype=torch.long), 1).item() == pytest.approx(4 / 5)
    assert torch.autograd.gradcheck(lambda z: loss.collision(z, sequence, 3, mask), logits)
