"""A differentiable neural computer over a whole sequence, with a gradient of its own."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphmoe.ops.dnc_step import Slots, allocates, backward_step, forward_step


def dnc_sequence(
    projected: Tensor, state: tuple[Tensor, ...], recurrent: Tensor, interface: Tensor, bias: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """All steps of a controller and its memory.

    Autograd would add up the gradients of the weights step by step; here they are one product over all
    steps, and the gradients of the slots are updated in place on their way back. Differentiable once.

    Args:
        projected: What the inputs add to the gates of the controller, ``[T, B, 4 H]`` (input, forget, output,
            new).
        state: The six tensors of :func:`~graphmoe.ops.dnc_step.dnc_step`, what was read ``[B, R W]``, output
            and cell of the controller ``[B, H]``.
        recurrent: Weight of ``[reads, output]`` in the gates, ``[4 H, R W + H]``.
        interface: Weight of the interface, ``[I, H]``.
        bias: Of the interface, ``[I]``.

    Returns:
        What was read and the outputs of the controller, ``[T, B, R W + H]``; the state after the last step;
        how far each step allocates, ``[T, B, 1]``.
    """
    inputs = (projected, *state, recurrent, interface, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        outputs, gate, *state = _DNCSequence.apply(*inputs)
    else:
        outputs, gate, state, _ = _forward(*inputs, keep=False)
    return outputs, tuple(state), gate


def lstm_update(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, cell and bounded cell ``[B, H]`` of an LSTM; overwrites its gates ``[B, 4 H]`` (input, forget,
    output, new) by what they open."""
    width = cell.size(1)
    gates[:, : 3 * width].sigmoid_()
    gates[:, 3 * width :].tanh_()
    enter, forget, leave, new = gates.chunk(4, dim=1)
    cell = (forget * cell).addcmul_(enter, new)
    bounded = torch.tanh(cell)
    return leave * bounded, cell, bounded


def _forward(projected: Tensor, *inputs: Tensor, keep: bool):
    slots, (reads, hidden, cell), (recurrent, interface, bias) = Slots(*inputs[:6]), inputs[6:9], inputs[9:]
    steps, batch, _ = projected.shape
    joint = projected.new_empty(steps + 1, batch, recurrent.size(1))
    torch.cat((reads, hidden), dim=1, out=joint[0])
    width, gate = reads.size(1), []
    history, inverse, recurrent, interface = [], None, recurrent.t(), interface.t()
    for now, behind, given in zip(joint[:-1], joint[1:], projected, strict=True):
        gates = torch.addmm(given, now, recurrent)
        hidden, new_cell, bounded = lstm_update(gates, cell)
        told = torch.addmm(bias, hidden, interface)
        after, reads, kept, inverse = forward_step(slots, told, inverse)
        behind[:, :width], behind[:, width:] = reads.flatten(1), hidden
        gate.append(allocates(kept))
        if keep:
            history.append((slots, after, kept, gates, cell, bounded))
        slots, cell = after, new_cell
    last = joint[-1]
    state = (*slots, last[:, :width].clone(), last[:, width:].clone(), cell)
    gate = torch.stack(gate) if gate else projected.new_empty(0, batch, 1)
    return joint[1:], gate, state, (joint, history)


class _DNCSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, gate, state, (joint, ctx.history) = _forward(*inputs, keep=True)
        ctx.save_for_backward(*inputs[-3:-1], joint)
        ctx.mark_non_differentiable(gate)
        # Copies: what a function returns refers to it, and what it keeps must not.
        return outputs.clone(), gate, *(tensor.clone() for tensor in state)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs: Tensor, _, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recurrent, interface, joint = ctx.saved_tensors
        slots = Slots(*(grad.clone() for grad in grads[:6]))
        grad_reads, grad_hidden, grad_cell = grads[6:]
        width = grad_reads.size(1)
        grad_projected = joint.new_empty(*grad_outputs.shape[:2], recurrent.size(0))
        grad_told = joint.new_empty(*grad_outputs.shape[:2], interface.size(0))
        steps = list(zip(ctx.history, grad_outputs, grad_projected, grad_told, strict=True))
        for (before, after, kept, gates, cell, bounded), grad, to_gates, to_told in reversed(steps):
            heads = after.read.size(1)
            grad_reads = (grad[:, :width] + grad_reads).unflatten(1, (heads, -1))
            slots, told = backward_step(slots, grad_reads, before, after, kept)
            to_told.copy_(told)
            grad_hidden = torch.addmm(grad_hidden, told, interface).add_(grad[:, width:])
            enter, forget, leave, new = gates.chunk(4, dim=1)
            opened = grad_hidden * leave
            grad_cell = opened.addcmul_(opened * bounded, bounded, value=-1).add_(grad_cell)
            torch.cat((grad_cell * new, grad_cell * cell, grad_hidden * bounded, grad_cell * enter), dim=1,
                      out=to_gates)  # fmt: skip
            closed = to_gates[:, : -new.size(1)]
            opened = gates[:, : -new.size(1)]
            closed.mul_(opened).addcmul_(closed, opened, value=-1)
            to_new = to_gates[:, -new.size(1) :]
            to_new.addcmul_(to_new * new, new, value=-1)
            grad_cell = grad_cell * forget
            grad_reads, grad_hidden = (to_gates @ recurrent).split((width, grad_hidden.size(1)), dim=1)
        flat_gates, flat_told = grad_projected.flatten(0, 1), grad_told.flatten(0, 1)
        grad_recurrent = flat_gates.t() @ joint[:-1].flatten(0, 1)
        grad_interface = flat_told.t() @ joint[1:, :, width:].flatten(0, 1)
        return (grad_projected, *slots, grad_reads, grad_hidden, grad_cell, grad_recurrent, grad_interface,
                flat_told.sum(dim=0))  # fmt: skip
