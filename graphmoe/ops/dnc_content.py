"""Content weights and allocation of a differentiable neural computer, each with its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-6
"""Added to a square norm, so that the cosine with an empty slot is 0 and has a gradient."""
USAGE_EPS = 1e-6
"""Least usage that the product over freer slots sees: a product of zeros would have no gradient."""


class Content(NamedTuple):
    """What one content lookup keeps for its gradient.

    Attributes:
        weights: ``[B, R, S]``.
        logits: Strength times cosine, ``[B, R, S]``.
        scaled: Keys times strength over norm, ``[B, R, W]``.
        inverse_key: One over the norm of each key, ``[B, R, 1]``.
        inverse_memory: One over the norm of each slot, ``[B, 1, S]``.
    """

    weights: Tensor
    logits: Tensor
    scaled: Tensor
    inverse_key: Tensor
    inverse_memory: Tensor


def inverse_norm(x: Tensor) -> Tensor:
    """One over the safe norm of the last dimension, which stays as one channel."""
    return (x * x).sum(dim=-1, keepdim=True).add_(NORM_EPS).rsqrt_()


def content(memory: Tensor, keys: Tensor, strengths: Tensor, inverse_memory: Tensor) -> Content:
    """Softmax over slots of strength times cosine.

    Args:
        memory: ``[B, S, W]``.
        keys: ``[B, R, W]``.
        strengths: ``[B, R, 1]``.
        inverse_memory: ``[B, 1, S]``.
    """
    inverse_key = inverse_norm(keys)
    scaled = keys * (inverse_key * strengths)
    logits = torch.bmm(scaled, memory.mT).mul_(inverse_memory)
    return Content(torch.softmax(logits, dim=-1), logits, scaled, inverse_key, inverse_memory)


def content_backward(
    grad: Tensor, found: Content, memory: Tensor, keys: Tensor, strengths: Tensor, grad_memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and strengths ``[B, R, 1]``; adds that of the memory to ``grad_memory``."""
    weights, logits, scaled, inverse_key, inverse_memory = found
    grad_logits = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    aligned = grad_logits * logits
    towards = grad_logits.mul_(inverse_memory)
    # The derivative of a cosine is the other vector less the part along its own.
    by_key, by_slot = aligned.sum(dim=-1, keepdim=True), aligned.sum(dim=1, keepdim=True)
    grad_keys = torch.bmm(towards, memory).mul_(inverse_key * strengths)
    grad_keys.addcmul_(by_key * inverse_key * inverse_key, keys, value=-1)
    grad_memory.baddbmm_(towards.mT, scaled)
    grad_memory.addcmul_((by_slot * inverse_memory).mul_(inverse_memory).mT, memory, value=-1)
    return grad_keys, by_key.div_(strengths)


class Allocation(NamedTuple):
    """What an allocation keeps for its gradient.

    Attributes:
        weights: ``[B, S]``.
        order: Slots by ascending usage, ``[B, S]`` int64.
        usage: Usages in that order.
        positive: The same, at least :data:`USAGE_EPS`.
        product: Product of all smaller usages, in that order.
    """

    weights: Tensor
    order: Tensor
    usage: Tensor
    positive: Tensor
    product: Tensor


def allocation(usage: Tensor) -> Allocation:
    """Write weights of the freest slots for ``usage [B, S]``; of equal ones the first counts as freer."""
    ordered, order = torch.sort(usage, dim=-1, stable=True)
    positive = ordered.mul(1 - USAGE_EPS).add_(USAGE_EPS)
    product = positive.cumprod(dim=-1).div_(positive)
    weights = torch.empty_like(usage).scatter_(-1, order, product.addcmul(product, ordered, value=-1))
    return Allocation(weights, order, ordered, positive, product)


def allocation_backward(grad: Tensor, found: Allocation) -> Tensor:
    """Gradient of the usage, ``[B, S]``."""
    _, order, usage, positive, product = found
    grad_product = grad.gather(-1, order).mul_(product)
    weighted = grad_product.addcmul(grad_product, usage, value=-1)
    # Summed from behind: a difference of two large sums would drown the small ones that count.
    behind = weighted.flip(-1).cumsum_(dim=-1).flip(-1).sub_(weighted)
    grad_usage = behind.div_(positive).mul_(1 - USAGE_EPS).sub_(grad_product)
    return torch.empty_like(usage).scatter_(-1, order, grad_usage)
