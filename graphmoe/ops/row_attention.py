"""Attention among the few rows of each token: many small problems that never meet."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, fills_blocks, suits_blocks, tokens_per_block
from graphmoe.ops.fold import log_factor, weighted_softmax
from graphmoe.ops.memory import empty
from graphmoe.ops.row_products import PAIRS, BatchProducts, PairProducts

_aten = torch.ops.aten


def row_attention(
    qkv: Tensor,
    heads: int,
    weight: Tensor | None = None,
    *,
    dropout: float = 0.0,
    return_shares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""What every row hears of the rows of its token.

    .. math::
        y_i = \sum_j \alpha_{ij}\, v_j, \qquad
        \alpha_{ij} = \frac{w_{ij} \exp(q_i^\top k_j / \sqrt d)}{\sum_l w_{il} \exp(q_i^\top k_l / \sqrt d)}

    in every head. A row whose weights are all 0 hears 0, and a weight of 0 receives no gradient.

    For many rows on a CPU in full precision, without dropout and unless the shares are asked for, tokens are
    served block by block, and nothing is kept beside the input and the shares. A gradient that is to be
    differentiated again is computed by plain maths.

    Args:
        qkv: Queries, keys and values ``[*, nodes, 3 * F]``, heads of ``d = F / heads`` channels in each.
        heads: Attention heads.
        weight: ``w >= 0``, ``[*, nodes, nodes]`` (target, source) or what broadcasts to it.
        dropout: Probability to drop a share ``alpha``.
        return_shares: Return the shares too.

    Returns:
        ``y [*, nodes, F]``, and ``alpha [*, heads, nodes, nodes]`` (target, source), before dropout, or
        ``None``.
    """
    tensors = (qkv,) if weight is None else (qkv, weight)
    if dropout or return_shares or not (fills_blocks(qkv) and suits_blocks(*tensors)):
        heard, alpha = attend(qkv, heads, weight, dropout)
        return heard, alpha if return_shares else None
    rows, weight = by_token(qkv, weight)
    heard, _ = _RowAttention.apply(rows, weight, heads)
    return heard.view(*qkv.shape[:-1], qkv.size(-1) // 3), None


def attend(qkv: Tensor, heads: int, weight: Tensor | None, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """:func:`row_attention` as plain maths, always with the shares."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-2, -3)
    score = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5  # [*, heads, nodes, nodes]
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if weight is None:
        alpha = score.softmax(dim=-1)
    else:
        alpha = weighted_softmax(score, weight.to(score.dtype).unsqueeze(-3), dim=-1)
    heard = F.dropout(alpha, dropout).to(value.dtype) @ value
    return heard.transpose(-2, -3).flatten(-2), alpha


def by_token(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows ``[*, nodes, F]`` as ``[N, nodes, F]``, and weights that broadcast over them as
    ``[N, nodes, nodes]``."""
    if weight is not None:
        weight = weight.expand(*x.shape[:-1], x.size(-2)).reshape(-1, x.size(-2), x.size(-2))
    return x.reshape(-1, *x.shape[-2:]).contiguous(), weight


class Shares:
    """The attention of blocks of tokens, forward and backward, with buffers that all blocks use.

    Args:
        like: A tensor ``[N, nodes, *]`` of the right dtype.
        channels: ``F``.
        heads: Attention heads.
        weight: ``[N, nodes, nodes]`` (target, source) of all tokens, or ``None``.
        tokens: Most tokens of a block.
    """

    def __init__(self, like: Tensor, channels: int, heads: int, weight: Tensor | None, tokens: int):
        nodes = like.size(1)
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        kind = PairProducts if nodes <= PAIRS else BatchProducts
        self.products = kind(like, nodes, heads, channels // heads, tokens)
        self.there = self.log_weight = None
        if weight is not None:
            weight = self.products.of_edges(weight)
            self.there = (weight > 0).to(like.dtype)
            self.log_weight = log_factor(torch.zeros_like(weight), weight)
        self.size = heads * nodes**2  # shares of one token
        self.grad = empty(like, tokens, self.size)

    def form(self, qkv: Tensor, block: slice, kept: Tensor) -> None:
        """Write the shares of a block to ``kept [N, size]``, a slice of one's own of a contiguous buffer."""
        query, key, _ = self._parts(qkv)
        shares = self.products.matrices(kept)
        self.products.dot(query, key, shares)
        shares.mul_(self.scale)
        if self.there is not None:
            shares.add_(self.log_weight[block])
        _aten._softmax.out(shares, 2, False, out=shares)
        if self.there is not None:
            shares.mul_(self.there[block])

    def hear(self, kept: Tensor, qkv: Tensor, out: Tensor) -> None:
        """Write what the rows of a block hear to ``out [N, nodes, F]``."""
        self.products.mix(self.products.matrices(kept), self._parts(qkv)[2], self._by_head(out))

    def back(
        self, grad: Tensor, kept: Tensor, qkv: Tensor, grad_qkv: Tensor, grad_log: Tensor | None
    ) -> None:
        """Write the gradient of ``qkv`` to ``grad_qkv``, from that of what was heard, and add that of the
        logarithms of the weights to ``grad_log [N, nodes, nodes]`` (target, source), if there is one."""
        products, grad = self.products, self._by_head(grad)
        query, key, value = self._parts(qkv)
        to_query, to_key, to_value = self._parts(grad_qkv)
        shares, scores = products.matrices(kept), products.matrices(self.grad[: len(qkv)])
        products.mix_back(shares, grad, to_value)
        products.dot(grad, value, scores)
        _aten._softmax_backward_data.out(scores, shares, 2, shares.dtype, grad_input=scores)
        if grad_log is not None:
            grad_log += products.sum_heads(scores)
        scores.mul_(self.scale)
        products.mix(scores, key, to_query)
        products.mix_back(scores, query, to_key)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[N, nodes, heads, d]``, without a copy."""
        return qkv.unflatten(2, (3, self.heads, -1)).unbind(2)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (self.heads, -1))


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(qkv: Tensor, weight: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
        """What was heard, and the shares."""
        out = empty(qkv, *qkv.shape[:2], qkv.size(2) // 3)
        attention = Shares(qkv, out.size(2), heads, weight, tokens_per_block(qkv))
        kept = empty(qkv, len(qkv), attention.size)
        for block in blocks(qkv):
            attention.form(qkv[block], block, kept[block])
            attention.hear(kept[block], qkv[block], out[block])
        return out, kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        qkv, weight, ctx.heads = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, weight, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 3
        qkv, weight, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this gradient
            found = grad_of(lambda *inputs: attend(inputs[0], ctx.heads, inputs[1])[0], (qkv, weight), grad)
            return *found, None
        grad = grad.contiguous()
        attention = Shares(qkv, grad.size(2), ctx.heads, weight, tokens_per_block(qkv))
        grad_qkv = empty(qkv, *qkv.shape)
        grad_log = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for block in blocks(qkv):
            to_log = None if grad_log is None else grad_log[block]
            attention.back(grad[block], kept[block], qkv[block], grad_qkv[block], to_log)
        return grad_qkv, grad_of_weight(grad_log, weight), None


def grad_of_weight(grad_log: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Gradient of the weights from that of their logarithms; 0 where a weight is."""
    if grad_log is None:
        return None
    return torch.where(weight > 0, grad_log / weight, torch.zeros_like(grad_log))


def grad_of(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` that can be differentiated again; ``None`` where none is wanted."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True, materialize_grads=True)
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)
