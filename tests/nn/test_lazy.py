import copy
import io
import pickle

import pytest
import torch
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv, to_hetero

from graphmoe.errors import ConfigError
from graphmoe.nn import (
    AttendConv,
    CollabConv,
    CoupleConv,
    ExpertConv,
    FeedForward,
    GatedFusion,
    HyperCoupleConv,
    IterativeExpert,
    MoELayer,
    ProjectedFusion,
    RowAttention,
)

WIDTH = 24
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6, 0, 3]])
IDS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def mixture(**options):
    return lambda channels: MoELayer(channels, 4, 3, **options)


def alone(conv, x):
    return conv(x)


def on_graph(conv, x):
    return conv(x, EDGES)


def on_routes(conv, x):
    return conv(x, torch.stack([torch.arange(7), torch.arange(7)]), IDS)


def on_rows(fusion, x):
    return fusion(x.view(7, 1, -1), edge_weight=torch.ones(7, 1))


# How to build each layer with a width, and how to call it.
LAYERS = {
    "moe": (mixture(), alone),
    "moe of given width": (mixture(hidden_channels=10), alone),
    "moe, gnn": (
        mixture(coupling="gnn", coupling_norm=True, coupling_scale=0.1, fusion_projection=True),
        alone,
    ),
    "moe, hyper": (mixture(coupling="hyper", hyperedges=[[0, 1], [1, 2, 3]], num_ghosts=0), alone),
    "moe, attention": (mixture(coupling="hyper", hyperedge_attention=True), alone),
    "moe, collab": (
        mixture(coupling="collab", coupling_kwargs={"mediator": True, "heads": 3}, fusion="gated"),
        alone,
    ),
    "moe, ghosts": (mixture(num_ghosts=2, coupling="gnn"), alone),
    "moe, contextual": (mixture(router="contextual", reasoning_steps=2), alone),
    "moe, expert choice": (mixture(router="expert_choice", num_shared_experts=1), alone),
    "moe, threshold": (mixture(router="threshold"), alone),
    "moe, hidden router": (mixture(router_hidden_channels=5, router="contextual"), alone),
    "moe, bias": (mixture(router_kwargs={"bias": True, "scoring_func": "sigmoid"}), alone),
    "experts": (lambda c: ExpertConv(c, 10, 4), on_routes),
    "iterative": (lambda c: IterativeExpert(c, 10, 4, steps=3), on_routes),
    "couple": (lambda c: CoupleConv(c, 7), on_graph),
    "hyper": (lambda c: HyperCoupleConv(c, 7, attention=True), alone),
    "collab": (lambda c: CollabConv(c, heads=6, hidden_channels=5), on_graph),
    "rows": (lambda c: RowAttention(c, heads=8), on_graph),
    "attend": (lambda c: AttendConv(in_channels=c, heads=4, kv_heads=2), on_graph),
    "feed forward": (lambda c: FeedForward(c, 10), alone),
    "projected": (lambda c: ProjectedFusion(c), on_rows),
    "gated": (lambda c: GatedFusion(c), on_rows),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def test_becomes_the_layer_with_the_channels_of_its_input(layer):
    build, call = layer
    lazy, x = build(-1), torch.randn(7, WIDTH)
    before = dict(lazy.named_parameters())
    assert before and all(isinstance(p, UninitializedParameter) for p in before.values())
    assert f"{WIDTH}" not in repr(lazy)
    torch.manual_seed(3)
    out = call(lazy, x)
    torch.manual_seed(3)
    eager = build(WIDTH)
    assert torch.equal(out, call(eager, x))
    assert repr(lazy) == repr(eager)
    after = dict(lazy.named_parameters())
    assert after.keys() == dict(eager.named_parameters()).keys()
    assert all(after[key] is parameter for key, parameter in before.items())
    assert type(next(iter(after.values()))) is torch.nn.Parameter
    for (key, value), other in zip(lazy.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(value, other) and value.dtype == other.dtype, key
    for part, twin in zip(lazy.modules(), eager.modules(), strict=True):
        assert plain(part) == plain(twin)
    assert not lazy._forward_pre_hooks and not lazy._load_state_dict_pre_hooks


def plain(module):
    return {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple)}


def test_an_optimiser_made_before_trains_it(layer):
    build, call = layer
    lazy = build(-1)
    optimiser = torch.optim.AdamW(lazy.parameters(), lr=0.1)
    x = torch.randn(7, WIDTH)
    with torch.no_grad():
        before = call(lazy, x)
    call(lazy, x).square().sum().backward()
    optimiser.step()
    assert not torch.equal(call(lazy, x), before)
    # Even a dry run under inference_mode leaves parameters that learn.
    other = build(-1)
    with torch.inference_mode():
        call(other, x)
    call(other, x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in other.parameters())


def test_copies_are_independent(layer):
    build, call = layer
    lazy, x = build(-1), torch.randn(7, WIDTH)
    copied, pickled = copy.deepcopy(lazy), pickle.loads(pickle.dumps(build(-1)))
    call(lazy, x)
    for other in (copied, pickled):
        assert all(is_lazy(p) for p in other.parameters())
        assert call(other, torch.cat([x, x], dim=1)).shape[-1] == 2 * WIDTH
    again = copy.deepcopy(lazy)
    assert torch.equal(call(again, x), call(lazy, x))


def test_state_before_and_after(layer):
    build, call = layer
    x = torch.randn(7, WIDTH)
    trained = build(WIDTH)
    fresh = build(-1)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(call(fresh, x), call(trained, x))
    # A state without channels loads into its like, through a file too.
    file = io.BytesIO()
    torch.save(build(-1).state_dict(), file)
    file.seek(0)
    fresh = build(-1)
    fresh.load_state_dict(torch.load(file, weights_only=False))
    assert all(is_lazy(p) for p in fresh.parameters())
    assert call(fresh, x).shape[-1] == WIDTH
    with pytest.raises(RuntimeError, match="uninitialized parameter"):
        trained.load_state_dict(build(-1).state_dict())
    # Inside another model, with a prefix.
    outer, inner = torch.nn.Sequential(build(WIDTH)), torch.nn.Sequential(build(-1))
    inner.load_state_dict(outer.state_dict())
    assert torch.equal(call(inner[0], x), call(outer[0], x))


def test_casts_and_flags_of_the_meantime_stay(layer):
    build, call = layer
    lazy = build(-1).double().eval()
    lazy.reset_parameters()  # there is nothing to reset
    for parameter in lazy.parameters():
        parameter.requires_grad = False
    calls = []
    lazy.register_forward_hook(lambda *_: calls.append(1))
    out = call(lazy, torch.randn(7, WIDTH, dtype=torch.double))
    assert out.dtype == torch.double and not lazy.training and calls == [1]
    eager = build(WIDTH).double()
    assert [b.dtype for b in lazy.buffers()] == [b.dtype for b in eager.buffers()]
    assert not any(p.requires_grad for p in lazy.parameters())
    assert not any(is_lazy(p) for p in lazy.parameters())


def test_what_was_set_in_the_meantime_stays():
    lazy = mixture(coupling="collab")(-1)
    experts, lazy.experts.fuse, lazy.track_attention = lazy.experts, False, True
    _, record = lazy(x=torch.randn(5, 8), return_record=True)  # a keyword is an input too
    assert lazy.experts is experts and experts.fuse is False and experts.in_channels == 8
    assert record.attention is not None and lazy.router.in_channels == 8


def test_moves_before_the_first_pass():
    lazy = mixture(coupling="hyper")(-1).to("cpu", torch.bfloat16)
    assert lazy(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert lazy.couplers[0].hyperedge_index.dtype == torch.int64
    with torch.device("meta"):
        assert CoupleConv(-1)(torch.empty(3, 8)).device.type == "meta"


def test_refuses_the_input_and_not_the_layer():
    lazy = RowAttention(-1, heads=5)
    with pytest.raises(ConfigError, match="heads must divide the channels; expected a divisor of 8; got 5"):
        lazy(torch.randn(4, 8))
    assert all(is_lazy(p) for p in lazy.parameters())
    assert lazy(torch.randn(4, 10)).shape == (4, 10)
    with pytest.raises(ConfigError, match="k must not exceed"):
        MoELayer(-1, num_experts=4, k=5)  # what does not depend on channels is refused at once


@pytest.mark.parametrize("channels", [0, -2, 3.0, None, (-1, -1), "8"])
def test_wrong_channels(channels):
    with pytest.raises(ConfigError, match=r"^in_channels: no number of channels; expected at least 1, or -1"):
        MoELayer(channels, 4)
    with pytest.raises(ConfigError, match=r"^channels: no number of channels"):
        ProjectedFusion(channels)
    with pytest.raises(TypeError, match="in_channels"):
        MoELayer(num_experts=4)


def test_a_class_of_ones_own():
    class Named(CoupleConv):
        def __init__(self, channels, name):
            super().__init__(channels)
            self.name, self.extra = name, torch.nn.Linear(2, 2)

    conv = Named(-1, "mine")
    assert conv(torch.randn(7, WIDTH), EDGES).shape == (7, WIDTH)
    assert conv.name == "mine" and conv.extra.weight.shape == (2, 2) and conv.in_channels == WIDTH


def test_through_to_hetero_and_pairs():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.moe, self.talk = SAGEConv((-1, -1), 12), MoELayer(-1, 4, 2), CoupleConv(-1)

        def forward(self, x, edge_index):
            return self.talk(self.moe(self.conv(x, edge_index)), edge_index)

    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(5, 8), torch.randn(3, 6)
    data["a", "to", "b"].edge_index = torch.tensor([[0, 1, 4], [0, 1, 2]])
    data["b", "to", "a"].edge_index = torch.tensor([[0, 1], [3, 4]])
    model = to_hetero(Net(), data.metadata())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(data.x_dict, data.edge_index_dict)
    assert {key: value.shape for key, value in out.items()} == {"a": (5, 12), "b": (3, 12)}
    assert not any(is_lazy(p) for p in model.parameters())
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model.moe["a"].router.weight is not model.moe["b"].router.weight


def test_compiles_after_the_first_pass():
    lazy, x = mixture(coupling="gnn")(-1), torch.randn(7, WIDTH)
    want = lazy(x)
    torch._dynamo.reset()
    compiled = torch.compile(lazy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
