"""Weights as edges: the dense map they stand for, the law of their number, and what a bad state says."""

import copy

import pytest
import torch
from contract import (
    assert_eval_changes_nothing,
    assert_every_parameter_learns,
    assert_same,
    assert_state_round_trip,
)
from torch import nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError, GraphError
from graphmoe.nn import SparseLinear, edge_form, to_sparse
from graphmoe.nn.sparse import allocate_density, er_total_density, feeds
from graphmoe.nn.sparse.density import er_density
from graphmoe.nn.sparse.places import draw_absent, draw_places, largest_absent
from graphmoe.typing import FEEDS


def layer(density=0.3, **options):
    return SparseLinear(7, 5, density, **options)


def places(made):
    return set(zip(made.target.tolist(), made.source.tolist(), strict=True))


# The map ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7,), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_map_gradients_included(double, shape, bias):
    made, x = layer(bias=bias), torch.randn(shape, requires_grad=True)
    if bias:
        nn.init.normal_(made.bias)
    out = made(x)
    torch.testing.assert_close(out, F.linear(x, made.dense_weight(), made.bias))
    grad = torch.randn_like(out)
    found = torch.autograd.grad((out * grad).sum(), (made.weight, x))
    dense = made.dense_weight().requires_grad_()
    wanted = torch.autograd.grad((F.linear(x, dense, made.bias) * grad).sum(), (dense, x))
    torch.testing.assert_close(found[0], wanted[0][made.target.long(), made.source.long()])
    torch.testing.assert_close(found[1], wanted[1])


def test_edge_form_and_feature_major_agree(double):
    made, x = layer(), torch.randn(4, 7, requires_grad=True)

    def edges():
        with edge_form(made):
            return made(x)

    assert_same(made, [x], lambda: made(x), edges)
    assert_same(made, [x], lambda: made(x), lambda: made(x.t(), feature_major=True).t())


def test_contract():
    made, x = layer(), torch.randn(4, 7)
    assert repr(made).startswith("SparseLinear(\n  7, 5, edges=10, density=0.2857, bias=True")
    assert_state_round_trip(made, layer(), lambda m: m(x))
    assert_eval_changes_nothing(made, lambda: made(x))
    assert_every_parameter_learns(made, made(x).square().sum())
    again = copy.deepcopy(made)
    again.rewire(0.5)
    assert torch.equal(made(x), copy.deepcopy(made)(x)) and not torch.equal(made.source, again.source)


def test_edges_changed_in_place_are_laid_out_anew():
    made, x = SparseLinear(7, 5, density=0.99), torch.randn(4, 7)
    made(x)
    full = SparseLinear(7, 5, density=0.99)
    made.source.copy_(full.source)
    made.target.copy_(full.target)
    torch.testing.assert_close(made(x), F.linear(x, made.dense_weight(), made.bias))


def test_compiled_code_sees_new_edges():
    made, x = layer(), torch.randn(4, 7)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    nn.init.normal_(made.weight)
    made.rewire(0.5)
    torch.testing.assert_close(compiled(x), F.linear(x, made.dense_weight(), made.bias))


def test_first_weights_are_those_of_the_real_fan_in():
    made = SparseLinear(400, 300, density=0.05)
    assert made.weight.std().item() == pytest.approx((2 / (400 * 0.05)) ** 0.5, rel=0.05)
    assert made.num_edges == 6000 and made.bias.abs().max() == 0


def test_densities():
    assert SparseLinear(10, 10, epsilon=2).density == pytest.approx(0.4)
    assert SparseLinear(3, 4, density=1.0).num_edges == 12
    assert (
        layer(generator=torch.Generator().manual_seed(3)).source.tolist()
        == layer(generator=torch.Generator().manual_seed(3)).source.tolist()
    )


# Rewiring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_number_of_edges_never_changes(growth):
    made = SparseLinear(30, 20, 0.1)
    for turn in range(10):
        before, weight = places(made), dict(zip(zip(made.target.tolist(), made.source.tolist(), strict=True),
                                                made.weight.tolist(), strict=True))  # fmt: skip
        origin = made.rewire(0.3, growth, gradient=torch.randn(20, 30))
        after = places(made)
        moved = int((origin < 0).sum())
        assert len(after) == made.num_edges == 60 and 16 <= moved <= 18
        assert len(before - after) == len(after - before) == moved
        for place, now, old in zip(
            zip(made.target.tolist(), made.source.tolist(), strict=True),
            made.weight.tolist(),
            origin.tolist(),
            strict=True,
        ):
            assert now == (0 if old < 0 else weight[place])
            assert (old < 0) == (place not in before)
        assert (made.born[origin < 0] == turn + 1).all() and int(made.rewirings) == turn + 1
        assert made.survival() == (made.born == 0).double().mean()
        with torch.no_grad():
            made.weight.add_(torch.randn(60))


