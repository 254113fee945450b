"""Weighted sums over edges: a double loop, gradients, empty and repeated edges, graphs that are none."""

import pytest
import torch
from torch.autograd import gradcheck
from torch_geometric import EdgeIndex

from graphmoe.errors import GraphError
from graphmoe.ops.spmm import spmm
from graphmoe.ops.topology import Topology, topology_of


def graph(sources=5, targets=4, count=9, *, seed=0):
    """Edges in any order, some of them twice, target 0 without any."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(sources, (count,), generator=generator)
    target = torch.randint(min(1, targets - 1), targets, (count,), generator=generator)
    return torch.stack([source, target])


def oracle(edges, weight, x, targets):
    out = [0 * weight.sum() + torch.zeros(x.size(1), dtype=x.dtype) for _ in range(targets)]
    for (source, target), w in zip(edges.t().tolist(), weight, strict=True):
        out[target] = out[target] + w * x[source]
    return torch.stack(out)


@pytest.mark.parametrize("sizes", [(5, 4, 9), (1, 1, 0), (3, 7, 40), (6, 2, 1), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("channels", [3, 1, 0])
def test_equals_a_double_loop_gradients_included(double, sizes, channels):
    sources, targets, count = sizes
    edges = graph(*sizes)
    weight = torch.randn(count, requires_grad=True)
    x = torch.randn(sources, channels, requires_grad=True)
    grad = torch.randn(targets, channels)
    expected = oracle(edges, weight, x, targets)
    wanted = torch.autograd.grad((expected * grad).sum(), (weight, x), allow_unused=True)
    out = spmm(edges, weight, x, num_targets=targets)
    found = torch.autograd.grad((out * grad).sum(), (weight, x))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for a, b, leaf in zip(found, wanted, (weight, x), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(leaf) if b is None else b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [16, 33])
@pytest.mark.parametrize("sizes", [(5, 4, 9), (3, 7, 40), (90, 80, 700), (6, 2, 1)], ids=str)
def test_wide_rows_of_float32_equal_those_of_float64(sizes, channels):
    sources, targets, count = sizes
    edges, generator = graph(*sizes), torch.Generator().manual_seed(1)
    weight, x = (torch.randn(*s, generator=generator) for s in [(count,), (sources, channels)])
    grad, results = torch.randn(targets, channels, generator=generator), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (weight, x)]
        out = spmm(edges, *leaves, num_targets=targets)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


def test_bias(double):
    made = Topology(graph(), (5, 4))
    weight, x, bias = (torch.randn(*s, requires_grad=True) for s in [(9,), (5, 3), (4,)])
    expected = spmm(made, weight, x) + bias.unsqueeze(1)
    torch.testing.assert_close(spmm(made, weight, x, bias=bias), expected)
    assert gradcheck(lambda w, v, b: spmm(made, w, v, bias=b), (weight, x, bias))
    assert gradcheck(lambda b: spmm(made, None, x.detach(), bias=b), (bias,))
    with pytest.raises(GraphError, match="not one bias a target"):
        spmm(made, weight, x, bias=torch.randn(5))


def test_gradcheck(double):
    edges, made = graph(), Topology(graph(), (5, 4))
    weight, x = torch.randn(9, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    assert gradcheck(lambda w, v: spmm(made, w, v), (weight, x))
    assert gradcheck(lambda v: spmm(edges, None, v, num_targets=4), (x,))


def test_the_order_of_the_edges_does_not_matter(double):
    edges, weight, x = graph(count=30), torch.randn(30), torch.randn(5, 3)
    perm = torch.randperm(30)
    torch.testing.assert_close(
        spmm(edges, weight, x, num_targets=4), spmm(edges[:, perm], weight[perm], x, num_targets=4)
    )


def test_sorted_edges_need_no_order_and_a_topology_gives_back_what_it_was_given():
    edges = graph(count=30)
    made = Topology(edges, (5, 4))
    assert torch.equal(made.edge_index(), edges) and made.order is not None
    by_target = edges[:, edges[1].sort(stable=True).indices]
    again = Topology(by_target.int(), (5, 4))
    assert torch.equal(again.edge_index(), by_target) and again.order is None
    assert repr(again) == "Topology(30 edges, 5 -> 4)"


def test_an_edge_index_is_laid_out_once_and_again_when_it_changes():
    edges = EdgeIndex(graph(), sparse_size=(5, 4))
    first = topology_of(edges, (5, None))
    assert topology_of(edges, (5, None)) is first is topology_of(edges, (5, 4))
    assert spmm(edges, None, torch.ones(5, 1)).sum() == 9
    plain = edges.as_tensor()
    plain[1] = 0
    assert topology_of(edges, (5, None)) is not first
    assert spmm(edges, None, torch.ones(5, 1)).flatten().tolist() == [9, 0, 0, 0]


def test_without_a_size_there_are_as_many_targets_as_sources():
    assert spmm(torch.tensor([[0], [1]]), None, torch.ones(3, 2)).shape == (3, 2)
    assert spmm(EdgeIndex([[0], [1]]), None, torch.ones(3, 2)).shape == (3, 2)


def test_half_precision_sums_in_float32():
    edges = torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.long)])
    x = torch.full((1000, 1), 1.0, dtype=torch.bfloat16)
    out = spmm(edges, None, x, num_targets=1)
    assert out.dtype == torch.bfloat16 and out.item() == 1000  # sums in bfloat16 stop at 256


def test_only_the_gradients_that_are_asked_for(double):
    made, weight = Topology(graph(), (5, 4)), torch.randn(9, requires_grad=True)
    spmm(made, weight, torch.randn(5, 2)).sum().backward()
    assert weight.grad.shape == (9,)
    x = torch.randn(5, 2, requires_grad=True)
    spmm(made, weight.detach(), x).sum().backward()
    assert x.grad.shape == (5, 2)


def test_compiles_in_one_piece():
    made = Topology(graph(), (5, 4))
    weight, x = torch.randn(9, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(lambda w, v: spmm(made, w, v).relu(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(weight, x).sum(), (weight, x))
    wanted = torch.autograd.grad(spmm(made, weight, x).relu().sum(), (weight, x))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "not an edge list": lambda: spmm(torch.zeros(3, 2, dtype=torch.long), None, torch.ones(5, 1)),
    "integers": lambda: spmm(torch.zeros(2, 2), None, torch.ones(5, 1)),
    "source id out of range": lambda: spmm(torch.tensor([[5], [0]]), None, torch.ones(5, 1)),
    "target id out of range": lambda: spmm(torch.tensor([[0], [9]]), None, torch.ones(5, 1), num_targets=4),
    "source id out": lambda: spmm(torch.tensor([[-1], [0]]), None, torch.ones(5, 1)),
    "target id out": lambda: spmm(EdgeIndex([[0], [7]]), None, torch.ones(5, 1)),
    "number of sources": lambda: spmm(EdgeIndex(graph(), sparse_size=(5, 4)), None, torch.ones(6, 1)),
    "number of targets": lambda: spmm(
        EdgeIndex(graph(), sparse_size=(5, 4)), None, torch.ones(5, 1), num_targets=3
    ),
    "topology of other nodes": lambda: spmm(Topology(graph(), (5, 4)), None, torch.ones(4, 1)),
    "not one weight an edge": lambda: spmm(graph(), torch.ones(8), torch.ones(5, 1)),
    "not features of nodes": lambda: spmm(graph(), None, torch.ones(5)),
    "no floating-point": lambda: spmm(graph(), None, torch.ones(5, 1, dtype=torch.long)),
}


@pytest.mark.parametrize("match", BAD)
def test_what_is_no_graph_is_a_typed_error(match):
    with pytest.raises(GraphError, match=match):
        BAD[match]()
