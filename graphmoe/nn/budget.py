"""Fewer edges where they carry little: what a token's budget leaves of its routing."""

import torch
from torch import Tensor

from graphmoe.nn.route import sort_routes
from graphmoe.typing import Routing


def in_token_order(routing: Routing, k: int) -> tuple[Tensor, Tensor]:
    """Expert (or slot) of each place of tokens with ``k`` places, and its weight, each ``[N, k]``."""
    expert = torch.empty_like(routing.expert).scatter(0, routing.perm, routing.expert)
    weight = torch.zeros_like(routing.weight).scatter(0, routing.perm, routing.weight)
    return expert.view(-1, k), weight.view(-1, k)


def within_budget(routing: Routing, floor: float | Tensor, budget: Tensor | None = None) -> Routing:
    r"""Take away edges whose weight times the budget of their token lies under a floor,

    .. math::
        b_n w_{nr} < \phi,

    except for the strongest of each token. What is left is scaled to the sum that the weights had.

    Args:
        routing: Edges of tokens that have equally many places.
        floor: :math:`\phi`; 0 keeps all edges.
        budget: ``b``, ``[N]``, without a gradient here; ``None``: 1.
    """
    if not routing.token.numel():
        return routing
    expert, weight = in_token_order(routing, routing.k)
    worth = weight.detach() if budget is None else weight.detach() * budget.detach().unsqueeze(1)
    places = torch.arange(routing.k, device=weight.device)
    strongest = places == worth.max(dim=1, keepdim=True).indices
    present = expert < routing.num_experts
    keep = present & (strongest | (worth >= floor))
    kept = weight * keep
    scale = weight.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1e-20)
    return sort_routes(torch.where(keep, expert, routing.num_experts), kept * scale, routing.logits)
