from itertools import combinations

import pytest
import torch

from graphmoe.ops.fold import (
    acting,
    apply_operator,
    fold_incidence,
    fold_pairs,
    look_up,
    pair_table,
    weighted_softmax,
)


def random_hypergraph(nodes, count):
    incidence = (torch.rand(nodes, count) < 0.5).to(torch.get_default_dtype())
    return incidence, torch.rand(count)


def test_rows_are_weighted_means(double):
    incidence, weight = random_hypergraph(6, 9)
    incidence[2] = 0
    sums = fold_incidence(incidence, weight).sum(dim=1)
    assert sums[2] == 0
    torch.testing.assert_close(sums, (incidence.sum(dim=1) > 0).to(sums.dtype))


def test_fold_incidence_by_hand(double):
    """Node 0 lies in {0, 1} of weight 1 and in {0, 2} of weight 3."""
    incidence = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    operator = fold_incidence(incidence, torch.tensor([1.0, 3.0]))
    expected = torch.tensor([[4.0, 1.0, 3.0], [4.0, 4.0, 0.0], [4.0, 0.0, 4.0]]) / 8
    torch.testing.assert_close(operator, expected)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("spreads", [False, True])
def test_pairs_equal_the_incidence(gathers, spreads, double):
    pairs = [*combinations(range(5), 2), (0, 1)]  # one pair twice: its weights add up
    incidence = torch.zeros(5, len(pairs))
    for h, members in enumerate(pairs):
        incidence[list(members), h] = 1
    weight = torch.rand(len(pairs)) * (torch.rand(len(pairs)) < 0.7)
    gather = torch.randn(3, 5, 2) if gathers else None
    spread = torch.randn(3, 5, 2) if spreads else None
    pair = fold_pairs(pair_table(incidence, weight), gather, spread)
    torch.testing.assert_close(
        pair, fold_incidence(incidence, weight, gather, spread), rtol=1e-12, atol=1e-12
    )


def test_pair_table_adds_parallel_pairs():
    incidence = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    table = pair_table(incidence, torch.tensor([1.0, 2.0, 4.0]))
    assert table.tolist() == [[0, 5, 2], [5, 0, 0], [2, 0, 0]]


def test_look_up_gives_zero_for_absent_ids():
    table = torch.arange(9.0).view(3, 3).requires_grad_()
    found = look_up(table, torch.tensor([[0, 3, 2]]).unsqueeze(2), torch.tensor([[1, 2, 3]]).unsqueeze(1))
    assert found.tolist() == [[[1, 2, 0], [0, 0, 0], [7, 8, 0]]]
    found.sum().backward()
    assert table.grad.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 1]]


def test_acting_needs_all_members():
    incidence = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    expert = torch.tensor([[1, 0], [2, 3]])
    member, weight = acting(incidence, torch.tensor([5.0, 7.0]), expert)
    assert weight.tolist() == [[5, 0], [0, 0]]
    assert member.tolist() == [[[1, 1], [1, 0]], [[0, 1], [0, 0]]]
    _, weight = acting(incidence, torch.tensor([5.0, 7.0]), expert, complete=False)
    assert weight.tolist() == [[5, 7], [5, 7]]


def test_weighted_softmax(double):
    score = torch.tensor([[0.0, 500.0, 1.0], [3.0, 2.0, 1.0]], requires_grad=True)
    factor = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    share = weighted_softmax(score, factor, dim=1)
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(share[0], torch.stack([1 / (1 + 2 * e), 0 * e, 2 * e / (1 + 2 * e)]))
    assert share[1].tolist() == [0, 0, 0]
    share.square().sum().backward()
    assert torch.isfinite(score.grad).all() and torch.isfinite(factor.grad).all()


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_apply_operator(shape, shared, double):
    x = torch.randn(*shape, 5)
    operator = torch.randn(3, 3) if shared else torch.randn(*shape, 3)
    expected = torch.einsum("...ij,...jf->...if", operator, x)
    torch.testing.assert_close(apply_operator(operator, x), expected)
