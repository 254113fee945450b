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
# Hyperedges of one to four members, by number of experts; experts from 1 on lie in one at least.
CUSTOM = {
    3: [[0, 1], [1, 2, 0], [2]],
    4: [[0, 1, 2], [3, 1], [2, 3], [0, 1, 2, 3]],
    5: [[0, 1], [4, 2, 0], [1, 2, 3], [3]],
    7: [[0, 1, 2], [2, 3], [0, 5, 6], [3, 4, 5, 6], [6], [2, 3, 6]],
}


def build(num_experts, strategy="all_pairs", **options):
    """A layer with random parameters; "sparse_pairs" are custom hyperedges of two members."""
    custom = {"custom": CUSTOM.get(num_experts), "sparse_pairs": [[i, i - 1] for i in range(1, num_experts)]}
    options |= {"hyperedges": custom[strategy]} if strategy in custom else {"strategy": strategy}
    conv = HyperCoupleConv(5, num_experts, **options)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    return conv


def members_of(conv):
    """The hyperedges of a layer, written out."""
    expert, hyperedge = conv.hyperedge_index.tolist()
    found = {}
    for e, h in zip(expert, hyperedge, strict=True):
        found.setdefault(h, []).append(e)
    return list(found.values())


def acting(conv, ids):
    """Hyperedges that act on a token with experts ``ids``, by slot, and their weights."""
    table = list(zip(members_of(conv), conv.hyperedge_weight(), strict=True))
    served = [(members, weight) for members, weight in table if set(members) <= set(ids)]
    edges = [tuple(ids.index(e) for e in members) for members, _ in served]
    return edges, torch.stack([weight for _, weight in served]) if served else torch.zeros(0)


def random_ids(num_tokens, k, num_experts):
    return torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])


@pytest.mark.parametrize("strategy", [*STRATEGIES, "custom", "sparse_pairs"])
@pytest.mark.parametrize("k, num_experts", [(4, 4), (3, 3), (4, 7)])
@pytest.mark.parametrize("num_ghosts", [0, 2])
@pytest.mark.parametrize("attention", [False, True])
def test_edge_form_equals_fast_form(strategy, k, num_experts, num_ghosts, attention, double):
    conv = build(num_experts, strategy, k=k, num_ghosts=num_ghosts, attention=attention)
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


@pytest.mark.parametrize("strategy", ["all_pairs", "all_triplets", "custom", "sparse_pairs"])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("k", [4, 7])
def test_equals_the_loop_over_acting_hyperedges(strategy, attention, k, double):
    conv = build(7, strategy, k=k, attention=attention)
    x, ids = torch.randn(6, k, 5, requires_grad=True), random_ids(6, k, 7)

    def loop():
        rows = []
        for token, experts in zip(x, ids.tolist(), strict=True):
            edges, weight = acting(conv, experts)
            options = (conv.gather_attention, conv.spread_attention) if attention else ()
            couple = reference.hyper_attention if attention else reference.hyper_couple
            rows.append(couple(token, conv.lin.weight, edges, weight, *options))
        return torch.stack(rows)

    assert_same(conv, [x], lambda: conv(x, expert=ids), loop)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "custom"])
