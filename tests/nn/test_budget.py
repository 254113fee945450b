import torch

from graphmoe.nn import TopKRouter
from graphmoe.nn.budget import in_token_order, within_budget


def by_hand(weight, expert, floor, budget):
    """One token after another: the weights that are left."""
    left = []
    for w, ids, b in zip(weight.tolist(), expert.tolist(), budget.tolist(), strict=True):
        best = max(range(len(w)), key=lambda j: w[j])
        kept = {ids[j]: w[j] for j in range(len(w)) if j == best or w[j] * b >= floor}
        left.append({e: v * sum(w) / sum(kept.values()) for e, v in kept.items()})
    return left


def test_equals_one_token_after_another(double):
    router = TopKRouter(6, 5, 3, scale=1.5).double()
    routing = router(3 * torch.randn(40, 6))
    budget = torch.rand(40)
    found = within_budget(routing, 0.2, budget)
    expert, weight = in_token_order(routing, 3)
    want = by_hand(weight, expert, 0.2, budget)
    expert, weight = in_token_order(found, 3)
    for ids, values, left in zip(expert.tolist(), weight.tolist(), want, strict=True):
        got = {e: v for e, v in zip(ids, values, strict=True) if e < 5}
        assert got.keys() == left.keys()
        assert all(abs(got[e] - left[e]) < 1e-12 for e in left)
    assert 40 <= int(found.ptr[-1]) < 120
    assert (found.expert.diff() >= 0).all()


def test_a_lower_budget_or_a_higher_floor_never_leaves_more():
    routing = TopKRouter(6, 5, 3)(torch.randn(50, 6))
    for floors, budgets in (((0, 0.1, 0.3, 0.9), (1.0,)), ((0.2,), (1.0, 0.7, 0.3, 0.0))):
        counts = [int(within_budget(routing, f, torch.full((50,), b)).ptr[-1])
                  for f in floors for b in budgets]  # fmt: skip
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] == 50


def test_masked_tokens_get_no_edge_and_no_floor_changes_nothing():
    router, x = TopKRouter(6, 5, 2), torch.randn(4, 6)
    routing = router(x, mask=torch.tensor([True, False, True, True]))
    found = within_budget(routing, 0.9)
    assert int(found.ptr[-1]) == 3 and not (found.token[:3] == 1).any()
    same = within_budget(routing, 0.0)
    assert torch.equal(same.expert, routing.expert)
    torch.testing.assert_close(same.weight, routing.weight)
    assert within_budget(router(x[:0]), 0.5).token.numel() == 0
