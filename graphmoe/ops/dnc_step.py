"""One step of the memory of a differentiable neural computer, with a gradient of its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graphmoe.ops.dnc_content import (
    Allocation,
    Content,
    allocation,
    allocation_backward,
    content,
    content_backward,
    inverse_norm,
)


def interface_parts(heads: int, width: int) -> tuple[int, ...]:
    """Sizes of the parts of an interface vector, ``W R + 3 W + 5 R + 3`` in all.

    In this order, so that what goes through one function lies together: read keys and the write key, write
    vector, strengths of reads and write, then what opens gates: erase vector, free gates, allocation gate and
    write gate, and last the read modes.
    """
    return (heads + 1) * width, width, heads + 1, width + heads + 2, 3 * heads


class Slots(NamedTuple):
    """Memory ``[B, S, W]``, usage ``[B, S]``, links ``[B, S, S]``, precedence ``[B, S]``, read weights
    ``[B, R, S]`` and write weights ``[B, S]``; or their gradients."""

    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read: Tensor
    write: Tensor


class Kept(NamedTuple):
    """What a step keeps for its gradient beside the slots before and behind it."""

    keys: Tensor  # [B, R + 1, W]
    strengths: Tensor  # [B, R + 1, 1]
    gates: Tensor  # [B, W + R + 2]
    modes: Tensor  # [B, R, 3]
    unfreed: Tensor  # [B, R, S]
    retention: Tensor  # [B, S]
    used: Tensor  # [B, S]
    mixed: Tensor  # [B, S]
    change: Tensor  # [B, S, W]
    stay: Tensor  # [B, S, S]
    rest: Tensor  # [B, 1]
    ways: Tensor  # [B, R, 3, S]
    free_slots: Allocation
    alike: Content
    found: Content


def dnc_step(*inputs: Tensor) -> tuple[Tensor, ...]:
    r"""Write to the memory and read from it, as the interface vector says.

    The equations stand in :mod:`graphmoe.nn.memory`: usage and allocation, content weights, links. About a
    hundred small operations would each cost more in autograd's bookkeeping than in arithmetic; here they
    are one, differentiable once.

    Args:
        inputs: Memory ``[B, S, W]``, usage ``[B, S]``, links ``[B, S, S]`` (later, earlier), precedence
            ``[B, S]``, read weights ``[B, R, S]``, write weights ``[B, S]``, and the interface
            ``[B, W R + 3 W + 5 R + 3]``, see :func:`interface_parts`; all of at least 32 bits.

    Returns:
        The first six after the step, what was read, ``[B, R, W]``, and for pictures, without gradients, the
        allocation gate times the write gate, ``[B, 1]``.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _DNCStep.apply(*inputs)
    slots, reads, kept, _ = forward_step(Slots(*inputs[:6]), inputs[6])
    return *slots, reads, allocates(kept)


class _DNCStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        slots, reads, kept, _ = forward_step(Slots(*inputs[:6]), inputs[6])
        gate = allocates(kept)
        ctx.mark_non_differentiable(gate)
        ctx.save_for_backward(*inputs[:6], *slots, *kept[:12], *kept.free_slots, *kept.alike, *kept.found)
        return *slots, reads, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        contents = Allocation(*tensors[24:29]), Content(*tensors[29:34]), Content(*tensors[34:])
        kept = Kept(*tensors[12:24], *contents)
        own = Slots(*(grad.clone() for grad in grads[:6]))
        slots, interface = backward_step(own, grads[6], Slots(*tensors[:6]), Slots(*tensors[6:12]), kept)
        return *slots, interface


def allocates(kept: Kept) -> Tensor:
    """The allocation gate times the write gate, ``[B, 1]``."""
    return kept.gates[:, -2:-1] * kept.gates[:, -1:]


