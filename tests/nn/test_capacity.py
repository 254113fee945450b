import math
from fractions import Fraction

import pytest
import torch

from graphmoe import loss
from graphmoe.errors import ConfigError
from graphmoe.nn import MoELayer, TopKRouter, limit_capacity
from graphmoe.nn.route import sort_routes
from graphmoe.typing import NEVER


def edges_of(routing):
    """Present edges (token, expert) with their weights."""
    live = int(routing.ptr[-1])
    pairs = zip(routing.token[:live].tolist(), routing.expert[:live].tolist(), strict=True)
    return dict(zip(pairs, routing.weight[:live].tolist(), strict=True))


def by_hand(routing, factor, batch=None):
    """The edges that stay, expert by expert in descending order of weight."""
    batch = torch.zeros(routing.logits.size(0), dtype=torch.long) if batch is None else batch
    edges, kept = edges_of(routing), {}
    for graph in set(batch.tolist()):
        mine = {pair: w for pair, w in edges.items() if batch[pair[0]] == graph}
        capacity = math.ceil(Fraction(str(factor)) * len(mine) / routing.num_experts)
        for expert in range(routing.num_experts):
            served = [(-w, token) for (token, e), w in mine.items() if e == expert]
            kept |= {(token, expert): -w for w, token in sorted(served)[:capacity]}
    return kept


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.1, 1.25, 4.0])
@pytest.mark.parametrize(
    "num_tokens, num_experts, k", [(1, 3, 2), (40, 4, 2), (33, 8, 1), (10, 3, 3), (0, 4, 2)]
)
@pytest.mark.parametrize("graphs", [1, 3])
def test_keeps_the_largest_weights_and_counts_exactly(factor, num_tokens, num_experts, k, graphs, double):
    router = TopKRouter(6, num_experts, k)
    x, mask = torch.randn(num_tokens, 6), torch.arange(num_tokens) % 5 != 3
    batch = torch.arange(num_tokens) % graphs
    routing = router(x, mask=mask)
    kept, overflow = limit_capacity(routing, factor, batch if graphs > 1 else None)
    assert edges_of(kept) == by_hand(routing, factor, batch)
    dropped = {(int(n), int(e)) for n, e in overflow.nonzero()}
    assert dropped == set(edges_of(routing)) - set(edges_of(kept))
    assert int(kept.ptr[-1]) + int(overflow.sum()) == int(mask.sum()) * k
    assert kept.token.shape == routing.token.shape and (kept.expert.diff() >= 0).all()
    assert torch.equal(kept.token, kept.perm // k)
    if graphs == 1:
        assert kept.ptr.diff().max() <= math.ceil(Fraction(str(factor)) * int(mask.sum()) * k / num_experts)


def test_ties_drop_later_tokens_and_rounding_is_exact():
    expert, weight = torch.zeros(10, 1, dtype=torch.long), torch.full((10, 1), 0.5)
    routing = sort_routes(expert, weight, torch.zeros(10, 1))
    kept, _ = limit_capacity(routing, 0.3)
    assert kept.token[:3].tolist() == [0, 1, 2] and int(kept.ptr[-1]) == 3
    kept, overflow = limit_capacity(routing, 1.1)  # 1.1 * 10 is more than 11 in floating point
    assert int(kept.ptr[-1]) == 10 and not overflow.any()


def test_an_expert_asleep_leaves_no_room():
    logits = torch.cat([torch.zeros(6, 2), torch.full((6, 1), NEVER)], dim=1)
    routing = sort_routes(torch.zeros(6, 1, dtype=torch.long), torch.rand(6, 1), logits)
    kept, _ = limit_capacity(routing, 1.0)
    assert int(kept.ptr[-1]) == 3  # half of six, not a third


def test_graphs_do_not_matter_to_one_another(double):
    router = TopKRouter(6, 4, 2)
    x, batch = torch.randn(30, 6), torch.arange(30) // 10
    kept, overflow = limit_capacity(router(x), 1.0, batch)
    for graph in range(3):
        mine = batch == graph
        alone, spilled = limit_capacity(router(x[mine]), 1.0)
        assert torch.equal(spilled, overflow[mine]) and spilled.any()
        first = int(mine.nonzero()[0])
        assert {(n + first, e) for n, e in edges_of(alone)} == {
            pair for pair in edges_of(kept) if mine[pair[0]]
        }


@pytest.mark.parametrize("options", [{}, {"coupling": "gnn"}, {"reasoning_steps": 2}], ids=str)
def test_a_layer_drops_in_training_only(options, double):
    layer = MoELayer(6, 4, 2, hidden_channels=5, capacity_factor=0.5, **options)
    x = torch.randn(20, 6)
    out, record = layer(x, return_record=True)
    assert int(record.dropped) == int(record.overflow.sum()) > 0
    assert int(record.routing.ptr[-1]) + int(record.dropped) == 40
    free, unlimited = layer.eval()(x, return_record=True)
    assert unlimited.overflow is None and int(unlimited.dropped) == 0
    touched = record.overflow.any(dim=1)
    assert torch.allclose(out[~touched], free[~touched]) and not torch.allclose(out[touched], free[touched])


def test_a_dropped_edge_leaves_the_rest_of_its_token_as_it_was(double):
    """Nothing is rescaled, and a token that lost every edge gets nothing."""
    layer = MoELayer(6, 4, 2, hidden_channels=5, capacity_factor=0.1)
    x = torch.randn(20, 6)
    out, record = layer(x, return_record=True)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[record.routing.token[: int(record.routing.ptr[-1])]] = True
    assert (~kept).sum() > 10 and (out[~kept] == 0).all() and (out[kept].abs().sum(dim=1) > 0).all()


def test_drop_penalty_has_a_gradient_towards_other_experts(double):
    layer = MoELayer(6, 4, 2, hidden_channels=5, capacity_factor=0.5)
    _, record = layer(torch.randn(20, 6), return_record=True)
    penalty = loss.drop_penalty(record.routing, record.overflow)
    share = record.routing.logits.softmax(dim=-1)
    by_hand = sum(share[n, e] for n, e in record.overflow.nonzero()) / 40
    torch.testing.assert_close(penalty, by_hand)
    (grad,) = torch.autograd.grad(penalty, record.routing.logits)
    assert (grad[record.overflow] > 0).all()  # a step against it lowers these scores
    assert (grad[~record.overflow.any(dim=1)] == 0).all()


def test_balance_counts_what_was_wanted_not_what_was_left(double):
    layer = MoELayer(6, 4, 2, hidden_channels=5, capacity_factor=0.5)
    x = torch.randn(20, 6)
    _, record = layer(x, return_record=True)
    _, free = layer.eval()(x, return_record=True)
    assert torch.equal(loss.wanted(record), loss.wanted(free))
    assert not torch.equal(record.routing.ptr, free.routing.ptr)
    counted = loss.balance(record.routing, counts=loss.wanted(record))
    torch.testing.assert_close(counted, loss.balance(free.routing))


def test_compiles():
    torch._dynamo.reset()
    layer = MoELayer(6, 4, 2, hidden_channels=5, capacity_factor=0.5)
    x = torch.randn(20, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_no_capacity(factor):
    match = "capacity_factor: capacity cannot be used"
    with pytest.raises(ConfigError, match=match):
        MoELayer(6, 4, 2, capacity_factor=factor)
    with pytest.raises(ConfigError, match=match):
        limit_capacity(TopKRouter(6, 4, 2)(torch.randn(3, 6)), factor)
