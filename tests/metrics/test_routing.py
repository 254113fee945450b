import math
from fractions import Fraction

import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError
from graphmoe.nn.route import sort_routes
from graphmoe.typing import NEVER


def routing(logits, k=2):
    expert = logits.topk(k, dim=1).indices
    return sort_routes(expert, torch.ones_like(expert, dtype=logits.dtype) / k, logits)


def test_routing_entropy_by_hand(double):
    logits = torch.randn(5, 4)
    p = logits.softmax(dim=-1)
    want = -(p * p.log2()).sum(dim=-1)
    torch.testing.assert_close(metrics.routing_entropy(routing(logits)), want.mean())
    mask = torch.tensor([[True, False, True, False, False]])
    torch.testing.assert_close(metrics.routing_entropy(routing(logits), mask), want[[0, 2]].mean())
    assert metrics.routing_entropy(routing(logits), torch.zeros(5, dtype=torch.bool)).item() == 0


def test_routing_entropy_of_undecided_and_decided_routers():
    undecided = torch.tensor([[0.0, 0.0, 0.0, 0.0, NEVER]]).expand(3, 5)
    assert metrics.routing_entropy(routing(undecided)).item() == pytest.approx(2)
    decided = torch.tensor([[500.0, 0.0, NEVER]]).requires_grad_()
    entropy = metrics.routing_entropy(routing(decided, k=1))
    assert entropy.item() == 0
    entropy.backward()
    assert torch.isfinite(decided.grad).all()


def test_routing_entropy_has_the_right_gradient(double):
    logits = torch.randn(3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: metrics.routing_entropy(routing(z)), logits)


