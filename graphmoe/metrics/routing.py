"""How a router spreads tokens over experts, beside what a blind one gives."""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.metrics.values import LN2, at_least_one, live_experts, to_float
from graphmoe.typing import NEVER, Routing

MOST_DRAWN = 1 << 16
"""Tokens times experts up to which a random batch is drawn, not calculated."""


class RouterCounts(NamedTuple):
    """What can be counted of one routing; counts of batches, or of processes, add up field by field.

    Sum over the processes of a run with
    ``RouterCounts(*map(graphmoe.loss.over_ranks, count_routes(routing)))``; measures that are no sums, such
    as the largest load, have to be taken of the sum.

    Attributes:
        served: Edges that each expert serves, ``[E]`` int64.
        reachable: Tokens that could have chosen each expert, ``[E]`` int64; 0 for a ghost asleep.
        tokens: Tokens that count, int64 scalar.
        unserved: Those without any edge, int64 scalar.
        dropped: Edges that a capacity limit dropped, int64 scalar.
        entropy: Sum over tokens of the entropy of their probabilities, bits, float64 scalar.
    """

    served: Tensor
    reachable: Tensor
    tokens: Tensor
    unserved: Tensor
    dropped: Tensor
    entropy: Tensor


@torch.no_grad()
def count_routes(
    routing: Routing, mask: Tensor | None = None, overflow: Tensor | None = None
) -> RouterCounts:
    """Count the edges and tokens of a routing.

    Args:
        routing: Routing edges; masked tokens have none.
        mask: Tokens that count, ``[N]`` bool, such as ``record.mask``: padding does not.
        overflow: Edges that a capacity limit dropped, ``[N, E]`` bool, such as ``record.overflow``.
    """
    tokens, experts = routing.logits.shape
    device = routing.logits.device
    mask = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask.flatten()
    edges = torch.zeros(tokens, dtype=torch.long, device=device)
    edges = edges.index_add(0, routing.token, (routing.expert < experts).long())
    return RouterCounts(
        served=routing.ptr.diff(),
        reachable=((routing.logits > NEVER / 2) & mask.unsqueeze(1)).sum(dim=0),
        tokens=mask.sum(),
        unserved=((edges == 0) & mask).sum(),
        dropped=torch.zeros((), dtype=torch.long, device=device) if overflow is None else overflow.sum(),
        entropy=(_entropy(routing).double() * mask).sum(),
    )


def router_metrics(counts: RouterCounts) -> dict[str, Tensor]:
    """How a router spreads its tokens; compare ``max_violation`` with :func:`random_max_violation`.

    Args:
        counts: Of one batch and process, or the sum of several.

    Returns:
        ``load [E]``, the share of all edges that each expert serves, and scalars: ``max_violation``,
        ``load_entropy`` (in [0, 1]) and ``dead_experts`` (reachable ones without any edge);
        ``load_p50`` and ``load_p95``, quantiles over reachable experts of their number of edges relative
        to the mean; ``routing_entropy``, bits a token; ``edges_per_token``; ``unserved``, the share of tokens
        without any edge; ``drop_rate``, the share of edges wanted that were dropped. All are 0 without
        tokens.
    """
    served, live = counts.served.double(), counts.reachable > 0
    edges = served.sum()
    mean = edges / live.sum().clamp(min=1)
    relative = torch.where(live, served / torch.where(mean > 0, mean, 1), torch.nan)
    quantiles = relative.nanquantile(relative.new_tensor([0.5, 0.95])).nan_to_num(0.0)
    tokens = counts.tokens.clamp(min=1)
    return {
        "load": served / edges.clamp(min=1),
        "max_violation": max_violation(served, live),
        "load_entropy": load_entropy(served, live),
        "dead_experts": (live & (served == 0)).sum(),
        "load_p50": quantiles[0],
        "load_p95": quantiles[1],
        "routing_entropy": counts.entropy / tokens,
        "edges_per_token": edges / tokens,
        "unserved": counts.unserved / tokens,
        "drop_rate": counts.dropped / (edges + counts.dropped).clamp(min=1),
    }


@lru_cache(maxsize=256)
def random_max_violation(num_tokens: int, num_experts: int, k: int, *, samples: int = 64) -> float:
    r""":func:`max_violation` to expect of a batch whose tokens take ``k`` experts blindly, each set as likely
    as any other.

    No router that looks at one token at a time can do better, however even its loads are in the long run:
    this is the sampling floor. Tokens of one text resemble one another, so that theirs is higher.

    Batches of up to 65,536 tokens times experts are drawn ``samples`` times. In larger ones loads are as good
    as
    normal, and with :math:`m_E` the expected largest of ``E`` standard normal numbers it is

    .. math::
        m_E \sqrt{\frac{1 - p}{N p} \cdot \frac{E}{E - 1}}, \qquad p = k / E

    Raises:
        ConfigError: No token, expert or sample, or ``k`` outside ``[1, E]``.
    """
    at_least_one(num_tokens=num_tokens, num_experts=num_experts, k=k, samples=samples)
    if k > num_experts:
        raise ConfigError("more than there are", "k", f"at most {num_experts}", k)
    if k == num_experts:
        return 0.0
    if num_tokens * num_experts > MOST_DRAWN:
        share = k / num_experts
        spread = (1 - share) / (num_tokens * share) * num_experts / (num_experts - 1)
        return _largest_normal(num_experts) * math.sqrt(spread)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(samples):
        chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(k, dim=1).indices
        total += max_violation(chosen.flatten().bincount(minlength=num_experts)).item()
    return total / samples


