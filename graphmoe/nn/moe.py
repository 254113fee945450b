from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing

from graphmoe.errors import ConfigError
from graphmoe.graph import one_end
from graphmoe.nn.expert import ExpertConv, FeedForward, GhostGate, IterativeExpert
from graphmoe.nn.fuse import GatedFusion, SumFusion
from graphmoe.nn.lazy import lazy_channels
from graphmoe.nn.resolver import resolve_coupling, resolve_experts, resolve_fusion, resolve_router
from graphmoe.nn.route import (
    ContextualRouter,
    DenseRouter,
    ExpertChoiceRouter,
    limit_capacity,
    spread,
)
from graphmoe.nn.route.capacity import check_capacity_factor
from graphmoe.nn.rows import (
    equal_weights,
    expert_means,
    outputs_of_all,
    outputs_of_chosen,
    unexplained_by,
)
from graphmoe.typing import Record, Routing

_NO_GHOSTS = {
    "contextual": "a router that listens to every expert would hear those asleep",
    "expert_choice": "experts that sleep would keep their share of the tokens",
}


@lazy_channels
class MoELayer(nn.Module):
    r"""A mixture of experts on the nodes of any graph: route, apply, couple, return.

    .. math::
        y_n = \sum_{r \in n} w_r\, h_r, \qquad h = \mathrm{couple}(o), \qquad o_r = f_{e_r}(x_n)

    ``couple`` never crosses tokens: rows of one token exchange messages, then return to it. With
    ``gnn`` it is :class:`CoupleConv`; with ``hyper`` it is ``h + GELU(HyperCoupleConv(h))``; with ``collab``
    it is :class:`CollabConv`, whose mediator, if it has one, returns through :class:`GatedFusion`. All are
    repeated ``coupling_layers`` times. ``w`` are the routing weights, or equal ones with
    ``fusion="mean"``, where the router learns from its auxiliary losses only.

    Dropped into a GNN between two convolutions it is an MoE GNN::

        conv, moe = GCNConv(34, 64), MoELayer(64, num_experts=8, k=2)
        x = moe(conv(x, edge_index).relu())

    Args:
        in_channels: Channels ``D`` in and out; ``-1``: those of the first input: see
            :func:`~graphmoe.nn.lazy.lazy_channels`.
        num_experts: Primary experts.
        k: Experts a token, ``1 <= k <= num_experts``; ``k = num_experts`` means every live expert.
        hidden_channels: Channels ``F`` inside an expert. Default: ``4 * D``.
        activation: ``swiglu`` or ``gelu``.
        num_shared_experts: Experts beside the others that serve every node with weight 1, as one
            :class:`FeedForward` of their joint width; they do not take part in coupling.
        reasoning_steps: Passes of :class:`IterativeExpert`; 0: plain experts, which are applied once.
        expert_density: Edges of an expert, as a share of the places of its matrices, in (0, 1]: experts are
            :class:`~graphmoe.nn.SparseExpert`, which neither reason in steps nor sleep as ghosts; shared
            experts stay dense. ``None`` or 1: matrices.
        expert_distribution: How the maps of an expert share its edges: ``uniform``, ``er`` or ``erk``.
        router: ``topk``, by what the token is; ``contextual``, by what all experts say about it;
            ``expert_choice``, by the experts, who take exactly their share of the nodes and must see all of
            them; or ``threshold``, its form that does not look at other nodes. A node then has ``k`` experts
            in the mean only.
        router_hidden_channels: Channels of a hidden layer of the router. ``None``: its scores are linear.
        router_kwargs: Further arguments of the router, such as ``{"temperature": 0.5}`` or ``{"bias":
            True}``.
        capacity_factor: In training, drop what an expert is given beyond its share times this factor: see
            :func:`~graphmoe.nn.route.limit_capacity`. ``None``: never.
        coupling: ``none``, ``gnn``, ``hyper`` or ``collab``.
        coupling_layers: Rounds of coupling. Default: 1 for ``hyper``, else 2; 0 of ``collab`` is no coupling.
        coupling_kwargs: Further arguments of the coupler, such as ``{"mediator": True}``.
        coupling_norm: Let the rows talk through an RMSNorm: what they say then has the size that the
            nonlinearity of a coupler needs, however small the outputs of the experts are.
        coupling_scale: Start of a learned factor of what each round of coupling adds to the rows; with
            0 the layer starts as one without coupling. ``None``: no such factor.
        strategy: Hyperedges of ``hyper``: ``all_pairs``, ``all_triplets``, ``all``, or ``custom`` with
            ``hyperedges``: the experts of each, such as ``[[0, 1, 2], [2, 3]]``.
        hyperedge_attention: Let ``hyper`` weigh the members of a hyperedge by attention.
        max_hyperedges: Most hyperedges that ``hyper`` may have.
        routed_scaling_factor: What the routing weights of a token sum to. Weights that sum to 1 make the
            output of ``k`` experts ``k`` times smaller than that of a dense layer of their width, and it
            then takes long to grow.
        fusion: ``sum`` (with routing weights) or ``mean`` of a token's rows, or ``gated``: see
            :class:`GatedFusion`.
        fusion_projection: Pass the fused rows through :class:`ProjectedFusion`.
        num_ghosts: Ghost experts beside the primary ones; asleep until a training callback wakes them.
        ghost_threshold, ghost_rate, ghost_window: See :class:`GhostGate`.
        track_outputs: Put mean expert outputs into the record (always done with ghosts or coupling).

    Shapes:
        - **input:** ``x [*, D]``; ``batch [*]``: the graph of each node, for ``expert_choice``, whose experts
          then choose in each graph as if it were alone, and for the capacity limit; ``mask [*]`` bool: False
          for nodes without edges, whose output is 0; ``rounds`` and ``steps``: other numbers of rounds of
          ``collab`` and of passes of the experts than those the layer was made with; ``thin``: what takes
          some edges of a :class:`~graphmoe.typing.Routing` away.
        - **output:** ``[*, D]``; with ``return_record=True`` also a :class:`~graphmoe.typing.Record`.

    Raises:
        ConfigError: ``k`` outside ``[1, num_experts]``, an unknown router, coupling, fusion, activation or
            strategy, a strategy that needs more rows than ``k``, hyperedges that do not fit the experts,
            options that exclude one another.
        GraphError: A pair of sources and targets instead of nodes.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        *,
        hidden_channels: int | None = None,
        activation: str = "swiglu",
        num_shared_experts: int = 0,
        reasoning_steps: int = 0,
        expert_density: float | None = None,
        expert_distribution: str = "uniform",
        router: str = "topk",
        router_hidden_channels: int | None = None,
        router_kwargs: Mapping | None = None,
        capacity_factor: float | None = None,
        coupling: str = "none",
        coupling_layers: int | None = None,
        coupling_kwargs: Mapping | None = None,
        coupling_norm: bool = False,
        coupling_scale: float | None = None,
        strategy: str = "all_pairs",
        hyperedges: Sequence[Sequence[int]] | None = None,
        hyperedge_attention: bool = False,
        max_hyperedges: int = 4096,
        routed_scaling_factor: float = 1.0,
        fusion: str = "sum",
        fusion_projection: bool = False,
        num_ghosts: int = 0,
        ghost_threshold: float = 0.01,
        ghost_rate: float = 0.01,
        ghost_window: int = 100,
        track_outputs: bool = False,
    ):
        super().__init__()
        if num_experts < 1:
            raise ConfigError("no expert", "num_experts", "at least 1", num_experts)
        if num_ghosts < 0:
            raise ConfigError("negative number of ghosts", "num_ghosts", "at least 0", num_ghosts)
        if not 1 <= k <= num_experts:
            # Ghosts do not count: all of them may be asleep.
            raise ConfigError("k must not exceed the number of experts", "k", f"1 <= k <= {num_experts}", k)
        if capacity_factor is not None:
            check_capacity_factor(capacity_factor)
        if router in _NO_GHOSTS and num_ghosts:
            raise ConfigError(_NO_GHOSTS[router], "num_ghosts", 0, num_ghosts)
        if router == "expert_choice" and capacity_factor is not None:
            what = "experts that choose take exactly their share"
            raise ConfigError(what, "capacity_factor", "None, or one in router_kwargs", capacity_factor)
        if num_ghosts and expert_density not in (None, 1):
            what = "ghosts are slices of stacked matrices"
            raise ConfigError(what, "num_ghosts", "0 with expert_density", num_ghosts)
        if num_shared_experts < 0:
            what = "negative number of experts"
            raise ConfigError(what, "num_shared_experts", "at least 0", num_shared_experts)
        total = num_experts + num_ghosts
        self.in_channels, self.num_experts, self.num_ghosts = in_channels, num_experts, num_ghosts
        self.k = total if k == num_experts else k
        # Rows of a node: where it may have any number of experts, there is a place for each.
        self.slots = total if router in ("threshold", "expert_choice") else self.k
        self.coupling, self.capacity_factor = coupling, capacity_factor
        self.track_outputs = track_outputs or coupling != "none" or num_ghosts > 0
        self.track_attention = False
        options = {"scale": routed_scaling_factor, "hidden_channels": router_hidden_channels}
        options |= router_kwargs or {}
        self.router = resolve_router(router, in_channels, total, self.k, **options)
        hidden_channels = hidden_channels or 4 * in_channels
        self.experts = resolve_experts(
            in_channels, hidden_channels, total, activation=activation, steps=reasoning_steps,
            density=expert_density, distribution=expert_distribution,
        )  # fmt: skip
        self.num_shared_experts, self.shared = num_shared_experts, None
        if num_shared_experts:
            width = num_shared_experts * hidden_channels
            self.shared = FeedForward(in_channels, width, activation=activation)
        self.ghosts = None
        if num_ghosts:
            self.ghosts = GhostGate(
                in_channels,
                total,
                num_ghosts,
                threshold=ghost_threshold,
                rate=ghost_rate,
                window=ghost_window,
            )
        options = dict(coupling_kwargs or {})
        if coupling == "hyper":
            options |= {
                "strategy": strategy,
                "hyperedges": hyperedges,
                "attention": hyperedge_attention,
                "max_hyperedges": max_hyperedges,
                "k": self.slots,
                "num_ghosts": num_ghosts,
            }
        couplers = resolve_coupling(coupling, in_channels, total, layers=coupling_layers, options=options)
        if coupling == "collab" and (coupling_norm or coupling_scale is not None):
            name = "coupling_norm" if coupling_norm else "coupling_scale"
            raise ConfigError("collaboration has norms of its own", name, "not with collab", coupling)
        self.couplers = nn.ModuleList(couplers)
        norms = [nn.RMSNorm(in_channels, eps=1e-6) for _ in couplers] if coupling_norm else []
        self.coupling_norms = nn.ModuleList(norms)
        self.coupling_start = coupling_scale
        self.register_parameter("coupling_scale", None)
        if couplers and coupling_scale is not None:
            self.coupling_scale = nn.Parameter(torch.full((len(couplers),), float(coupling_scale)))
        self.mean = fusion == "mean"
        self.mediator = coupling == "collab" and bool(couplers) and couplers[0].mediator is not None
        self.fusion = resolve_fusion(
            fusion, in_channels, projection=fusion_projection, mediator=self.mediator
        )
        for module in self.modules():
            if isinstance(module, MessagePassing):
                # An Explainer around the user's GNN masks the edges of that graph, not those in here.
                module.explain = False

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.ModuleList):
                for conv in module:
                    conv.reset_parameters()
            elif module is not None:
                module.reset_parameters()
        if self.coupling_scale is not None:
            nn.init.constant_(self.coupling_scale, self.coupling_start)

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        rounds: int | None = None,
        steps: int | None = None,
        thin: Callable[[Routing], Routing] | None = None,
        return_record: bool = False,
    ) -> Tensor | tuple[Tensor, Record]:
        self._check_knobs(rounds, steps)
        x = one_end(x, "a mixture serves nodes, it has no edges")
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # [N, D]
        batch = None if batch is None else batch.flatten()
        mask = None if mask is None else mask.flatten()
        level = None if self.ghosts is None else self.ghosts()
        options = {} if steps is None else {"steps": steps}
        outputs = None
        if isinstance(self.router, ContextualRouter):
            outputs = outputs_of_all(self.experts, x, **options)  # [N, E, D]
        offset = None if self.ghosts is None else self.ghosts.offset()
        routing = self.router(x if outputs is None else outputs, batch=batch, mask=mask, offset=offset)
        routing = routing if thin is None else thin(routing)
        overflow = None
        if self.capacity_factor is not None and self.training:
            routing, overflow = limit_capacity(routing, self.capacity_factor, batch)

        ragged = isinstance(self.router, ExpertChoiceRouter) and batch is None
        mean = unexplained = centre = attention = gate = None
        if self._sums_only and self.experts.fuse:
            perm = None if ragged else routing.perm
            out = self.experts.reduce(x, routing.token, routing.weight, routing.ptr, perm)
        else:
            routing = spread(routing) if ragged else routing
            row = torch.arange(routing.perm.numel(), device=x.device)
            inverse = torch.empty_like(row).scatter_(0, routing.perm, row)  # place -> row
            expert = routing.expert.index_select(0, inverse).view(-1, self.slots)
            if outputs is None:
                edges = torch.stack([routing.token, row])
                rows = self.experts(x, edges, routing.expert, routing.ptr, routing.perm, **options)  # [R, D]
                slots = rows.index_select(0, inverse).view(-1, self.slots, x.size(1))  # [N, k, D]
            else:
                slots = outputs_of_chosen(outputs, expert)
                rows = slots.flatten(0, 1).index_select(0, routing.perm)
            if self.mean:
                weight = equal_weights(expert, routing.num_experts, level)
            else:
                weight = routing.weight.index_select(0, inverse).view(-1, self.slots)
            coupled, attention = self._couple(slots, expert, level, rounds)
            out, gate = self._fuse(coupled, weight.to(x.dtype), x)
            if return_record and self.track_outputs:
                mean = expert_means(rows, routing)
                unexplained, centre = unexplained_by(x, slots, expert < routing.num_experts)
        if self.shared is not None:
            common = self.shared(x)
            out = out + (common if mask is None else torch.where(mask.unsqueeze(1), common, 0.0))
        out = out.view(shape)
        if not return_record:
            return out
        dropped = torch.zeros((), dtype=torch.long, device=x.device) if overflow is None else overflow.sum()
        return out, Record(
            routing, mean, attention, dropped, unexplained, centre, overflow=overflow, gate=gate, mask=mask
        )

    @property
    def _sums_only(self) -> bool:
        """Whether the rows of a token are summed and nothing else, which needs no rows."""
        plain = type(self.experts) is ExpertConv and type(self.fusion) is SumFusion
        chosen_first = not isinstance(self.router, ContextualRouter)
        return plain and chosen_first and not self.track_outputs and not self.mean

    def _couple(
        self, slots: Tensor, expert: Tensor, level: Tensor | None, rounds: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows after they talked, and behind them their mediator, if any; attention, if it is kept."""
        if self.coupling == "collab":
            options = {"expert": expert, "level": level, "rounds": rounds}
            for conv in self.couplers:
                if self.track_attention:
                    return conv(slots, **options, return_attention_weights=True)
                slots = conv(slots, **options)
            return slots, None
        if isinstance(self.router, DenseRouter):
            # Slot e is expert e; absent rows are 0 and stay 0, so all tokens share one operator.
            expert = None
        for index, conv in enumerate(self.couplers):
            spoken = self.coupling_norms[index](slots) if self.coupling_norms else slots
            heard = conv(spoken, expert=expert, level=level)
            scale = None if self.coupling_scale is None else self.coupling_scale[index]
            if self.coupling == "hyper":
                added = F.gelu(heard)
            elif self.coupling_norms or scale is not None:
                added = heard - spoken  # the conv has a residual of its own
            else:
                slots = heard
                continue
            slots = slots + (added if scale is None else scale * added)
        return slots, None

    def _fuse(self, coupled: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What returns to each token, and the share of the mediator in it, if there is one."""
        if not isinstance(self.fusion, GatedFusion):
            return self.fusion(coupled, edge_weight=weight), None
        if not self.mediator:
            return self.fusion(coupled, edge_weight=weight, return_gate=True)
        rows, mediator = coupled[:, :-1], coupled[:, -1]
        return self.fusion(rows, edge_weight=weight, token=x, mediator=mediator, return_gate=True)

    def _check_knobs(self, rounds: int | None, steps: int | None) -> None:
        if rounds is not None and not (self.coupling == "collab" and self.couplers):
            raise ConfigError("there is no collaboration to adjust", "collab_rounds", "None", rounds)
        if steps is not None and not isinstance(self.experts, IterativeExpert):
            raise ConfigError("experts do not reason in steps", "reasoning_steps", "None", steps)

    def connections(self) -> Tensor | None:
        """Strength of each expert connection in the forward pass, ``[E, E]`` (target, source):
        mean over coupling layers; ``None`` without coupling, and for ``collab``, whose connections are
        attention: another for each token."""
        if not self.couplers or self.coupling == "collab":
            return None
        level = None if self.ghosts is None else self.ghosts()
        return torch.stack([conv.connections(level) for conv in self.couplers]).mean(dim=0)

    def ghost_slices(self) -> dict[nn.Parameter, int]:
        """Stacked parameters whose last ``num_ghosts`` slices belong to ghosts."""
        if self.ghosts is None:
            return {}
        stacked = (self.router.weight, self.experts.gate_up_proj, self.experts.down_proj)
        return dict.fromkeys(stacked, self.num_ghosts)

    def extra_repr(self) -> str:
        return f"k={self.k}, coupling={self.coupling!r}, num_ghosts={self.num_ghosts}"


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
