from itertools import combinations

import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.graph import STRATEGIES
from graphmoe.nn import HyperCoupleConv, edge_form

SIZE = {"all_pairs": 2, "all_triplets": 3}


def build(num_experts, **options):
    conv = HyperCoupleConv(5, num_experts, **options)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    return conv


def random_ids(num_tokens, k, num_experts):
    return torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k, num_experts", [(4, 4), (3, 3), (4, 7)])
@pytest.mark.parametrize("num_ghosts", [0, 2])
def test_edge_form_equals_fast_form(strategy, k, num_experts, num_ghosts, double):
    conv = build(num_experts, strategy=strategy, k=k, num_ghosts=num_ghosts)
    x = torch.randn(6, k, 5)
    ids = None
    if k < num_experts:
        ids = random_ids(6, k, num_experts)
        ids[0, 1] = ids[1, 0] = ids[1, 2] = num_experts
        x = x * (ids < num_experts).unsqueeze(-1)  # rows of absent edges are 0
    x.requires_grad_()
    level = None
    if num_ghosts:
        level = torch.cat([torch.ones(num_experts - 2), torch.tensor([0.3, 0.0])])

    def edge():
        with edge_form(conv):
            return conv(x, expert=ids, level=level)

    assert_same(conv, [x], lambda: conv(x, expert=ids, level=level), edge)


@pytest.mark.parametrize("strategy", ["all_pairs", "all_triplets"])
def test_equals_the_dense_formula_with_uneven_weights(strategy, double):
    conv = build(5, strategy=strategy)
    x = torch.randn(3, 5, 5, requires_grad=True)
    edges = list(combinations(range(5), SIZE[strategy]))

    def dense():
        weight = F.softplus(conv.weight)
        return torch.stack([reference.hyper_couple(token, conv.lin.weight, edges, weight) for token in x])

    assert_same(conv, [x], lambda: conv(x), dense)


@pytest.mark.parametrize("strategy", ["all_pairs", "all_triplets"])
def test_weights_follow_expert_ids(strategy, double):
    conv = build(7, strategy=strategy, k=4)
    x, ids = torch.randn(3, 4, 5), random_ids(3, 4, 7)
    out = conv(x, expert=ids)
    table = {e: i for i, e in enumerate(combinations(range(7), SIZE[strategy]))}
    for n in range(3):
        edges = list(combinations(range(4), SIZE[strategy]))
        weight = torch.stack(
            [F.softplus(conv.weight)[table[tuple(sorted(ids[n, list(e)].tolist()))]] for e in edges]
        )
        torch.testing.assert_close(out[n], reference.hyper_couple(x[n], conv.lin.weight, edges, weight))


def test_user_hypergraph_by_hand(double):
    """Two hyperedges of weights 1 and 3 around node 0."""
    conv = HyperCoupleConv(1)
    torch.nn.init.ones_(conv.lin.weight)
    x = torch.tensor([[10.0], [20.0], [80.0]])
    edges = torch.tensor([[0, 1, 0, 2], [0, 0, 1, 1]])
    out = conv(x, edges, edge_weight=torch.tensor([1.0, 3.0]))
    # hyperedge means 15 and 45; node 0: (1 * 15 + 3 * 45) / 4
    torch.testing.assert_close(out, torch.tensor([[37.5], [15.0], [45.0]]))


def test_uniform_weights_cancel(double):
    conv = HyperCoupleConv(5, 4)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(conv(x), conv(x, edge_weight=torch.full((6,), 7.0)))


@pytest.mark.parametrize(
    "strategy, num_experts, k, has_weight",
    [
        ("all_pairs", 6, 2, False),
        ("all_pairs", 6, 3, True),
        ("all_triplets", 6, 3, False),
        ("all_triplets", 6, 4, True),
        ("all", 6, 6, False),
    ],
)
def test_no_parameter_where_it_would_cancel(strategy, num_experts, k, has_weight):
    conv = HyperCoupleConv(5, num_experts, strategy=strategy, k=k)
    assert (conv.weight is not None) == has_weight
    if has_weight:
        assert (conv.hyperedge_weight() - 1).abs().max() < 1e-6
    ids = random_ids(40, k, num_experts)
    assert_every_parameter_learns(conv, conv(torch.randn(40, k, 5), expert=ids).square().sum())


def test_ghost_groups_have_logits_that_learn():
    conv = HyperCoupleConv(5, 6, k=6, num_ghosts=2)
    assert conv.group.bincount().tolist() == [6, 1, 8]  # primaries, ghosts, mixed
    assert_every_parameter_learns(conv, conv(torch.randn(9, 6, 5)).square().sum())
    assert len(HyperCoupleConv(5, 6, k=6, num_ghosts=1).group_logits) == 2  # no pair of ghosts


def test_a_dormant_ghost_is_not_there(double):
    conv = build(6, num_ghosts=2)
    x = torch.randn(3, 6, 5)
    level = torch.tensor([1.0, 1, 1, 1, 0, 0])
    changed = x.clone()
    changed[:, 4:] += 1
    out = conv(x, level=level)
    torch.testing.assert_close(out[:, :4], conv(changed, level=level)[:, :4], rtol=0, atol=0)
    assert (out[:, 4:] == 0).all()


def test_tokens_do_not_meet(double):
    conv = build(5)
    x = torch.randn(3, 5, 5)
    changed = x.clone()
    changed[2] += 1
    assert torch.equal(conv(x)[:2], conv(changed)[:2])


def test_state_round_trip(double):
    conv = build(6, k=4, num_ghosts=2)
    x, ids = torch.randn(3, 4, 5), random_ids(3, 4, 6)
    fresh = HyperCoupleConv(5, 6, k=4, num_ghosts=2)
    assert_state_round_trip(conv, fresh, lambda c: c(x, expert=ids))


def test_wrong_input():
    with pytest.raises(
        ConfigError, match=r"k: all_triplets needs more rows a token; expected at least 3; got 2"
    ):
        HyperCoupleConv(5, 6, strategy="all_triplets", k=2)
    with pytest.raises(ConfigError, match="no hypergraph"):
        HyperCoupleConv(5)(torch.randn(3, 5))
    assert repr(HyperCoupleConv(5, 4)) == "HyperCoupleConv(5, num_experts=4, strategy='all_pairs')"
