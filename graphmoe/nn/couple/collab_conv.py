import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.typing import Adj

from graphmoe.errors import ConfigError
from graphmoe.graph import one_end, weighted_edges
from graphmoe.nn.bare import is_bare
from graphmoe.nn.lazy import lazy_channels
from graphmoe.nn.row_attention import RowAttention
from graphmoe.ops.collaborate import collaborate

GRAPHS = ("complete", "self")


@lazy_channels
class CollabConv(nn.Module):
    r"""Rounds of collaboration between the experts of a token: attention among its rows, then a
    feed-forward step of each, with the same weights in every round.

    .. math::
        t &\leftarrow \mathrm{RMSNorm}\bigl(t + \mathrm{MHA}(t)\bigr) \\
        t &\leftarrow t + \mathrm{FFN}\bigl(\mathrm{RMSNorm}(t)\bigr), \qquad
            \mathrm{FFN}(u) = W^{down}\bigl(\mathrm{SiLU}(W^{gate}u) \odot W^{up}u\bigr)

    With a mediator, a learned node joins every token as its last one; it hears and is heard by everybody.
    The attention is :class:`~graphmoe.nn.RowAttention`. No map has a bias, so a row of zeros that hears
    nobody stays one.

    Edges: node -> node of one token, every node to itself included. Leading dimensions are tokens that share
    the edges and never exchange messages. Without ``edge_index`` the graph is complete, and the rounds of all
    tokens are dense products.

    Args:
        in_channels: Channels ``F`` of a row; ``-1``: those of the first input.
        num_experts: ``E``: a row with an expert id of at least ``E`` is absent. ``None``: none is.
        heads: Attention heads; must divide ``F``.
        rounds: Rounds of collaboration; 0 leaves the nodes as they come.
        hidden_channels: Channels inside the feed-forward step. Default: ``F``.
        mediator: Append the learned node.
        graph: ``complete``, or ``self``: every node hears only itself, a control of equal cost without talk.
            Only where no ``edge_index`` is given.
        dropout: On attention weights, in training.
        eps: Added to the mean square in RMSNorm.

    Shapes:
        - **input:** ``x [*, nodes, F]``; ``edge_index [2, M]`` or ``adj_t`` over the nodes, or ``None``;
          ``expert [*, nodes]`` expert ids (default: the node index); an absent row is heard by nobody,
          comes out as 0 and receives no gradient; ``edge_weight``, at least 0: ``[M]`` or ``[*, M]`` with
          ``edge_index``, else dense ``[*, nodes, nodes]`` (target, source); ``level [E]``: how far each
          expert is there, a factor of every edge from it; ``rounds``: instead of the constructor's number.
        - **output:** ``[*, nodes, F]``, or ``[*, nodes + 1, F]`` with the mediator behind the rows. With
          ``return_attention_weights=True`` also ``attention [rounds, *, heads, nodes', nodes']`` (target,
          source; ``nodes'`` counts the mediator), or with ``edge_index`` ``(edge_index', alpha
          [rounds, *, M', heads])``, the edges of the mediator behind the others.

    Raises:
        ConfigError: Heads that do not divide the channels, a negative number of rounds, an unknown graph.
        GraphError: ``edge_index`` that is no graph of these nodes; sources beside targets.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int | None = None,
        *,
        heads: int = 4,
        rounds: int = 2,
        hidden_channels: int | None = None,
        mediator: bool = False,
        graph: str = "complete",
        dropout: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if graph not in GRAPHS:
            raise ConfigError("unknown graph", "graph", f"one of {', '.join(GRAPHS)}", graph)
        hidden_channels = in_channels if hidden_channels is None else hidden_channels
        if hidden_channels < 1:
            raise ConfigError("too few channels", "hidden_channels", "at least 1", hidden_channels)
        self.in_channels, self.num_experts, self.rounds = in_channels, num_experts, _checked(rounds)
        self.graph, self.hidden_channels = graph, hidden_channels
        self.attention = RowAttention(in_channels, heads, dropout=dropout)
        self.attention_norm = nn.RMSNorm(in_channels, eps=eps)
        self.feed_forward_norm = nn.RMSNorm(in_channels, eps=eps)
        self.gate_up_proj = nn.Linear(in_channels, 2 * hidden_channels, bias=False)
        self.down_proj = nn.Linear(hidden_channels, in_channels, bias=False)
        self.register_parameter("mediator", nn.Parameter(torch.empty(in_channels)) if mediator else None)
        self.reset_parameters()

    @property
    def fuse(self) -> bool:
        """Whether the dense forms may be taken; ``False`` passes messages edge by edge."""
        return self.attention.fuse

    @fuse.setter
    def fuse(self, value: bool) -> None:
        self.attention.fuse = value

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()
        if self.mediator is not None:
            nn.init.normal_(self.mediator, std=0.02)

    def connections(self, level: Tensor | None = None) -> None:
        """``None``: attention depends on the token, no part of a connection is the same for all of them.
        What a forward pass did is in its attention weights."""
        return None

    def forward(
        self,
        x: Tensor,
        edge_index: Adj | None = None,
        expert: Tensor | None = None,
        edge_weight: Tensor | None = None,
        level: Tensor | None = None,
        *,
        rounds: int | None = None,
        return_attention_weights: bool = False,
    ):
        rounds = self.rounds if rounds is None else _checked(rounds)
        x = one_end(x, "in rounds every node hears and speaks")
        source, present = self._nodes(x, expert, level)
        t = x if present is None else x.masked_fill(~present.unsqueeze(-1), 0.0)
        if self.mediator is not None:
            mediator = self.mediator.to(x.dtype).expand(*x.shape[:-2], 1, -1)
            t = torch.cat([t, mediator], dim=-2)  # [*, nodes + 1, F]
            source = source if source is None else F.pad(source, (0, 1), value=1.0)
            present = present if present is None else F.pad(present, (0, 1), value=True)
        if edge_index is None:
            weight = self._dense_weight(t, edge_weight, source, present)
        else:
            edges, edge_weight = weighted_edges(edge_index, edge_weight, x.size(-2))
            edge_index, weight = self._edge_weight(t, edges, edge_weight, source, present)
        if edge_index is None and rounds and not return_attention_weights and self._suits_kernel():
            attend = self.attention
            return collaborate(
                t,
                weight,
                attend.lin_qkv.weight,
                attend.lin_out.weight,
                self.attention_norm.weight,
                self.feed_forward_norm.weight,
                self.gate_up_proj.weight,
                self.down_proj.weight,
                heads=attend.heads,
                rounds=rounds,
                eps=self.attention_norm.eps,
            )
        attention = []
        for _ in range(rounds):
            heard = self.attention(t, edge_index, weight, return_attention_weights=return_attention_weights)
            if return_attention_weights:
                heard, alpha = heard
                attention.append(alpha if edge_index is None else alpha[1])
            t = self.attention_norm(t + heard)
            gate, up = self.gate_up_proj(self.feed_forward_norm(t)).chunk(2, dim=-1)
            t = t + self.down_proj(F.silu(gate) * up)
        if not return_attention_weights:
            return t
        nodes, heads = t.size(-2), self.attention.heads
        if edge_index is None:
            shape = (*t.shape[:-2], heads, nodes, nodes)
        else:
            shape = (*t.shape[:-2], edge_index.size(1), heads)
        attention = torch.stack(attention) if attention else t.new_empty(0, *shape)
        return t, attention if edge_index is None else (edge_index, attention)

    def _suits_kernel(self) -> bool:
        attention = self.attention
        linears = (attention.lin_qkv, attention.lin_out, self.gate_up_proj, self.down_proj)
        return (
            self.fuse
            and not (self.training and attention.dropout)
            and is_bare(attention, RowAttention)
            and all(is_bare(lin) for lin in linears)
            and all(is_bare(norm, nn.RMSNorm) for norm in (self.attention_norm, self.feed_forward_norm))
        )

    def _nodes(
        self, x: Tensor, expert: Tensor | None, level: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """How loud every row speaks, and which rows are present, ``[*, nodes]``; ``None``: 1, all."""
        present = None
        if expert is not None and self.num_experts is not None:
            present = expert < self.num_experts
        if level is None:
            return None if present is None else present.to(x.dtype), present
        level = level.to(x.dtype)
        if expert is None:
            return level, None
        # Absent rows look up a 0 behind the last expert.
        ids = expert.clamp(max=level.numel())
        return F.pad(level, (0, 1)).index_select(0, ids.flatten()).view(ids.shape), present

    def _dense_weight(
        self, t: Tensor, edge_weight: Tensor | None, source: Tensor | None, present: Tensor | None
    ) -> Tensor | None:
        """Weights of the complete graph, ``[*, nodes', nodes']`` (target, source) or what broadcasts to it;
        ``None``: all 1."""
        nodes, weight = t.size(-2), edge_weight
        if weight is not None and self.mediator is not None:
            weight = weight.expand(*weight.shape[:-2], nodes - 1, nodes - 1)
            weight = F.pad(weight, (0, 1, 0, 1), value=1.0)
        factors = [] if source is None else [source.unsqueeze(-2)]
        if present is not None:  # an absent row does not listen either
            factors.append(present.unsqueeze(-1).to(t.dtype))
        if self.graph == "self":
            factors.append(torch.eye(nodes, dtype=t.dtype, device=t.device))
        for factor in factors:
            weight = factor if weight is None else weight * factor
        return weight

    def _edge_weight(
        self,
        t: Tensor,
        edges: Tensor,
        edge_weight: Tensor | None,
        source: Tensor | None,
        present: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The caller's edges with those of the mediator behind them, and their weights ``[*, M']``."""
        if self.mediator is not None:
            node = torch.arange(t.size(-2), device=t.device)
            last = node[-1:].expand_as(node)
            hears, speaks = torch.stack([node, last]), torch.stack([last, node])[:, :-1]
            if edge_weight is not None:
                edge_weight = F.pad(edge_weight, (0, hears.size(1) + speaks.size(1)), value=1.0)
            edges = torch.cat([edges, hears, speaks], dim=1)
        factors = [] if source is None else [source.index_select(-1, edges[0])]
        if present is not None:
            factors.append(present.index_select(-1, edges[1]).to(t.dtype))
        for factor in factors:
            edge_weight = factor if edge_weight is None else edge_weight * factor
        return edges, edge_weight

    def __repr__(self) -> str:
        mediator = ", mediator=True" if self.mediator is not None else ""
        graph = "" if self.graph == "complete" else f", graph={self.graph!r}"
        return (
            f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts}, "
            f"heads={self.attention.heads}, rounds={self.rounds}{mediator}{graph})"
        )


def _checked(rounds: int) -> int:
    if rounds < 0:
        raise ConfigError("negative number of rounds", "rounds", "at least 0", rounds)
    return rounds
