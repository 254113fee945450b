"""Which experts serve the same tokens, beside independent choice with the same loads."""

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.typing import Routing


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


def random_coactivation(load: Tensor, *, fixed: bool = True) -> Tensor:
    r"""How often experts would meet if who serves a token did not depend on who else does.

    Each expert tosses a coin of its own for every token, and the tosses with exactly ``k`` heads count; the
    coins are such that every expert serves the share ``load`` of the tokens. A set :math:`S` of ``k``
    experts then has the probability

    .. math::
        P(S) \propto \prod_{e \in S} \omega_e, \qquad \sum_{S \ni e} P(S) = \mathrm{load}_e,

    the distribution of greatest entropy among all with this ``k`` and these loads. Its weights are found by
    the iteration of `Chen, Dempster and Liu <https://doi.org/10.1093/biomet/81.3.457>`_. Where loads are
    equal, two experts meet in ``k (k - 1) / (E (E - 1))`` of all tokens.

    Where tokens differ in their number of experts, all tosses count but those without any head, and two
    experts
    meet in the share :math:`q_i q_j / P`, with :math:`q_e = P\,\mathrm{load}_e` the coin of an expert and
    :math:`P`
    the probability of any head, the root of :math:`P = 1 - \prod_e (1 - P\,\mathrm{load}_e)`.

    Args:
        load: Share of the tokens that each expert serves, ``[E]``: the diagonal of :func:`coactivation`. If
            all tokens have ``k`` experts, it sums to ``k``.
        fixed: Whether all tokens have the same number of experts.

    Returns:
        ``[E, E]`` float64, as :func:`coactivation`.

    Raises:
        ConfigError: A share outside [0, 1], or shares that do not sum to a whole number.
    """
    load = load.double().cpu()
    if not fixed:
        return _independent_pairs(load)
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


def _independent_pairs(load: Tensor) -> Tensor:
    """Pairs among tosses with any head, ``[E, E]``, of coins that give the loads ``[E]`` there."""
    some = 1.0
    for _ in range(200):  # the largest root is approached from above
        some = 1 - float((1 - load * some).prod())
    together = load.unsqueeze(0) * load.unsqueeze(1) * some
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
