import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.nn import DenseRouter, TopKRouter
from graphmoe.typing import NEVER


@pytest.mark.parametrize("num_tokens, num_experts, k", [(1, 1, 1), (7, 5, 2), (33, 8, 8), (0, 4, 2)])
def test_contract(num_tokens, num_experts, k):
    router = TopKRouter(6, num_experts, k)
    x = torch.randn(num_tokens, 6)
    r = router(x)
    assert r.token.shape == r.expert.shape == r.weight.shape == r.perm.shape == (num_tokens * k,)
    assert (r.expert.diff() >= 0).all()
    assert r.ptr.tolist() == [int((r.expert < e).sum()) for e in range(num_experts + 1)]
    assert torch.equal(r.token, r.perm // k)
    assert r.token.bincount(minlength=num_tokens).tolist() == [k] * num_tokens
    per_token = torch.zeros(num_tokens).index_add(0, r.token, r.weight)
    torch.testing.assert_close(per_token, torch.ones(num_tokens))
    assert repr(router) == f"TopKRouter(6, num_experts={num_experts}, k={k})"


def test_takes_the_largest_scores_and_ties_go_to_the_lowest_id():
    router = TopKRouter(2, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0, 1], [1, 0], [1, 0], [1, 0]]))
    r = router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    chosen = {t: sorted(r.expert[r.token == t].tolist()) for t in (0, 1)}
    assert chosen == {0: [1, 2], 1: [0, 1]}


@pytest.mark.parametrize("k", [1, 3, 4, 5, 8])
def test_choice_equals_a_stable_sort(k):
    router = TopKRouter(3, 8, k)
    with torch.no_grad():  # many ties
        router.weight.copy_(torch.randint(-1, 2, (8, 3)).float())
    x = torch.randint(-1, 2, (200, 3)).float()
    r = router(x)
    want = (x @ router.weight.t()).sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(r.expert[r.perm.argsort()].view(-1, k), want)


def test_masked_tokens_have_no_edges():
    router = TopKRouter(6, 5, 2)
    x, mask = torch.randn(4, 6), torch.tensor([True, False, True, False])
    r = router(x, mask=mask)
    assert int(r.ptr[-1]) == 4
    assert not mask[r.token[4:]].any()
    assert (r.expert[4:] == 5).all() and (r.weight[4:] == 0).all()
    alone = router(x[mask])
    assert torch.equal(r.expert[:4], alone.expert)


@pytest.mark.parametrize("router", [TopKRouter(6, 5, 3), DenseRouter(6, 5)], ids=["topk", "dense"])
def test_an_expert_that_never_serves_changes_nothing(router, double):
    router = router.double()
    x = torch.randn(9, 6)
    offset = torch.tensor([0, 0, 0, 0, NEVER])
    r = router(x, offset=offset)
    assert not (r.expert == 4).any()
    smaller = type(router)(6, 4, *([3] if isinstance(router, TopKRouter) else []))
    smaller.weight.data = router.weight.data[:4]
    live = int(r.ptr[-1])
    torch.testing.assert_close(r.weight[:live], smaller(x).weight, rtol=0, atol=0)


def test_router_stays_in_fp32_under_autocast():
    router = TopKRouter(64, 8, 2)
    x = torch.randn(50, 64)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert cast.logits.dtype == torch.float32
    assert torch.equal(plain.expert, cast.expert)
    assert router.bfloat16()(x.bfloat16()).logits.dtype == torch.float32


def test_edge_index_is_a_valid_graph():
    r = TopKRouter(6, 5, 2)(torch.randn(4, 6), mask=torch.tensor([True, True, True, False]))
    r.edge_index.validate()
    assert r.edge_index.shape == (2, 6)
    r.rows.validate()
    assert r.rows.shape == (2, 8)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_out_of_range(k):
    with pytest.raises(ConfigError, match=r"k: k must not exceed.*1 <= k <= 5"):
        TopKRouter(6, 5, k)


@pytest.mark.parametrize("kind", [TopKRouter, DenseRouter])
def test_scale_is_what_weights_sum_to(kind):
    sizes = (6, 5, 3) if kind is TopKRouter else (6, 5)
    plain, scaled = kind(*sizes), kind(*sizes, scale=2.5)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(9, 6)
    torch.testing.assert_close(scaled(x).weight, 2.5 * plain(x).weight)
    assert torch.equal(scaled(x).expert, plain(x).expert)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="routed_scaling_factor: weights need a positive scale"):
            kind(*sizes, scale=bad)


