"""One step of the memory of a differentiable neural computer, with a gradient of its own."""

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


def dnc_step(
    memory: Tensor,
    usage: Tensor,
    link: Tensor,
    precedence: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    interface: Tensor,
) -> tuple[Tensor, ...]:
    r"""Write to the memory and read from it, as the interface vector says.

    The equations stand in :mod:`graphmoe.nn.memory`: usage and allocation, content weights, links. About a
    hundred small operations would each cost more in autograd's bookkeeping than in arithmetic; here they
    are one, differentiable once.

    Args:
        memory: ``[B, S, W]``, floating point of at least 32 bits, as everything here.
        usage: ``[B, S]``.
        link: ``[B, S, S]`` (later, earlier).
        precedence: ``[B, S]``.
        read_weights: ``[B, R, S]``.
        write_weights: ``[B, S]``.
        interface: ``[B, W R + 3 W + 5 R + 3]``, see :func:`interface_parts`.

    Returns:
        The same six after the step, what was read, ``[B, R, W]``, and for pictures only, without gradients,
        the allocation gate times the write gate, ``[B, 1]``.
    """
    inputs = (memory, usage, link, precedence, read_weights, write_weights, interface)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _DNCStep.apply(*inputs)
    return _forward(*inputs)[0]


def _forward(memory, usage, link, precedence, read_weights, write_weights, interface):
    """The results, and what the gradient needs beside the inputs."""
    batch, slots, width = memory.shape
    heads = read_weights.size(1)
    keys, vector, strengths, gates, modes = interface.split(interface_parts(heads, width), dim=1)
    keys = keys.view(batch, heads + 1, width)
    strengths = F.softplus(strengths).add_(1).unsqueeze(-1)  # [B, R + 1, 1]
    gates = torch.sigmoid(gates)
    erase, free, allocate, write = gates.split((width, heads, 1, 1), dim=1)
    modes = torch.softmax(modes.view(batch, heads, 3), dim=-1)
    # Usage: what was written and not freed by a read head.
    kept = torch.addcmul(read_weights.new_ones(()), free.unsqueeze(-1), read_weights, value=-1)  # [B, R, S]
    retention = kept.prod(dim=1)
    used = torch.addcmul(usage + write_weights, usage, write_weights, value=-1)
    new_usage = used * retention
    # Write: to free slots, or to those alike.
    free_slots = allocation(new_usage)
    alike = content(memory, keys[:, heads:], strengths[:, heads:], inverse_norm(memory).unsqueeze(1))
    mixed = torch.lerp(alike.weights.squeeze(1), free_slots.weights, allocate)
    new_write = mixed * write
    column = new_write.unsqueeze(-1)
    change = torch.addcmul(vector.unsqueeze(1), memory, erase.unsqueeze(1), value=-1)  # v - M e
    new_memory = torch.addcmul(memory, column, change)
    # Links: which slot was written after which.
    stay = (1 - new_write).unsqueeze(-1) - new_write.unsqueeze(1)  # [B, S, S]
    new_link = torch.mul(link, stay).addcmul_(column, precedence.unsqueeze(1))
    new_link.diagonal(dim1=1, dim2=2).zero_()
    rest = 1 - new_write.sum(dim=-1, keepdim=True)
    new_precedence = torch.addcmul(new_write, rest, precedence)
    # Read: what was written before what was read, what is alike, what was written after it.
    found = content(new_memory, keys[:, :heads], strengths[:, :heads], inverse_norm(new_memory).unsqueeze(1))
    before, after = torch.bmm(read_weights, new_link), torch.bmm(read_weights, new_link.mT)
    ways = torch.stack((before, found.weights, after), dim=2)  # [B, R, 3, S]
    new_read = torch.matmul(modes.unsqueeze(2), ways).squeeze(2)
    reads = torch.bmm(new_read, new_memory)
    results = (new_memory, new_usage, new_link, new_precedence, new_read, new_write, reads, allocate * write)
    saved = (keys, strengths, gates, modes, kept, retention, used, mixed, vector, stay, rest, ways)
    return results, saved, (free_slots, alike, found)


