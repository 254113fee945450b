"""A stack of maps as one operation: finite differences, and the same stack layer by layer."""

import pytest
import torch

from graphmoe.errors import GraphError
from graphmoe.nn import SparseLinear
from graphmoe.ops.sparse_layers import Map, sparse_layers
from graphmoe.ops.spmm import spmm


def stack(*, dense: int | None = None) -> list[Map]:
    """Layers 6-7-5-3, of which one may be dense."""
    maps = []
    for index, (sources, targets) in enumerate([(6, 7), (7, 5), (5, 3)]):
        layer = SparseLinear(sources, targets, 0.4)
        torch.nn.init.normal_(layer.bias)
        weight = torch.randn(targets, sources, requires_grad=True) if index == dense else layer.weight
        maps.append(Map(None if index == dense else layer.topology(), weight, layer.bias))
    return maps


def draw_masks(maps: list[Map], batch: int) -> list[torch.Tensor]:
    return [(torch.rand(one.bias.numel(), batch) > 0.3) / 0.7 for one in maps[:-1]]


def one_by_one(x, maps, masks):
    for index, (graph, weight, bias) in enumerate(maps):
        x = weight @ x + bias.unsqueeze(1) if graph is None else spmm(graph, weight, x, bias=bias)
        if index < len(maps) - 1:
            x = torch.relu(x) * (masks[index] if masks else 1)
    return x


def with_weights(maps, weights):
    return [Map(one.graph, *weights[2 * i : 2 * i + 2]) for i, one in enumerate(maps)]


@pytest.mark.parametrize("dense", [None, 0, 1, 2])
@pytest.mark.parametrize("dropout", [False, True])
def test_gradients(dense, dropout, double):
    maps, x = stack(dense=dense), torch.randn(6, 4, requires_grad=True)
    masks = [mask.double() for mask in draw_masks(maps, 4)] if dropout else []
    weights = [tensor for one in maps for tensor in (one.weight, one.bias)]

    def call(x, *weights):
        return sparse_layers(x, with_weights(maps, weights), masks)

    assert torch.autograd.gradcheck(call, (x, *weights))
    expected = one_by_one(x, maps, masks)
    torch.testing.assert_close(call(x, *weights), expected)
    seed = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(call(x, *weights), (x, *weights), seed),
        torch.autograd.grad(expected, (x, *weights), seed),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("frozen", [(), (0, 1), (4, 5), (0, 1, 2, 3), (1, 3, 5)])
@pytest.mark.parametrize("of_x", [True, False])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen, of_x, double):
    maps, x = stack(dense=2), torch.randn(6, 4, requires_grad=of_x)
    weights = [tensor for one in maps for tensor in (one.weight, one.bias)]
    for index in frozen:
        weights[index].requires_grad_(False)
    found = []
    for form in (sparse_layers, one_by_one):
        x.grad = None
        for weight in weights:
            weight.grad = None
        form(x, maps, []).square().sum().backward()
        found.append([x.grad, *(weight.grad for weight in weights)])
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)
    assert [got is None for got in found[0]] == [not of_x, *(i in frozen for i in range(6))]


def test_half_precision_is_summed_in_float32():
    maps, x = stack(dense=2), torch.randn(6, 4)
    halves = [Map(graph, weight.bfloat16(), bias.bfloat16()) for graph, weight, bias in maps]
    out = sparse_layers(x.bfloat16(), halves)
    again = [Map(graph, weight.float(), bias.float()) for graph, weight, bias in halves]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sparse_layers(x.bfloat16().float(), again).bfloat16())


def test_edges_moved_before_the_gradient_are_an_error():
    layer = SparseLinear(6, 3, 0.4)
    out = sparse_layers(torch.randn(6, 4), [Map(layer.topology(), layer.weight, layer.bias)])
    layer.rewire(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


BAD = {
    "layer of other channels": lambda maps: [maps[0], maps[2]],
    "not one weight an edge": lambda maps: [maps[0]._replace(weight=maps[0].weight[1:])],
    "not one bias a target": lambda maps: [maps[0]._replace(bias=maps[0].bias[1:])],
}


@pytest.mark.parametrize("match", BAD)
def test_layers_that_do_not_fit(match):
    with pytest.raises(GraphError, match=match):
        sparse_layers(torch.randn(6, 4), BAD[match](stack()))
    with pytest.raises(GraphError, match="layer of other channels"):
        sparse_layers(torch.randn(5, 4), stack())


def test_no_samples():
    maps = stack(dense=2)
    out = sparse_layers(torch.randn(6, 0), maps)
    out.sum().backward()
    assert out.shape == (3, 0) and all((one.weight.grad == 0).all() for one in maps)