@pytest.mark.parametrize("kind", [TopKRouter, DenseRouter])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
def test_weights_are_those_of_the_formula(kind, scoring_func, norm, double):
    sizes = (6, 5, 3) if kind is TopKRouter else (6, 5)
    router = kind(*sizes, scale=1.5, temperature=0.7, scoring_func=scoring_func, norm_topk_prob=norm).double()
    x = torch.randn(9, 6)
    r = router(x)
    logits = x @ router.weight.t() / 0.7
    probability = logits.softmax(dim=1) if scoring_func == "softmax" else 1 / (1 + (-logits).exp())
    for n in range(9):
        here = r.token == n
        chosen = probability[n][r.expert[here]]
        want = 1.5 * (chosen / chosen.sum() if norm else chosen)
        torch.testing.assert_close(r.weight[here], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_a_router_of_one_expert_a_token_learns_from_its_task_only_without_the_norm(scoring_func):
    x = torch.randn(9, 6)
    for norm in (True, False):
        router = TopKRouter(6, 4, 1, scoring_func=scoring_func, norm_topk_prob=norm)
        router(x).weight.square().sum().backward()
        assert bool(router.weight.grad.abs().max() > 1e-4) is not norm


def test_sigmoid_weights_are_finite_where_all_scores_are_hopeless():
    router = TopKRouter(1, 4, 2, scoring_func="sigmoid")
    with torch.no_grad():
        router.weight.fill_(-200.0)
    r = router(torch.ones(3, 1))
    r.weight.sum().backward()
    assert r.weight.isfinite().all() and router.weight.grad.isfinite().all()


def test_noise_moves_choices_in_training_only():
    router = TopKRouter(6, 8, 2, noise_std=5.0)
    x = torch.randn(50, 6)
    assert not torch.equal(router(x).expert, router(x).expert)
    router.eval()
    assert torch.equal(router(x).expert, router(x).expert)


def test_bias_moves_choices_and_no_weight():
    router = TopKRouter(6, 4, 2, bias=True, bias_rate=0.5)
    x = torch.randn(20, 6)
    before = router(x)
    router.rebalance(torch.tensor([10, 20, 4, 6]))  # mean 10: nothing, less, more, more
    assert router.bias_steps.tolist() == [0, -1, 1, 1]
    torch.testing.assert_close(router.bias(), torch.tensor([-0.125, -0.625, 0.375, 0.375]))
    after = router(x)
    assert torch.equal(after.logits, before.logits)
    wanted = (after.logits + router.bias()).sort(dim=1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(after.expert[after.perm.argsort()].view(-1, 2), wanted)
    chosen = after.logits.gather(1, wanted)
    weight = after.weight[after.perm.argsort()].view(-1, 2)
    torch.testing.assert_close(weight, chosen.softmax(dim=1))


def test_bias_balances_a_router_that_prefers_one_expert():
    router = TopKRouter(4, 4, 1, bias=True, bias_rate=0.05)
    with torch.no_grad():
        router.weight[0] += torch.tensor([2.0, 0, 0, 0])
    x = torch.randn(2000, 4) + torch.tensor([2.0, 0, 0, 0])
    first = router(x).ptr.diff()
    for _ in range(200):
        router.rebalance(router(x).ptr.diff())
    last = router(x).ptr.diff()
    assert first.max() > 1500
    assert last.max() < 1.1 * 500


def test_bias_leaves_experts_alone_that_cannot_be_chosen():
    router = TopKRouter(6, 4, 2, bias=True)
    router.rebalance(torch.tensor([3, 1, 2, 0]), live=torch.tensor([True, True, True, False]))
    assert router.bias_steps.tolist() == [-1, 1, 0, 0]


def test_bias_is_in_the_state_survives_a_cast_and_can_be_reset():
    router = TopKRouter(6, 4, 2, bias=True)
    for _ in range(3001):
        router.rebalance(torch.tensor([3, 1, 2, 2]))
    fresh = TopKRouter(6, 4, 2, bias=True)
    fresh.load_state_dict(router.state_dict())
    torch.testing.assert_close(fresh.bfloat16().bias(), torch.tensor([-3.001, 3.001, 0, 0]))
    assert "bias_steps" not in TopKRouter(6, 4, 2).state_dict()
    router.reset_parameters()
    assert not router.bias().any()


def test_bad_options():
    with pytest.raises(ConfigError, match=r"scoring_func: unknown scoring function.*softmax, sigmoid.*tanh"):
        TopKRouter(6, 5, 2, scoring_func="tanh")
    with pytest.raises(ConfigError, match="router_bias_rate: a bias moves by some amount"):
        TopKRouter(6, 5, 2, bias=True, bias_rate=0.0)