def forward_step(
    slots: Slots, interface: Tensor, inverse_memory: Tensor | None = None
) -> tuple[Slots, Tensor, Kept, Tensor]:
    """The slots after a step, what was read, what :func:`backward_step` needs, and one over the norm of
    each slot ``[B, 1, S]``, which the next step takes."""
    memory, usage, link, precedence, read, write = slots
    heads, width = read.size(1), memory.size(2)
    keys, vector, strengths, gates, modes = interface.split(interface_parts(heads, width), dim=1)
    keys = keys.unflatten(1, (heads + 1, width))
    strengths = F.softplus(strengths).add_(1).unsqueeze(-1)
    gates = torch.sigmoid(gates)
    erase, free, allocate, open_write = gates.split((width, heads, 1, 1), dim=1)
    modes = torch.softmax(modes.unflatten(1, (heads, 3)), dim=-1)
    # Usage: what was written and not freed by a read head.
    unfreed = (free.unsqueeze(-1) * read).neg_().add_(1)
    retention = unfreed.prod(dim=1)
    used = torch.addcmul(usage + write, usage, write, value=-1)
    new_usage = used * retention
    # Write: to free slots, or to those alike.
    free_slots = allocation(new_usage)
    if inverse_memory is None:
        inverse_memory = inverse_norm(memory).mT
    alike = content(memory, keys[:, heads:], strengths[:, heads:], inverse_memory)
    mixed = torch.lerp(alike.weights.squeeze(1), free_slots.weights, allocate)
    new_write = mixed * open_write
    column = new_write.unsqueeze(-1)
    change = torch.addcmul(vector.unsqueeze(1), memory, erase.unsqueeze(1), value=-1)  # v - M e
    new_memory = torch.addcmul(memory, column, change)
    # Links: which slot was written after which.
    stay = (1 - new_write).unsqueeze(-1) - new_write.unsqueeze(1)
    new_link = torch.mul(link, stay).addcmul_(column, precedence.unsqueeze(1))
    new_link.diagonal(dim1=1, dim2=2).zero_()
    rest = 1 - new_write.sum(dim=-1, keepdim=True)
    new_precedence = torch.addcmul(new_write, rest, precedence)
    # Read: what was written before what was read, what is alike, what was written after it.
    inverse_memory = inverse_norm(new_memory).mT
    found = content(new_memory, keys[:, :heads], strengths[:, :heads], inverse_memory)
    ways = torch.stack((torch.bmm(read, new_link), found.weights, torch.bmm(read, new_link.mT)), dim=2)
    new_read = (modes.unsqueeze(-1) * ways).sum(dim=2)
    kept = Kept(keys, strengths, gates, modes, unfreed, retention, used, mixed, change, stay, rest, ways,
                free_slots, alike, found)  # fmt: skip
    after = Slots(new_memory, new_usage, new_link, new_precedence, new_read, new_write)
    return after, torch.bmm(new_read, new_memory), kept, inverse_memory


