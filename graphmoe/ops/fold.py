"""Folding a hypergraph over experts into one small matrix, and applying it to the rows of tokens."""

import torch
from torch import Tensor


def fold_incidence(incidence: Tensor, weight: Tensor) -> Tensor:
    r"""Fold :math:`D^{-1} B W C^{-1} B^\top` into one matrix per set of nodes.

    ``C`` is the size of a hyperedge, ``D`` the weight of the hyperedges around a node; a node
    without hyperedges gets a row of zeros.

    Args:
        incidence: ``B [*, nodes, H]``, 1 where the node is a member, less for a partial one.
        weight: Hyperedge weights ``[*, H]``; 0 removes a hyperedge.

    Returns:
        ``[*, nodes, nodes]`` (target, source); rows sum to 1, or to 0 for an isolated node.
    """
    weighted = incidence * weight.unsqueeze(-2)  # [*, nodes, H]
    size = incidence.sum(dim=-2, keepdim=True)
    degree = weighted.sum(dim=-1, keepdim=True)
    operator = weighted @ (incidence / _nonzero(size)).transpose(-1, -2)
    return operator / _nonzero(degree)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def apply_operator(operator: Tensor, x: Tensor) -> Tensor:
    """Mix the rows of every token.

    Args:
        operator: ``[nodes, nodes]`` shared by all tokens (one GEMM over all of them), or
            ``[N, nodes, nodes]``, one per token.
        x: ``[N, nodes, F]``.

    Returns:
        ``[N, nodes, F]``.
    """
    if operator.dim() == 3:
        return operator @ x
    by_node = x.movedim(-2, 0)
    mixed = operator @ by_node.reshape(by_node.size(0), -1)
    return mixed.view_as(by_node).movedim(0, -2)
