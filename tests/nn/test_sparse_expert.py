"""Experts whose weights are edges: both forms, an obvious loop, matrices of the same weights, bad input."""

from types import SimpleNamespace

import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import ConfigError, GraphError
from graphmoe.nn import ExpertConv, MoELayer, SparseExpert, TopKRouter, edge_form
from graphmoe.ops import sparse_mlp as kernel
from graphmoe.train.rewire import Rewire, sparse_layers


def rows_of(conv, num_tokens, k):
    """Tokens and their routing, of which token 3 is absent."""
    x = torch.randn(num_tokens, conv.in_channels, requires_grad=True)
    r = TopKRouter(conv.in_channels, conv.num_experts, k)(x.detach(), mask=torch.arange(num_tokens) != 3)
    return x, r, torch.stack([r.token, torch.arange(len(r.token))])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("num_tokens, num_experts, k", [(1, 1, 1), (17, 3, 2), (5, 9, 1), (0, 4, 2)])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_edge_form_equals_fast_form(activation, num_tokens, num_experts, k, density, double, monkeypatch):
    monkeypatch.setattr(kernel, "PIECE_ROWS", 4)  # so that an expert has several pieces
    conv = SparseExpert(6, 10, num_experts, density=density, activation=activation)
    x, r, edges = rows_of(conv, num_tokens, k)

    def edge():
        with edge_form(conv):
            return conv(x, edges, r.expert, r.ptr)

    assert_same(conv, [x], lambda: conv(x, edges, r.expert, r.ptr), edge)


def test_calling_each_map_equals_the_fast_form(double):
    conv = SparseExpert(6, 10, 3, density=0.4)
    x, r, edges = rows_of(conv, 11, 2)

    def heard(x=x):
        hook = conv.gate_up_proj[0].register_forward_hook(lambda *_: None)
        try:
            return conv(x, edges, r.expert, r.ptr)
        finally:
            hook.remove()

    assert_same(conv, [x], lambda: conv(x, edges, r.expert, r.ptr), heard)
    assert heard(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_oracle(activation, double):
    conv = SparseExpert(4, 3, 2, density=0.5, activation=activation)
    x = torch.randn(3, 4)
    expert = torch.tensor([1, 0, 2, 1])  # row 2 is absent
    out = conv(x, torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]]), expert)
    for row, token in ((0, 0), (1, 1), (3, 2)):
        first, down = (part[expert[row]].dense_weight() for part in (conv.gate_up_proj, conv.down_proj))
        torch.testing.assert_close(out[row], reference.expert(x[token], first, down, activation))
    assert (out[2] == 0).all()


@pytest.mark.parametrize("coupling, router", [("none", "topk"), ("gnn", "topk"), ("none", "contextual"),
                                              ("none", "threshold")])  # fmt: skip
def test_a_mixture_with_the_matrices_of_its_edges(coupling, router, double):
    """Whatever stands around them, sparse experts are dense ones with zeros."""
    options = {"hidden_channels": 10, "coupling": coupling, "router": router}
    sparse = MoELayer(8, 3, 2, expert_density=0.4, **options)
    dense = MoELayer(8, 3, 2, **options)
    state = {name: value for name, value in sparse.state_dict().items() if not name.startswith("experts.")}
    for name in ("gate_up_proj", "down_proj"):
        layers = getattr(sparse.experts, name)
        state[f"experts.{name}"] = torch.stack([layer.dense_weight() for layer in layers])
    dense.load_state_dict(state)
    x = torch.randn(9, 8, requires_grad=True)
    mask = torch.arange(9) != 4
    (grad,) = torch.autograd.grad(sparse(x, mask=mask).square().sum(), x)
    (want,) = torch.autograd.grad(dense(x, mask=mask).square().sum(), x)
    torch.testing.assert_close(sparse(x, mask=mask), dense(x, mask=mask))
    torch.testing.assert_close(grad, want)


def test_contract():
    conv = SparseExpert(8, 12, 4, density=0.25, distribution="er")
    assert [len(part) for part in (conv.gate_up_proj, conv.down_proj)] == [4, 4]
    assert conv.num_edges == pytest.approx(0.25 * 4 * 3 * 8 * 12, abs=4)
    assert conv.down_proj[0].density > conv.gate_up_proj[0].density  # the smaller map is denser
    assert "num_experts=4" in repr(conv) and "density=0.25" in repr(conv)
    x, r, edges = rows_of(conv, 40, 2)
    assert_every_parameter_learns(conv, conv(x, edges, r.expert, r.ptr).square().sum())
    fresh = SparseExpert(8, 12, 4, density=0.25, distribution="er")
    assert_state_round_trip(conv, fresh, lambda m: m(x, edges, r.expert, r.ptr))


