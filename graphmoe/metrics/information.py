"""What the expert of a token says about its class, beside experts dealt out at random."""

import torch
from torch import Tensor

from graphmoe.errors import GraphError
from graphmoe.metrics.values import LN2, at_least_one


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
    at_least_one(samples=samples)
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
