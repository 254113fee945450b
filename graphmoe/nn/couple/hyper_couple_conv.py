import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj, OptTensor

from graphmoe.errors import ConfigError
from graphmoe.graph import hyperedges, to_edges
from graphmoe.ops.fold import apply_operator, fold_incidence


class HyperCoupleConv(MessagePassing):
    r"""Hypergraph convolution over the experts of a token, with learned positive hyperedge weights
    (after `Hypergraph Convolution and Hypergraph Attention <https://arxiv.org/abs/1901.08150>`_).

    .. math::
        X' = D^{-1} B W C^{-1} B^\top X \Theta, \qquad
        C_h = \sum_i B_{ih}, \quad D_i = \sum_h w_h B_{ih}, \quad w = \mathrm{softplus}(v)

    A hyperedge acts on a token when all its members serve that token, so the same weights serve
    ``k = E`` and ``k < E``. A node without an acting hyperedge receives 0. Where every node lies in
    at most one hyperedge (``all``; pairs at ``k = 2``; triplets at ``k = 3``) :math:`D^{-1}` cancels
    ``w``, and there is no such parameter.

    With ghosts, a softmax over learned logits weighs the groups of hyperedges: of primaries only, of
    ghosts only, and mixed.

    Edges: expert -> hyperedge -> expert of one token, two bipartite passes; leading dimensions are
    tokens, which never exchange messages. The fast form folds the passes into one small matrix.

    Args:
        in_channels: Channels ``F`` of a row.
        num_experts: ``E``, ghosts included; ``None`` for a hypergraph given in ``forward``.
        strategy: ``all_pairs``, ``all_triplets`` or ``all``.
        k: Rows of a token, default ``E``.
        num_ghosts: How many of the last experts are ghosts.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [*, nodes, F]``; ``edge_index [2, nnz]`` (node, hyperedge) of the caller's own
          hypergraph, or ``None`` for the strategy's; ``expert [*, nodes]`` expert ids, different within a
          token (``E`` for an absent row; default: node ``i`` is expert ``i``); ``edge_weight [H]``: factor of
          each hyperedge; ``level [E]``: how far each expert is there, multiplied into the weights
          of its hyperedges (0 = not at all).
        - **output:** ``[*, nodes, F]``.

    Raises:
        ConfigError: A strategy that does not fit ``k`` or ``E``; no hypergraph at all.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int | None = None,
        *,
        strategy: str = "all_pairs",
        k: int | None = None,
        num_ghosts: int = 0,
        **kwargs,
    ):
        super().__init__(aggr="sum", node_dim=-2, **kwargs)
        self.in_channels, self.num_experts, self.strategy = in_channels, num_experts, strategy
        self.fuse = True
        self.lin = nn.Linear(in_channels, in_channels, bias=False)
        self.register_parameter("weight", None)
        self.register_parameter("group_logits", None)
        if num_experts is not None:
            self._build(num_experts, num_experts if k is None else k, num_ghosts)
        self.reset_parameters()

    def _build(self, num_experts: int, k: int, num_ghosts: int) -> None:
        # Built on the CPU whatever the default device: a model may be laid out on "meta" first,
        # and then finds its (persistent) buffers in the checkpoint.
        with torch.device("cpu"):
            if self.strategy == "all":
                # The rows of a token form one hyperedge, whichever experts they are.
                edges = torch.stack([torch.arange(num_experts), torch.zeros(num_experts, dtype=torch.long)])
                size = k
            else:
                edges = hyperedges(num_experts, self.strategy)
                size = int((edges[1] == 0).sum())
            if k < max(size, 2):
                raise ConfigError(
                    f"{self.strategy} needs more rows a token", "k", f"at least {max(size, 2)}", k
                )
            incidence = torch.zeros(num_experts, int(edges[1].max()) + 1)
            incidence[edges[0], edges[1]] = 1.0
            ghosts = incidence[num_experts - num_ghosts :].sum(dim=0)
            kind = torch.where(ghosts == 0, 0, torch.where(ghosts == size, 1, 2))
            # Groups without a hyperedge get no logit: it could never have a gradient.
            groups, group = kind.unique(return_inverse=True)
        device = torch.get_default_device()
        self.register_buffer("hyperedge_index", edges.to(device))
        self.register_buffer("incidence", incidence.to(device))
        if k == size:
            return
        self.weight = nn.Parameter(torch.empty(incidence.size(1)))
        if len(groups) > 1:
            self.group_logits = nn.Parameter(torch.empty(len(groups)))
            self.register_buffer("group", group.to(device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, math.log(math.e - 1))  # softplus gives 1
        if self.group_logits is not None:
            nn.init.zeros_(self.group_logits)

    def hyperedge_weight(self) -> Tensor:
        """Positive weights of the strategy's hyperedges, ``[H]``."""
        if self.weight is None:
            return self.incidence.new_ones(self.incidence.size(1), dtype=self.lin.weight.dtype)
        weight = F.softplus(self.weight)
        if self.group_logits is not None:
            weight = weight * self.group_logits.softmax(0).index_select(0, self.group)
        return weight

    def connections(self, level: Tensor | None = None) -> Tensor:
        """The folded matrix over all experts, ``[E, E]`` (target, source)."""
        return fold_incidence(*self._structure(level, None))

    def forward(
        self,
        x: Tensor,
        edge_index: Adj | None = None,
        expert: Tensor | None = None,
        edge_weight: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        if edge_index is not None:
            edges = to_edges(edge_index)
            if edge_weight is None:
                edge_weight = x.new_ones(int(edges[1].max()) + 1 if edges.numel() else 0)
            return self._spread(self.lin(x), edges, edge_weight, x.new_ones(x.size(-2), 1))
        if self.num_experts is None:
            raise ConfigError("no hypergraph", "edge_index", "an incidence [2, nnz], or num_experts")
        incidence, weight = self._structure(level, edge_weight)
        if not self.fuse:
            return self._pass_messages(self.lin(x), expert, incidence.amax(dim=1), weight)
        if expert is not None:
            incidence, weight = self._acting(incidence, expert, weight)
        return self.lin(apply_operator(fold_incidence(incidence, weight).to(x.dtype), x))

    def _structure(self, level: Tensor | None, edge_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Incidence ``[E, H]`` and weights ``[H]`` with the levels of the experts in them."""
        weight = self.hyperedge_weight()
        incidence = self.incidence.to(weight.dtype)
        if edge_weight is not None:
            weight = weight * edge_weight
        if level is not None and self.strategy == "all":
            # One hyperedge of whoever is there: an expert is a member as far as its level goes.
            incidence = incidence * level.unsqueeze(1)
        elif level is not None:
            joint = torch.where(incidence > 0, level.unsqueeze(1), torch.ones_like(incidence)).prod(dim=0)
            weight = weight * joint
        return incidence.to(weight.dtype), weight

    def _acting(self, incidence: Tensor, expert: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Incidence ``[*, nodes, H]`` and weights ``[*, H]`` of the hyperedges acting on each token."""
        absent = incidence.new_zeros(1, incidence.size(1))
        member = torch.cat([incidence, absent]).index_select(0, expert.flatten())
        member = member.view(*expert.shape, incidence.size(1))  # [*, nodes, H]
        if self.strategy == "all":
            return member, weight.expand(*expert.shape[:-1], -1)
        return member, weight * (member.sum(dim=-2) == incidence.sum(dim=0))

    def _pass_messages(self, x: Tensor, expert: Tensor | None, member: Tensor, weight: Tensor) -> Tensor:
        """Edge form on the strategy's hyperedges; rows with ids visit the nodes of their experts.

        ``member [E]`` says how far each expert is a member of its hyperedges.
        """
        member = member.unsqueeze(-1).to(x.dtype)  # [E, 1]
        if expert is None:
            return self._spread(x, self.hyperedge_index, weight, member)
        place = expert.unsqueeze(-1)  # [*, nodes, 1]
        nodes = x.new_zeros(*x.shape[:-2], self.num_experts + 1, x.size(-1))
        present = torch.zeros_like(nodes[..., :1]).scatter(-2, place, 1.0)[..., :-1, :] * member
        nodes = nodes.scatter(-2, place.expand_as(x), x)[..., :-1, :]
        if self.strategy != "all":
            size = tuple(self.incidence.shape)
            count = self.propagate(self.hyperedge_index, x=(present, None), scale=None, size=size)
            weight = weight * (count.squeeze(-1) == self.incidence.sum(dim=0))
        out = self._spread(nodes, self.hyperedge_index, weight, present)
        out = torch.cat([out, torch.zeros_like(out[..., :1, :])], dim=-2)
        return out.gather(-2, place.expand_as(x))

    def _spread(self, x: Tensor, edges: Tensor, weight: Tensor, present: Tensor) -> Tensor:
        """Expert -> hyperedge -> expert; ``present [*, nodes, 1]`` is how far a node is a member."""
        weight = weight.to(x.dtype).unsqueeze(-1)  # [*, H, 1]
        there, back = (x.size(-2), weight.size(-2)), (weight.size(-2), x.size(-2))
        members = self.propagate(edges, x=(present, None), scale=None, size=there)
        total = self.propagate(edges, x=(x, None), scale=(present, None), size=there)
        mean = total / torch.where(members == 0, torch.ones_like(members), members)
        degree = self.propagate(edges.flip(0), x=(weight, None), scale=None, size=back)
        out = self.propagate(edges.flip(0), x=(mean, None), scale=(weight, None), size=back)
        return out / torch.where(degree == 0, torch.ones_like(degree), degree) * (present > 0)

    def message(self, x_j: Tensor, scale_j: OptTensor) -> Tensor:
        return x_j if scale_j is None else scale_j * x_j

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts}, "
            f"strategy={self.strategy!r})"
        )
