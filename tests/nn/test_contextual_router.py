import pytest
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.nn import ContextualRouter, MoELayer, edge_form


def build(k=2, **options):
    router = ContextualRouter(8, 4, k, heads=2, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def logits_by_hand(router, outputs):
    """One token ``[E, D]``, one head and one expert at a time."""
    x = outputs + router.identity
    query, key, value = (router.attention.lin_qkv.weight @ x.t()).t().chunk(3, dim=1)
    heard = []
    for head in (slice(0, 4), slice(4, 8)):
        share = (query[:, head] @ key[:, head].t() / 4**0.5).softmax(dim=1)
        heard.append(share @ value[:, head])
    z = torch.cat(heard, dim=1) @ router.attention.lin_out.weight.t() + outputs
    z = z / (z.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * router.norm.weight
    return router.weight @ z.mean(dim=0) / router.temperature


def test_oracle(double):
    router, x = build(temperature=0.5), torch.randn(5, 4, 8)
    routing = router(x)
    want = torch.stack([logits_by_hand(router, token) for token in x])
    torch.testing.assert_close(routing.logits, want)
    chosen = want.topk(2).indices.sort().values
    expert = routing.expert[routing.perm.argsort()].view(5, 2)
    assert torch.equal(expert.sort().values, chosen)
    weight = routing.weight[routing.perm.argsort()].view(5, 2)
    torch.testing.assert_close(weight, want.gather(1, expert).softmax(dim=1))


def test_edge_form_equals_fast_form(double):
    router, x = build(), torch.randn(5, 4, 8, requires_grad=True)

    def edge():
        with edge_form(router):
            return router(x).logits

    assert_same(router, [x], lambda: router(x).logits, edge)


def test_who_said_it_matters(double):
    """With identities the same outputs in another order are another context; without them they are not."""
    router, x = build(), torch.randn(5, 4, 8)
    turned = x[:, [1, 2, 3, 0]]
    assert (router(x).logits - router(turned).logits).abs().max() > 1e-3
    torch.nn.init.zeros_(router.identity)
    torch.testing.assert_close(router(x).logits, router(turned).logits)


def layer(**options):
    module = MoELayer(8, 4, 2, hidden_channels=5, router="contextual", router_kwargs={"heads": 2}, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


OPTIONS = [
    {},
    {"coupling": "collab", "coupling_layers": 1, "fusion": "gated"},
    {"reasoning_steps": 2, "capacity_factor": 0.5},
    {"coupling": "gnn"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_edge_form_equals_fast_form(options, double):
    module, x = layer(**options), torch.randn(2, 7, 8, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False

    def edge():
        with edge_form(module):
            return module(x, mask=mask)

    assert_same(module, [x], lambda: module(x, mask=mask), edge)
    assert (module(x, mask=mask)[0, :3] == 0).all()


def test_layer_oracle(double):
    """Every expert speaks, the router listens, the chosen ones return."""
    module, x = layer(), torch.randn(6, 8)
    outputs = []
    for e in range(4):
        gate, up = (x @ module.experts.gate_up_proj[e].t()).chunk(2, dim=1)
        outputs.append((F.silu(gate) * up) @ module.experts.down_proj[e].t())
    outputs = torch.stack(outputs, dim=1)
    want = []
    for token in outputs:
        logits = logits_by_hand(module.router, token)
        top = logits.topk(2)
        want.append(top.values.softmax(dim=0) @ token[top.indices])
    torch.testing.assert_close(module(x), torch.stack(want))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contract(options):
    module, x = layer(**options), torch.randn(40, 8)
    assert_state_round_trip(module.eval(), layer(**options).eval(), lambda m: m(x))
    out, record = module.train()(x, return_record=True)
    assert_every_parameter_learns(module, out.pow(3).sum() + record.routing.logits.square().mean())
    assert module(x[:0]).shape == (0, 8)


def test_wrong_input():
    with pytest.raises(ConfigError, match="k must not exceed"):
        ContextualRouter(8, 4, 5)
    with pytest.raises(ConfigError, match="heads must divide"):
        ContextualRouter(8, 4, 2, heads=3)
    with pytest.raises(ConfigError, match="router_temperature: scores need a positive temperature"):
        ContextualRouter(8, 4, 2, temperature=0)
    with pytest.raises(ConfigError, match="num_ghosts"):
        MoELayer(8, 4, 2, router="contextual", num_ghosts=1)
    with pytest.raises(ConfigError, match="router_kwargs: TopKRouter does not take this"):
        MoELayer(8, 4, 2, router_kwargs={"heads": 2})
    with pytest.raises(ConfigError, match="router: unknown router"):
        MoELayer(8, 4, 2, router="psychic")