def test_load_entropy_and_violation_by_hand(double):
    load = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert metrics.load_entropy(load).item() == pytest.approx(1.5 / 2)
    assert metrics.max_violation(load).item() == pytest.approx(1)
    live = torch.tensor([True, True, True, False])
    assert metrics.load_entropy(load, live).item() == pytest.approx(1.5 / math.log2(3))
    assert metrics.max_violation(load, live).item() == pytest.approx(0.5)
    counts = torch.tensor([20, 10, 10, 0])
    assert metrics.load_entropy(counts).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    "load, entropy, violation",
    [([1, 1, 1], 1, 0), ([1, 0, 0], 0, 2), ([0, 0, 0], 0, 0), ([5], 1, 0), ([0], 0, 0)],
)
def test_extreme_loads(load, entropy, violation):
    load = torch.tensor(load, dtype=torch.float32)
    assert metrics.load_entropy(load).item() == pytest.approx(entropy, abs=1e-6)
    assert metrics.max_violation(load).item() == pytest.approx(violation, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("tokens, experts, k", [(1, 2, 1), (10, 4, 2), (33, 8, 3), (12, 5, 5)])
def test_random_drop_rate_equals_a_sum_over_loads(tokens, experts, k, factor):
    capacity = math.ceil(Fraction(str(factor)) * tokens * k / experts)
    share = Fraction(k, experts)
    over = sum(
        (load - capacity) * math.comb(tokens, load) * share**load * (1 - share) ** (tokens - load)
        for load in range(capacity + 1, tokens + 1)
    )
    want = float(over / (tokens * share))
    assert metrics.random_drop_rate(tokens, experts, k, factor) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert want > 0 or factor > 1 or k == experts or tokens == 1


def test_wrong_input():
    with pytest.raises(ConfigError, match="k: more than there are; expected at most 4; got 5"):
        metrics.random_drop_rate(10, 4, 5, 1.0)
    with pytest.raises(ConfigError, match="num_tokens"):
        metrics.random_drop_rate(0, 4, 2, 1.0)


def random_routing(tokens=40, experts=5, k=2, masked=True):
    mask = torch.rand(tokens) < 0.7 if masked else torch.ones(tokens, dtype=torch.bool)
    logits = torch.randn(tokens, experts)
    logits[:, -1] = NEVER
    logits[:, 0] += 2
    expert = torch.where(mask.unsqueeze(1), logits.topk(k, dim=1).indices, experts)
    overflow = torch.zeros(tokens, experts, dtype=torch.bool)
    first = expert[:, 0] == 0
    first = first & (first.cumsum(0) > 3)  # expert 0 has room for three firsts
    overflow[first, 0] = True
    expert[first, 0] = experts
    return sort_routes(expert, torch.ones(tokens, k) / k, logits), mask, overflow


def test_counts_and_measures_equal_loops(double):
    routing, mask, overflow = random_routing()
    counts = metrics.count_routes(routing, mask, overflow)
    served, tokens = [0] * 5, set()
    for t, e in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        if e < 5:
            served[e] += 1
            tokens.add(t)
    assert counts.served.tolist() == served
    assert counts.tokens == mask.sum() < 40
    assert counts.unserved == int(mask.sum()) - len(tokens)
    assert counts.reachable.tolist() == [int(mask.sum())] * 4 + [0]
    assert counts.dropped == overflow.sum() > 0
    found = metrics.router_metrics(counts)
    mean = sum(served) / 4
    assert found["load"].tolist() == pytest.approx([s / sum(served) for s in served])
    assert found["max_violation"] == pytest.approx(max(served) / mean - 1)
    assert found["load_p50"] == pytest.approx(torch.tensor(served[:4]).double().quantile(0.5) / mean)
    assert found["load_p95"] == pytest.approx(torch.tensor(served[:4]).double().quantile(0.95) / mean)
    assert found["dead_experts"] == sum(s == 0 for s in served[:4])
    assert found["edges_per_token"] == pytest.approx(sum(served) / int(mask.sum()))
    assert found["drop_rate"] == pytest.approx(int(overflow.sum()) / (sum(served) + int(overflow.sum())))
    torch.testing.assert_close(found["routing_entropy"], metrics.routing_entropy(routing, mask))


def test_counts_of_two_batches_add_up_to_those_of_both():
    routing, mask, overflow = random_routing()
    dense = torch.full((40, 2), 5)
    dense.view(-1)[routing.perm] = routing.expert
    halves = []
    for part in (slice(0, 15), slice(15, 40)):
        half = sort_routes(dense[part], torch.ones_like(dense[part]) / 2, routing.logits[part])
        halves.append(metrics.count_routes(half, mask[part], overflow[part]))
    summed = metrics.RouterCounts(*(a + b for a, b in zip(*halves, strict=True)))
    for a, b in zip(summed, metrics.count_routes(routing, mask, overflow), strict=True):
        torch.testing.assert_close(a, b)
    both = metrics.router_metrics(summed)["max_violation"]
    alone = [metrics.router_metrics(half)["max_violation"] for half in halves]
    assert both < sum(alone) / 2  # violations themselves do not average


def test_an_expert_without_edges_is_dead_unless_it_cannot_be_reached():
    logits = torch.tensor([[2.0, 1.0, 0.0, NEVER]] * 3)
    found = metrics.router_metrics(metrics.count_routes(routing(logits)))
    assert found["dead_experts"] == 1
    assert found["load"].tolist() == [0.5, 0.5, 0, 0]
    assert found["max_violation"] == 0.5


@pytest.mark.parametrize("tokens", [0, 6])
def test_padding_alone_gives_zeros_and_no_nan(tokens):
    mask = torch.zeros(tokens, dtype=torch.bool)
    expert = torch.full((tokens, 2), 4)
    found = metrics.router_metrics(
        metrics.count_routes(sort_routes(expert, torch.zeros(tokens, 2), torch.randn(tokens, 4)), mask)
    )
    assert all(bool((value == 0).all()) for value in found.values())


def test_random_violation_of_one_choice_of_two():
    # |2 X - N| / N of a fair coin thrown N times.
    throws = 50
    want = sum(math.comb(throws, x) * abs(2 * x - throws) for x in range(throws + 1)) / throws / 2**throws
    assert metrics.random_max_violation(throws, 2, 1, samples=4000) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("experts, k", [(2, 1), (8, 2), (64, 4)])
def test_drawn_and_calculated_violations_meet(experts, k, monkeypatch):
    from graphmoe.metrics import routing as module

    tokens = module.MOST_DRAWN // experts
    drawn = metrics.random_max_violation(tokens, experts, k, samples=200)
    metrics.random_max_violation.cache_clear()
    monkeypatch.setattr(module, "MOST_DRAWN", 0)
    calculated = metrics.random_max_violation(tokens, experts, k)
    metrics.random_max_violation.cache_clear()
    # The load of 8 to 64 experts leans to one side a little: its largest value is above that of a normal one.
    assert calculated == pytest.approx(drawn, rel=0.1)
    assert metrics.random_max_violation(tokens, experts, experts) == 0


def test_floor_leaves_the_generator_alone():
    before = torch.get_rng_state()
    metrics.random_max_violation(33, 4, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="k: more than there are; expected at most 4; got 5"):
        metrics.random_max_violation(10, 4, 5)
