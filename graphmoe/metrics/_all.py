r"""Measures of specialisation and routing, each beside what chance alone would give.

Pure functions of tensors; nothing here is trained on. Entropies and information are in bits.
"""

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from graphmoe.errors import ConfigError, GraphError
from graphmoe.loss import gram
from graphmoe.typing import Routing

LN2 = math.log(2)


def specialisation(rows: Tensor, live: Tensor | None = None) -> Tensor:
    r"""How much experts differ: by direction and by how little all of them have in common.

    .. math::
        \Bigl(1 - \operatorname{mean}_{i \ne j} |\cos(c_i, c_j)|\Bigr)
        \Bigl(1 - \frac{E\,\|\bar o\|^2}{\sum_e \|o_e\|^2}\Bigr), \qquad c_e = o_e - \bar o

    The raw :math:`1 - |\cos(o_i, o_j)|` proves nothing: two random vectors of ``D`` channels have
    :math:`|\cos| \approx \sqrt{2 / (\pi D)}`, so untrained experts score 0.95 at 256 channels, and
    more channels score higher. Here the mean of all experts is taken away first, and its share of
    their energy (1 for identical experts, ``1 / E`` for orthogonal ones of equal length) is taken
    off the result. Compare with :func:`random_specialisation`: centred vectors lean away from one
    another (:math:`\cos \approx -1 / (E - 1)`), so ``E`` unrelated experts have about
    ``(1 - 1 / (E - 1)) * (1 - 1 / E)``: 0.5 for 4, 0.75 for 8, and never 1.

    Two centred vectors are always opposite, whatever the experts do; with exactly two live experts
    the first factor is left out.

    Args:
        rows: One vector an expert, ``[E, D]``, such as its mean output.
        live: Experts that count, ``[E]`` bool.

    Returns:
        Scalar in [0, 1], at least float32; 0 for identical experts, for rows of zeros and for fewer
        than two live experts.
    """
    rows, live = _float(rows), _live(rows, live)
    rows = torch.where(live.unsqueeze(1), rows, 0)
    count = live.sum()
    centred = torch.where(live.unsqueeze(1), rows - rows.sum(dim=0) / count.clamp(min=1), 0)
    # 1 - share, without the difference of two equal numbers that identical experts would give.
    energy = rows.square().sum()
    distinct = centred.square().sum() / torch.where(energy > 0, energy, 1)
    cosine = gram(centred, eps=1e-12).abs()
    apart = 1 - (cosine.sum() - cosine.diagonal().sum()) / (count * (count - 1)).clamp(min=1)
    return torch.where(count == 2, distinct, apart.clamp(min=0) * distinct) * (count > 1)


@lru_cache(maxsize=256)
def random_specialisation(num_experts: int, channels: int, *, samples: int = 64, seed: int = 0) -> float:
    """:func:`specialisation` of independent Gaussian vectors, mean over ``samples`` draws.

    Raises:
        ConfigError: No channel or no sample.
    """
    _at_least_one(channels=channels, samples=samples)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(samples):
        rows = torch.randn(num_experts, channels, generator=generator, dtype=torch.float64)
        total += specialisation(rows).item()
    return total / samples


def linear_cka(outputs: Tensor) -> Tensor:
    r"""Similarity of what experts compute on the same tokens: linear `CKA
    <https://arxiv.org/abs/1905.00414>`_ of every pair.

    .. math::
        \frac{\|Y_i^\top Y_j\|_F^2}{\|Y_i^\top Y_i\|_F\, \|Y_j^\top Y_j\|_F}

    with columns centred over tokens; rotating or scaling an expert's output changes nothing.
    Compare with :func:`random_cka`: few tokens and many channels look alike by chance. That is a low
    bar, as Gaussian outputs do not depend on the token: experts that were never trained share their
    input and are several times more alike.

    Args:
        outputs: ``[E, N, D]``: every expert applied to the same tokens.

    Returns:
        ``[E, E]`` float64, symmetric, in [0, 1]: 1 on the diagonal, 0 beside an expert whose output
        is the same for all tokens.
    """
    outputs = outputs.double()
    centred = outputs - outputs.mean(dim=1, keepdim=True)
    # Centring a constant leaves rounding noise, which has a direction: it must not be compared.
    varies = centred.flatten(1).norm(dim=1) > 1e-12 * outputs.flatten(1).norm(dim=1)
    cross = outputs.new_zeros(outputs.size(0), outputs.size(0))
    for i in varies.nonzero().flatten().tolist():
        for j in varies[: i + 1].nonzero().flatten().tolist():
            cross[i, j] = cross[j, i] = (centred[i].t() @ centred[j]).square().sum()
    norm = cross.diagonal().sqrt()
    norm = norm.unsqueeze(0) * norm.unsqueeze(1)
    return cross / torch.where(norm > 0, norm, 1)


