r"""Losses of mixture-of-experts layers: routing records in, one scalar out.

None of them is scaled; the caller multiplies by its own coefficient.
"""

import torch
from torch import Tensor

from graphmoe.typing import NEVER, Routing


def load(routing: Routing) -> Tensor:
    """Fraction of the present routing edges that each expert serves, ``[E]``; 0 without edges."""
    counts = routing.ptr.diff().to(routing.logits.dtype)
    return counts / counts.sum().clamp(min=1)


def balance(routing: Routing, mask: Tensor | None = None) -> Tensor:
    r"""Load-balancing loss :math:`E \sum_e f_e p_e` of the `Switch Transformer
    <https://arxiv.org/abs/2101.03961>`_; 1 when the load is uniform.

    ``f`` is the fraction of edges of an expert (no gradient), ``p`` its mean router probability;
    ``E`` counts the experts that can be chosen, so dormant ghosts do not move the minimum.

    Args:
        routing: Routing edges; masked tokens have none.
        mask: Tokens that count, ``[N]`` bool.
    """
    probability = _token_mean(routing.logits.softmax(dim=-1), mask)  # [E]
    reachable = (routing.logits.detach() > NEVER / 2).any(dim=0).sum()
    return reachable * (load(routing).detach() * probability).sum()


def router_z(routing: Routing, mask: Tensor | None = None) -> Tensor:
    r"""Router z-loss :math:`\frac1N\sum_n \mathrm{logsumexp}(z_n)^2` of `ST-MoE
    <https://arxiv.org/abs/2202.08906>`_."""
    return _token_mean(routing.logits.logsumexp(dim=-1).square(), mask)


def gram(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosine Gram matrix ``[E, E]`` of the rows of ``[E, D]``; a zero row is orthogonal to all."""
    # sqrt(sum + eps^2) instead of a clamped norm: its gradient at a zero row is 0, not 1e5.
    norm = (rows.square().sum(dim=-1, keepdim=True) + eps**2).sqrt()
    unit = rows / norm
    return unit @ unit.t()


def orthogonality(rows: Tensor, live: Tensor | None = None) -> Tensor:
    r"""Mean squared off-diagonal cosine :math:`\operatorname{mean}_{i\ne j} G_{ij}^2`.

    Args:
        rows: One vector an expert, ``[E, ...]`` (flattened): its first weight matrix, or its mean
            output.
        live: Experts that count, ``[E]`` bool. With fewer than two the loss is 0.
    """
    squared = gram(rows.flatten(1)).square()
    pair = ~torch.eye(rows.size(0), dtype=torch.bool, device=rows.device)
    if live is not None:
        pair = pair & live.unsqueeze(0) & live.unsqueeze(1)
    return (squared * pair).sum() / pair.sum().clamp(min=1)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(dim=0)
    keep = mask.flatten().to(values.dtype)
    return (values * keep.view(-1, *[1] * (values.dim() - 1))).sum(dim=0) / keep.sum().clamp(min=1)
