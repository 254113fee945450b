import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import glorot
from torch_geometric.typing import Adj, OptTensor
from torch_geometric.utils import softmax

from graphmoe.errors import ConfigError
from graphmoe.graph import one_end, to_edges
from graphmoe.nn.bare import is_bare
from graphmoe.nn.couple.hypergraph import build_hypergraph, check_strategy
from graphmoe.nn.lazy import lazy_channels
from graphmoe.ops.fold import (
    SLOPE,
    acting,
    apply_operator,
    fold_incidence,
    fold_pairs,
    log_factor,
    look_up,
    pair_table,
)
from graphmoe.ops.mix_linear import mix_linear


@lazy_channels
class HyperCoupleConv(MessagePassing):
    r"""Hypergraph convolution over the experts of a token, with learned positive hyperedge weights
    (after `Hypergraph Convolution and Hypergraph Attention <https://arxiv.org/abs/1901.08150>`_).

    .. math::
        X' = D^{-1} B W C^{-1} B^\top X \Theta, \qquad
        C_h = \sum_i B_{ih}, \quad D_i = \sum_h w_h B_{ih}, \quad w = \mathrm{softplus}(v)

    A hyperedge acts on a token when all its members serve that token, so the same weights serve
    ``k = E`` and ``k < E``. A node without an acting hyperedge receives 0. Where no expert lies in two
    hyperedges that can act together (``all``; pairs at ``k = 2``; triplets at ``k = 3``)
    :math:`D^{-1}` cancels ``w``, and there is no such parameter.

    With ghosts, a softmax over learned logits weighs the groups of hyperedges: of primaries only, of
    ghosts only, and mixed.

    With ``attention``, and :math:`z = X\Theta`, :math:`e_h` the mean of the :math:`z` of the members:

    .. math::
        x'_i = \sum_{h \ni i} \beta_{ih} \sum_{j \in h} \alpha_{jh} z_j, \qquad
        \alpha_{\cdot h} = \mathrm{softmax}_j\,\lambda(a_g^\top[z_j \,\|\, e_h]), \qquad
        \beta_{i \cdot} = \mathrm{softmax}_h\bigl(\lambda(a_s^\top[z_i \,\|\, e_h]) + \log w_h\bigr)

    with :math:`\lambda` a LeakyReLU of slope 0.2. Zero :math:`a_g` and :math:`a_s` give the convolution
    above. A vector that would cancel does not exist: :math:`a_s` where no expert lies in two hyperedges
    that can act together, :math:`a_g` where every hyperedge has one member.

    Edges: expert -> hyperedge -> expert of one token, two bipartite passes; leading dimensions are
    tokens, which never exchange messages. The fast form folds the passes into one small matrix;
    on a CPU and without attention it is differentiable once.

    Args:
        in_channels: Channels ``F`` of a row; ``-1``: those of the first input.
        num_experts: ``E``, ghosts included; ``None`` for a hypergraph given in ``forward``.
        strategy: ``all_pairs``, ``all_triplets``, ``all`` or ``custom``.
        k: Rows of a token, default ``E``.
        num_ghosts: How many of the last experts are ghosts.
        hyperedges: The experts of each hyperedge; makes the strategy ``custom``.
        max_hyperedges: Largest number of hyperedges.
        attention: Attention on the incidences.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [*, nodes, F]``; ``edge_index [2, nnz]`` (node, hyperedge) of the caller's own
          hypergraph, or a sparse matrix of it ``[hyperedges, nodes]``, whose values are ignored, or ``None``
          for the strategy's; ``expert [*, nodes]`` expert ids, different within a
          token (``E`` for an absent row; default: node ``i`` is expert ``i``); ``edge_weight [H]``: factor of
          each hyperedge, at least 0; ``level [E]``: how far each expert is there, multiplied into the
          weights of its hyperedges (0 = not at all). In ``all`` it is how far an expert is a member.
        - **output:** ``[*, nodes, F]``.

    Raises:
        ConfigError: A strategy that does not fit ``k`` or ``E``; hyperedges that do not fit ``E`` or ``k``,
            or leave a ghost out; more of them than ``max_hyperedges``; no hypergraph at all; a reversed flow.
        GraphError: ``edge_index`` that is no incidence of these nodes, or with more hyperedges than
            ``edge_weight``; features of hyperedges.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int | None = None,
        *,
        strategy: str = "all_pairs",
        k: int | None = None,
        num_ghosts: int = 0,
        hyperedges: Sequence[Sequence[int]] | None = None,
        max_hyperedges: int = 4096,
        attention: bool = False,
        **kwargs,
    ):
        super().__init__(aggr="sum", node_dim=-2, **kwargs)
        if self.flow != "source_to_target":
            raise ConfigError(
                "a hypergraph has no direction to reverse", "flow", "source_to_target", self.flow
            )
        self.in_channels, self.num_experts, self.attention = in_channels, num_experts, attention
        self.strategy = check_strategy(strategy, hyperedges, num_experts)
        self.fuse, self.pairs = True, False
        self.lin = nn.Linear(in_channels, in_channels, bias=False)
        for name in ("weight", "group_logits", "gather_attention", "spread_attention"):
            self.register_parameter(name, None)
        gathers = spreads = attention
        if num_experts is not None:
            # Built on the CPU whatever the default device: a model may be laid out on "meta" first,
            # and then finds its (persistent) buffers in the checkpoint.
            with torch.device("cpu"):
                graph = build_hypergraph(
                    num_experts,
                    self.strategy,
                    k=num_experts if k is None else k,
                    num_ghosts=num_ghosts,
                    members=hyperedges,
                    max_hyperedges=max_hyperedges,
                )
            device = torch.get_default_device()
            self.register_buffer("hyperedge_index", graph.edges.to(device))
            self.register_buffer("incidence", graph.incidence.to(device))
            self.pairs = graph.sizes == (2, 2) and self.strategy != "all"
            if graph.overlap:
                self.weight = nn.Parameter(torch.empty(graph.incidence.size(1)))
            if graph.mixed:
                self.group_logits = nn.Parameter(torch.empty(int(graph.group.max()) + 1))
                self.register_buffer("group", graph.group.to(device))
            gathers, spreads = attention and graph.sizes[1] > 1, attention and graph.overlap
        if gathers:
            self.gather_attention = nn.Parameter(torch.empty(2, in_channels))
        if spreads:
            self.spread_attention = nn.Parameter(torch.empty(2, in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, math.log(math.e - 1))  # softplus gives 1
        if self.group_logits is not None:
            nn.init.zeros_(self.group_logits)
        glorot(self.gather_attention)
        glorot(self.spread_attention)

    def hyperedge_weight(self) -> Tensor:
        """Positive weights of the strategy's hyperedges, ``[H]``."""
        if self.weight is None:
            return self.incidence.new_ones(self.incidence.size(1), dtype=self.lin.weight.dtype)
        weight = F.softplus(self.weight)
        if self.group_logits is not None:
            weight = weight * self.group_logits.softmax(0).index_select(0, self.group)
        return weight

    def connections(self, level: Tensor | None = None) -> Tensor:
        """The folded matrix over all experts, ``[E, E]`` (target, source). Attention, which depends on
        the token, is left out: this is the part that the hyperedge weights alone decide."""
        return fold_incidence(*self._structure(level, None))

    def forward(
        self,
        x: Tensor,
        edge_index: Adj | None = None,
        expert: Tensor | None = None,
        edge_weight: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        x = one_end(x, "hyperedges have no features")
        if edge_index is not None:
            edges = to_edges(edge_index, (x.size(-2), None if edge_weight is None else edge_weight.size(-1)))
            if edge_weight is None:
                edge_weight = x.new_ones(int(edges[1].max()) + 1 if edges.numel() else 0)
            return self._spread(self.lin(x), edges, edge_weight, x.new_ones(x.size(-2), 1))
        if self.num_experts is None:
            raise ConfigError("no hypergraph", "edge_index", "an incidence [2, nnz], or num_experts")
        incidence, weight = self._structure(level, edge_weight)
        if not self.fuse:
            return self._pass_messages(self.lin(x), expert, incidence.amax(dim=1), weight)
        if not self.attention and is_bare(self.lin):
            return mix_linear(x, self._operator(incidence, weight, expert).to(x.dtype), self.lin.weight)
        z = self.lin(x)
        operator = self._operator(incidence, weight, expert, *self._scores(z))
        return apply_operator(operator.to(x.dtype), z)

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

    def _scores(self, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What each row adds to the scores of the two passes, as itself and within ``e_h``."""
        vectors = [v for v in (self.gather_attention, self.spread_attention) if v is not None]
        if not vectors:
            return None, None
        # One product for both: it reads every row once.
        first, *rest = (z @ torch.cat(vectors).t()).split(2, dim=-1)  # [*, nodes, 2]
        if rest:
            return first, rest[0]
        return (first, None) if self.spread_attention is None else (None, first)

    def _operator(
        self,
        incidence: Tensor,
        weight: Tensor,
        expert: Tensor | None,
        gather: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> Tensor:
        """Both passes as one matrix ``[nodes, nodes]``, or one per token ``[*, nodes, nodes]``."""
        if self.pairs:
            table = pair_table(incidence, weight)
            if expert is not None:
                table = look_up(table, expert.unsqueeze(-1), expert.unsqueeze(-2))
            return fold_pairs(table, gather, spread)
        if expert is not None:
            incidence, weight = acting(incidence, weight, expert, complete=self.strategy != "all")
        return fold_incidence(incidence, weight, gather, spread)

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
            count = self.propagate(self.hyperedge_index, x=(present, None), scale=None, share=None, size=size)
            weight = weight * (count.squeeze(-1) == self.incidence.sum(dim=0))
        out = self._spread(nodes, self.hyperedge_index, weight, present)
        out = torch.cat([out, torch.zeros_like(out[..., :1, :])], dim=-2)
        return out.gather(-2, place.expand_as(x))

    def _spread(self, x: Tensor, edges: Tensor, weight: Tensor, present: Tensor) -> Tensor:
        """Expert -> hyperedge -> expert; ``present [*, nodes, 1]`` is how far a node is a member."""
        weight = weight.to(x.dtype).unsqueeze(-1)  # [*, H, 1]
        back_edges = edges.flip(0)
        there, back = (x.size(-2), weight.size(-2)), (weight.size(-2), x.size(-2))
        members = self.propagate(edges, x=(present, None), scale=None, share=None, size=there)
        total = self.propagate(edges, x=(x, None), scale=(present, None), share=None, size=there)
        centre = mean = total / torch.where(members == 0, torch.ones_like(members), members)
        if self.gather_attention is not None:
            own, part = self.gather_attention.unsqueeze(-1)  # [F, 1]
            share = self.edge_updater(
                edges, score=(x @ own, centre @ part), factor=(present, None), size=there
            )
            mean = self.propagate(edges, x=(x, None), scale=None, share=share, size=there)
        if self.spread_attention is not None:
            own, part = self.spread_attention.unsqueeze(-1)
            share = self.edge_updater(
                back_edges, score=(centre @ part, x @ own), factor=(weight, None), size=back
            )
            out = self.propagate(back_edges, x=(mean, None), scale=None, share=share, size=back)
            return out * (present > 0)
        degree = self.propagate(back_edges, x=(weight, None), scale=None, share=None, size=back)
        out = self.propagate(back_edges, x=(mean, None), scale=(weight, None), share=None, size=back)
        return out / torch.where(degree == 0, torch.ones_like(degree), degree) * (present > 0)

    def edge_update(
        self, score_i: Tensor, score_j: Tensor, factor_j: Tensor, index: Tensor, size_i: int
    ) -> Tensor:
        score = log_factor(F.leaky_relu(score_i + score_j, SLOPE), factor_j)  # [*, nnz, 1]
        return softmax(score, index, num_nodes=size_i, dim=-2) * (factor_j > 0)

    def message(self, x_j: Tensor, scale_j: OptTensor, share: OptTensor) -> Tensor:
        if share is not None:
            return share * x_j
        return x_j if scale_j is None else scale_j * x_j

    def __repr__(self) -> str:
        attention = ", attention=True" if self.attention else ""
        return (
            f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts}, "
            f"strategy={self.strategy!r}{attention})"
        )
