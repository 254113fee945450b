from typing import Optional

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import softmax

from graphmoe.errors import GraphError
from graphmoe.graph import dense_to_edges, to_edges
from graphmoe.nn.memory.read_conv import weighed


class RecallConv(MessagePassing):
    r"""Tokens recall the values of slots whose keys are near, as in a
    `matching network <https://arxiv.org/abs/1606.04080>`_, but by distance and with a learned temperature.

    .. math::
        y_n = \sum_{s \to n} \alpha_{sn} c_s, \qquad
        \alpha_{sn} = \mathrm{softmax}_{s \to n}\!\left(-\tau \frac{\lVert W_q x_n - V_s\rVert^2}{\sqrt F}
        + \log w_{sn}\right), \qquad \tau = e^t

    Other than in :class:`ReadConv` values are apart from keys and pass unchanged, so that one-hot labels stay
    labels: what is recalled of them is a probability of each. An edge of weight 0 is no edge; a token without
    edges recalls 0.

    Edges: slot -> token.

    Args:
        in_channels: Channels ``D`` of a token.
        key_channels: Channels ``F`` of the key of a slot.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x``: pair ``(key [slots, F], x_token [N, D])`` with ``value [slots, C]``,
          ``edge_index [2, M]`` and ``edge_weight [M]``; or, of memories side by side, ``(key [B, S, F],
          x_token [B, T, D])`` with ``value [B, S, C]``, ``mask [B, T, S]`` bool, True where there is
          an edge, and ``edge_weight [B, S]``, that of all edges of a slot.
        - **output:** as ``x_token``, with ``C`` channels; with ``return_attention_weights=True`` also
          ``(edge_index, weights [M])``, and without ``edge_index`` ``weights [B, T, S]``.

    Raises:
        GraphError: Features that are no pair, an ``edge_index`` that is no graph of them, or neither that nor
            a ``mask``.
    """

    def __init__(self, in_channels: int, key_channels: int, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        self.in_channels, self.key_channels = in_channels, key_channels
        self.fuse = True
        self.lin_query = nn.Linear(in_channels, key_channels, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries start as tokens are, and the temperature at 1."""
        super().reset_parameters()
        nn.init.eye_(self.lin_query.weight)
        nn.init.zeros_(self.log_temperature)

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        value: Tensor,
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        return_attention_weights: bool = False,
    ):
        if not isinstance(x, tuple | list) or len(x) != 2:
            raise GraphError("slots answer tokens", "x", "a pair (key, x_token)", type(x).__name__)
        key, query = x[0], self.lin_query(x[1])
        if edge_index is not None:
            edges = to_edges(edge_index, (key.size(0), query.size(0)))
            out, alpha = self._edges(query, key, value, edges, edge_weight)
            return (out, (edges, alpha)) if return_attention_weights else out
        if mask is None or mask.shape != (*query.shape[:2], key.size(1)):
            got = None if mask is None else tuple(mask.shape)
            expected = f"{(*query.shape[:-1], key.size(-2))} without edge_index"
            raise GraphError("which slots answer which tokens?", "mask", expected, got)
        if self.fuse:
            out, alpha = self._side_by_side(query, key, value, edge_weight, mask)
            return (out, alpha) if return_attention_weights else out
        edges = dense_to_edges(mask)
        weight = None if edge_weight is None else edge_weight.flatten()[edges[0]]
        flat = [part.flatten(0, 1) for part in (query, key, value)]
        out, alpha = self._edges(*flat, edges, weight)
        out = out.unflatten(0, query.shape[:2])
        if not return_attention_weights:
            return out
        dense = alpha.new_zeros(mask.shape)
        dense[mask] = alpha  # a mask lists its edges in the same order
        return out, dense

    def _side_by_side(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fast form: one matrix of distances for each memory."""
        squares = query.square().sum(-1, keepdim=True) + key.square().sum(-1).unsqueeze(-2)
        distance = torch.baddbmm(squares, query, key.transpose(1, 2), alpha=-2)  # [B, T, S]
        score = self._score(distance)
        if weight is not None:
            score, present = weighed(score.unsqueeze(-1), weight.unsqueeze(1).expand_as(score))
            score, mask = score.squeeze(-1), mask & present.squeeze(-1)
        # Of a token without edges everything is -inf, whose softmax is NaN and its gradient too.
        lowest = torch.finfo(score.dtype).min
        alpha = score.masked_fill(~mask, lowest).softmax(dim=-1) * mask
        return alpha.to(value.dtype) @ value, alpha

    def _edges(
        self, query: Tensor, key: Tensor, value: Tensor, edges: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Edge form: ``query [N, F]``, ``key [slots, F]``, ``value [slots, C]``."""
        size = (key.size(0), query.size(0))
        alpha = self.edge_updater(edges, query=(None, query), key=(key, None), edge_weight=weight, size=size)
        return self.propagate(edges, value=(value, None), alpha=alpha, size=size), alpha

    def _score(self, distance: Tensor) -> Tensor:
        return -self.log_temperature.exp() * self.key_channels**-0.5 * distance

    def edge_update(
        self,
        query_i: Tensor,
        key_j: Tensor,
        edge_weight: Optional[Tensor],  # noqa: UP045 (PyG reads it)
        index: Tensor,
        size_i: Optional[int],  # noqa: UP045
    ) -> Tensor:
        score = self._score((query_i - key_j).square().sum(dim=-1))
        score, present = weighed(score.unsqueeze(-1), edge_weight)
        present = present.squeeze(-1) if isinstance(present, Tensor) else present
        return softmax(score.squeeze(-1), index, num_nodes=size_i) * present

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        return alpha.to(value_j.dtype).unsqueeze(-1) * value_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.key_channels})"
