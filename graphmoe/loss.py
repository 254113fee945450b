r"""Losses of mixture-of-experts layers: routing records in, one scalar out.

None of them is scaled; the caller multiplies by its own coefficient.
"""

import torch
from torch import Tensor, distributed

from graphmoe.typing import NEVER, MemoryRecord, Record, Routing


def load(routing: Routing) -> Tensor:
    """Fraction of the present routing edges that each expert serves, ``[E]``; 0 without edges."""
    counts = routing.ptr.diff().to(routing.logits.dtype)
    return counts / counts.sum().clamp(min=1)


def wanted(record: Record | MemoryRecord) -> Tensor:
    """Edges that the router gave each expert or slot, ``[E]`` int64: those there are and those a capacity
    limit dropped."""
    counts, overflow = record.routing.ptr.diff(), getattr(record, "overflow", None)
    return counts if overflow is None else counts + overflow.sum(dim=0)


def over_ranks(counts: Tensor) -> Tensor:
    """Sum of ``counts`` over the processes that train together; themselves in a single process.

    A collective: every process has to call it. No gradient passes.
    """
    counts = counts.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts
    total = counts.clone()
    distributed.all_reduce(total)
    return total


def balance(routing: Routing, mask: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    r"""Load-balancing loss :math:`E \sum_e f_e p_e` of the `Switch Transformer
    <https://arxiv.org/abs/2101.03961>`_; 1 when the load is uniform.

    ``f`` is the fraction of edges of an expert (no gradient), ``p`` its mean router probability;
    ``E`` counts the experts that can be chosen, so dormant ghosts do not move the minimum.

    In processes that train together, ``f`` has to be that of all of them, and ``p`` may stay each one's own:
    the mean of their gradients is then the gradient of the loss of all tokens, if each has as many. The mean
    of losses with an ``f`` of each one's own is another loss.

    Args:
        routing: Routing edges; masked tokens have none.
        mask: Tokens that count, ``[N]`` bool.
        counts: Edges of each expert that ``f`` is made of, ``[E]``, such as ``over_ranks(wanted(record))``.
            Default: those of ``routing``.
    """
    probability = _token_mean(routing.logits.softmax(dim=-1), mask)  # [E]
    reachable = (routing.logits.detach() > NEVER / 2).any(dim=0).sum()
    counts = (routing.ptr.diff() if counts is None else counts).to(probability.dtype)
    return reachable * (counts.detach() / counts.sum().clamp(min=1) * probability).sum()


def drop_penalty(routing: Routing, overflow: Tensor) -> Tensor:
    r"""Probability that the router gave to edges which a capacity limit dropped, a mean over all edges that
    it
    wanted: :math:`\frac{1}{R}\sum_{(n, e)\ \mathrm{dropped}} \mathrm{softmax}(z_n)_e`.

    Unlike the number of dropped edges it has a gradient: it teaches the router to prefer others there.

    Args:
        routing: The edges that were kept.
        overflow: The dropped ones, ``[N, E]`` bool.
    """
    total = routing.ptr[-1] + overflow.sum()
    mass = (routing.logits.softmax(dim=-1) * overflow).sum()
    return mass / total.clamp(min=1)


def diversity(attention: Tensor) -> Tensor:
    """Negative entropy of the attention of collaborating rows in nats, a mean over listeners: between
    ``-log(nodes)``, everybody is heard alike, and 0, each hears one only.

    Args:
        attention: ``[*, nodes, nodes]`` (target, source); rows of absent listeners are 0 and do not count.
    """
    # log of a clamped value: the gradient of p log p at 0 is NaN, of entr it is infinite.
    entropy = -(attention * attention.clamp(min=torch.finfo(attention.dtype).tiny).log()).sum(dim=-1)
    listens = attention.detach().sum(dim=-1) > 0
    return -(entropy * listens).sum() / listens.sum().clamp(min=1)


def effective_edges(routing: Routing) -> Tensor:
    r"""How many edges a token in effect has, as a fraction of those it may have:
    :math:`u_n = \frac1k (\sum_r \bar w_{nr}^2)^{-1}` with its weights :math:`\bar w` scaled to sum to 1
    (the inverse participation ratio), ``[N]``: 1 for ``k`` equal ones, ``1 / k`` for one that has all the
    weight, 0 without edges. Unlike the number of edges it has a gradient.
    """
    square = torch.zeros_like(routing.logits[:, 0]).index_add(0, routing.token, routing.weight.square())
    total = torch.zeros_like(square).index_add(0, routing.token, routing.weight)
    present = total > 0
    return present * total.square() / (routing.k * torch.where(present, square, 1.0))


def budget(usage: Tensor, allowed: Tensor, limit: float, mask: Tensor | None = None) -> Tensor:
    r"""What tokens use beyond a limit, and how badly their budgets foretell it:
    :math:`\frac1N\sum_n \mathrm{ReLU}(u_n - \tau) + (b_n - u_n)^2`.

    Args:
        usage: ``u``, ``[N]``, such as :func:`effective_edges`.
        allowed: The budgets ``b``, ``[N]``.
        limit: ``tau``.
        mask: Tokens that count, ``[N]`` bool.
    """
    return _token_mean((usage - limit).relu() + (allowed - usage).square(), mask)


def collision(logits: Tensor, sequence: Tensor, sequences: int, mask: Tensor | None = None) -> Tensor:
    r"""Expected number of other tokens of its sequence that choose the slot of a token,

    .. math::
        \frac1B\sum_b \frac{1}{n_b} \sum_s \Bigl[\Bigl(\sum_{i \in b} p_{is}\Bigr)^2
        - \sum_{i \in b} p_{is}^2\Bigr], \qquad p = \mathrm{softmax}(z),

    if each chose one by the probabilities of its router: 0 if no two share a slot. Sequences without tokens
    that count are left out.

    Args:
        logits: ``z``, ``[N, S]``.
        sequence: Sequence of each token, ``[N]`` in ``[0, B)``.
        sequences: ``B``.
        mask: Tokens that count, ``[N]`` bool.
    """
    probability = logits.softmax(dim=-1)
    count = torch.ones_like(probability[:, 0]) if mask is None else mask.to(probability.dtype)
    probability = probability * count.unsqueeze(1)
    together = probability.new_zeros(sequences, logits.size(1)).index_add(0, sequence, probability)
    alone = probability.new_zeros(sequences).index_add(0, sequence, probability.square().sum(dim=1))
    tokens = count.new_zeros(sequences).index_add(0, sequence, count)
    met = (together.square().sum(dim=1) - alone) / tokens.clamp(min=1)
    return met.sum() / (tokens > 0).sum().clamp(min=1)


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
