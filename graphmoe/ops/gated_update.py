"""One round of talk between the rows of a token, on a CPU block by block so that it stays in the cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, flat, suits_blocks, tokens_per_block
from graphmoe.ops.memory import empty


def gated_update(
    x: Tensor, strength: Tensor, gate: Tensor, bias: Tensor, neighbor: Tensor, own: Tensor
) -> Tensor:
    r"""Every row hears the others through its gates and updates itself.

    .. math::
        y_i = x_i + \mathrm{GELU}\Bigl(
            W_n \sum_j s_{ij}\,\sigma(w^\top[x_i \,\|\, x_j] + b)\,x_j + W_s x_i\Bigr)

    On a CPU in full precision it is differentiable once and keeps one tensor of the size of ``x``.

    Args:
        x: Rows ``[*, nodes, F]``.
        strength: ``s``, ``[*, nodes, nodes]`` (target, source) or what broadcasts to it.
        gate: ``w``, split into target and source, ``[2, F]``.
        bias: ``b [1]``.
        neighbor: ``W_n [F, F]``.
        own: ``W_s [F, F]``.

    Returns:
        ``[*, nodes, F]``.
    """
    tensors = (strength, gate, bias, neighbor, own)
    if not suits_blocks(x, *tensors) or x.numel() == 0:
        gates = strength * open_gates(x @ gate.t(), bias)
        return x + F.gelu(F.linear(gates @ x, neighbor) + F.linear(x, own))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    strength = strength.expand(*x.shape[:-1], x.size(-2))
    rows = x.reshape(-1, *x.shape[-2:]).contiguous()  # [N, nodes, F]
    strength = strength.reshape(-1, *strength.shape[-2:])
    out, _, _ = _GatedUpdate.apply(rows, strength, gate, bias, neighbor, own, keep)
    return out.view(x.shape)


def open_gates(scores: Tensor, bias: Tensor) -> Tensor:
    """The part of the gates that depends on the token, ``[*, nodes, nodes]`` (target, source).

    Args:
        scores: What a row adds as target and as source, ``[*, nodes, 2]``.
        bias: ``[1]``.
    """
    target, source = scores.unbind(dim=-1)
    return torch.sigmoid(target.unsqueeze(-1) + source.unsqueeze(-2) + bias)


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, strength: Tensor, gate: Tensor, bias: Tensor, neighbor: Tensor, own: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the scores, and with ``keep`` what the GELU is applied to (else one block of it)."""
        out, scores = empty(x, *x.shape), x.new_empty(*x.shape[:-1], 2)
        heard = empty(x, tokens_per_block(x), *x.shape[1:])
        hidden = empty(x, *(x if keep else heard).shape)
        for block in blocks(x):
            rows = x[block]
            talk, inner = heard[: len(rows)], hidden[block] if keep else hidden[: len(rows)]
            # The large product comes first: it brings the rows into the cache, where small ones are fast.
            torch.mm(flat(rows), own.t(), out=flat(inner))
            torch.mm(flat(rows), gate.t(), out=flat(scores[block]))
            torch.bmm(strength[block] * open_gates(scores[block], bias), rows, out=talk)
            flat(inner).addmm_(flat(talk), neighbor.t())
            torch.ops.aten.gelu.out(inner, out=out[block])
            out[block].add_(rows)
        return out, scores, hidden

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, strength, gate, bias, neighbor, own, scores, hidden = ctx.saved_tensors
        *talks, trains_neighbor, trains_own, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x, grad_strength = empty(x, *x.shape), x.new_empty(strength.shape)
        grad_gate, grad_bias, grad_neighbor, grad_own = map(torch.zeros_like, (gate, bias, neighbor, own))
        inner_block, talk_block = empty(x, 2, tokens_per_block(x), *x.shape[1:])
        for block in blocks(x):
            rows, total = x[block], grad_x[block]
            inner, talk = inner_block[: len(rows)], talk_block[: len(rows)]
            opened = open_gates(scores[block], bias)
            gates = strength[block] * opened
            torch.ops.aten.gelu_backward.grad_input(grad[block], hidden[block], grad_input=inner)
            if trains_own:
                grad_own.addmm_(flat(inner).t(), flat(rows))
            if trains_neighbor:
                # What was heard is cheaper to mix again than to keep.
                torch.bmm(gates, rows, out=talk)
                grad_neighbor.addmm_(flat(inner).t(), flat(talk))
            if not any(talks):
                continue
            torch.mm(flat(inner), neighbor, out=flat(talk))
            grad_gates = talk @ rows.transpose(1, 2)
            grad_strength[block] = grad_gates * opened
            grad_logits = grad_gates * gates * (1 - opened)
            grad_bias += grad_logits.sum()
            grad_scores = flat(torch.stack([grad_logits.sum(dim=2), grad_logits.sum(dim=1)], dim=-1))
            grad_gate.addmm_(grad_scores.t(), flat(rows))
            torch.mm(flat(inner), own, out=flat(total))
            flat(total).addmm_(grad_scores, gate)
            total.baddbmm_(gates.transpose(1, 2), talk).add_(grad[block])
        return grad_x, grad_strength, grad_gate, grad_bias, grad_neighbor, grad_own, None