def test_set_drops_the_smallest_positive_and_the_largest_negative_weights():
    made = SparseLinear(10, 10, 0.1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 8.0, -1.0, -2.0, -3.0, -4.0]))
    made.rewire(0.5)
    assert sorted(made.weight.tolist()) == [-4, -3, 0, 0, 0, 0, 0, pytest.approx(0.4), 8, 9]


def test_rigl_drops_the_least_magnitudes_and_grows_the_largest_gradients():
    made = SparseLinear(10, 10, 0.1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 8.0, -1.0, -2.0, -3.0, -4.0]))
    before = places(made)
    gradient = torch.randn(10, 10)
    made.rewire(0.5, "gradient", gradient=gradient)
    assert sorted(made.weight.abs().tolist())[5:] == [2, 3, 4, 8, 9]
    absent = {(i, j): abs(gradient[i, j].item()) for i in range(10) for j in range(10)}
    absent = {place: size for place, size in absent.items() if place not in before}
    assert places(made) - before == set(sorted(absent, key=absent.get)[-5:])


def test_a_full_layer_stays_as_it_is():
    full = SparseLinear(4, 3, 1.0)
    weight = full.weight.detach().clone()
    assert torch.equal(full.rewire(0.3), torch.arange(12)) and torch.equal(full.weight, weight)
    nearly = SparseLinear(4, 3, 11 / 12)
    assert int((nearly.rewire(0.9) < 0).sum()) <= 1


def test_rewiring_is_a_function_of_the_generator():
    first = SparseLinear(30, 20, 0.1)
    second = copy.deepcopy(first)
    for made in (first, second):
        made.rewire(0.3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.source, second.source) and torch.equal(first.target, second.target)


def test_drawn_places_are_even():
    counts, absent = torch.zeros(12), torch.zeros(12)
    present = torch.tensor([0, 3, 4, 11])
    for _ in range(2000):
        counts[draw_places(12, 2)] += 1
        absent[draw_absent(present, 12, 3)] += 1
    assert absent[present].sum() == 0
    assert (counts / 2000 - 2 / 12).abs().max() < 0.04
    assert (absent[[1, 2, 5, 6, 7, 8, 9, 10]] / 2000 - 3 / 8).abs().max() < 0.05
    assert len(set(draw_places(10**12, 1000).tolist())) == 1000
    assert largest_absent(torch.tensor([5.0, 1, 1, 0, 1]), torch.tensor([0]), 2).tolist() == [1, 2]


# Networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_layers_share_the_edges(distribution):
    shapes = [(784, 1000), (1000, 1000), (1000, 1000), (1000, 10)]
    densities = allocate_density(shapes, 0.05, distribution, dense=[3])
    edges = sum(d * i * o for d, (i, o) in zip(densities, shapes, strict=True))
    assert edges == pytest.approx(139_700) and densities[3] == 1
    if distribution == "uniform":
        assert densities[0] == densities[1] == pytest.approx(0.046587, rel=1e-4)
    else:
        assert densities[0] / densities[1] == pytest.approx((1 / 784 + 1 / 1000) / (2 / 1000))
    assert allocate_density(shapes, 1.0, distribution) == [1.0] * 4
    assert allocate_density([(100, 100), (100, 1)], 0.9, "er")[1] == 1.0


def test_layers_of_one_epsilon():
    shapes = [(50, 40), (40, 30), (30, 5)]
    total = er_total_density(shapes, 3, dense=[2])
    assert total * (2000 + 1200 + 150) == pytest.approx(3 * 90 + 3 * 70 + 150)
    found = allocate_density(shapes, total, "er", dense=[2])
    assert found == pytest.approx([er_density(3, 50, 40), er_density(3, 40, 30), 1.0])
    with pytest.raises(ConfigError, match="epsilon: no number of edges"):
        er_total_density(shapes, 5)