@pytest.mark.parametrize("k", [4, 7])
def test_attention_of_zero_is_the_convolution(strategy, k, double):
    conv = build(7, strategy, k=k, num_ghosts=2, attention=True)
    plain = build(7, strategy, k=k, num_ghosts=2)
    plain.load_state_dict(conv.state_dict(), strict=False)
    for vector in (conv.gather_attention, conv.spread_attention):
        if vector is not None:
            torch.nn.init.zeros_(vector)
    x, ids = torch.randn(6, k, 5), random_ids(6, k, 7)
    ids[0, 0] = ids[1, 2] = 7
    level = torch.tensor([1.0, 1, 1, 1, 1, 0.3, 0])
    torch.testing.assert_close(
        conv(x, expert=ids, level=level), plain(x, expert=ids, level=level), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(conv.connections(level), plain.connections(level))


def test_attention_where_no_hyperedge_acts(double):
    conv = build(7, "custom", k=4, attention=True)
    x = torch.randn(2, 4, 5, requires_grad=True)
    ids = torch.tensor([[0, 1, 3, 4], [7, 7, 7, 7]])
    out = conv(x, expert=ids)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    grads = [x.grad, *(p.grad for p in conv.parameters())]
    assert all(torch.isfinite(g).all() for g in grads)
    pairs = build(5, attention=True)
    out = pairs(x[:, [0, 1, 2, 3, 3]], level=torch.tensor([1.0, 0, 0, 0, 0]))
    assert torch.equal(out, torch.zeros_like(out))


def test_attention_of_a_partial_member(double):
    """A ghost at half its level counts half in the centre and in the softmax of its hyperedge."""
    conv = build(3, "all", num_ghosts=2, attention=True)
    x = torch.randn(3, 5)
    level = torch.tensor([1.0, 0.5, 0.0])
    z = x @ conv.lin.weight.T
    centre = (z[0] + 0.5 * z[1]) / 1.5
    own, part = conv.gather_attention
    share = level * F.leaky_relu(z @ own + centre @ part, 0.2).exp()
    heard = (share / share.sum()) @ z
    expected = torch.stack([heard, heard, torch.zeros_like(heard)])
    torch.testing.assert_close(conv(x, level=level), expected, rtol=1e-12, atol=1e-12)


def test_attention_stays_finite_for_large_scores():
    conv = HyperCoupleConv(5, 6, attention=True)
    x = 1e4 * torch.randn(3, 6, 5)
    with edge_form(conv):
        edge = conv(x)
    assert torch.isfinite(conv(x)).all()
    torch.testing.assert_close(conv(x), edge)


@pytest.mark.parametrize("attention", [False, True])
def test_user_hypergraph_equals_the_fast_form(attention, double):
    conv = build(7, "custom", attention=attention)
    x = torch.randn(2, 7, 5)
    order = torch.randperm(conv.hyperedge_index.size(1))
    own = conv(x, conv.hyperedge_index[:, order], edge_weight=conv.hyperedge_weight())
    torch.testing.assert_close(own, conv(x), rtol=1e-12, atol=1e-12)
    free = HyperCoupleConv(5, attention=attention)
    loss = free(x[0], conv.hyperedge_index).square().sum()
    assert_every_parameter_learns(free, loss)
    assert torch.equal(free(x[0], conv.hyperedge_index[:, :0]), torch.zeros(7, 5))


def test_user_hypergraph_by_hand(double):
    """Two hyperedges of weights 1 and 3 around node 0."""
    conv = HyperCoupleConv(1)
    torch.nn.init.ones_(conv.lin.weight)
    x = torch.tensor([[10.0], [20.0], [80.0]])
    edges = torch.tensor([[0, 1, 0, 2], [0, 0, 1, 1]])
    out = conv(x, edges, edge_weight=torch.tensor([1.0, 3.0]))
    # hyperedge means 15 and 45; node 0: (1 * 15 + 3 * 45) / 4
    torch.testing.assert_close(out, torch.tensor([[37.5], [15.0], [45.0]]))


def test_attention_by_hand(double):
    """One hyperedge of three nodes whose scores are 0, log 2 and log 5."""
    conv = HyperCoupleConv(2, attention=True)
    torch.nn.init.eye_(conv.lin.weight)
    with torch.no_grad():
        conv.gather_attention.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 8.0], [2.0, 16.0], [5.0, 0.0]])
    x[:, 0] = x[:, 0].log()
    out = conv(x, torch.tensor([[0, 1, 2], [0, 0, 0]]))
    torch.testing.assert_close(out[:, 1], torch.full((3,), (1 * 8 + 2 * 16 + 5 * 0) / 8))


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
        ([[0, 1, 2], [4, 3]], 6, 6, False),
        ([[0, 1, 2], [2, 3]], 6, 4, True),
        ([[0, 1, 2], [2, 3]], 6, 3, False),
        ([[0, 1], [1, 0]], 3, 3, False),
        ([[0], [0, 1]], 3, 2, True),
    ],
)
@pytest.mark.parametrize("attention", [False, True])
def test_no_parameter_where_it_would_cancel(strategy, num_experts, k, has_weight, attention):
    given = {"strategy": strategy} if isinstance(strategy, str) else {"hyperedges": strategy}
    conv = HyperCoupleConv(5, num_experts, k=k, attention=attention, **given)
    assert (conv.weight is not None) == has_weight
    assert (conv.spread_attention is not None) == (has_weight and attention)
    assert (conv.gather_attention is not None) == attention
    if has_weight:
        assert (conv.hyperedge_weight() - 1).abs().max() < 1e-6
    ids = random_ids(90, k, num_experts)
    assert_every_parameter_learns(conv, conv(torch.randn(90, k, 5), expert=ids).square().sum())


