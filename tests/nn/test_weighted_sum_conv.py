import pytest
import torch
from contract import assert_same
from torch import nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv

from graphmoe.errors import GraphError
from graphmoe.nn import edge_form
from graphmoe.nn.sparse import WeightedSumConv
from graphmoe.ops.topology import Topology

EDGES = torch.tensor([[0, 1, 2, 3, 4, 4, 1, 0], [1, 1, 3, 0, 3, 3, 0, 1]])


@pytest.mark.parametrize("kind", ["edge_index", "topology"])
@pytest.mark.parametrize("targets", [5, 4])
def test_both_forms_agree(double, kind, targets):
    conv = WeightedSumConv()
    graph = (
        EdgeIndex(EDGES, sparse_size=(5, targets)) if kind == "edge_index" else Topology(EDGES, (5, targets))
    )
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    nodes, bias = (x, torch.zeros(targets, 3)), torch.randn(targets, requires_grad=True)

    def edges():
        with edge_form(conv):
            return conv(nodes, graph, weight, bias)

    assert_same(conv, [x, weight, bias], lambda: conv(nodes, graph, weight, bias), edges)
    assert_same(conv, [x, weight, bias], edges, lambda: conv(nodes, EDGES, weight, bias))


def test_a_sparse_matrix_is_its_transposed_adjacency(double):
    conv, x, weight = WeightedSumConv(), torch.randn(5, 3), torch.randn(8)
    adj_t = torch.sparse_coo_tensor(EDGES.flip(0), weight, (5, 5), check_invariants=True).coalesce()
    torch.testing.assert_close(conv(x, adj_t), conv(x, EDGES, weight))
    assert conv(x, EDGES).sum() == pytest.approx(conv(x, EDGES, torch.ones(8)).sum().item())


def test_learned_weights_in_a_network_of_other_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.sum = GCNConv(4, 8), WeightedSumConv()
            self.edge_weight = nn.Parameter(torch.ones(8))

        def forward(self, x, edge_index):
            return self.sum(self.first(x, edge_index).relu(), edge_index, self.edge_weight)

    net, x = Net(), torch.randn(5, 4)
    plain = net(x, EDGES)
    fast = net(x, EdgeIndex(EDGES, sparse_size=(5, 5)))
    torch.testing.assert_close(fast, plain)
    fast.square().sum().backward()
    assert net.edge_weight.grad.abs().min() > 0


def test_wrong_input():
    conv, x = WeightedSumConv(), torch.randn(5, 3)
    with pytest.raises(GraphError, match="source id out of range"):
        conv(x, torch.tensor([[7], [0]]))
    with pytest.raises(GraphError, match="not one weight an edge"):
        conv(x, EDGES, torch.ones(3))
    for graph in (EDGES, EdgeIndex(EDGES, sparse_size=(5, 5))):
        with pytest.raises(GraphError, match="not one bias a target"):
            conv(x, graph, bias=torch.ones(3))
    with pytest.raises(GraphError, match="not one weight an edge"):
        conv(x, EdgeIndex(EDGES, sparse_size=(5, 5)), torch.ones(3))
    assert repr(conv) == "WeightedSumConv()"
