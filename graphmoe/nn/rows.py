"""The rows of a mixture: those of every expert, those of the chosen ones, and figures of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.nn.expert import ExpertConv
from graphmoe.typing import Record, Routing


def outputs_of_all(experts: ExpertConv, x: Tensor, **options) -> Tensor:
    """Output of every expert on every token ``x [N, D]``, ``[N, E, D]``; ``options`` go to the experts."""
    tokens, count = x.size(0), experts.num_experts
    row = torch.arange(tokens * count, device=x.device)
    token, expert = row % max(tokens, 1), row.div(max(tokens, 1), rounding_mode="floor")
    ptr = torch.arange(count + 1, device=x.device) * tokens
    rows = experts(x, torch.stack([token, row]), expert, ptr, token * count + expert, **options)
    return rows.view(count, tokens, x.size(1)).transpose(0, 1)


def outputs_of_chosen(outputs: Tensor, expert: Tensor) -> Tensor:
    """Rows ``[N, k, D]`` of the experts ``[N, k]`` among those of all, ``[N, E, D]``; 0 if absent."""
    present = (expert < outputs.size(1)).unsqueeze(-1)
    index = expert.clamp(max=outputs.size(1) - 1).unsqueeze(-1).expand(-1, -1, outputs.size(2))
    return torch.where(present, outputs.gather(1, index), 0.0)


def expert_means(rows: Tensor, routing: Routing) -> Tensor:
    """Mean of the rows ``[R, D]`` of each expert, ``[E, D]``; 0 for an expert without rows."""
    ids = torch.arange(routing.num_experts, device=rows.device).unsqueeze(1)
    member = (routing.expert == ids).to(rows.dtype)  # [E, R]: one small GEMM, with a cheap gradient
    return member @ rows / member.sum(dim=1, keepdim=True).clamp(min=1)


def unexplained_by(x: Tensor, slots: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Variance over tokens of ``x - mean_e o_e``, averaged over channels, and its mean ``[D]``; no
    gradient."""
    with torch.no_grad():
        count = present.sum(dim=1, keepdim=True)
        residual = x - slots.sum(dim=1) / count.clamp(min=1)
        keep = (count > 0).to(x.dtype)  # masked tokens do not count
        total = keep.sum().clamp(min=1)
        centre = (residual * keep).sum(dim=0) / total
        return ((residual - centre).square() * keep).sum(dim=0).div(total).mean(), centre


def equal_weights(expert: Tensor, num_experts: int, level: Tensor | None) -> Tensor:
    """Weights ``[N, k]`` of a mean over the present rows; a ghost counts as far as its level goes."""
    level = torch.ones(num_experts, device=expert.device) if level is None else level
    weight = F.pad(level, (0, 1)).index_select(0, expert.flatten()).view(expert.shape)
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-30)


def attention_of_experts(record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """What experts, and behind them their mediator if there is one, have heard of one another.

    Args:
        record: Of a layer that kept its attention.

    Returns:
        ``heard [n, n]`` (listening, speaking): sum over tokens of the attention, mean over rounds and heads;
        ``met [n, n]``: tokens that have both; ``uniform [N]``: attention of a node to each if it listens to
        all of its token alike, 0 for a token without experts. All but the counts are float64.
    """
    attention = record.attention.double().mean(dim=(0, 2))  # [N, nodes, nodes]
    routing = record.routing
    experts, slots = routing.num_experts, routing.k
    # A place for every expert, one for the mediator, and one for whatever is absent.
    node = torch.empty_like(routing.expert).scatter_(0, routing.perm, routing.expert).view(-1, slots)
    present = node < experts
    node = torch.where(present, node, experts + 1)
    if attention.size(1) > slots:
        served = present.any(dim=1, keepdim=True)
        node = torch.cat([node, torch.where(served, experts, experts + 1)], dim=1)
    size = experts + 2
    pair = (node.unsqueeze(2) * size + node.unsqueeze(1)).flatten()  # (target, source)
    heard = attention.new_zeros(size * size).index_add(0, pair, attention.flatten())
    met = torch.bincount(pair, minlength=size * size)
    kept = slice(experts + (attention.size(1) > slots))
    nodes = (node <= experts).sum(dim=1)  # [N]
    uniform = torch.where(nodes > 0, 1 / nodes.clamp(min=1), 0).double()
    return heard.view(size, size)[kept, kept], met.view(size, size)[kept, kept], uniform
