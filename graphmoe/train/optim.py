"""Optimisers with the usual decay groups, updates scaled for slices of stacked parameters, ghosts' rates."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphmoe.checkpoint.shards import is_shard
from graphmoe.errors import ConfigError

GhostPolicy = Literal["level", "inverse", "complementary"]

LARGEST_SCALE = 100.0
"""Most that the update of a ghost is enlarged. What a step did is known only to half a unit in the
last place of the weight, and so an update of ``r`` made out of one of ``r / scale`` is off by up to
``scale * 6e-8`` of the weight. At 100 and ``r = 1e-3`` that is 0.6 % of the update of a weight of 1."""


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW that decays matrices only, see :func:`decay_groups`."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def sgd(
    model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> torch.optim.SGD:
    """Gradient descent with momentum; the decay, of matrices only, is part of the gradient as usual."""
    return torch.optim.SGD(decay_groups(model, weight_decay), lr=learning_rate, momentum=momentum, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of an optimiser: what decays is weights of two or more dimensions outside embeddings
    and expert adjacencies."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        (decay if is_matrix and not name.endswith("adjacency") else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def scale_updates(optimizer: Optimizer, scales: Mapping[nn.Parameter, Callable[[], Tensor]]) -> None:
    """Scale what each optimiser step does to slices of stacked parameters.

    After a step a slice becomes ``old + scale * (new - old)``: 0 freezes it whatever weight decay
    and momentum say, 1 leaves the step as it is, bit for bit. A step of SGD or AdamW is linear in its
    learning rate, so ``r / lr`` is a step at the rate ``r``; above 1 it enlarges the rounding of the
    step, too. Parameter groups cannot split a stacked tensor, Adam ignores scaled gradients, and
    weight decay moves slices whose gradient is 0.

    Args:
        optimizer: Any optimiser; hooks are registered on it.
        scales: For each parameter ``[E, ...]`` a function that returns the scale of each of its
            slices, ``[E]``, at least 0. It is called once before each step.

    Raises:
        ConfigError: A parameter is sharded, so that a process does not hold the slices whole.
    """
    if any(is_shard(parameter) for parameter in scales):
        what = "updates of slices of sharded parameters cannot be scaled"
        raise ConfigError(what, "--parallel", "ddp with --num_ghosts", "fsdp")
    saved: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    def before(*_) -> None:
        for parameter, scale_fn in scales.items():
            scale = scale_fn().to(parameter.device)
            slices = (scale != 1).nonzero().flatten()
            if slices.numel():
                kept = parameter.detach().index_select(0, slices)
                saved[parameter] = (slices, scale.index_select(0, slices), kept)

    def after(*_) -> None:
        with torch.no_grad():
            for parameter, (slices, scale, old) in saved.items():
                new = parameter.index_select(0, slices)
                shape = (-1, *[1] * (parameter.dim() - 1))
                # where, not lerp alone: old + 0 * (new - old) would carry a NaN through.
                moved = torch.where(
                    (scale == 0).view(shape), old, old.lerp(new, scale.to(old.dtype).view(shape))
                )
                parameter.index_copy_(0, slices, moved)
        saved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, slices: Tensor) -> None:
    """Zero the optimiser's moments of some slices ``[n]`` of a stacked parameter.

    Its step counter belongs to the whole tensor and stays. The first updates of a cleared slice are
    therefore smaller than those of a new AdamW, never larger: 0.45 of the rate at betas 0.9 and 0.95.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.index_fill_(0, slices, 0)


def ghost_learning_rate(
    policy: GhostPolicy, lr: float, peak: float, ghost_peak: float, level: Tensor
) -> Tensor:
    r"""Learning rate of each ghost in a step whose primary rate is ``lr``, ``[G]``.

    With :math:`f = \mathrm{lr} / \mathrm{peak}`, at most 1,

    .. math::
        \text{level: } \mathrm{lr} \cdot \mathrm{level} \qquad
        \text{inverse: } \mathrm{lr}_g (1 - f) \cdot \mathrm{level} \qquad
        \text{complementary: } \mathrm{lr}_g \bigl(0.5 (1 - f) + 0.1\bigr) \cdot \mathrm{level}

    but never more than ``LARGEST_SCALE * lr * level``. What is returned is the rate that is really
    applied. Where ``lr`` is below about a hundredth of the peak, in the first steps of a warm-up and
    the last of a schedule that ends at 0, a ghost's rate thus goes to 0 together with ``lr``, and at
    ``lr = 0`` it is 0.

    Args:
        policy: ``level``, ``inverse`` or ``complementary``.
        lr: Primary learning rate of the step.
        peak: Its largest value over the run, above 0; not used by ``level``.
        ghost_peak: The ghosts' own rate :math:`\mathrm{lr}_g`; not used by ``level``.
        level: How far each ghost is there, ``[G]``, 0 to 1.

    Raises:
        ConfigError: See :func:`require_ghost_rates`.
    """
    return lr * ghost_update_scale(policy, lr, peak, ghost_peak, level)


def ghost_update_scale(
    policy: GhostPolicy, lr: float, peak: float, ghost_peak: float, level: Tensor
) -> Tensor:
    """What :func:`scale_updates` needs for a step at ``ghost_learning_rate`` of the same arguments, ``[G]``:
    that rate over ``lr``, and 0 under ``inverse`` and ``complementary`` if ``lr`` is 0."""
    require_ghost_rates(policy, peak, ghost_peak)
    if policy == "level":
        return level  # not lr * level / lr, which is a little off
    if lr <= 0:
        return torch.zeros_like(level)
    missing = max(0.0, 1 - lr / peak)
    share = missing if policy == "inverse" else 0.5 * missing + 0.1
    return min(ghost_peak * share / lr, LARGEST_SCALE) * level


def require_ghost_rates(policy: str, peak: float | None, ghost_peak: float | None) -> None:
    """Refuse what cannot be a schedule of the ghosts' learning rate.

    Args:
        policy: One of :data:`GhostPolicy`.
        peak: Peak of the primary rate, which only ``level`` can do without.
        ghost_peak: The ghosts' own rate, or ``None`` for that peak.

    Raises:
        ConfigError: An unknown policy (``ghost_lr_schedule``), a rate of ghosts that is negative or not
            finite (``ghost_learning_rate``), a peak that is needed and not above 0 (``learning_rate``).
    """
    known = get_args(GhostPolicy)
    if policy not in known:
        what = "unknown schedule of the ghosts' learning rate"
        raise ConfigError(what, "ghost_lr_schedule", f"one of {', '.join(known)}", policy)
    if ghost_peak is not None and not 0 <= ghost_peak < math.inf:
        raise ConfigError(
            "rate of the ghosts cannot be used", "ghost_learning_rate", "finite, >= 0", ghost_peak
        )
    if policy != "level" and (peak is None or not 0 < peak < math.inf):
        raise ConfigError(
            f"the {policy} rate of ghosts is relative to a peak", "learning_rate", "finite, > 0", peak
        )
