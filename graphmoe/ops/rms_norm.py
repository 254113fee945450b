"""Root-mean-square normalisation, on a CPU block by block so that it stays in the cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, fills_blocks, suits_blocks, tokens_per_block
from graphmoe.ops.memory import empty


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""`RMSNorm <https://arxiv.org/abs/1910.07467>`_ of every row:
    :math:`y = w \odot x \,/ \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    For many rows on a CPU in full precision it is differentiable once, and keeps its input and one number
    a row.

    Args:
        x: Rows ``[*, D]``.
        weight: Gain ``w [D]``.
        eps: Added to the mean square.

    Returns:
        ``[*, D]``.
    """
    if not (suits_blocks(x, weight) and fills_blocks(x)):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    rows = x.reshape(-1, x.size(-1)).contiguous()  # [N, D]
    out, _ = _RMSNorm.apply(rows, weight, eps)
    return out.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The output, and what every row is multiplied by, ``[N, 1]``."""
        out, scale = empty(x, *x.shape), x.new_empty(x.size(0), 1)
        for block in blocks(x.unsqueeze(1)):
            rows, factor = x[block], scale[block]
            torch.linalg.vecdot(rows, rows, out=factor.squeeze(1))
            factor.div_(x.size(1)).add_(eps).rsqrt_()
            torch.mul(rows, factor, out=out[block]).mul_(weight)
        return out, scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, _) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = empty(x, *x.shape), torch.zeros_like(weight)
        unit_block = empty(x, tokens_per_block(x.unsqueeze(1)), x.size(1))
        for block in blocks(x.unsqueeze(1)):
            factor, out = scale[block], grad_x[block]
            unit = torch.mul(x[block], factor, out=unit_block[: len(out)])  # rows of mean square 1
            # The gradient of a row loses its part along the row, which normalisation undoes.
            torch.mul(grad[block], weight, out=out)
            along = torch.linalg.vecdot(out, unit).div_(x.size(1)).unsqueeze(1)
            out.addcmul_(unit, along, value=-1).mul_(factor)
            grad_weight += unit.mul_(grad[block]).sum(dim=0)
        return grad_x, grad_weight, None
