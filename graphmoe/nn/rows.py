"""Figures of the rows of a mixture: means, what they leave unexplained, equal weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.typing import Routing


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
