import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import glorot
from torch_geometric.typing import Adj, OptTensor

from graphmoe.errors import GraphError
from graphmoe.graph import both_ends, complete, weighted_edges
from graphmoe.nn.bare import is_bare
from graphmoe.nn.lazy import lazy_channels
from graphmoe.ops.fold import look_up
from graphmoe.ops.gated_update import gated_update, open_gates


@lazy_channels
class CoupleConv(MessagePassing):
    r"""One gated round of talk between the experts of a token (the "gnn" coupler).

    .. math::
        h_i' = h_i + \mathrm{GELU}\Bigl(W_n \sum_{j \ne i}
            \sigma(A_{e_i e_j})\,\sigma(w^\top[h_i \,\|\, h_j] + b)\,h_j + W_s h_i\Bigr)

    ``A`` is a learned adjacency over expert ids, drawn around 0 so that every pair starts half
    open; the second gate depends on the token.

    Edges: expert -> expert of one token. Leading dimensions are tokens that share the edges and
    never exchange messages. Without ``edge_index`` the graph is complete and the messages of a token are
    one small batched matrix product; on a CPU this form is differentiable once.

    Args:
        in_channels: Channels ``F`` of a row; ``-1``: those of the first input.
        num_experts: Size ``E`` of the learned adjacency; ``None`` leaves it out.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [*, nodes, F]``, or with ``edge_index`` a pair of sources and targets;
          ``edge_index [2, M]``, ``adj_t`` or ``None``; ``expert [*, nodes]``
          expert ids (``E`` for an absent row, which neither speaks nor listens; default: the node
          index), a pair if ``x`` is; ``edge_weight``, ``[M]`` or ``[*, M]`` with ``edge_index``, else dense
          ``[*, nodes, nodes]`` (target, source); ``level [E]``: how far each expert is there, a
          factor of every gate to and from it.
        - **output:** ``[*, nodes, F]``, of the targets; with ``return_attention_weights=True`` also
          ``(edge_index, gates [*, M])``.

    Raises:
        GraphError: ``edge_index`` that is no graph of these nodes, or a pair without one.
    """

    def __init__(self, in_channels: int, num_experts: int | None = None, **kwargs):
        super().__init__(aggr="sum", node_dim=-2, **kwargs)
        self.in_channels, self.num_experts = in_channels, num_experts
        self.fuse = True
        self.lin_neighbor = nn.Linear(in_channels, in_channels, bias=False)
        self.lin_self = nn.Linear(in_channels, in_channels, bias=False)
        self.gate = nn.Parameter(torch.empty(2, in_channels))  # w, split into target and source
        self.gate_bias = nn.Parameter(torch.empty(1))
        if num_experts is not None:
            self.adjacency = nn.Parameter(torch.empty(num_experts, num_experts))
        else:
            self.register_parameter("adjacency", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_neighbor.reset_parameters()
        self.lin_self.reset_parameters()
        glorot(self.gate)
        nn.init.zeros_(self.gate_bias)
        if self.adjacency is not None:
            nn.init.normal_(self.adjacency, std=0.02)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | None = None,
        expert: Tensor | tuple[Tensor, Tensor] | None = None,
        edge_weight: Tensor | None = None,
        level: Tensor | None = None,
        return_attention_weights: bool = False,
    ):
        if edge_index is None and not isinstance(x, Tensor):
            raise GraphError("sources and targets of which edges?", "edge_index", "[2, M]", None)
        if edge_index is None and self.fuse and not return_attention_weights:
            if not (is_bare(self.lin_neighbor) and is_bare(self.lin_self)):
                return self._update(x, self.gates(x, expert, edge_weight, level) @ x)
            strength = self._strength(x, expert, edge_weight, level)
            weights = self.lin_neighbor.weight, self.lin_self.weight
            return gated_update(x, strength, self.gate, self.gate_bias, *weights)
        if edge_index is None:
            edge_index = complete(x.size(-2), device=x.device)
            if edge_weight is not None:
                edge_weight = edge_weight[..., edge_index[1], edge_index[0]]
        source, target = both_ends(x)
        size = (source.size(-2), target.size(-2))
        edge_index, edge_weight = weighted_edges(edge_index, edge_weight, size)
        if edge_weight is None:
            edge_weight = target.new_ones(edge_index.size(1))
        speaker, listener = (None, None) if expert is None else both_ends(expert, "expert")
        gate = self.edge_updater(
            edge_index,
            score=(source @ self.gate[1:].t(), target @ self.gate[:1].t() + self.gate_bias),
            expert=(self._experts(source, speaker), self._experts(target, listener)),
            edge_weight=edge_weight.to(target.dtype),
            level=level,
            size=size,
        )
        out = self._update(target, self.propagate(edge_index, x=(source, None), gate=gate, size=size))
        return (out, (edge_index, gate.squeeze(-1))) if return_attention_weights else out

    def gates(
        self,
        x: Tensor,
        expert: Tensor | None = None,
        edge_weight: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Gates of the complete graph, dense ``[*, nodes, nodes]`` (target, source), diagonal 0."""
        opened = open_gates(x @ self.gate.t(), self.gate_bias)
        return opened * self._strength(x, expert, edge_weight, level)

    def connections(self, level: Tensor | None = None) -> Tensor:
        """Strength ``sigmoid(A)`` (times the levels) of each connection, ``[E, E]`` (target,
        source), diagonal 0: the part of the gates that does not depend on the token."""
        ids = torch.arange(self.num_experts, device=self.gate.device)
        strength = self._pair(ids.unsqueeze(1), ids.unsqueeze(0), level)
        return strength * (1 - torch.eye(len(ids), dtype=strength.dtype, device=ids.device))

    def _strength(
        self, x: Tensor, expert: Tensor | None, edge_weight: Tensor | None, level: Tensor | None
    ) -> Tensor:
        """The part of the gates that does not depend on the features, ``[*, nodes, nodes]``, diagonal 0."""
        ids = self._experts(x, expert).squeeze(-1)
        strength = self._pair(ids.unsqueeze(-1), ids.unsqueeze(-2), level)
        if edge_weight is not None:
            strength = strength * edge_weight
        return strength * (1 - torch.eye(x.size(-2), dtype=x.dtype, device=x.device))

    def _experts(self, x: Tensor, expert: Tensor | None) -> Tensor:
        if expert is None:
            expert = torch.arange(x.size(-2), device=x.device)
        return expert.unsqueeze(-1)  # a node attribute [*, nodes, 1]

    def _pair(self, target: Tensor, source: Tensor, level: Tensor | None) -> Tensor:
        """Strength of a pair of expert ids, 0 where one is absent."""
        if self.adjacency is None:
            return torch.ones((), dtype=self.gate.dtype, device=self.gate.device)
        table = self.adjacency.sigmoid()
        if level is not None:
            table = table * (level.unsqueeze(1) * level).to(table.dtype)
        return look_up(table, target, source)

    def _update(self, x: Tensor, heard: Tensor) -> Tensor:
        return x + F.gelu(self.lin_neighbor(heard) + self.lin_self(x))

    def edge_update(
        self,
        score_i: Tensor,
        score_j: Tensor,
        expert_i: Tensor,
        expert_j: Tensor,
        edge_weight: Tensor,
        level: OptTensor,
    ) -> Tensor:
        pair = self._pair(expert_i, expert_j, level)
        return torch.sigmoid(score_i + score_j) * pair * edge_weight.unsqueeze(-1)

    def message(self, x_j: Tensor, gate: Tensor) -> Tensor:
        return gate * x_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts})"
