"""Rounds of collaboration between the rows of a token, on a CPU in blocks that stay in the cache."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, fills_blocks, flat, suits_blocks, tokens_per_block
from graphmoe.ops.expert_loop import activate, activate_back
from graphmoe.ops.memory import empty
from graphmoe.ops.row_attention import Shares, attend, by_token, grad_of, grad_of_weight


def collaborate(
    x: Tensor,
    weight: Tensor | None,
    qkv_proj: Tensor,
    out_proj: Tensor,
    attention_gain: Tensor,
    feed_forward_gain: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    heads: int,
    rounds: int,
    eps: float = 1e-6,
) -> Tensor:
    r"""Attention among the rows of every token and a feed-forward step of each row, several times.

    .. math::
        t &\leftarrow g_a \odot \frac{r}{\mathrm{rms}(r)}, \qquad
            r = t + W_o\, \mathrm{attend}(W_{qkv}\, t) \\
        t &\leftarrow t + W^{down}\bigl(\mathrm{SiLU}(W^{gate} u) \odot W^{up} u\bigr), \qquad
            u = g_f \odot \frac{t}{\mathrm{rms}(t)}

    with :math:`\mathrm{rms}(t)^2 = \mathrm{mean}(t^2) + \epsilon` and the attention of
    :func:`~graphmoe.ops.row_attention.row_attention`.

    For many rows on a CPU in full precision all rounds of a block of tokens follow one another. Kept for the
    backward pass are the results of the large products, ``4 + 2 * hidden / F`` tensors of the size of ``x``
    a round, and the input of every round but the first. A gradient that is to be differentiated again is
    computed by plain maths.

    Args:
        x: Rows ``[*, nodes, F]``.
        weight: Factors of the attention, ``[*, nodes, nodes]`` (target, source) or what broadcasts to it, at
            least 0; ``None``: all 1. A row whose weights are all 0 hears 0.
        qkv_proj: ``W_qkv [3 * F, F]``: queries, keys, values.
        out_proj: ``W_o [F, F]``.
        attention_gain: ``g_a [F]``.
        feed_forward_gain: ``g_f [F]``.
        gate_up_proj: ``[2 * hidden, F]``, gate above up.
        down_proj: ``[F, hidden]``.
        heads: Attention heads; divides ``F``.
        rounds: Rounds, at least 1.
        eps: Added to the mean square.

    Returns:
        ``[*, nodes, F]``.
    """
    maps = _Maps(qkv_proj, out_proj, attention_gain, feed_forward_gain, gate_up_proj, down_proj)
    tensors = (x, *maps) if weight is None else (x, weight, *maps)
    if not (fills_blocks(x) and suits_blocks(*tensors)):
        return plain_collaborate(x, weight, *maps, heads=heads, rounds=rounds, eps=eps)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    rows, weight = by_token(x, weight)
    return _Collaborate.apply(rows, weight, *maps, heads, rounds, eps, keep)[0].view(x.shape)


class _Maps(NamedTuple):
    """The parameters, or their gradients."""

    qkv: Tensor
    out: Tensor
    attention_gain: Tensor
    feed_forward_gain: Tensor
    gate_up: Tensor
    down: Tensor


class _Round(NamedTuple):
    """What a round computes that its backward pass reads, of some tokens; or of all rounds and tokens."""

    qkv: Tensor  # [N, nodes, 3 * F]
    shares: Tensor  # [N, heads * nodes * nodes]
    total: Tensor  # [N, nodes, F], what the first norm normalises
    inverse: Tensor  # [N, nodes, 1], one over the root mean square there
    inverse_second: Tensor  # the same of the second norm
    hidden: Tensor  # [N, nodes, 2 * hidden], before the activation

    def at(self, turn: int, block: slice) -> "_Round":
        return _Round(*(t[turn, block] for t in self))


def plain_collaborate(
    x: Tensor, weight: Tensor | None, *parameters: Tensor, heads: int, rounds: int, eps: float
) -> Tensor:
    """:func:`collaborate` as plain maths, on any device and in any precision."""
    maps, size = _Maps(*parameters), x.shape[-1:]
    for _ in range(rounds):
        heard, _ = attend(F.linear(x, maps.qkv), heads, weight)
        x = F.rms_norm(x + F.linear(heard, maps.out), size, maps.attention_gain, eps)
        gate, up = F.linear(F.rms_norm(x, size, maps.feed_forward_gain, eps), maps.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, maps.down)
    return x


class _Collaborate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, *args) -> tuple[Tensor, ...]:
        """The output, and with ``keep`` the input of every round but the first, then the parts of
        :class:`_Round`, all of them stacked over the rounds (else scratch of the size of a block)."""
        *parameters, heads, rounds, eps, keep = args
        maps, count, (nodes, channels) = _Maps(*parameters), tokens_per_block(x), x.shape[1:]
        attention = Shares(x, channels, heads, weight, count)
        tokens, turns = (len(x), rounds) if keep else (count, 1)
        sizes = ((nodes, 3 * channels), (attention.size,), (nodes, channels), (nodes, 1), (nodes, 1))
        kept = _Round(*(empty(x, turns, tokens, *size) for size in (*sizes, (nodes, maps.gate_up.size(0)))))
        later = empty(x, turns - 1, tokens, nodes, channels)
        out = empty(x, *x.shape)
        scratch = empty(x, 2, count, nodes, channels), empty(x, count, nodes, maps.down.size(1))
        for block in blocks(x):
            rows, size = x[block], block.stop - block.start
            heard, normed, active = *scratch[0][:, :size], scratch[1][:size]
            for turn in range(rounds):
                it = kept.at(turn, block) if keep else kept.at(0, slice(0, size))
                torch.mm(flat(rows), maps.qkv.t(), out=flat(it.qkv))
                attention.form(it.qkv, block, it.shares)
                attention.hear(it.shares, it.qkv, heard)
                torch.addmm(flat(rows), flat(heard), maps.out.t(), out=flat(it.total))
                joined = _normalize(it.total, maps.attention_gain, eps, it.inverse, out=heard)
                _normalize(joined, maps.feed_forward_gain, eps, it.inverse_second, out=normed)
                torch.mm(flat(normed), maps.gate_up.t(), out=flat(it.hidden))
                activate("swiglu", it.hidden.chunk(2, dim=2), active)
                rows = later[turn, block] if keep and turn < rounds - 1 else out[block]
                torch.addmm(flat(joined), flat(active), maps.down.t(), out=flat(rows))
        return out, later, *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.heads, ctx.rounds, ctx.eps, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        saved = ctx.saved_tensors  # read once: under checkpointing each read recomputes
        inputs, (later, *kept) = saved[:8], saved[8:]
        if torch.is_grad_enabled():  # somebody will differentiate this gradient
            plain = partial(plain_collaborate, heads=ctx.heads, rounds=ctx.rounds, eps=ctx.eps)
            return *grad_of(plain, inputs, grad), None, None, None, None
        (x, weight, *parameters), wanted, grad = inputs, ctx.needs_input_grad, grad.contiguous()
        maps, kept, count = _Maps(*parameters), _Round(*kept), tokens_per_block(x)
        attention = Shares(x, x.size(2), ctx.heads, weight, count)
        grad_x, grad_log = empty(x, *x.shape), torch.zeros_like(weight) if wanted[1] else None
        grads = _Maps(*(torch.zeros_like(p) if w else None for p, w in zip(maps, wanted[2:8], strict=True)))
        scratch = _Scratch.of(count, kept, maps)
        for block in blocks(x):
            upstream, mine = grad[block], scratch.first(block.stop - block.start)
            for turn in reversed(range(ctx.rounds)):
                rows, it = later[turn - 1, block] if turn else x[block], kept.at(turn, block)
                grad_sum = _back_feed_forward(upstream, it, maps, grads, mine)
                to_log = None if grad_log is None else grad_log[block]
                _back_attention(grad_sum, rows, it, maps, grads, mine, attention, to_log)
                upstream = grad_x[block]
                torch.addmm(flat(grad_sum), flat(mine.qkv), maps.qkv, out=flat(upstream))
        return grad_x, grad_of_weight(grad_log, weight), *grads, None, None, None, None


class _Scratch(NamedTuple):
    """Buffers of the backward pass of a block."""

    qkv: Tensor  # [N, nodes, 3 * F]
    hidden: Tensor  # [N, nodes, 2 * hidden]
    rows: Tensor  # [4, N, nodes, F]
    active: Tensor  # [3, N, nodes, hidden]

    @classmethod
    def of(cls, tokens: int, kept: _Round, maps: _Maps) -> "_Scratch":
        like, nodes = kept.qkv, kept.qkv.size(2)
        return cls(
            empty(like, tokens, nodes, maps.qkv.size(0)),
            empty(like, tokens, nodes, maps.gate_up.size(0)),
            empty(like, 4, tokens, nodes, maps.qkv.size(1)),
            empty(like, 3, tokens, nodes, maps.down.size(1)),
        )

    def first(self, size: int) -> "_Scratch":
        return _Scratch(self.qkv[:size], self.hidden[:size], self.rows[:, :size], self.active[:, :size])


def _back_feed_forward(upstream: Tensor, it: _Round, maps: _Maps, grads: _Maps, scratch: _Scratch) -> Tensor:
    """Gradient of ``it.total`` from that of the output of the round, through both norms."""
    (unit, normed, grad, spare), (active, grad_active, spare_active) = scratch.rows, scratch.active
    # What the norms made of their inputs is cheaper to compute again than to keep.
    torch.mul(it.total, it.inverse, out=unit)
    unit_second = torch.mul(unit, maps.attention_gain, out=normed).mul_(it.inverse_second)
    torch.mm(flat(upstream), maps.down, out=flat(grad_active))
    pre, grad_pre = it.hidden.chunk(2, dim=2), scratch.hidden.chunk(2, dim=2)
    activate_back("swiglu", pre, grad_active, active, spare_active, grad_pre, None)
    _add_product(grads.down, upstream, active)
    if grads.gate_up is not None:
        _add_product(grads.gate_up, scratch.hidden, torch.mul(unit_second, maps.feed_forward_gain, out=spare))
    torch.mm(flat(scratch.hidden), maps.gate_up, out=flat(grad))
    _normalize_back(
        grad, unit_second, it.inverse_second, maps.feed_forward_gain, grads.feed_forward_gain, spare
    )
    grad.add_(upstream)
    _normalize_back(grad, unit, it.inverse, maps.attention_gain, grads.attention_gain, spare)
    return grad


def _back_attention(
    grad_sum: Tensor,
    rows: Tensor,
    it: _Round,
    maps: _Maps,
    grads: _Maps,
    scratch: _Scratch,
    attention: Shares,
    grad_log: Tensor | None,
) -> None:
    """Write the gradient of ``it.qkv`` to ``scratch.qkv``."""
    heard, grad_heard, *_ = scratch.rows
    if grads.out is not None:
        attention.hear(it.shares, it.qkv, heard)  # cheaper again than kept
        _add_product(grads.out, grad_sum, heard)
    torch.mm(flat(grad_sum), maps.out, out=flat(grad_heard))
    attention.back(grad_heard, it.shares, it.qkv, scratch.qkv, grad_log)
    _add_product(grads.qkv, scratch.qkv, rows)


def _add_product(total: Tensor | None, grad: Tensor, rows: Tensor) -> None:
    """Add the gradient of a linear map to ``total``, unless nobody wants it."""
    if total is not None:
        total.addmm_(flat(grad).t(), flat(rows))


def _normalize(rows: Tensor, gain: Tensor, eps: float, inverse: Tensor, out: Tensor) -> Tensor:
    """RMSNorm of ``rows [N, nodes, F]`` to ``out``; one over the root mean square to ``inverse``."""
    torch.linalg.vector_norm(rows, dim=2, keepdim=True, out=inverse)
    inverse.square_().div_(rows.size(2)).add_(eps).rsqrt_()
    return torch.mul(rows, inverse, out=out).mul_(gain)


def _normalize_back(
    grad: Tensor, unit: Tensor, inverse: Tensor, gain: Tensor, to_gain: Tensor | None, spare: Tensor
) -> None:
    """Turn ``grad [N, nodes, F]`` of the output of an RMSNorm into that of its input.

    With the input ``r``, ``unit = r * inverse`` and ``h = gain * grad`` it is
    ``inverse * (h - unit * mean(h * unit))``. The gradient of the gain is added to ``to_gain``.
    """
    product = torch.mul(grad, unit, out=spare)
    mean = torch.mv(flat(product), gain).div_(grad.size(2)).view(inverse.shape)
    if to_gain is not None:
        to_gain += flat(product).sum(dim=0)
    grad.mul_(gain).addcmul_(unit, mean, value=-1).mul_(inverse)