def test_as_a_typed_graph():
    first, second = SparseLinear(4, 3, 0.5), SparseLinear(3, 2, 0.5, bias=False)
    data = feeds([first, second])
    data.validate()
    assert data["neuron"].num_nodes == 9 and data["neuron"].layer.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    edges = data[FEEDS]
    assert data["neuron"].layer[edges.edge_index[0]].tolist() == [0] * 6 + [1] * 3
    assert torch.equal(edges.edge_index[:, :6], first.edge_index() + torch.tensor([[0], [4]]))
    assert torch.equal(edges.edge_index[:, 6:], second.edge_index() + torch.tensor([[4], [7]]))
    assert torch.equal(edges.weight, torch.cat([first.weight, second.weight]).detach())
    networkx = pytest.importorskip("networkx")
    graph = first.to_networkx()
    assert isinstance(graph, networkx.DiGraph) and graph.number_of_edges() == 6
    with pytest.raises(GraphError, match="layer before"):
        feeds([second, second])


def test_a_users_model_becomes_sparse(double):
    net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)), torch.randn(3, 8)
    dense = copy.deepcopy(net)
    assert to_sparse(net, 0.25) is net
    assert isinstance(net[0], SparseLinear) and net[0].num_edges == 12 and net[2].num_edges == 6
    kept = net[0].dense_weight() != 0
    assert torch.equal(net[0].dense_weight()[kept], dense[0].weight[kept])
    assert dense[0].weight[kept].abs().min() >= dense[0].weight[~kept].abs().max()
    net(x).sum().backward()
    same = to_sparse(copy.deepcopy(dense), 1.0, method="random")
    torch.testing.assert_close(same(x), dense(x))
    one = to_sparse(copy.deepcopy(dense[0]), 0.5, method="random")
    assert isinstance(one, SparseLinear) and one.num_edges == 24
    part = to_sparse(copy.deepcopy(dense), 0.5, convert=lambda name, layer: name == "2")
    assert type(part[0]) is nn.Linear and isinstance(part[2], SparseLinear)


# Wrong input -----------------------------------------------------------------------------------


def damaged(name, change):
    state = copy.deepcopy(layer().state_dict())
    change(state[name])
    layer().load_state_dict(state)


BAD = {
    "either density or epsilon": lambda: SparseLinear(3, 4),
    "no share of the places": lambda: SparseLinear(3, 4, 0.0),
    "at most 1; got 1.5": lambda: SparseLinear(3, 4, 1.5),
    "no number of edges": lambda: SparseLinear(10, 10, epsilon=6),
    "in_channels: no number": lambda: SparseLinear(0, 4, 0.5),
    "input of other channels": lambda: layer()(torch.ones(2, 5)),
    "feature_major|\\[7, N\\]": lambda: layer()(torch.ones(2, 7), feature_major=True),
    "no share of the edges": lambda: layer().rewire(1.1),
    "unknown growth": lambda: layer().rewire(0.1, "hope"),
    "gradient of all places": lambda: layer().rewire(0.1, "gradient"),
    "not the gradient": lambda: layer().rewire(0.1, "gradient", gradient=torch.ones(7, 5)),
    "source id out of range": lambda: damaged("source", lambda ids: ids[0].fill_(1000)),
    "target id out of range": lambda: damaged("target", lambda ids: ids[-1].fill_(-1)),
    "out of order or there twice": lambda: damaged("target", lambda ids: ids[0].fill_(4)),
    "there twice": lambda: damaged("source", lambda ids: ids.fill_(2)),
    "unknown method": lambda: to_sparse(nn.Linear(2, 2), 0.5, method="luck"),
    "no linear layer": lambda: to_sparse(nn.ReLU(), 0.5),
    "unknown distribution": lambda: allocate_density([(2, 2)], 0.5, "fair"),
    "dense layers alone": lambda: allocate_density([(2, 2), (2, 2)], 0.4, dense=[0]),
    "more edges than places": lambda: draw_places(3, 4),
}


@pytest.mark.parametrize("match", BAD)
def test_wrong_input(match):
    with pytest.raises((ConfigError, GraphError), match=match):
        BAD[match]()


def test_shared_weights_are_not_converted():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ConfigError, match="shared"):
        to_sparse(net, 0.5)
