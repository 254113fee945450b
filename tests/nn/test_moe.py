import copy

import pytest
import reference
import torch
from contract import (
    assert_eval_changes_nothing,
    assert_every_parameter_learns,
    assert_same,
    assert_state_round_trip,
)
from torch_geometric.data import HeteroData
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import GCNConv, SAGEConv, to_hetero

from graphmoe.errors import ConfigError
from graphmoe.nn import MoELayer, edge_form

COUPLINGS = [
    ("none", None),
    ("gnn", None),
    ("hyper", "all_pairs"),
    ("hyper", "all_triplets"),
    ("hyper", "all"),
]


def build(coupling="none", strategy=None, *, k=3, num_ghosts=0, awake=True, **options):
    layer = MoELayer(
        6,
        4,
        k,
        hidden_channels=5,
        coupling=coupling,
        strategy=strategy or "all_pairs",
        num_ghosts=num_ghosts,
        **options,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if num_ghosts and awake:
        layer.ghosts.phase[0], layer.ghosts.steps[0] = 2, 100
        layer.ghosts.phase[1:], layer.ghosts.steps[1:] = 1, 40
    return layer


@pytest.mark.parametrize("coupling, strategy", COUPLINGS)
@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("num_ghosts", [0, 2])
def test_edge_form_equals_fast_form(coupling, strategy, k, num_ghosts, double):
    layer = build(coupling, strategy, k=k, num_ghosts=num_ghosts)
    x = torch.randn(2, 7, 6, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False

    def edge():
        with edge_form(layer):
            return layer(x, mask=mask)

    assert_same(layer, [x], lambda: layer(x, mask=mask), edge)
    assert (layer(x, mask=mask)[0, :3] == 0).all()


OPTIONS = [
    {"coupling": "gnn", "fusion": "mean"},
    {"coupling": "gnn", "fusion_projection": True, "coupling_layers": 1},
    {"coupling": "hyper", "fusion": "mean", "fusion_projection": True},
    {"coupling": "none", "fusion": "mean"},
    {"coupling": "none", "fusion_projection": True},
    {"coupling": "hyper", "coupling_scale": 0.3, "coupling_layers": 2},
    {"coupling": "gnn", "coupling_scale": 0.3},
    {"coupling": "gnn", "coupling_norm": True},
    {"coupling": "none", "routed_scaling_factor": 2.5},
    {"coupling": "hyper", "coupling_norm": True, "coupling_scale": 0.3},
    {"coupling": "hyper", "hyperedges": [[0], [1], [2], [3]]},
    {"coupling": "hyper", "hyperedge_attention": True},
    {"coupling": "hyper", "hyperedges": [[0, 1, 2], [2, 3], [0, 3]]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [3, 4])
def test_edge_form_equals_fast_form_for_every_option(options, k, double):
    layer = build(k=k, **options)
    x = torch.randn(2, 7, 6, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False

    def edge():
        with edge_form(layer):
            return layer(x, mask=mask)

    assert_same(layer, [x], lambda: layer(x, mask=mask), edge)
    assert (layer(x, mask=mask)[0, :3] == 0).all()
    twin = build(k=k, **options)
    assert_state_round_trip(layer, twin, lambda module: module(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_of_every_option_learns(options):
    layer = build(k=3, **options)
    x = torch.randn(40, 6)
    out, record = layer(x, return_record=True)
    # With equal weights the router learns from its auxiliary losses alone.
    assert_every_parameter_learns(layer, out.pow(3).sum() + record.routing.logits.square().mean())


def test_mean_fusion_is_the_mean_over_the_live_rows(double):
    layer = build(k=4, num_ghosts=2, awake=False, fusion="mean")
    x = torch.randn(5, 6)
    weights = list(zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True))
    served = torch.stack([torch.stack([reference.expert(t, *pair) for t in x]) for pair in weights])
    torch.testing.assert_close(layer(x), served[:4].mean(dim=0))
    layer.ghosts.phase[0], layer.ghosts.steps[0] = 1, 50  # half awake: level 0.5
    weight = torch.tensor([1.0, 1, 1, 1, 0.5, 0])
    mean = (weight.view(-1, 1, 1) * served).sum(dim=0) / 4.5
    torch.testing.assert_close(layer(x), mean, rtol=1e-6, atol=1e-6)  # levels are float32


@pytest.mark.parametrize("coupling", ["gnn", "hyper"])
def test_a_coupling_scale_of_zero_is_no_coupling(coupling, double):
    layer = build(coupling, coupling_scale=0.0)
    torch.nn.init.zeros_(layer.coupling_scale)
    plain = build()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(9, 6)
    torch.testing.assert_close(layer(x), plain(x))
    layer.reset_parameters()
    assert (layer.coupling_scale == 0).all()
    torch.nn.init.ones_(layer.coupling_scale)
    whole = build(coupling)
    whole.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), whole(x))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_oracle_without_coupling(k, double):
    layer = build(k=k)
    x = torch.randn(9, 6, requires_grad=True)
    assert_same(layer, [x], lambda: layer(x), lambda: reference.moe(layer, x))


def test_reduced_path_equals_rows_path(double):
    layer, x = build(k=2), torch.randn(9, 6, requires_grad=True)
    tracked = build(k=2, track_outputs=True)
    tracked.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), tracked(x))
    assert layer(x, return_record=True)[1].expert_mean is None
    record = tracked(x, return_record=True)[1]
    for e in range(4):
        rows = [reference.expert(x[t], tracked.experts.gate_up_proj[e], tracked.experts.down_proj[e])
                for t in record.routing.token[record.routing.expert == e]]  # fmt: skip
        want = torch.stack(rows).mean(0) if rows else torch.zeros(6)
        torch.testing.assert_close(record.expert_mean[e], want)


@pytest.mark.parametrize("coupling, strategy", COUPLINGS)
@pytest.mark.parametrize("k", [3, 4])
def test_dormant_ghosts_change_nothing(coupling, strategy, k, double):
    with_ghosts = build(coupling, strategy, k=k, num_ghosts=2, awake=False)
    x = torch.randn(11, 6, requires_grad=True)
    out, record = with_ghosts(x, return_record=True)
    assert (record.routing.ptr.diff()[4:] == 0).all()  # no rows, hence no FLOPs
    for parameter in (
        with_ghosts.experts.gate_up_proj,
        with_ghosts.experts.down_proj,
        with_ghosts.router.weight,
    ):
        with torch.no_grad():
            parameter[4:] = 1e3 * torch.randn_like(parameter[4:])
    changed = with_ghosts(x)
    assert torch.equal(changed, out)
    changed.square().sum().backward()
    for parameter in with_ghosts.ghost_slices():
        assert (parameter.grad[4:] == 0).all()


@pytest.mark.parametrize("k", [3, 4])
def test_a_layer_with_dormant_ghosts_equals_one_without(k, double):
    ghostly = build(k=k, num_ghosts=2, awake=False)
    plain = build(k=k)
    plain.router.weight.data = ghostly.router.weight.data[:4]
    plain.experts.gate_up_proj.data = ghostly.experts.gate_up_proj.data[:4]
    plain.experts.down_proj.data = ghostly.experts.down_proj.data[:4]
    x = torch.randn(9, 6)
    torch.testing.assert_close(ghostly(x), plain(x), rtol=0, atol=1e-15)


def test_a_waking_ghost_moves_the_output_little():
    """The level enters before the choice: at a tiny level a ghost displaces nobody who matters."""
    layer = build("hyper", k=3, num_ghosts=2, awake=False).double()
    x = torch.randn(200, 6).double()
    asleep = layer(x)
    layer.ghosts.phase[0], layer.ghosts.steps[0], layer.ghosts.rate = 1, 1, 1e-9
    assert (layer(x) - asleep).abs().max() < 1e-6 * asleep.abs().max()


@pytest.mark.parametrize("coupling, strategy", COUPLINGS)
@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("num_ghosts", [0, 2])
def test_every_parameter_learns(coupling, strategy, k, num_ghosts):
    layer = build(coupling, strategy, k=k, num_ghosts=num_ghosts)
    assert_every_parameter_learns(layer, layer(torch.randn(64, 6)).square().sum())


@pytest.mark.parametrize("coupling, strategy", COUPLINGS)
def test_contract(coupling, strategy):
    layer = build(coupling, strategy, num_ghosts=2)
    x = torch.randn(10, 6)
    assert_state_round_trip(layer, build(coupling, strategy, num_ghosts=2), lambda m: m(x))
    assert_eval_changes_nothing(layer, lambda: layer(x, return_record=True))
    assert layer(x[:0]).shape == (0, 6)
    order = torch.randperm(10)
    torch.testing.assert_close(layer(x)[order], layer(x[order]))
    strength = layer.connections()
    if coupling == "none":
        assert strength is None
    else:
        assert strength.shape == (6, 6) and (strength >= 0).all()
    layer.reset_parameters()
    assert layer.ghosts.phase.tolist() == [0, 0]


def test_connections_are_what_the_forward_pass_uses(double):
    layer = build("hyper", k=4)
    conv = layer.couplers[0]
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(conv(x), conv.lin(layer.connections() @ x))


def test_same_weights_across_precision_and_autocast():
    layer = build("hyper", num_ghosts=2)
    x = torch.randn(32, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    torch.testing.assert_close(cast.float(), layer(x), rtol=0.1, atol=0.1)
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "coupling, strategy, k",
    [*((*pair, 3) for pair in COUPLINGS), ("gnn", None, 4), ("hyper", "all_pairs", 4)],
)
def test_compiles_whole(coupling, strategy, k):
    layer = build(coupling, strategy, k=k, num_ghosts=2)
    x = torch.randn(16, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


# In other people's graphs ---------------------------------------------------------------------


class GNN(torch.nn.Module):
    def __init__(self, conv=GCNConv, channels=34):
        super().__init__()
        self.conv1, self.moe, self.conv2 = conv(channels, 16), MoELayer(16, 4, 2, coupling="gnn"), conv(16, 2)

    def forward(self, x, edge_index):
        return self.conv2(self.moe(self.conv1(x, edge_index).relu()), edge_index)


def test_inside_a_gnn_with_an_explainer():
    x = torch.eye(34)
    edge_index = torch.stack([torch.arange(33), torch.arange(1, 34)])
    model = GNN()
    explainer = Explainer(
        model, GNNExplainer(epochs=3), explanation_type="model", edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
    )  # fmt: skip
    explanation = explainer(x, edge_index)
    assert explanation.edge_mask.shape == (33,)
    model(x, edge_index).sum().backward()


def test_to_hetero():
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(5, 8), torch.randn(3, 8)
    data["a", "to", "b"].edge_index = torch.tensor([[0, 1, 4], [0, 1, 2]])
    data["b", "to", "a"].edge_index = torch.tensor([[0, 1], [3, 4]])
    model = to_hetero(GNN(SAGEConv, (-1, -1)), data.metadata())
    out = model(data.x_dict, data.edge_index_dict)
    assert out["a"].shape == (5, 2) and out["b"].shape == (3, 2)


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"num_experts": 4, "k": 5},
            r"^k: k must not exceed the number of experts; expected 1 <= k <= 4; got 5",
        ),
        ({"num_experts": 4, "k": 5, "num_ghosts": 4}, r"expected 1 <= k <= 4"),
        ({"num_experts": 4, "k": 0}, "k must not"),
        ({"num_experts": 0}, "num_experts"),
        (
            {"num_experts": 4, "coupling": "gcn"},
            "coupling: unknown coupling; expected one of none, gnn, hyper",
        ),
        ({"num_experts": 4, "coupling": "hyper", "strategy": "all_triplets"}, "needs more rows a token"),
        ({"num_experts": 4, "num_ghosts": -1}, "num_ghosts"),
    ],
)
def test_wrong_input(options, match):
    with pytest.raises(ConfigError, match=match):
        MoELayer(8, **options)
