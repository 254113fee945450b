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
