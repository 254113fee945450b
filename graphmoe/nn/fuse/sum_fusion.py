import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing


class SumFusion(MessagePassing):
    r"""Returns the rows of a token to it: :math:`y_n = \sum_{r \in n} w_r\, o_r`.

    Edges: row -> token. Rows in token order, ``[N, k, D]``, need no index at all.

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [N, k, D]`` and ``edge_weight [N, k]``; or ``x [R, D]``, ``edge_index [2, R]``
          (row, token), ``edge_weight [R]`` and ``num_tokens``.
        - **output:** ``[N, D]``.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", **kwargs)
        self.fuse = True

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
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
