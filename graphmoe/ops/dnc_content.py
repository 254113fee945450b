"""Content weights and allocation of a differentiable neural computer, each with its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-6
"""Added to a square norm, so that the cosine with an empty slot is 0 and has a gradient."""
USAGE_EPS = 1e-6
"""Least usage that the product over freer slots sees: its logarithm must not be infinite."""


class Content(NamedTuple):
    """What one content lookup keeps for its gradient.

    Attributes:
        weights: ``[B, R, S]``.
        cosine: ``[B, R, S]``.
        inverse_key: One over the norm of each key, ``[B, R, 1]``.
        inverse_memory: One over the norm of each slot, ``[B, 1, S]``.
    """

    weights: Tensor
    cosine: Tensor
    inverse_key: Tensor
    inverse_memory: Tensor


def inverse_norm(x: Tensor) -> Tensor:
    """One over the safe norm of the last dimension, which is dropped."""
    return torch.linalg.vecdot(x, x).add_(NORM_EPS).rsqrt_()


def content(memory: Tensor, keys: Tensor, strengths: Tensor, inverse_memory: Tensor) -> Content:
    """Softmax over slots of strength times cosine.

    Args:
        memory: ``[B, S, W]``.
        keys: ``[B, R, W]``.
        strengths: ``[B, R, 1]``.
        inverse_memory: ``[B, 1, S]``.
    """
    inverse_key = inverse_norm(keys).unsqueeze(-1)
    cosine = torch.bmm(keys * inverse_key, memory.mT).mul_(inverse_memory)
    return Content(torch.softmax(cosine * strengths, dim=-1), cosine, inverse_key, inverse_memory)


def content_backward(
    grad: Tensor, found: Content, memory: Tensor, keys: Tensor, strengths: Tensor, grad_memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and strengths ``[B, R]``; adds that of the memory to ``grad_memory``."""
    weights, cosine, inverse_key, inverse_memory = found
    grad_logits = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    grad_strengths = torch.linalg.vecdot(grad_logits, cosine)
    grad_cosine = grad_logits.mul_(strengths)
    aligned = grad_cosine * cosine
    towards = grad_cosine.mul_(inverse_key).mul_(inverse_memory)
    # The derivative of a cosine is the other vector less the part along its own.
    own = aligned.sum(dim=-1, keepdim=True).mul_(inverse_key).mul_(inverse_key)
    grad_keys = torch.bmm(towards, memory).addcmul_(own, keys, value=-1)
    along = aligned.sum(dim=1, keepdim=True).mul_(inverse_memory).mul_(inverse_memory)
    grad_memory.baddbmm_(towards.mT, keys).addcmul_(along.mT, memory, value=-1)
    return grad_keys, grad_strengths


class Allocation(NamedTuple):
    """What an allocation keeps for its gradient.

    Attributes:
        weights: ``[B, S]``.
        order: Slots by ascending usage, ``[B, S]`` int64.
        usage: Usages in that order.
        product: Product of all smaller usages, in that order.
    """

    weights: Tensor
    order: Tensor
    usage: Tensor
    product: Tensor


def allocation(usage: Tensor) -> Allocation:
    """Write weights of the freest slots for ``usage [B, S]``; of equal ones the first counts as freer."""
    ordered, order = torch.sort(usage, dim=-1, stable=True)
    logs = ordered.mul(1 - USAGE_EPS).add_(USAGE_EPS).log_()
    product = logs.cumsum(dim=-1).sub_(logs).exp_()
    weights = torch.empty_like(usage).scatter_(-1, order, product.addcmul(product, ordered, value=-1))
    return Allocation(weights, order, ordered, product)


def allocation_backward(grad: Tensor, found: Allocation) -> Tensor:
    """Gradient of the usage, ``[B, S]``."""
    _, order, usage, product = found
    grad_product = grad.gather(-1, order).mul_(product)
    behind = grad_product.addcmul(grad_product, usage, value=-1)
    # Summed from behind: a difference of two large sums would drown the small ones that count.
    behind = behind.flip(-1).cumsum_(dim=-1).flip(-1).sub_(behind)
    scale = usage.mul(1 - USAGE_EPS).add_(USAGE_EPS).reciprocal_().mul_(1 - USAGE_EPS)
    return torch.empty_like(usage).scatter_(-1, order, behind.mul_(scale).sub_(grad_product))