def test_an_expert_without_rows_gets_gradients_of_zero():
    conv = SparseExpert(6, 8, 3, density=0.5)
    x, expert = torch.randn(4, 6), torch.tensor([0, 0, 2, 2])
    edges, ptr = torch.arange(4).expand(2, 4), torch.tensor([0, 2, 2, 4])
    conv(x, edges, expert, ptr).sum().backward()
    assert [bool(layer.weight.grad.any()) for layer in conv.gate_up_proj] == [True, False, True]


def test_half_precision_and_offsets_that_do_not_ascend():
    conv = SparseExpert(6, 8, 2, density=0.5)
    x, r, edges = rows_of(conv, 9, 1)
    out = conv(x.bfloat16(), edges, r.expert, r.ptr)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), conv(x, edges, r.expert, r.ptr), atol=0.05, rtol=0.05)
    with pytest.raises(GraphError, match="ptr: offsets do not ascend"):
        conv(x, edges, r.expert, torch.tensor([0, 5, 3]))


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_edges_of_experts_evolve_and_keep_their_number(growth, double):
    layer = MoELayer(8, 3, 2, hidden_channels=10, expert_density=0.3)
    layers, x = sparse_layers(layer), torch.randn(30, 8)
    counts, places = [part.num_edges for part in layers], [part.edge_index() for part in layers]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    state = State(optimizer)
    rewire = Rewire(layer, every=1, growth=growth)
    rewire.on_start(state, layer)
    layer(x).square().sum().backward()
    if growth == "gradient":
        check_gradient_of_all_places(rewire, layer, x)
    optimizer.step()
    state.step = 1
    rewire.on_step(state, layer, None)
    rewire.on_end(state, layer)
    assert len(layers) == 6 and [part.num_edges for part in layers] == counts
    for part, before in zip(layers, places, strict=True):
        new = part.born > 0
        assert new.any() and not torch.equal(part.edge_index(), before)
        assert (part.weight[new] == 0).all() and (optimizer.state[part.weight]["exp_avg"][new] == 0).all()
    fast = layer(x)
    with edge_form(layer):
        torch.testing.assert_close(layer(x), fast)


class State:
    accelerator = SimpleNamespace(num_processes=1)

    def __init__(self, optimizer):
        self.optimizer, self.step, self.max_steps = optimizer, 0, 10


def check_gradient_of_all_places(rewire, layer, x):
    dense = MoELayer(8, 3, 2, hidden_channels=10)
    dense.router.load_state_dict(layer.router.state_dict())
    parts = ("gate_up_proj", "down_proj")
    for name in parts:
        weights = torch.stack([part.dense_weight() for part in getattr(layer.experts, name)])
        getattr(dense.experts, name).data.copy_(weights)
    dense(x).square().sum().backward()
    wanted = [grad for name in parts for grad in getattr(dense.experts, name).grad]
    for found, want in zip(rewire.gradients, wanted, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"expert_density": 0}, "expert_density: no share of the places; expected above 0, at most 1; got 0"),
        ({"expert_density": 1.5}, "expert_density: no share"),
        ({"expert_density": 0.5, "expert_distribution": "fair"}, "expert_distribution: unknown"),
        ({"expert_density": 0.5, "reasoning_steps": 2}, "reasoning_steps: sparse experts are applied once"),
        ({"expert_density": 0.5, "num_ghosts": 1}, "num_ghosts: ghosts are slices of stacked matrices"),
    ],
)
def test_wrong_input(options, match):
    with pytest.raises(ConfigError, match=match):
        MoELayer(8, 3, 2, **options)
    with pytest.raises(ConfigError, match="activation"):
        SparseExpert(4, 4, 2, density=0.5, activation="relu")


@pytest.mark.parametrize("density", [None, 1, 1.0])
def test_all_places_are_matrices(density):
    assert type(MoELayer(8, 3, 2, expert_density=density).experts) is ExpertConv


def test_channels_of_the_first_input():
    lazy, x = MoELayer(-1, 3, 2, hidden_channels=10, expert_density=0.3), torch.randn(7, 8)
    assert lazy(x).shape == (7, 8)
    assert sum(layer.num_edges for layer in sparse_layers(lazy)) == 3 * (48 + 24)


def test_compiles():
    layer, x = MoELayer(8, 3, 2, expert_density=0.3), torch.randn(7, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))
