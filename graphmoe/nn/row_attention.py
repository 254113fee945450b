from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import softmax

from graphmoe.errors import ConfigError, GraphError
from graphmoe.graph import both_ends, complete, weighted_edges
from graphmoe.nn.lazy import lazy_channels
from graphmoe.ops.fold import log_factor
from graphmoe.ops.row_attention import row_attention


@lazy_channels
class RowAttention(MessagePassing):
    r"""Multi-head attention among the nodes of one token
    (`Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_).

    .. math::
        y_i = W_o \bigl\Vert_h \sum_{j \to i} \alpha^h_{ij}\, v^h_j, \qquad
        \alpha^h_{ij} = \frac{w_{ij} \exp(q_i^{h\top} k^h_j / \sqrt d)}
            {\sum_{l \to i} w_{il} \exp(q_i^{h\top} k^h_l / \sqrt d)}, \qquad
        [q \,\Vert\, k \,\Vert\, v] = W_{qkv}\, x

    An edge of weight 0 is no edge: nothing passes it in either direction, its weight receives no gradient,
    and a node without incoming edges receives 0.

    Edges: node -> node of one token. Leading dimensions are tokens that share the edges and never exchange
    messages. Without ``edge_index`` the graph is complete, every node included, and the messages of a token
    are small dense products.

    Args:
        in_channels: Channels ``F``; ``-1``: those of the first input.
        heads: Attention heads; must divide ``F``.
        dropout: On attention weights, in training.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [*, nodes, F]``, or with ``edge_index`` a pair of sources and targets;
          ``edge_index [2, M]``, ``adj_t`` or ``None``; ``edge_weight``, at least 0: ``[M]`` or
          ``[*, M]`` with ``edge_index``, else dense ``[*, nodes, nodes]`` (target, source) or what
          broadcasts to it.
        - **output:** ``[*, nodes, F]``, of the targets; with ``return_attention_weights=True`` also
          ``(edge_index, alpha [*, M, heads])``, or without ``edge_index`` ``alpha [*, heads, nodes, nodes]``
          (target, source), before dropout.

    Raises:
        ConfigError: Heads that do not divide the channels.
        GraphError: ``edge_index`` that is no graph of these nodes, or a pair without one.
    """

    def __init__(self, in_channels: int, heads: int, *, dropout: float = 0.0, **kwargs):
        super().__init__(aggr="sum", node_dim=-2, **kwargs)
        if heads < 1 or in_channels % heads:
            raise ConfigError("heads must divide the channels", "heads", f"a divisor of {in_channels}", heads)
        self.in_channels, self.heads, self.dropout = in_channels, heads, dropout
        self.fuse = True
        self.lin_qkv = nn.Linear(in_channels, 3 * in_channels, bias=False)
        self.lin_out = nn.Linear(in_channels, in_channels, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_qkv.reset_parameters()
        self.lin_out.reset_parameters()

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        *,
        return_attention_weights: bool = False,
    ):
        source, target = both_ends(x)
        if edge_index is None and source is not target:
            raise GraphError("sources and targets of which edges?", "edge_index", "[2, M]", None)
        qkv = self.lin_qkv(source)  # [*, nodes, 3 * F]
        if edge_index is None and self.fuse:
            dropout = self.dropout if self.training else 0.0
            heard, alpha = row_attention(
                qkv, self.heads, edge_weight, dropout=dropout, return_shares=return_attention_weights
            )
            out = self.lin_out(heard)
            return (out, alpha) if return_attention_weights else out
        size = nodes, _ = source.size(-2), target.size(-2)
        if edge_index is None:
            edges = complete(nodes, loops=True, device=source.device)
            if edge_weight is not None:
                edge_weight = edge_weight.expand(*edge_weight.shape[:-2], nodes, nodes).flatten(-2)
        else:
            edges, edge_weight = weighted_edges(edge_index, edge_weight, size)
        if edge_weight is None:
            edge_weight = source.new_ones(edges.size(1))
        query, key, value = qkv.chunk(3, dim=-1)
        if source is not target:
            query = self.lin_qkv(target).chunk(3, dim=-1)[0]
        alpha = self.edge_updater(
            edges, query=(None, query), key=(key, None), edge_weight=edge_weight.unsqueeze(-1), size=size
        )  # [*, M, heads]
        dropped = F.dropout(alpha, self.dropout, self.training)
        out = self.lin_out(self.propagate(edges, value=(value, None), alpha=dropped, size=size))
        if not return_attention_weights:
            return out
        if edge_index is None:  # the complete graph is sorted by target, then by source
            return out, alpha.unflatten(-2, (nodes, nodes)).movedim(-1, -3)
        return out, (edges, alpha)

    def edge_update(
        self, query_i: Tensor, key_j: Tensor, edge_weight: Tensor, index: Tensor, size_i: int
    ) -> Tensor:
        query, key = self._heads(query_i), self._heads(key_j)
        score = (query * key).sum(dim=-1) * query.size(-1) ** -0.5  # [*, M, heads]
        weight = edge_weight.to(score.dtype)
        alpha = softmax(log_factor(score, weight), index, num_nodes=size_i, dim=-2)
        return alpha * (weight > 0)

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        return (alpha.unsqueeze(-1) * self._heads(value_j)).flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [*, heads, d]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, heads={self.heads})"
