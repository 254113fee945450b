"""Rounds of collaboration between the rows of a token, on a CPU in blocks that stay in the cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.ops.blocks import blocks, flat, suits_blocks, tokens_per_block
from graphmoe.ops.expert_loop import activate, activate_back
from graphmoe.ops.memory import empty
from graphmoe.ops.row_attention import Shares, attend, by_token, grad_of, grad_of_weight

# What one step of a round goes through, in tensors of the size of the rows: queries, keys, values and the
# rows themselves.
_TENSORS = 1


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

    On a CPU in full precision all rounds of a block of tokens follow one another, and it keeps of each round
    the results of the large products (``5 + 2 * hidden / F`` tensors of the size of ``x``, and the input of
    all rounds but the first); a gradient that is to be differentiated again is computed by plain maths.

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
    parameters = (qkv_proj, out_proj, attention_gain, feed_forward_gain, gate_up_proj, down_proj)
    tensors = (x, *parameters) if weight is None else (x, weight, *parameters)
    if not suits_blocks(*tensors):
        return _plain(x, weight, *parameters, heads, rounds, eps)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    rows, weight = by_token(x, weight)
    return _Collaborate.apply(rows, weight, *parameters, heads, rounds, eps, keep)[0].view(x.shape)


def _plain(
    x: Tensor,
    weight: Tensor | None,
    qkv_proj: Tensor,
    out_proj: Tensor,
    attention_gain: Tensor,
    feed_forward_gain: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    heads: int,
    rounds: int,
    eps: float,
) -> Tensor:
    size = x.shape[-1:]
    for _ in range(rounds):
        heard, _ = attend(F.linear(x, qkv_proj), heads, weight)
        x = F.rms_norm(x + F.linear(heard, out_proj), size, attention_gain, eps)
        gate, up = F.linear(F.rms_norm(x, size, feed_forward_gain, eps), gate_up_proj).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, down_proj)
    return x


class _Collaborate(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        qkv_proj: Tensor,
        out_proj: Tensor,
        attention_gain: Tensor,
        feed_forward_gain: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        heads: int,
        rounds: int,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        """The output, and with ``keep`` what the backward pass reads of every round (else one block of it):
        the input of all but the first, queries with keys and values, shares, the sum that is normalised, the
        inverse of both root mean squares, and the hidden rows before the activation."""
        count = tokens_per_block(x, _TENSORS)
        tokens, turns = (len(x), rounds) if keep else (count, 1)
        nodes, channels = x.shape[1:]
        attention = Shares(x, channels, heads, weight, count)
        out, later = empty(x, *x.shape), empty(x, turns - 1, tokens, nodes, channels)
        qkv_kept = empty(x, turns, tokens, nodes, 3 * channels)
        shares_kept = empty(x, turns, tokens, attention.size)
        sum_kept = empty(x, turns, tokens, nodes, channels)
        inverse_kept = empty(x, turns, 2, tokens, nodes, 1)
        hidden_kept = empty(x, turns, tokens, nodes, gate_up_proj.size(0))
        heard_block, normed_block = empty(x, 2, count, nodes, channels)
        active_block = empty(x, count, nodes, down_proj.size(1))
        for block in blocks(x, _TENSORS):
            size = block.stop - block.start
            here = block if keep else slice(0, size)
            heard, normed, active = heard_block[:size], normed_block[:size], active_block[:size]
            rows = x[block]
            for turn in range(rounds):
                at = turn if keep else 0
                qkv, total, hidden = qkv_kept[at, here], sum_kept[at, here], hidden_kept[at, here]
                torch.mm(flat(rows), qkv_proj.t(), out=flat(qkv))
                attention.form(qkv, block, shares_kept[at, here])
                attention.hear(shares_kept[at, here], qkv, heard)
                torch.addmm(flat(rows), flat(heard), out_proj.t(), out=flat(total))
                first, second = inverse_kept[at, :, here]
                _normalize(total, attention_gain, eps, first, heard)
                _normalize(heard, feed_forward_gain, eps, second, normed)
                torch.mm(flat(normed), gate_up_proj.t(), out=flat(hidden))
                activate("swiglu", hidden.chunk(2, dim=2), active)
                rows = later[turn, here] if keep and turn < rounds - 1 else out[block]
                torch.addmm(flat(heard), flat(active), down_proj.t(), out=flat(rows))
        return out, later, qkv_kept, shares_kept, sum_kept, inverse_kept, hidden_kept

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
        inputs, kept = saved[:8], saved[8:]
        if torch.is_grad_enabled():  # somebody will differentiate this gradient
            found = grad_of(lambda *args: _plain(*args, ctx.heads, ctx.rounds, ctx.eps), inputs, grad)
        else:
            found = _back(grad.contiguous(), inputs, kept, ctx.heads, ctx.needs_input_grad)
        return *found, None, None, None, None


def _back(
    grad: Tensor,
    inputs: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    heads: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of :class:`_Collaborate`; all rounds of a block, last one first."""
    x, weight, *parameters = inputs
    qkv_proj, out_proj, attention_gain, feed_forward_gain, gate_up_proj, down_proj = parameters
    later, qkv_kept, shares_kept, sum_kept, inverse_kept, hidden_kept = kept
    grad_x = empty(x, *x.shape)
    grad_log = torch.zeros_like(weight) if wanted[1] else None
    totals = [torch.zeros_like(p) if want else None for p, want in zip(parameters, wanted[2:8], strict=True)]
    to_qkv, to_out, to_attention_gain, to_feed_forward_gain, to_gate_up, to_down = totals
    count, (nodes, channels) = tokens_per_block(x, _TENSORS), x.shape[1:]
    attention = Shares(x, channels, heads, weight, count)
    wide_block = empty(x, count, nodes, 3 * channels)
    rows_block = empty(x, 4, count, nodes, channels)
    active_block = empty(x, 3, count, nodes, down_proj.size(1))
    inner_block = empty(x, count, nodes, gate_up_proj.size(0))
    for block in blocks(x, _TENSORS):
        size = block.stop - block.start
        grad_qkv, inner = wide_block[:size], inner_block[:size]
        first, second, third, spare = rows_block[:, :size]
        active, grad_active, spare_active = active_block[:, :size]
        upstream, current = grad[block], grad_x[block]
        for turn in reversed(range(len(qkv_kept))):
            rows = later[turn - 1, block] if turn else x[block]
            qkv, hidden, shares = qkv_kept[turn, block], hidden_kept[turn, block], shares_kept[turn, block]
            inverse, inverse_second = inverse_kept[turn, :, block]
            # What the norms made of their inputs is cheaper to compute again than to keep.
            unit = torch.mul(sum_kept[turn, block], inverse, out=first)
            normed = torch.mul(unit, attention_gain, out=second)
            unit_second = normed.mul_(inverse_second)
            torch.mm(flat(upstream), down_proj, out=flat(grad_active))
            activate_back(
                "swiglu",
                hidden.chunk(2, dim=2),
                grad_active,
                active,
                spare_active,
                inner.chunk(2, dim=2),
                None,
            )
            if to_down is not None:
                to_down.addmm_(flat(upstream).t(), flat(active))
            if to_gate_up is not None:
                fed = torch.mul(unit_second, feed_forward_gain, out=third)
                to_gate_up.addmm_(flat(inner).t(), flat(fed))
            torch.mm(flat(inner), gate_up_proj, out=flat(third))
            _normalize_back(
                third, unit_second, inverse_second, feed_forward_gain, to_feed_forward_gain, spare
            )
            third.add_(upstream)
            _normalize_back(third, unit, inverse, attention_gain, to_attention_gain, spare)
            if to_out is not None:
                heard = spare
                attention.hear(shares, qkv, heard)
                to_out.addmm_(flat(third).t(), flat(heard))
            torch.mm(flat(third), out_proj, out=flat(second))
            of_edges = attention.back(second, shares, qkv, grad_qkv)
            if grad_log is not None:
                grad_log[block] += of_edges
            if to_qkv is not None:
                to_qkv.addmm_(flat(grad_qkv).t(), flat(rows))
            torch.addmm(flat(third), flat(grad_qkv), qkv_proj, out=flat(current))
            upstream = current
    return grad_x, grad_of_weight(grad_log, weight), *totals


def _normalize(rows: Tensor, gain: Tensor, eps: float, inverse: Tensor, out: Tensor) -> None:
    """RMSNorm of ``rows [N, nodes, F]`` to ``out``; one over the root mean square to ``inverse``."""
    torch.linalg.vector_norm(rows, dim=2, keepdim=True, out=inverse)
    inverse.square_().div_(rows.size(2)).add_(eps).rsqrt_()
    torch.mul(rows, inverse, out=out).mul_(gain)


def _normalize_back(
    grad: Tensor, unit: Tensor, inverse: Tensor, gain: Tensor, to_gain: Tensor | None, spare: Tensor
) -> None:
    """Turn ``grad [N, nodes, F]`` of the output of an RMSNorm into that of its input.

    With the input ``r``, ``unit = r * inverse`` and ``h = gain * grad`` it is
    ``inverse * (h - unit * mean(h * unit))``. ``to_gain`` gathers the gradient of the gain.
    """
    product = torch.mul(grad, unit, out=spare)
    mean = torch.mv(flat(product), gain).div_(grad.size(2)).view(inverse.shape)
    if to_gain is not None:
        to_gain += flat(product).sum(dim=0)
    grad.mul_(gain).addcmul_(unit, mean, value=-1).mul_(inverse)
