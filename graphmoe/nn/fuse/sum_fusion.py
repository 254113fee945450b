import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from graphmoe.errors import GraphError
from graphmoe.graph import weighted_edges


class SumFusion(MessagePassing):
    r"""Returns the rows of a token to it: :math:`y_n = \sum_{r \in n} w_r\, o_r`.

    Edges: row -> token. Rows in token order, ``[N, k, D]``, need no index at all.

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [N, k, D]`` and ``edge_weight [N, k]``; or ``x [R, D]``, ``edge_index [2, M]``
          (row, token) or ``adj_t``, ``edge_weight [M]`` (default: 1) and ``num_tokens``, which a pair of rows
          and tokens in the place of ``x`` tells too.
        - **output:** ``[N, D]``.

    Raises:
        GraphError: ``edge_index`` that does not lead from these rows to tokens, or without their number.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", **kwargs)
        self.fuse = True

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        x, edge_index, edge_weight, num_tokens = ends(x, edge_index, edge_weight, num_tokens)
        if edge_index is None:
            if self.fuse:
                return (x * edge_weight.unsqueeze(-1)).sum(dim=1)
            num_tokens = x.size(0)
            row = torch.arange(edge_weight.numel(), device=x.device)
            edge_index = torch.stack([row, row.div(x.size(1), rounding_mode="floor")])
            x, edge_weight = x.flatten(0, 1), edge_weight.flatten()
        size = (x.size(0), num_tokens)
        return self.propagate(edge_index, x=(x, None), edge_weight=edge_weight, size=size)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        return edge_weight.unsqueeze(-1) * x_j


def ends(
    x: Tensor | tuple[Tensor, Tensor | None],
    edge_index: Adj | None,
    edge_weight: Tensor | None,
    tokens: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, int | None]:
    """Rows, checked edges to tokens, their weights, the number of tokens; rows in token order as they are."""
    if edge_index is None:
        return x, edge_index, edge_weight, tokens
    x, token = (x, None) if isinstance(x, Tensor) else x
    if tokens is None:
        if token is None:
            raise GraphError("how many tokens?", "num_tokens", "a number, or x = (rows, tokens)", None)
        tokens = token.size(0)
    edges, weight = weighted_edges(edge_index, edge_weight, (x.size(0), tokens))
    return x, edges, x.new_ones(edges.size(1)) if weight is None else weight.to(x.dtype), tokens