def test_hyperedges_of_one_expert_have_nothing_to_gather():
    conv = HyperCoupleConv(5, 3, hyperedges=[[0], [2]], attention=True)
    assert conv.gather_attention is None and conv.spread_attention is None and conv.weight is None
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(conv(x), conv.lin(x) * torch.tensor([[1.0], [0.0], [1.0]]))


def test_ghost_groups_have_logits_that_learn():
    conv = HyperCoupleConv(5, 6, k=6, num_ghosts=2)
    assert conv.group.bincount().tolist() == [6, 1, 8]  # primaries, ghosts, mixed
    assert_every_parameter_learns(conv, conv(torch.randn(9, 6, 5)).square().sum())
    assert len(HyperCoupleConv(5, 6, k=6, num_ghosts=1).group_logits) == 2  # no pair of ghosts


@pytest.mark.parametrize(
    "hyperedges, groups",
    [
        ([[0, 1], [1, 2], [3, 4]], None),  # the groups never meet in an expert
        ([[0, 1], [1, 2], [2, 3, 4]], 2),
        ([[0, 1], [1, 3], [3, 4]], 3),
    ],
)
def test_groups_of_custom_hyperedges(hyperedges, groups):
    conv = HyperCoupleConv(5, 5, hyperedges=hyperedges, num_ghosts=2)
    assert (None if conv.group_logits is None else len(conv.group_logits)) == groups
    assert_every_parameter_learns(conv, conv(torch.randn(9, 5, 5)).square().sum())


def test_a_dormant_ghost_is_not_there(double):
    conv = build(6, num_ghosts=2)
    x = torch.randn(3, 6, 5)
    level = torch.tensor([1.0, 1, 1, 1, 0, 0])
    changed = x.clone()
    changed[:, 4:] += 1
    out = conv(x, level=level)
    torch.testing.assert_close(out[:, :4], conv(changed, level=level)[:, :4], rtol=0, atol=0)
    assert (out[:, 4:] == 0).all()


@pytest.mark.parametrize("attention", [False, True])
def test_tokens_do_not_meet(attention, double):
    conv = build(5, attention=attention)
    x = torch.randn(3, 5, 5)
    changed = x.clone()
    changed[2] += 1
    assert torch.equal(conv(x)[:2], conv(changed)[:2])


def test_state_round_trip(double):
    conv = build(6, k=4, num_ghosts=2, attention=True)
    x, ids = torch.randn(3, 4, 5), random_ids(3, 4, 6)
    fresh = HyperCoupleConv(5, 6, k=4, num_ghosts=2, attention=True)
    assert_state_round_trip(conv, fresh, lambda c: c(x, expert=ids))


