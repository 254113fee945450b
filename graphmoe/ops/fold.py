"""Folding a hypergraph over experts into one small matrix, and applying it to the rows of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.2
"""Negative slope of the attention scores."""


def fold_incidence(
    incidence: Tensor, weight: Tensor, gather: Tensor | None = None, spread: Tensor | None = None
) -> Tensor:
    r"""Fold :math:`D^{-1} B W C^{-1} B^\top` into one matrix per set of nodes.

    ``C`` is the size of a hyperedge, ``D`` the weight of the hyperedges around a node; a node
    without hyperedges gets a row of zeros. Attention replaces the shares of the members in a hyperedge
    (``gather``) and of the hyperedges around a node (``spread``) by a softmax of
    ``LeakyReLU(own_i + centre_h)``, ``centre_h`` a mean over the members; zero scores change nothing.

    Args:
        incidence: ``B [*, nodes, H]``, 1 where the node is a member, less for a partial one.
        weight: Hyperedge weights ``[*, H]``; 0 removes a hyperedge.
        gather: Scores ``[*, nodes, 2]`` of each node, own and as part of a centre, or ``None``.
        spread: The same for the second pass.

    Returns:
        ``[*, nodes, nodes]`` (target, source); rows sum to 1, or to 0 for an isolated node.
    """
    weight = weight.unsqueeze(-2)
    mean = incidence / _nonzero(incidence.sum(dim=-2, keepdim=True))  # [*, nodes, H]
    if spread is None:
        weighted = incidence * weight
        there = weighted / _nonzero(weighted.sum(dim=-1, keepdim=True))
    else:
        there = weighted_softmax(_scores(spread, mean), weight * (incidence > 0), dim=-1)
    if gather is not None:
        mean = weighted_softmax(_scores(gather, mean), incidence, dim=-2)
    return there @ mean.transpose(-1, -2)


def fold_pairs(weight: Tensor, gather: Tensor | None = None, spread: Tensor | None = None) -> Tensor:
    """What :func:`fold_incidence` gives where every hyperedge is a pair, without its ``H`` columns.

    Args:
        weight: Weight of the hyperedge of two nodes, ``[*, nodes, nodes]``, symmetric, with a diagonal
            of zeros; 0 where there is none.
        gather: As in :func:`fold_incidence`.
        spread: As in :func:`fold_incidence`.

    Returns:
        ``[*, nodes, nodes]`` (target, source).
    """
    # All in the order (source, target): sums and softmaxes over the last of few columns are slow.
    if spread is None:
        there = weight / _nonzero(weight.sum(dim=-2, keepdim=True))
    else:
        there = weighted_softmax(_pair_scores(spread), weight, dim=-2)
    if gather is None:
        other = 0.5 * there
        own = other.sum(dim=-2)
    else:
        score = _pair_scores(gather)
        # The softmax of two scores is the sigmoid of their difference.
        other = there * torch.sigmoid(score.transpose(-1, -2) - score)
        own = (there - other).sum(dim=-2)
    return (other + torch.diag_embed(own)).transpose(-1, -2)


def acting(
    incidence: Tensor, weight: Tensor, expert: Tensor, *, complete: bool = True
) -> tuple[Tensor, Tensor]:
    """The hypergraph over experts as each token sees it.

    Args:
        incidence: ``[E, H]``.
        weight: Hyperedge weights ``[H]``.
        expert: Expert ids ``[*, nodes]``, ``E`` for an absent row.
        complete: A hyperedge acts only where all its members are present.

    Returns:
        Incidence ``[*, nodes, H]`` and weights ``[*, H]``, 0 where a hyperedge does not act.
    """
    absent = incidence.new_zeros(1, incidence.size(1))
    member = torch.cat([incidence, absent]).index_select(0, expert.flatten())
    member = member.view(*expert.shape, incidence.size(1))
    if not complete:
        return member, weight.expand(*expert.shape[:-1], -1)
    return member, weight * (member.sum(dim=-2) == incidence.sum(dim=0))


def pair_table(incidence: Tensor, weight: Tensor) -> Tensor:
    """Weights ``[E, E]`` of hyperedges that are pairs, by expert; parallel pairs add up."""
    table = (incidence * weight) @ incidence.t()
    return table * (1 - torch.eye(table.size(0), dtype=table.dtype, device=table.device))


def look_up(table: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """``table[target, source]`` for ids of any two shapes that broadcast; 0 where an id is ``E`` (absent)."""
    # index_select on the flat table: the backward of table[i, j] is a slow index_put.
    flat = target * (table.size(0) + 1) + source
    return F.pad(table, (0, 1, 0, 1)).flatten().index_select(0, flat.flatten()).view(flat.shape)


def weighted_softmax(score: Tensor, factor: Tensor, dim: int) -> Tensor:
    """Softmax of ``score + log(factor)``: exactly 0 where ``factor`` is 0, even if it is 0 everywhere."""
    there = factor > 0
    return log_factor(score, factor).softmax(dim=dim) * there


def log_factor(score: Tensor, factor: Tensor) -> Tensor:
    """``score + log(factor)``, with a finite value and no gradient where ``factor`` is 0."""
    there = factor > 0
    # Far below any score: a softmax must not prefer an edge that is not there to one that is.
    never = torch.finfo(score.dtype).min / 4
    return torch.where(there, score + torch.where(there, factor, 1).log(), never)


def _scores(score: Tensor, mean: Tensor) -> Tensor:
    own, part = score.split(1, dim=-1)  # [*, nodes, 1]
    return F.leaky_relu(own + part.transpose(-1, -2) @ mean, SLOPE)  # [*, nodes, H]


def _pair_scores(score: Tensor) -> Tensor:
    """Score of a node (second) in its pair with another one (first), ``[*, nodes, nodes]``."""
    own, part = score.split(1, dim=-1)
    half = 0.5 * part
    return F.leaky_relu(half + (own + half).transpose(-1, -2), SLOPE)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def apply_operator(operator: Tensor, x: Tensor) -> Tensor:
    """Mix the rows of every token.

    Args:
        operator: ``[nodes, nodes]`` shared by all tokens, or ``[*, nodes, nodes]``, one per token.
        x: ``[*, nodes, F]``.

    Returns:
        ``[*, nodes, F]``.
    """
    # Expanded by hand: for a shared matrix, matmul would move the rows of x to make one GEMM of it, and
    # moving them takes longer than the small products.
    return operator.expand(*x.shape[:-1], operator.size(-1)) @ x
