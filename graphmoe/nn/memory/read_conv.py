from typing import Optional

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import softmax

from graphmoe.errors import ConfigError, GraphError
from graphmoe.graph import to_edges
from graphmoe.typing import NEVER


class ReadConv(MessagePassing):
    r"""Multi-head attention of tokens to the slots that they have edges to
    (`MANN <https://arxiv.org/abs/1605.06065>`_ reads by content, too, but all slots).

    .. math::
        y_n = \Big\Vert_h \sum_{s \to n} \alpha^h_{sn} W_v^h V_s, \qquad
        \alpha^h_{sn} = \mathrm{softmax}_{s \to n}\!\left(\frac{(W_q^h x_n)^\top W_k^h V_s}{\sqrt d}
        + \log w_{sn}\right)

    A slot without an edge to the token is not looked at, instead of being multiplied by a small number; an
    edge of weight 0 is no edge. A token without edges reads 0. Heads stay apart: there is no map behind them.

    Edges: slot -> token.

    Args:
        in_channels: Channels of slots and tokens, or of each, ``(slot, token)``.
        out_channels: Channels read; ``heads`` must divide them.
        heads: Attention heads.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x``: pair ``(x_slot [slots, F], x_token [N, D])`` with ``edge_index [2, M]`` and
          ``edge_weight [M]``; or, the fast form, without ``edge_index``, ``x_slot [N, k, F]``: the slots of
          each token as it finds them, and ``edge_weight [N, k]``.
        - **output:** ``[N, out_channels]``; with ``return_attention_weights`` given also ``(edge_index,
          weights [M, heads])``, and without ``edge_index`` ``weights [N, heads, k]``.

    Raises:
        ConfigError: Heads that do not divide the channels.
        GraphError: Features that are no pair, or an ``edge_index`` that is no graph of them.
    """

    def __init__(self, in_channels: int | tuple[int, int], out_channels: int, heads: int = 4, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        if heads < 1 or out_channels % heads:
            what = "heads must divide the channels"
            raise ConfigError(what, "heads", f"a divisor of {out_channels}", heads)
        self.in_channels = (in_channels, in_channels) if isinstance(in_channels, int) else tuple(in_channels)
        self.out_channels, self.heads = out_channels, heads
        self.head_channels = out_channels // heads
        self.fuse = True
        self.lin_query = nn.Linear(self.in_channels[1], out_channels, bias=False)
        self.lin_key = nn.Linear(self.in_channels[0], out_channels, bias=False)
        self.lin_value = nn.Linear(self.in_channels[0], out_channels, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for lin in (self.lin_query, self.lin_key, self.lin_value):
            lin.reset_parameters()

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ):
        if not isinstance(x, tuple | list) or len(x) != 2:
            raise GraphError("slots answer tokens", "x", "a pair (x_slot, x_token)", type(x).__name__)
        slot, token = x
        wanted = return_attention_weights is not None
        query = self._heads(self.lin_query(token))  # [N, heads, d]
        key, value = self._heads(self.lin_key(slot)), self._heads(self.lin_value(slot))
        if edge_index is not None:
            edges = to_edges(edge_index, (slot.size(0), token.size(0)))
            out, alpha = self._edges(query, key, value, edges, edge_weight)
            return (out, (edges, alpha)) if wanted else out
        if slot.dim() != 3 or slot.size(0) != token.size(0):
            expected = f"[{token.size(0)}, k, F] without edge_index"
            raise GraphError("not the slots of each token", "x_slot", expected, tuple(slot.shape))
        if self.fuse:
            out, alpha = self._each_own(query, key, value, edge_weight)
        else:
            count, k = slot.shape[:2]
            place = torch.arange(count * k, device=slot.device)
            edges = torch.stack([place, place.div(max(k, 1), rounding_mode="floor")])
            weight = None if edge_weight is None else edge_weight.flatten()
            out, alpha = self._edges(query, key.flatten(0, 1), value.flatten(0, 1), edges, weight)
            alpha = alpha.view(count, k, self.heads).transpose(1, 2)
        return (out, alpha) if wanted else out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_channels))

    def _each_own(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Fast form: ``query [N, heads, d]``, ``key`` and ``value [N, k, heads, d]``."""
        score = (query.unsqueeze(1) * key).sum(dim=-1) * self.head_channels**-0.5  # [N, k, heads]
        score, present = weighed(score, weight)
        alpha = score.softmax(dim=1) * present
        out = (alpha.to(value.dtype).unsqueeze(-1) * value).sum(dim=1)
        return out.flatten(1), alpha.transpose(1, 2)

    def _edges(
        self, query: Tensor, key: Tensor, value: Tensor, edges: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Edge form: ``query [N, heads, d]``, ``key`` and ``value [slots, heads, d]``."""
        size = (key.size(0), query.size(0))
        alpha = self.edge_updater(edges, query=(None, query), key=(key, None), edge_weight=weight, size=size)
        out = self.propagate(edges, value=(value, None), alpha=alpha, size=size)
        return out.flatten(1), alpha

    def edge_update(
        self,
        query_i: Tensor,
        key_j: Tensor,
        edge_weight: Optional[Tensor],  # noqa: UP045 (PyG reads it)
        index: Tensor,
        size_i: Optional[int],  # noqa: UP045
    ) -> Tensor:
        score = (query_i * key_j).sum(dim=-1) * self.head_channels**-0.5
        score, present = weighed(score, edge_weight)
        return softmax(score, index, num_nodes=size_i) * present

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        return alpha.to(value_j.dtype).unsqueeze(-1) * value_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"


def weighed(score: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Scores ``[*, heads]`` plus the logarithm of weights ``[*]``, and which edges there are."""
    if weight is None:
        return score, 1.0
    weight = weight.unsqueeze(-1)
    present = weight > 0
    # Finite instead of -inf: a token all of whose edges have weight 0 must not read NaN.
    logarithm = weight.clamp(min=torch.finfo(weight.dtype).tiny).log()
    return torch.where(present, score + logarithm, NEVER), present
