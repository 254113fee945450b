"""How much experts differ, beside what vectors without any meaning give."""

from functools import lru_cache

import torch
from torch import Tensor

from graphmoe.loss import gram
from graphmoe.metrics.values import at_least_one, live_experts, to_float


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
    rows, live = to_float(rows), live_experts(rows, live)
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
    at_least_one(channels=channels, samples=samples)
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
    at_least_one(num_tokens=num_tokens, channels=channels)
    generator = torch.Generator().manual_seed(seed)
    similarity = linear_cka(torch.randn(4, num_tokens, channels, generator=generator))
    return ((similarity.sum() - similarity.diagonal().sum()) / 12).item()