def _largest_normal(count: int) -> float:
    """Expected largest of ``count`` independent standard normal numbers, by the trapezoid rule."""
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    distribution = torch.special.ndtr(x) ** count
    # E[X] = integral over x > 0 of 1 - F(x), less that over x < 0 of F(x).
    tail = torch.where(x > 0, 1 - distribution, -distribution)
    return torch.trapezoid(tail, x).item()


def routing_entropy(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """How undecided the router is: entropy of a token's distribution over experts, mean over tokens.

    Unreachable experts (logit :data:`~graphmoe.typing.NEVER`) contribute 0. An undecided router of
    ``E`` reachable experts gives ``log2(E)``.

    Args:
        routing: Routing edges.
        mask: Tokens that count, ``[N]`` bool.

    Returns:
        Scalar, bits; 0 without tokens.
    """
    bits = _entropy(routing)
    keep = torch.ones_like(bits) if mask is None else mask.flatten().to(bits.dtype)
    return (bits * keep).sum() / keep.sum().clamp(min=1)


def _entropy(routing: Routing) -> Tensor:
    """Entropy of the distribution of each token over experts, ``[N]``, bits."""
    logits = to_float(routing.logits)
    # lse - sum p z equals -sum p log p, whose gradient is NaN where p = 0.
    nats = logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return nats.clamp(min=0) / LN2


def load_entropy(load: Tensor, live: Tensor | None = None) -> Tensor:
    """Entropy of the load as a fraction of its largest value, the log of the number of live experts.

    Args:
        load: Share or number of edges of each expert, ``[E]``.
        live: Experts that count, ``[E]`` bool.

    Returns:
        Scalar in [0, 1]: 1 where all live experts serve equally many edges (also where there is but
        one), 0 where one of several serves all, or nobody any.
    """
    live = live_experts(load, live)
    load = torch.where(live, to_float(load), 0)
    share = load / load.sum().clamp(min=torch.finfo(load.dtype).tiny)
    nats = -torch.xlogy(share, share).sum()
    count = live.sum()
    fraction = nats / count.clamp(min=2).to(load.dtype).log()
    return torch.where(count > 1, fraction, (load.sum() > 0).to(load.dtype)).clamp(0, 1)


def max_violation(load: Tensor, live: Tensor | None = None) -> Tensor:
    """Largest load over mean load, minus 1, among live experts: 0 is balanced, ``E - 1`` is one expert.

    Args:
        load: Share or number of edges of each expert, ``[E]``.
        live: Experts that count, ``[E]`` bool.

    Returns:
        Scalar; 0 without load.
    """
    live = live_experts(load, live)
    load = torch.where(live, to_float(load), 0)
    mean = load.sum() / live.sum().clamp(min=1)
    return torch.where(mean > 0, load.max() / torch.where(mean > 0, mean, 1) - 1, 0)


@lru_cache(maxsize=256)
def random_drop_rate(num_tokens: int, num_experts: int, k: int, capacity_factor: float) -> float:
    r"""Share of the edges that a capacity drops if every token takes ``k`` experts at random.

    .. math::
        \frac{E}{N k}\, \mathbb{E}\bigl[(X - C)_+\bigr], \qquad X \sim \mathrm{Binomial}(N, k / E), \quad
        C = \Bigl\lceil \mathrm{capacity\_factor} \cdot \frac{N k}{E} \Bigr\rceil

    Loads vary even then, so a capacity factor of 1 drops some edges; an even load drops none.

    Raises:
        ConfigError: No token or expert, or ``k`` outside ``[1, E]``.
    """
    at_least_one(num_tokens=num_tokens, num_experts=num_experts, k=k)
    if k > num_experts:
        raise ConfigError("more than there are", "k", f"at most {num_experts}", k)
    if k == num_experts:  # everybody serves everybody
        return float(max(0, 1 - Fraction(math.ceil(Fraction(str(capacity_factor)) * num_tokens), num_tokens)))
    capacity = math.ceil(Fraction(str(capacity_factor)) * num_tokens * k / num_experts)
    edges = torch.arange(num_tokens + 1, dtype=torch.float64)
    total = torch.tensor(num_tokens + 1.0, dtype=torch.float64).lgamma()
    ways = total - (edges + 1).lgamma() - (num_tokens - edges + 1).lgamma()
    share = k / num_experts
    probability = (ways + edges * math.log(share) + (num_tokens - edges) * math.log1p(-share)).exp()
    over = ((edges - capacity).clamp(min=0) * probability).sum().item()
    return over / (num_tokens * share)
