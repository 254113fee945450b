from typing import Optional

from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from graphmoe.errors import GraphError
from graphmoe.graph import both_ends, weighted_edges
from graphmoe.ops.spmm import spmm
from graphmoe.ops.topology import Topology


class WeightedSumConv(MessagePassing):
    r"""Weighted sum over the edges of any graph, whose weights may learn,

    .. math::
        y_i = b_i + \sum_{j \to i} w_{ji} x_j .

    It has no parameters of its own: ``edge_weight`` and ``bias`` may be, or anything computed from some. With
    an :class:`~torch_geometric.EdgeIndex` or a :class:`~graphmoe.ops.topology.Topology`, which are checked
    and laid out once, it is one sparse product, and so are its gradients; with a plain tensor, messages
    are passed edge by edge. The fast form is differentiable once.

    Edges: neuron -> neuron, or those of any graph.

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [N, F]``, or a pair ``(x_src, x_dst)`` of which only the number of targets counts;
          ``edge_index [2, M]`` or a sparse matrix ``adj_t``; ``edge_weight [M]``, 1 by default;
          ``bias [targets]``, added to all features of a target, 0 by default.
        - **output:** ``[targets, F]``.

    Raises:
        GraphError: An ``edge_index`` that is no graph of these nodes, not one weight an edge, or not one bias
            a target.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        self.fuse = True

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | Topology,
        edge_weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        source, target = both_ends(x)
        size = (source.size(0), target.size(0))
        fused = self.fuse and not self.explain
        if fused and isinstance(edge_index, EdgeIndex | Topology):
            return spmm(edge_index, edge_weight, source, bias=bias, num_targets=size[1])
        if isinstance(edge_index, Topology):
            edge_index = edge_index.edge_index()
        edges, edge_weight = weighted_edges(edge_index, edge_weight, size)
        if edge_weight is not None and edge_weight.shape != edges.shape[1:]:
            got = tuple(edge_weight.shape)
            raise GraphError("not one weight an edge", "edge_weight", f"[{edges.size(1)}]", got)
        if bias is not None and bias.shape != size[1:]:
            raise GraphError("not one bias a target", "bias", f"[{size[1]}]", tuple(bias.shape))
        out = self.propagate(edges, x=(source, None), edge_weight=edge_weight, size=size)
        return out if bias is None else out + bias.unsqueeze(1)

    def message(self, x_j: Tensor, edge_weight: Optional[Tensor]) -> Tensor:  # noqa: UP045 (PyG reads it)
        return x_j if edge_weight is None else edge_weight.unsqueeze(-1) * x_j