@lru_cache(maxsize=64)
def random_cka(num_tokens: int, channels: int, seed: int = 0) -> float:
    """:func:`linear_cka` of independent Gaussian outputs ``[N, D]``, mean over the pairs of four.

    Raises:
        ConfigError: No token or no channel.
    """
    _at_least_one(num_tokens=num_tokens, channels=channels)
    generator = torch.Generator().manual_seed(seed)
    similarity = linear_cka(torch.randn(4, num_tokens, channels, generator=generator))
    return ((similarity.sum() - similarity.diagonal().sum()) / 12).item()


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
    logits = _float(routing.logits)
    # lse - sum p z equals -sum p log p, whose gradient is NaN where p = 0.
    nats = logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)  # [N]
    keep = torch.ones_like(nats) if mask is None else mask.flatten().to(nats.dtype)
    return (nats.clamp(min=0) * keep).sum() / keep.sum().clamp(min=1) / LN2


def load_entropy(load: Tensor, live: Tensor | None = None) -> Tensor:
    """Entropy of the load as a fraction of its largest value, the log of the number of live experts.

    Args:
        load: Share or number of edges of each expert, ``[E]``.
        live: Experts that count, ``[E]`` bool.

    Returns:
        Scalar in [0, 1]: 1 where all live experts serve equally many edges (also where there is but
        one), 0 where one of several serves all, or nobody any.
    """
    live = _live(load, live)
    load = torch.where(live, _float(load), 0)
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
    live = _live(load, live)
    load = torch.where(live, _float(load), 0)
    mean = load.sum() / live.sum().clamp(min=1)
    return torch.where(mean > 0, load.max() / torch.where(mean > 0, mean, 1) - 1, 0)


def serving(routing: Routing) -> Tensor:
    """Which experts serve which token, ``[N, E]`` bool."""
    tokens, experts = routing.logits.shape
    serves = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=routing.logits.device)
    serves[routing.token, routing.expert] = True
    return serves[:, :-1]


def coactivation(routing: Routing) -> Tensor:
    """How often experts serve the same token: share of the tokens that both of them serve.

    Compare with :func:`random_coactivation`: busy experts meet often, whoever chooses them.

    Args:
        routing: Routing edges; tokens without any do not count.

    Returns:
        ``[E, E]`` float64, symmetric, in [0, 1]; on the diagonal the share of tokens that the expert serves.
    """
    serves = serving(routing).double()
    return serves.t() @ serves / serves.any(dim=1).sum().clamp(min=1)


def random_coactivation(load: Tensor) -> Tensor:
    r"""How often experts would meet if who serves a token did not depend on who else does.

    Each expert tosses a coin of its own for every token, and the tosses with exactly ``k`` heads count; the
    coins are such that every expert serves the share ``load`` of the tokens. A set :math:`S` of ``k``
    experts then has the probability

    .. math::
        P(S) \propto \prod_{e \in S} \omega_e, \qquad \sum_{S \ni e} P(S) = \mathrm{load}_e,

    the distribution of greatest entropy among all with this ``k`` and these loads. Its weights are found by
    the iteration of `Chen, Dempster and Liu <https://doi.org/10.1093/biomet/81.3.457>`_. Where loads are
    equal, two experts meet in ``k (k - 1) / (E (E - 1))`` of all tokens.

    Args:
        load: Share of the tokens that each expert serves, ``[E]``: the diagonal of :func:`coactivation`. It
            sums to ``k``.

    Returns:
        ``[E, E]`` float64, as :func:`coactivation`.

    Raises:
        ConfigError: A share outside [0, 1], or shares that do not sum to a whole number.
    """
    load = load.double().cpu()
    k = round(load.sum().item())
    if not bool(((load > -1e-6) & (load < 1 + 1e-6)).all()) or abs(load.sum().item() - k) > 1e-4:
        raise ConfigError("no load of k experts a token", "load", "shares that sum to k", load.tolist())
    # Whoever serves all tokens or none has a weight without bounds, and meets the others all the same.
    chosen = (load > 1e-6) & (load < 1 - 1e-6)
    free = k - int((load >= 1 - 1e-6).sum())
    together = load.unsqueeze(0) * load.unsqueeze(1)
    if free > 0 and chosen.any():
        part = _pairs_of_sets(load[chosen], free)
        where = chosen.nonzero().flatten()
        together[where.unsqueeze(1), where] = part
    return together.fill_diagonal_(0) + load.diag()