class _DNCStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        results, saved, (free_slots, alike, found) = _forward(*inputs)
        ctx.mark_non_differentiable(results[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *inputs, results[0], results[2], results[4], results[5], *saved, *free_slots, *alike, *found
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx.saved_tensors, grads)


def _backward(tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    memory, usage, link, precedence, read_weights, write_weights, interface = tensors[:7]
    new_memory, new_link, new_read, new_write = tensors[7:11]
    keys, strengths, gates, modes, kept, retention, used, mixed, vector, stay, rest, ways = tensors[11:23]
    free_slots, alike, found = Allocation(*tensors[23:27]), Content(*tensors[27:31]), Content(*tensors[31:])
    grad_memory, grad_usage, grad_link, grad_precedence, grad_read, grad_write, grad_reads, _ = grads
    heads, width = read_weights.size(1), memory.size(2)
    parts = interface_parts(heads, width)
    grad_interface = torch.empty_like(interface)
    to_keys, to_vector, to_strengths, to_gates, to_modes = grad_interface.split(parts, dim=1)
    to_keys, to_modes = to_keys.view(keys.shape), to_modes.view(modes.shape)
    erase, free, allocate, write = gates.split((width, heads, 1, 1), dim=1)
    grad_gates = torch.empty_like(gates)
    to_erase, to_free, to_allocate, to_write = grad_gates.split((width, heads, 1, 1), dim=1)
    column, row = new_write.unsqueeze(-1), new_write.unsqueeze(1)

    # Read.
    if grad_reads is not None:
        through = torch.bmm(grad_reads, new_memory.mT)
        grad_read = through if grad_read is None else through.add_(grad_read)
        total = torch.bmm(new_read.mT, grad_reads)
        grad_memory = total if grad_memory is None else total.add_(grad_memory)
    else:
        grad_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory.clone()
        grad_read = torch.zeros_like(new_read) if grad_read is None else grad_read
    grad_modes = torch.matmul(ways, grad_read.unsqueeze(-1)).squeeze(-1)  # [B, R, 3]
    to_modes.copy_(torch._softmax_backward_data(grad_modes, modes, -1, modes.dtype))
    grad_before, grad_found, grad_after = (modes.unsqueeze(-1) * grad_read.unsqueeze(2)).unbind(dim=2)
    read_keys, read_strengths = keys[:, :heads], strengths[:, :heads]
    grad_keys, grad_strengths = content_backward(
        grad_found, found, new_memory, read_keys, read_strengths, grad_memory
    )
    to_keys[:, :heads], to_strengths[:, :heads] = grad_keys, grad_strengths
    grad_old_read = torch.bmm(grad_before, new_link.mT).baddbmm_(grad_after, new_link)
    later = torch.cat((grad_after, read_weights), dim=1)  # [B, 2 R, S]
    earlier = torch.cat((read_weights, grad_before), dim=1)

    # Links.
    total = torch.bmm(later.mT, earlier) if grad_link is None else torch.baddbmm(grad_link, later.mT, earlier)
    total.diagonal(dim1=1, dim2=2).zero_()
    grad_new_write = torch.bmm(total, precedence.unsqueeze(-1)).squeeze(-1)
    grad_old_precedence = torch.bmm(row, total).squeeze(1)
    weighted = total * link
    grad_new_write.sub_(weighted.sum(dim=2)).sub_(weighted.sum(dim=1))
    grad_old_link = total.mul_(stay)
    if grad_precedence is not None:
        grad_old_precedence.addcmul_(rest, grad_precedence)
        lost = torch.linalg.vecdot(grad_precedence, precedence).unsqueeze(-1)
        grad_new_write.add_(grad_precedence).sub_(lost)
    if grad_write is not None:
        grad_new_write.add_(grad_write)

    # Write.
    with_memory = grad_memory * memory
    grad_new_write.add_(torch.bmm(grad_memory, vector.unsqueeze(-1)).squeeze(-1))
    grad_new_write.sub_(torch.bmm(with_memory, erase.unsqueeze(-1)).squeeze(-1))
    to_vector.copy_(torch.bmm(row, grad_memory).squeeze(1))
    torch.neg(torch.bmm(row, with_memory).squeeze(1), out=to_erase)
    grad_old_memory = torch.addcmul(grad_memory, grad_memory * erase.unsqueeze(1), column, value=-1)
    torch.sum(grad_new_write * mixed, dim=-1, keepdim=True, out=to_write)
    grad_mixed = grad_new_write * write
    apart = free_slots.weights - alike.weights.squeeze(1)
    torch.sum(grad_mixed * apart, dim=-1, keepdim=True, out=to_allocate)
    grad_free_slots = grad_mixed * allocate
    grad_alike = (grad_mixed - grad_free_slots).unsqueeze(1)
    grad_key, grad_strength = content_backward(
        grad_alike, alike, memory, keys[:, heads:], strengths[:, heads:], grad_old_memory
    )
    to_keys[:, heads:], to_strengths[:, heads:] = grad_key, grad_strength

    # Usage.
    grad_new_usage = allocation_backward(grad_free_slots, free_slots)
    if grad_usage is not None:
        grad_new_usage.add_(grad_usage)
    grad_used = grad_new_usage * retention
    grad_retention = (grad_new_usage * used).unsqueeze(1)
    grad_kept = grad_retention * _others(kept)
    torch.neg(torch.linalg.vecdot(grad_kept, read_weights), out=to_free)
    grad_old_read.addcmul_(grad_kept, free.unsqueeze(-1), value=-1)
    grad_old_usage = torch.addcmul(grad_used, grad_used, write_weights, value=-1)
    grad_old_write = torch.addcmul(grad_used, grad_used, usage, value=-1)

    to_gates.copy_(grad_gates.mul_(gates).mul_(1 - gates))
    # softplus' derivative from its value, which is the strength less 1.
    to_strengths.mul_(-torch.expm1(1 - strengths.squeeze(-1)))
    return (grad_old_memory, grad_old_usage, grad_old_link, grad_old_precedence, grad_old_read,
            grad_old_write, grad_interface)  # fmt: skip


def _others(kept: Tensor) -> Tensor:
    """Product over all other heads of ``kept [B, R, S]``; a factor may be 0, so nothing is divided."""
    heads = kept.size(1)
    if heads == 1:
        return torch.ones_like(kept)
    own = torch.eye(heads, dtype=torch.bool, device=kept.device).unsqueeze(-1)
    return kept.unsqueeze(1).masked_fill(own, 1.0).prod(dim=2)
