import math
from fractions import Fraction

import pytest
import torch

from graphmoe import MoELayer
from graphmoe.errors import ConfigError
from graphmoe.nn import ExpertChoiceRouter
from graphmoe.nn.route import spread
from tests.contract import assert_every_parameter_learns, assert_same


def edges_of(routing) -> dict[tuple[int, int], float]:
    live = int(routing.ptr[-1])
    names = zip(routing.token[:live].tolist(), routing.expert[:live].tolist(), strict=True)
    return dict(zip(names, routing.weight[:live].tolist(), strict=True))


def oracle(router, x, mask=None, batch=None) -> dict[tuple[int, int], float]:
    """Graph by graph, expert by expert."""
    mask = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    batch = torch.zeros(len(x), dtype=torch.long) if batch is None else batch
    probability, found = (x @ router.weight.detach().t()).softmax(dim=1), {}
    for graph in batch.unique().tolist():
        tokens = [n for n in range(len(x)) if batch[n] == graph and mask[n]]
        factor = Fraction(str(router.capacity_factor))
        for e in range(router.num_experts):
            ranked = sorted(tokens, key=lambda n: (-float(probability[n, e]), n))
            for n in ranked[: math.ceil(factor * len(tokens) / router.num_experts)]:
                found[n, e] = float(router.scale * probability[n, e])
    return found


@pytest.mark.parametrize("tokens, num_experts, k", [(12, 4, 2), (7, 5, 3), (1, 3, 1), (33, 8, 8), (0, 4, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("graphs", [0, 3])
def test_equals_the_oracle(tokens, num_experts, k, masked, graphs, double):
    router = ExpertChoiceRouter(6, num_experts, k, scale=1.5).double()
    x = torch.randn(tokens, 6)
    mask = torch.rand(tokens) < 0.6 if masked else None
    batch = 3 * torch.randint(0, graphs, (tokens,)) if graphs else None
    r = router(x, mask=mask, batch=batch)
    want = oracle(router, x, mask, batch)
    assert edges_of(r) == pytest.approx(want, abs=1e-12)
    assert (r.expert.diff() >= 0).all()
    assert sorted(r.perm.tolist()) == list(range(r.token.numel()))
    assert (r.token[r.perm.argsort()].diff() >= 0).all()
    assert r.ptr.tolist() == [int((r.expert < e).sum()) for e in range(num_experts + 1)]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 2.75, 5.0])
def test_every_expert_takes_exactly_its_share(factor):
    router = ExpertChoiceRouter(6, 5, 1, capacity_factor=factor)
    for tokens in (10, 11, 64):
        capacity = math.ceil(Fraction(str(factor)) * tokens / 5)
        assert router(torch.randn(tokens, 6)).ptr.diff().tolist() == [capacity] * 5


def test_ties_go_to_the_earlier_token():
    router = ExpertChoiceRouter(2, 2, 1)
    r = router(torch.ones(7, 2))
    assert [sorted(r.token[r.expert == e].tolist()) for e in (0, 1)] == [[0, 1, 2, 3]] * 2


def test_graphs_of_a_batch_do_not_matter_to_one_another(double):
    layer = MoELayer(6, num_experts=4, k=2, router="expert_choice").double()
    one, two = torch.randn(9, 6), torch.randn(14, 6)
    order = torch.randperm(23)
    x, batch = torch.cat([one, two])[order], torch.tensor([0] * 9 + [1] * 14)[order]
    together = torch.empty(23, 6)
    together[order] = layer(x, batch=batch)
    torch.testing.assert_close(together[:9], layer(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[9:], layer(two), rtol=0, atol=1e-12)


def test_padding_does_not_matter(double):
    layer = MoELayer(6, num_experts=4, k=2, router="expert_choice").double()
    x = torch.randn(9, 6)
    padded, mask = torch.cat([x, torch.randn(5, 6)]), torch.arange(14) < 9
    for batch in (None, torch.zeros(14, dtype=torch.long)):
        out = layer(padded, mask=mask, batch=batch)
        torch.testing.assert_close(out[:9], layer(x), rtol=0, atol=1e-12)
        assert not out[9:].any()


@pytest.mark.parametrize("coupling", ["none", "gnn", "hyper", "collab"])
def test_rows_and_sums_agree_and_every_parameter_learns(coupling, double):
    layer = MoELayer(8, num_experts=4, k=2, router="expert_choice", coupling=coupling).double()
    x = torch.randn(15, 8, requires_grad=True)
    out, record = layer(x, return_record=True)
    assert_every_parameter_learns(layer, out.square().sum())
    served = torch.zeros(15, dtype=torch.bool)
    served[record.routing.token[: int(record.routing.ptr[-1])]] = True
    assert not out[~served].any()
    if coupling == "none":

        def rows():
            layer.track_outputs = True
            return layer(x)

        assert_same(layer, [x], lambda: layer(x), rows)


def test_spread_gives_every_expert_a_place_at_every_token():
    r = ExpertChoiceRouter(6, 4, 2)(torch.randn(10, 6), mask=torch.arange(10) % 3 != 0)
    wide = spread(r)
    assert edges_of(wide) == edges_of(r)
    assert wide.token.numel() == 40
    assert torch.equal(wide.token, wide.perm // 4)


def test_norm_makes_the_weights_of_a_token_sum_to_the_scale(double):
    router = ExpertChoiceRouter(6, 4, 2, norm_topk_prob=True, scale=2.0).double()
    x = torch.randn(20, 6)
    for batch in (None, torch.arange(20) // 10):
        r = router(x, batch=batch)
        total = torch.zeros(20).index_add(0, r.token, r.weight)
        served = torch.zeros(20).index_fill(0, r.token[: int(r.ptr[-1])], 1.0)
        torch.testing.assert_close(total, 2.0 * served)


def test_compiles_without_a_break():
    layer = MoELayer(8, num_experts=4, k=2, router="expert_choice")
    x, batch = torch.randn(12, 8), torch.arange(12) // 6
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x, batch=batch), layer(x, batch=batch))


def test_bad_options():
    for factor in (0, -1.0, 4.5, float("nan")):
        with pytest.raises(
            ConfigError, match=r"capacity_factor: no number of experts a token.*at most num_exp"
        ):
            ExpertChoiceRouter(6, 4, 2, capacity_factor=factor)
    with pytest.raises(ConfigError, match="num_ghosts: experts that sleep would keep their share"):
        MoELayer(6, 4, 2, router="expert_choice", num_ghosts=1)
    with pytest.raises(ConfigError, match="capacity_factor: experts that choose take exactly their share"):
        MoELayer(6, 4, 2, router="expert_choice", capacity_factor=1.0)
    assert (
        MoELayer(6, 4, 2, router="expert_choice", router_kwargs={"capacity_factor": 1.5}).router.capacity(8)
        == 3
    )
