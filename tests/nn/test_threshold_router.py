import math

import pytest
import torch

from graphmoe import MoELayer
from graphmoe.errors import ConfigError
from graphmoe.nn import ThresholdRouter
from graphmoe.typing import NEVER
from tests.contract import assert_eval_changes_nothing, assert_every_parameter_learns, assert_state_round_trip


def observed(num_experts=5, k=2, tokens=200, **options) -> tuple[ThresholdRouter, torch.Tensor]:
    router = ThresholdRouter(6, num_experts, k, **options)
    x = torch.randn(tokens, 6)
    router.observe(router.scores(x, None))
    return router, x


def test_equals_a_loop_over_tokens_and_experts(double):
    router, x = observed()
    router = router.double()
    r = router(x, mask=torch.arange(200) % 7 != 0)
    edges = {(int(t), int(e)): w for t, e, w in zip(r.token, r.expert, r.weight, strict=True) if e < 5}
    want = {}
    for n, logits in enumerate(x @ router.weight.t()):
        for e, p in enumerate(logits.softmax(dim=0)):
            if p > router.threshold[e] and n % 7:
                want[n, e] = p
    assert set(edges) == set(want)
    for edge, weight in want.items():
        torch.testing.assert_close(edges[edge], weight, rtol=1e-12, atol=0)
    assert r.token.numel() == 200 * 5
    assert (r.expert.diff() >= 0).all()
    assert torch.equal(r.token, r.perm // 5)
    assert (r.weight[int(r.ptr[-1]) :] == 0).all()


def test_before_the_first_observation_tokens_take_their_best():
    router = ThresholdRouter(6, 5, 2)
    x = torch.randn(30, 6)
    r = router(x)
    live = int(r.ptr[-1])
    assert r.token[:live].bincount().tolist() == [2] * 30
    best = router.scores(x, None).topk(2).indices.sort().values
    pairs = sorted(zip(r.token[:live].tolist(), r.expert[:live].tolist(), strict=True))
    assert [e for _, e in pairs] == best.flatten().tolist()


@pytest.mark.parametrize("tokens, num_experts, k", [(200, 5, 2), (64, 8, 3), (33, 4, 1), (10, 3, 3)])
def test_the_batch_that_was_observed_gives_every_expert_exactly_its_share(tokens, num_experts, k):
    router, x = observed(num_experts, k, tokens)
    capacity = math.ceil(k * tokens / num_experts)
    # Where an expert takes all tokens, the one with the lowest probability is on the threshold, not above.
    least = capacity - (capacity == tokens)
    assert router(x).ptr.diff().tolist() == [least] * num_experts


def test_thresholds_are_a_mean_first_and_then_move_slowly():
    router = ThresholdRouter(6, 5, 2, decay=0.75)
    seen = []
    for _ in range(6):
        logits = torch.randn(50, 5)
        ordered = logits.softmax(dim=1).sort(dim=0, descending=True).values
        seen.append((ordered[19] + ordered[20]) / 2)
        router.observe(logits)
        if len(seen) <= 4:
            torch.testing.assert_close(router.threshold, torch.stack(seen).mean(dim=0))
    want = torch.stack(seen[:4]).mean(dim=0)
    for border in seen[4:]:
        want = 0.75 * want + 0.25 * border
    torch.testing.assert_close(router.threshold, want)
    assert router.observed == 6


def test_the_share_of_experts_that_sleep_goes_to_the_others():
    router = ThresholdRouter(6, 4, 2)
    x, offset = torch.randn(90, 6), torch.tensor([0, 0, 0, NEVER])
    router.observe(router.scores(x, offset))
    assert router(x, offset=offset).ptr.diff().tolist() == [60, 60, 60, 0]


def test_nothing_to_observe_changes_nothing():
    router, _ = observed()
    before = router.threshold.clone()
    router.observe(torch.zeros(0, 5))
    assert torch.equal(router.threshold, before) and router.observed == 1


def test_a_token_knows_nothing_of_the_others(double):
    router, x = observed()
    router = router.double()
    changed = torch.cat([x[:100], torch.randn(100, 6)])
    one, two = router(x), router(changed)
    for r, s in ((one, two),):
        first, second = r.token < 100, s.token < 100
        for a, b in ((r.expert, s.expert), (r.weight, s.weight)):
            order = r.perm[first].argsort(), s.perm[second].argsort()
            assert torch.equal(a[first][order[0]], b[second][order[1]])


def test_weights_may_sum_to_the_scale(double):
    router, x = observed(k=1, scale=2.0, norm_topk_prob=True)
    r = router.double()(x)
    total = torch.zeros(200).index_add(0, r.token, r.weight)
    served = torch.zeros(200, dtype=torch.bool).index_fill(0, r.token[: int(r.ptr[-1])], True)
    assert not served.all()
    torch.testing.assert_close(total, 2.0 * served)


def test_in_a_layer():
    layer = MoELayer(6, num_experts=5, k=1, router="threshold", coupling="gnn")
    x = torch.randn(40, 6)
    layer.router.observe(layer.router.scores(x, None))
    out, record = layer(x, return_record=True)
    assert_every_parameter_learns(layer, out.square().sum())
    served = torch.zeros(40, dtype=torch.bool)
    served[record.routing.token[: int(record.routing.ptr[-1])]] = True
    assert not served.all()
    assert not out[~served].any()  # they pass by the residual around the layer
    assert_eval_changes_nothing(layer, lambda: layer(x))
    fresh = MoELayer(6, num_experts=5, k=1, router="threshold", coupling="gnn")
    assert_state_round_trip(layer, fresh, lambda m: m(x))


def test_sum_alone_equals_the_rows(double):
    layer = MoELayer(6, num_experts=5, k=2, router="threshold").double()
    x = torch.randn(40, 6)
    layer.router.observe(layer.router.scores(x, None))
    fast = layer(x)
    layer.track_outputs = True
    torch.testing.assert_close(layer(x), fast, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ConfigError, match="decay: thresholds would never move, or run away"):
        ThresholdRouter(6, 5, 2, decay=decay)
