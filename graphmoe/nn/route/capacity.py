"""A limit to how many edges an expert serves: what overflows is dropped, and known."""

from fractions import Fraction

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.nn.route.router import sizes, sort_routes
from graphmoe.typing import NEVER, Routing


def limit_capacity(
    routing: Routing, capacity_factor: float, batch: Tensor | None = None
) -> tuple[Routing, Tensor]:
    r"""Leave every expert at most

    .. math::
        C = \left\lceil \mathrm{capacity\_factor} \cdot \frac{\text{present edges}}{E} \right\rceil

    edges, exactly (no rounding of the product, no power of two). Of an expert with more, those of lowest
    weight are dropped; of equal ones, those of later tokens. What is left of a token's weights is not
    rescaled: a token that lost an expert gets less from the layer, and one that lost all passes by the
    residual.

    Whether an edge is dropped depends on other tokens, later ones and those of other sequences included, so
    models that must not see the future apply this in training only.

    Args:
        routing: Edges, sorted by expert. Masked tokens have none and do not count.
        capacity_factor: 1 leaves room for exactly the mean load.
        batch: Graph of each token, ``[N]``: capacity is then counted, and exceeded, within each graph.

    Returns:
        The edges that are left, and those that were dropped, ``[N, E]`` bool. Kept and dropped ones together
        are the present ones.

    Raises:
        ConfigError: A capacity factor that is not a finite positive number.
    """
    check_capacity_factor(capacity_factor)
    tokens, experts = routing.logits.shape
    # Ghosts asleep serve nobody and leave no room to others.
    live = (routing.logits.detach() > NEVER / 2).any(dim=0).sum()
    present = routing.expert < experts
    graph = torch.zeros_like(routing.token) if batch is None else batch.index_select(0, routing.token)
    edges = sizes(graph, present)  # of the graph of each edge
    ratio = Fraction(str(capacity_factor))
    # Integers: 1.1 * 10 is more than 11 in floating point.
    over = ratio.denominator * live.clamp(min=1)
    capacity = (ratio.numerator * edges + over - 1).div(over, rounding_mode="floor")

    by_weight = routing.weight.detach().sort(descending=True, stable=True).indices
    group = graph * (experts + 1) + routing.expert
    ordered, by_group = group.index_select(0, by_weight).sort(stable=True)
    place = torch.arange(len(ordered), device=graph.device)
    rank = torch.empty_like(place).scatter_(
        0, by_weight.index_select(0, by_group), place - torch.searchsorted(ordered, ordered)
    )
    dropped = present & (rank >= capacity)

    hit = torch.where(dropped, routing.expert, experts)
    overflow = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=graph.device)
    overflow[routing.token, hit] = True
    expert = torch.where(dropped, experts, routing.expert)
    weight = routing.weight * ~dropped
    inverse = torch.empty_like(place).scatter_(0, routing.perm, place)
    slots = (max(tokens, 1), -1) if tokens else (0, 1)
    kept = sort_routes(
        expert.index_select(0, inverse).view(slots),
        weight.index_select(0, inverse).view(slots),
        routing.logits,
    )
    return kept, overflow[:, :experts]


def check_capacity_factor(capacity_factor: float) -> None:
    """Refuse what is no capacity factor."""
    if not 0 < capacity_factor < float("inf"):
        raise ConfigError(
            "capacity cannot be used", "capacity_factor", "a finite number > 0", capacity_factor
        )
