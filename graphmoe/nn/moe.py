from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing

from graphmoe.errors import ConfigError
from graphmoe.nn.couple import CoupleConv, HyperCoupleConv
from graphmoe.nn.expert import ExpertConv, GhostGate
from graphmoe.nn.fuse import ProjectedFusion, SumFusion
from graphmoe.nn.route import DenseRouter, TopKRouter
from graphmoe.nn.rows import equal_weights, expert_means, unexplained_by
from graphmoe.typing import Record, Routing

COUPLINGS = ("none", "gnn", "hyper")
FUSIONS = ("sum", "mean")


class MoELayer(nn.Module):
    r"""A mixture of experts on the nodes of any graph: route, apply, couple, return.

    .. math::
        y_n = \sum_{r \in n} w_r\, h_r, \qquad h = \mathrm{couple}(o), \qquad o_r = f_{e_r}(x_n)

    ``couple`` never crosses tokens: rows of one token exchange messages, then return to it. With
    ``gnn`` it is :class:`CoupleConv`; with ``hyper`` it is ``h + GELU(HyperCoupleConv(h))``; both are
    repeated ``coupling_layers`` times. ``w`` are the routing weights, or equal ones with
    ``fusion="mean"``, where the router learns from its auxiliary losses only.

    Dropped into a GNN between two convolutions it is an MoE GNN::

        conv, moe = GCNConv(34, 64), MoELayer(64, num_experts=8, k=2)
        x = moe(conv(x, edge_index).relu())

    Args:
        in_channels: Channels ``D`` in and out.
        num_experts: Primary experts.
        k: Experts a token, ``1 <= k <= num_experts``; ``k = num_experts`` means every live expert.
        hidden_channels: Channels ``F`` inside an expert. Default: ``4 * D``.
        activation: ``swiglu`` or ``gelu``.
        coupling: ``none``, ``gnn`` or ``hyper``.
        coupling_layers: Rounds of coupling. Default: 2 for ``gnn``, 1 for ``hyper``.
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
        fusion: ``sum`` (with routing weights) or ``mean`` of a token's rows.
        fusion_projection: Pass the fused rows through :class:`ProjectedFusion`.
        num_ghosts: Ghost experts beside the primary ones; asleep until a training callback wakes them.
        ghost_threshold, ghost_rate, ghost_window: See :class:`GhostGate`.
        track_outputs: Put mean expert outputs into the record (always done with ghosts or coupling).

    Shapes:
        - **input:** ``x [*, D]``; ``batch [*]``: the graph of each node, for routers whose choice
          depends on it (top-k does not); ``mask [*]`` bool: False for nodes without edges, whose
          output is 0.
        - **output:** ``[*, D]``; with ``return_record=True`` also a :class:`~graphmoe.typing.Record`.

    Raises:
        ConfigError: ``k`` outside ``[1, num_experts]``, an unknown coupling, fusion, activation or
            strategy, a strategy that needs more rows than ``k``, hyperedges that do not fit the experts.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        *,
        hidden_channels: int | None = None,
        activation: str = "swiglu",
        coupling: str = "none",
        coupling_layers: int | None = None,
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
        if coupling not in COUPLINGS:
            raise ConfigError("unknown coupling", "coupling", f"one of {', '.join(COUPLINGS)}", coupling)
        if fusion not in FUSIONS:
            raise ConfigError("unknown fusion", "fusion", f"one of {', '.join(FUSIONS)}", fusion)
        if coupling_layers is not None and coupling_layers < 1:
            raise ConfigError("too few rounds", "coupling_layers", "at least 1", coupling_layers)
        if num_experts < 1:
            raise ConfigError("no expert", "num_experts", "at least 1", num_experts)
        if num_ghosts < 0:
            raise ConfigError("negative number of ghosts", "num_ghosts", "at least 0", num_ghosts)
        if not 1 <= k <= num_experts:
            # Ghosts do not count: all of them may be asleep.
            raise ConfigError("k must not exceed the number of experts", "k", f"1 <= k <= {num_experts}", k)
        total = num_experts + num_ghosts
        self.in_channels, self.num_experts, self.num_ghosts = in_channels, num_experts, num_ghosts
        self.k = total if k == num_experts else k
        self.coupling, self.track_outputs = coupling, track_outputs or coupling != "none" or num_ghosts > 0
        if k == num_experts:
            self.router = DenseRouter(in_channels, total, scale=routed_scaling_factor)
        else:
            self.router = TopKRouter(in_channels, total, k, scale=routed_scaling_factor)
        self.experts = ExpertConv(
            in_channels, hidden_channels or 4 * in_channels, total, activation=activation
        )
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
        rounds = coupling_layers or (2 if coupling == "gnn" else 1)
        if coupling == "gnn":
            couplers = [CoupleConv(in_channels, total) for _ in range(rounds)]
        elif coupling == "hyper":
            options = {
                "strategy": strategy,
                "hyperedges": hyperedges,
                "attention": hyperedge_attention,
                "max_hyperedges": max_hyperedges,
                "k": self.k,
                "num_ghosts": num_ghosts,
            }
            couplers = [HyperCoupleConv(in_channels, total, **options) for _ in range(rounds)]
        else:
            couplers = []
        self.couplers = nn.ModuleList(couplers)
        norms = [nn.RMSNorm(in_channels, eps=1e-6) for _ in couplers] if coupling_norm else []
        self.coupling_norms = nn.ModuleList(norms)
        self.coupling_start = coupling_scale
        self.register_parameter("coupling_scale", None)
        if couplers and coupling_scale is not None:
            self.coupling_scale = nn.Parameter(torch.full((rounds,), float(coupling_scale)))
        self.mean = fusion == "mean"
        self.fusion = ProjectedFusion(in_channels) if fusion_projection else SumFusion()
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
        return_record: bool = False,
    ) -> Tensor | tuple[Tensor, Record]:
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # [N, D]
        batch = None if batch is None else batch.flatten()
        mask = None if mask is None else mask.flatten()
        level = None if self.ghosts is None else self.ghosts()
        offset = None if self.ghosts is None else self.ghosts.offset()
        routing = self.router(x, batch=batch, mask=mask, offset=offset)

        if self.experts.fuse and not self.track_outputs and not self.mean and type(self.fusion) is SumFusion:
            out = self.experts.reduce(x, routing.token, routing.weight, routing.ptr, routing.perm)
            mean = unexplained = centre = None
        else:
            rows = self._rows(x, routing)  # [R, D], sorted by expert
            row = torch.arange(routing.perm.numel(), device=x.device)
            inverse = torch.empty_like(row).scatter_(0, routing.perm, row)  # place -> row
            slots = rows.index_select(0, inverse).view(-1, self.k, x.size(1))  # [N, k, D]
            expert = routing.expert.index_select(0, inverse).view(-1, self.k)
            if self.mean:
                weight = equal_weights(expert, routing.num_experts, level)
            else:
                weight = routing.weight.index_select(0, inverse).view(-1, self.k)
            coupled = self._couple(slots, expert, level)
            out = self.fusion(coupled, edge_weight=weight.to(x.dtype))
            if return_record and self.track_outputs:
                mean = expert_means(rows, routing)
                unexplained, centre = unexplained_by(x, slots, expert < routing.num_experts)
            else:
                mean = unexplained = centre = None
        out = out.view(shape)
        if not return_record:
            return out
        dropped = torch.zeros((), dtype=torch.long, device=x.device)
        return out, Record(routing, mean, None, dropped, unexplained, centre)

    def _rows(self, x: Tensor, routing: Routing) -> Tensor:
        row = torch.arange(routing.token.numel(), device=x.device)
        edges = torch.stack([routing.token, row])
        return self.experts(x, edges, routing.expert, routing.ptr, routing.perm)

    def _couple(self, slots: Tensor, expert: Tensor, level: Tensor | None) -> Tensor:
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
        return slots

    def connections(self) -> Tensor | None:
        """Strength of each expert connection in the forward pass, ``[E, E]`` (target, source):
        mean over coupling layers; ``None`` without coupling."""
        if not self.couplers:
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