def _pairs_of_sets(load: Tensor, k: int) -> Tensor:
    """Probability of each pair in a set of ``k``, ``[M, M]``, of the loads ``[M]`` strictly inside (0, 1)."""
    count = load.numel()
    if 2 * k > count:
        # The same of those left out, which are fewer: weights of experts nearly always chosen settle slowly.
        return load.unsqueeze(0) + load.unsqueeze(1) - 1 + _pairs_of_sets(1 - load, count - k)
    others = 1 - torch.eye(count, dtype=load.dtype)
    weight = load / (1 - load)
    for _ in range(1000):
        # An expert is in the set with weight_e * (sets of k - 1 of the others) / (sets of k).
        without = _sums_of_sets(weight * others, k - 1)  # [M]
        served = weight * without
        served = k * served / served.sum()
        if (served - load).abs().max() < 1e-9:
            break
        weight = load / without
        weight = weight / weight.log().mean().exp()  # a common factor changes nothing but may overflow
    if k < 2:
        return torch.zeros(count, count, dtype=load.dtype)
    two = weight * others.unsqueeze(0) * others.unsqueeze(1)  # [M, M, M]: all but two
    pairs = weight.unsqueeze(0) * weight.unsqueeze(1) * _sums_of_sets(two, k - 2)
    return pairs / _sums_of_sets(weight, k)


def _sums_of_sets(weight: Tensor, k: int) -> Tensor:
    """Sum over all sets of ``k`` entries of ``weight [*, M]`` of their products, ``[*]``."""
    sums = [torch.ones_like(weight[..., 0])] + [torch.zeros_like(weight[..., 0]) for _ in range(k)]
    for entry in weight.unbind(dim=-1):
        for size in range(k, 0, -1):
            sums[size] = sums[size] + entry * sums[size - 1]
    return sums[k]


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
    _at_least_one(num_tokens=num_tokens, num_experts=num_experts, k=k)
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


def mutual_information(expert: Tensor, token_class: Tensor, num_experts: int, num_classes: int) -> Tensor:
    """Information that the expert of an edge carries about the class of its token, from counts.

    Counting overestimates it, the more the fewer edges there are: compare with
    :func:`shuffled_mutual_information`.

    Args:
        expert: Expert of each edge, ``[R]`` int64; absent edges (``E``) do not count.
        token_class: Class of the token of each edge, ``[R]`` int64.
        num_experts: ``E``.
        num_classes: Number of classes.

    Returns:
        Scalar float64, bits; 0 without edges.

    Raises:
        GraphError: Not one class an edge, or an expert or class outside its range.
    """
    expert, token_class = _edges(expert, token_class, num_experts, num_classes)
    cell = token_class * num_experts + expert
    counts = torch.bincount(cell, minlength=num_classes * num_experts).view(num_classes, num_experts)
    joint = counts.double() / max(expert.numel(), 1)
    sides = joint.sum(dim=0), joint.sum(dim=1)
    nats = torch.xlogy(joint, joint).sum() - sum(torch.xlogy(side, side).sum() for side in sides)
    return nats.clamp(min=0) / LN2


def shuffled_mutual_information(
    expert: Tensor,
    token_class: Tensor,
    num_experts: int,
    num_classes: int,
    *,
    seed: int = 0,
    samples: int = 8,
) -> Tensor:
    """:func:`mutual_information` with experts permuted among the present edges, mean over ``samples``.

    What a router of the same load gives that does not look at the token, finite-sample bias included.
    A router that was never trained does look at it, so it is already above this value.

    Raises:
        GraphError: As :func:`mutual_information`.
        ConfigError: No sample.
    """
    _at_least_one(samples=samples)
    expert, token_class = _edges(expert, token_class, num_experts, num_classes)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(expert.numel(), generator=generator) for _ in range(samples)]
    shuffled = [expert[order.to(expert.device)] for order in orders]
    values = [mutual_information(other, token_class, num_experts, num_classes) for other in shuffled]
    return torch.stack(values).mean()


def _edges(expert: Tensor, token_class: Tensor, num_experts: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The present edges."""
    if expert.shape != token_class.shape:
        raise GraphError("one class an edge", "token_class", tuple(expert.shape), tuple(token_class.shape))
    limits = {"expert": (expert, num_experts), "token_class": (token_class, num_classes - 1)}
    for name, (ids, most) in limits.items():
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= most:
            raise GraphError("id out of range", name, f"0 .. {most}", [int(ids.min()), int(ids.max())])
    present = expert < num_experts
    return expert[present], token_class[present]


def _float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _live(values: Tensor, live: Tensor | None) -> Tensor:
    return torch.ones(values.size(0), dtype=torch.bool, device=values.device) if live is None else live


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError("too small", name, "at least 1", number)