def backward_step(
    grads: Slots, grad_reads: Tensor, before: Slots, after: Slots, kept: Kept
) -> tuple[Slots, Tensor]:
    """Gradients of the slots before a step and of its interface; overwrites those of the slots behind it."""
    grad_memory, grad_usage, grad_link, grad_precedence, grad_read, grad_write = grads
    keys, strengths, gates, modes = kept[:4]
    heads, width = modes.size(1), keys.size(2)
    erase, free, allocate, open_write = gates.split((width, heads, 1, 1), dim=1)
    column = after.write.unsqueeze(-1)

    # Read.
    grad_read.baddbmm_(grad_reads, after.memory.mT)
    grad_memory.baddbmm_(after.read.mT, grad_reads)
    grad_modes = torch.matmul(kept.ways, grad_read.unsqueeze(-1)).squeeze(-1)
    grad_modes = torch._softmax_backward_data(grad_modes, modes, -1, modes.dtype)
    grad_before, grad_found, grad_after = (modes.unsqueeze(-1) * grad_read.unsqueeze(2)).unbind(dim=2)
    grad_read_keys, grad_read_strengths = content_backward(
        grad_found, kept.found, after.memory, keys[:, :heads], strengths[:, :heads], grad_memory
    )
    grad_read = torch.bmm(grad_before, after.link.mT).baddbmm_(grad_after, after.link)

    # Links.
    later = torch.cat((grad_after, before.read), dim=1)  # [B, 2 R, S]
    grad_link.baddbmm_(later.mT, torch.cat((before.read, grad_before), dim=1))
    grad_link.diagonal(dim1=1, dim2=2).zero_()
    weighted = grad_link * before.link
    grad_write.sub_(weighted.sum(dim=1))
    weighted.addcmul_(grad_link, before.precedence.unsqueeze(1), value=-1)
    grad_write.sub_(weighted.sum(dim=2))
    grad_write.add_(grad_precedence).sub_((grad_precedence * before.precedence).sum(dim=-1, keepdim=True))
    grad_precedence = torch.bmm(after.write.unsqueeze(1), grad_link).squeeze(1).addcmul_(
        kept.rest, grad_precedence
    )  # fmt: skip
    grad_link.mul_(kept.stay)

    # Write.
    grad_write.add_((grad_memory * kept.change).sum(dim=2))
    grad_change = grad_memory * column
    grad_vector = grad_change.sum(dim=1)
    grad_erase = (grad_change * before.memory).sum(dim=1).neg_()
    grad_memory.addcmul_(grad_change, erase.unsqueeze(1), value=-1)
    grad_open_write = (grad_write * kept.mixed).sum(dim=-1, keepdim=True)
    grad_mixed = grad_write.mul_(open_write)
    alike = kept.alike.weights.squeeze(1)
    grad_allocate = (grad_mixed * (kept.free_slots.weights - alike)).sum(dim=-1, keepdim=True)
    grad_free_slots = grad_mixed * allocate
    grad_write_key, grad_write_strength = content_backward(
        grad_mixed.sub_(grad_free_slots).unsqueeze(1), kept.alike, before.memory,
        keys[:, heads:], strengths[:, heads:], grad_memory,
    )  # fmt: skip

    # Usage.
    grad_usage.add_(allocation_backward(grad_free_slots, kept.free_slots))
    grad_unfreed = (grad_usage * kept.used).unsqueeze(1) * _others(kept.unfreed)
    grad_usage.mul_(kept.retention)
    grad_free = (grad_unfreed * before.read).sum(dim=-1).neg_()
    grad_read.addcmul_(grad_unfreed, free.unsqueeze(-1), value=-1)
    grad_write = torch.addcmul(grad_usage, grad_usage, before.usage, value=-1)
    grad_usage.addcmul_(grad_usage, before.write, value=-1)

    grad_gates = torch.cat((grad_erase, grad_free, grad_allocate, grad_open_write), dim=1)
    grad_gates.mul_(gates).addcmul_(grad_gates, gates, value=-1)
    # softplus' derivative from its value, which is the strength less 1.
    grad_strengths = torch.cat((grad_read_strengths, grad_write_strength), dim=1)
    grad_strengths.mul_(torch.expm1(1 - strengths)).neg_()
    grad_keys = (grad_read_keys.flatten(1), grad_write_key.flatten(1))
    grad_interface = torch.cat(
        (*grad_keys, grad_vector, grad_strengths.flatten(1), grad_gates, grad_modes.flatten(1)), dim=1
    )
    return Slots(grad_memory, grad_usage, grad_link, grad_precedence, grad_read, grad_write), grad_interface


def _others(factors: Tensor) -> Tensor:
    """Product over all other heads of ``factors [B, R, S]``; one may be 0, so nothing is divided."""
    heads = factors.unbind(dim=1)
    before, behind = [torch.ones_like(heads[0])], [torch.ones_like(heads[0])]
    for first, last in zip(heads[:-1], heads[:0:-1], strict=True):
        before.append(before[-1] * first)
        behind.append(behind[-1] * last)
    return torch.stack([a * b for a, b in zip(before, reversed(behind), strict=True)], dim=1)
