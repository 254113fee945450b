import pytest
import torch
from contract import assert_every_parameter_learns, assert_state_round_trip

from graphmoe.errors import ConfigError
from graphmoe.nn import (
    ContextualRouter,
    DenseRouter,
    ExpertChoiceRouter,
    MoELayer,
    ThresholdRouter,
    TopKRouter,
)

KINDS = (TopKRouter, DenseRouter, ThresholdRouter, ExpertChoiceRouter, ContextualRouter)


def build(kind, **options):
    sizes = (8, 4) if kind is DenseRouter else (8, 4, 2)
    return kind(*sizes, **options)


def tokens(kind, count=9):
    return torch.randn(count, 4, 8) if kind is ContextualRouter else torch.randn(count, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_layer_contract(kind):
    router, x = build(kind, hidden_channels=3), tokens(kind)
    extra = ", hidden_channels=3)"
    assert repr(router).endswith(extra)
    assert repr(build(kind)) == repr(router).replace(extra, ")")
    assert router.weight.shape == (4, 3) and router.hidden.weight.shape == (3, 8)
    assert_state_round_trip(router, build(kind, hidden_channels=3), lambda r: r(x).weight)
    assert_every_parameter_learns(router, router(tokens(kind, 50)).logits.square().sum())


@pytest.mark.parametrize("kind", KINDS[:4])
def test_scores_are_those_of_the_formula(kind, double):
    router, x = build(kind, hidden_channels=3, temperature=0.5).double(), torch.randn(9, 8)
    torch.nn.init.normal_(router.hidden.bias)
    layer = [parameter.detach() for parameter in router.hidden.parameters()]
    for token, scores in zip(x, router(x).logits, strict=True):
        inner = [max(0.0, float(row @ token + b)) for row, b in zip(*layer, strict=True)]
        want = [sum(w * h for w, h in zip(row, inner, strict=True)) / 0.5 for row in router.weight]
        torch.testing.assert_close(scores, torch.stack(want))


def test_a_layer_that_changes_nothing_changes_nothing(double):
    router, x = build(ContextualRouter, hidden_channels=8).double(), tokens(ContextualRouter)
    plain = build(ContextualRouter).double()
    plain.load_state_dict({key: v for key, v in router.state_dict().items() if "hidden" not in key})
    with torch.no_grad():  # the identity, as long as nothing is negative
        router.hidden.weight.copy_(torch.eye(8))
        router.hidden.bias.fill_(100.0)
    shift = 100 * router.weight.sum(dim=1)
    torch.testing.assert_close(router(x).logits, plain(x).logits + shift, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_stay_in_fp32_under_autocast(kind):
    router, x = build(kind, hidden_channels=16), tokens(kind, 40)
    if kind is ContextualRouter:  # its attention is not part of the scores
        x = x.mean(dim=1)
    plain = router.scores(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router.scores(x, None)
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)
    assert router.bfloat16().scores(x.bfloat16(), None).dtype == torch.float32


def test_reset_gives_scores_the_size_they_have_without_the_layer():
    x = torch.randn(500, 64)
    for hidden in (None, 32, 256):
        router = TopKRouter(64, 64, 2, hidden_channels=hidden)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.fill_(7.0)
        router.reset_parameters()
        assert 0.8 < router(x).logits.std() < 1.2
        assert hidden is None or not router.hidden.bias.any()


@pytest.mark.parametrize("router", ["topk", "contextual", "threshold", "expert_choice"])
def test_option_of_a_mixture(router):
    layer = MoELayer(8, 4, 2, router=router, router_hidden_channels=3)
    assert layer.router.hidden.out_features == 3
    out = layer(torch.randn(20, 8))
    assert_every_parameter_learns(layer, out.square().sum())
    assert MoELayer(8, 4, 2, router=router).router.hidden is None


def test_ghosts_stay_asleep_behind_a_hidden_layer():
    layer = MoELayer(8, 4, 2, num_ghosts=2, router_hidden_channels=3)
    _, record = layer(torch.randn(20, 8), return_record=True)
    live = record.routing.expert[: int(record.routing.ptr[-1])]
    assert (live < 4).all()
    assert layer.router.weight in layer.ghost_slices() and layer.router.weight.shape == (6, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input(kind):
    with pytest.raises(ConfigError, match="router_hidden_channels: a hidden layer without channels"):
        build(kind, hidden_channels=0)
    with pytest.raises(ConfigError, match="scores need a positive temperature"):
        build(kind, temperature=0)
    with pytest.raises(TypeError, match="warmth"):
        build(kind, warmth=1)
