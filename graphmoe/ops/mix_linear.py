"""A linear map of all rows and a small matrix that mixes the rows of each token, in one pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, flat, suits_blocks, tokens_per_block
from graphmoe.ops.fold import apply_operator
from graphmoe.ops.memory import empty


def mix_linear(x: Tensor, operator: Tensor, weight: Tensor) -> Tensor:
    r"""Transform the rows of every token and mix them: :math:`Y = M X \Theta`.

    On a CPU in full precision it is differentiable once and keeps nothing but its inputs.

    Args:
        x: Rows ``X [*, nodes, F]``.
        operator: ``M [*, nodes, nodes]`` (target, source), or one ``[nodes, nodes]`` for all tokens.
        weight: :math:`\Theta^\top`, ``[D, F]``.

    Returns:
        ``[*, nodes, D]``.
    """
    if not suits_blocks(x, operator, weight):
        return apply_operator(operator, F.linear(x, weight))
    rows = x.reshape(-1, *x.shape[-2:]).contiguous()  # [N, nodes, F]
    operator = operator.expand(*x.shape[:-1], x.size(-2))
    out = _MixLinear.apply(rows, operator.reshape(-1, *operator.shape[-2:]), weight)
    return out.view(*x.shape[:-1], weight.size(0))


class _MixLinear(torch.autograd.Function):
    # In every block a large product comes first: it brings the rows into the cache, where the small
    # products are twice as fast.

    @staticmethod
    def forward(x: Tensor, operator: Tensor, weight: Tensor) -> Tensor:
        out = empty(x, *x.shape[:2], weight.size(0))
        mapped = empty(x, tokens_per_block(x), *out.shape[1:])
        for block in blocks(x):
            rows = mapped[: block.stop - block.start]
            torch.mm(flat(x[block]), weight.t(), out=flat(rows))
            torch.bmm(operator[block], rows, out=out[block])
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, operator, weight = ctx.saved_tensors
        trains_x, trains_operator, trains_weight = ctx.needs_input_grad
        grad, mixing = grad.contiguous(), operator.transpose(1, 2)
        grad_x = empty(x, *x.shape) if trains_x else None
        grad_operator = x.new_empty(operator.shape) if trains_operator else None
        grad_weight = torch.zeros_like(weight) if trains_weight else None
        mapped_block = empty(x, tokens_per_block(x), *x.shape[1:])
        mixed_block = empty(x, mapped_block.size(0), *grad.shape[1:])
        for block in blocks(x):
            count = block.stop - block.start
            mapped, mixed = mapped_block[:count], mixed_block[:count]
            if trains_x or trains_operator:
                torch.mm(flat(grad[block]), weight, out=flat(mapped))
            if trains_weight:
                torch.bmm(mixing[block], grad[block], out=mixed)
                grad_weight.addmm_(flat(mixed).t(), flat(x[block]))
            if trains_operator:
                torch.bmm(mapped, x[block].transpose(1, 2), out=grad_operator[block])
            if trains_x:
                torch.bmm(mixing[block], mapped, out=grad_x[block])
        return grad_x, grad_operator, grad_weight