@pytest.mark.parametrize("attention", [False, True])
def test_a_hook_on_the_linear_layer_counts(attention, double):
    conv = build(5, attention=attention)
    x = torch.randn(3, 5, 5)
    plain = conv(x)
    conv.lin.register_forward_hook(lambda module, args, out: 2 * out + 1)
    with edge_form(conv):
        edge = conv(x)
    torch.testing.assert_close(conv(x), edge, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(edge, plain)


@pytest.mark.parametrize(
    "strategy, attention, k",
    [("all_pairs", False, 4), ("all_pairs", True, 7), ("custom", False, 7), ("custom", True, 4)],
)
def test_compiles_whole(strategy, attention, k, double):
    conv = build(7, strategy, k=k, attention=attention)
    x, ids = torch.randn(3, k, 5, requires_grad=True), None if k == 7 else random_ids(3, k, 7)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_same(conv, [x], lambda: conv(x, expert=ids), lambda: compiled(x, expert=ids))


def test_budget():
    assert HyperCoupleConv(5, 5, max_hyperedges=10).incidence.size(1) == 10
    with pytest.raises(ConfigError, match=r"max_hyperedges: more hyperedges.*at least 10; got 9"):
        HyperCoupleConv(5, 5, max_hyperedges=9)
    with pytest.raises(ConfigError, match=r"num_ghosts: ghosts have no room in the hyperedge budget.*15"):
        HyperCoupleConv(5, 6, num_ghosts=1, max_hyperedges=10)
    with pytest.raises(ConfigError, match="num_ghosts: ghosts have no room"):
        HyperCoupleConv(5, 3, hyperedges=[[0, 1], [1, 2]], num_ghosts=1, max_hyperedges=1)
    with pytest.raises(ConfigError, match="max_hyperedges: no room"):
        HyperCoupleConv(5, 4, max_hyperedges=0)
    # 10^17 triplets: the answer comes before the memory is asked for.
    with pytest.raises(ConfigError, match="max_hyperedges"):
        HyperCoupleConv(5, 10**6, strategy="all_triplets")


@pytest.mark.parametrize(
    "num_experts, options, match",
    [
        (6, {"strategy": "all_triplets", "k": 2}, r"k: all_triplets needs more rows.*at least 3; got 2"),
        (2, {"strategy": "all_triplets"}, r"num_experts: all_triplets needs more experts.*got 2"),
        (1, {"strategy": "all"}, r"num_experts: all needs more experts.*got 1"),
        (3, {"k": 4}, r"k: k must not exceed"),
        (3, {"num_ghosts": 3}, r"num_ghosts: at least one expert is no ghost"),
        (4, {"strategy": "squares"}, r"hyperedge_strategy: unknown strategy"),
        (4, {"strategy": "custom"}, r"hyperedges: custom hyperedges are missing"),
        (None, {"hyperedges": [[0, 1]]}, r"num_experts: hyperedges need their experts"),
        (4, {"strategy": "all", "hyperedges": [[0, 1]]}, r"strategy: contradicts.*got 'all'"),
        (4, {"hyperedges": [[0, 1], [1, 4]]}, r"hyperedges: hyperedge 1 has an expert id out of range"),
        (4, {"hyperedges": [[0, 1], [1, 2, 3]], "k": 2}, r"hyperedges: hyperedge 1 can never act.*got 3"),
        (4, {"hyperedges": [[0, 1], [1, 2]], "num_ghosts": 2}, r"hyperedges: a ghost lies in no.*expert 3"),
    ],
)
def test_wrong_input(num_experts, options, match):
    with pytest.raises(ConfigError, match=match):
        HyperCoupleConv(5, num_experts, **options)


def test_no_hypergraph_at_all():
    with pytest.raises(ConfigError, match="no hypergraph"):
        HyperCoupleConv(5)(torch.randn(3, 5))


def test_repr():
    assert repr(HyperCoupleConv(5, 4)) == "HyperCoupleConv(5, num_experts=4, strategy='all_pairs')"
    conv = HyperCoupleConv(5, 4, hyperedges=[[0, 1]], strategy="custom", attention=True)
    assert repr(conv) == "HyperCoupleConv(5, num_experts=4, strategy='custom', attention=True)"


def test_values_of_a_sparse_matrix_are_ignored():
    conv, x = HyperCoupleConv(8), torch.randn(4, 8)
    members = torch.tensor([[0, 1, 2, 3, 1], [0, 0, 1, 1, 1]])
    matrix = torch.sparse_coo_tensor(members.flip(0), torch.rand(5) + 0.1, (2, 4)).coalesce()
    torch.testing.assert_close(conv(x, matrix), conv(x, members))
