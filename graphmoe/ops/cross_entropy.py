"""The output layer of a language model together with its loss, block by block of rows.

The gradient of the logits, as large as the logits themselves, then never leaves the cache, and neither do
the log-probabilities.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.ops.memory import empty

BLOCK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits of one block, per thread on a CPU."""

BLOCK_ROWS = 128
"""Rows a block may have at any vocabulary, so that its products stay efficient."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, label: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    r"""Logits of every row and the cross entropy of its label:

    .. math::
        z_n = W x_n, \qquad \ell_n = \mathrm{logsumexp}(z_n) - z_{n, y_n}

    Differentiable once, through the losses and through the logits. The losses and their gradient are computed
    in at least fp32. Under autocast, ``x`` and ``weight`` are cast first.

    Args:
        x: Rows ``[N, D]``.
        weight: ``W [V, D]``.
        label: ``y [N]`` int64 in ``[0, V)``, or ``ignore_index`` for a row without a loss.
        ignore_index: Label of the rows whose loss is 0.

    Returns:
        Losses ``[N]``, in nats, and logits ``[N, V]``.

    Raises:
        ConfigError: Shapes that do not fit one another.
        RuntimeError: A label outside the vocabulary (on a CPU).
    """
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1):
        raise ConfigError("weight does not fit x [N, D]", "weight", ("V", x.size(-1)), tuple(weight.shape))
    if label.shape != x.shape[:1]:
        raise ConfigError("one label a row", "label", tuple(x.shape[:1]), tuple(label.shape))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _forward_op(x, weight, label, ignore_index)


@torch.library.custom_op("graphmoe::linear_cross_entropy", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    counts = (label != ignore_index).unsqueeze(1)
    target = label.unsqueeze(1).masked_fill(~counts, 0)
    logits = empty(x, x.size(0), weight.size(0))
    loss = x.new_empty(x.size(0), 1, dtype=_precision(x))
    scratch = _scratch(logits)
    for block in _blocks(logits):
        torch.mm(x[block], weight.t(), out=logits[block])
        log_p = scratch[: block.stop - block.start]
        torch.log_softmax(logits[block], dim=1, dtype=log_p.dtype, out=log_p)
        torch.gather(log_p, 1, target[block], out=loss[block])
    return loss.neg_().masked_fill_(~counts, 0).squeeze(1), logits


@_forward_op.register_fake
def _(x, weight, label, ignore_index):
    return x.new_empty(x.size(0), dtype=_precision(x)), x.new_empty(x.size(0), weight.size(0))


@torch.library.custom_op("graphmoe::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad: Tensor | None,
    grad_logits: Tensor | None,
    x: Tensor,
    weight: Tensor,
    label: Tensor,
    logits: Tensor,
    ignore_index: int,
    trains_x: bool,
    trains_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``; empty where they are not wanted."""
    counts = label != ignore_index
    target = label.masked_fill(~counts, 0).unsqueeze(1)
    grad = logits.new_zeros(label.shape, dtype=_precision(x)) if grad is None else grad
    scale = (grad * counts).unsqueeze(1)  # [N, 1]
    grad_x = empty(x, *(x.shape if trains_x else (0,)))
    # Sums over blocks are kept in at least fp32.
    grad_weight = x.new_zeros(weight.shape if trains_weight else 0, dtype=_precision(x))
    scratch = _scratch(logits)
    for block in _blocks(logits):
        inner = scratch[: block.stop - block.start]
        torch.softmax(logits[block], dim=1, dtype=inner.dtype, out=inner)
        inner.mul_(scale[block]).scatter_add_(1, target[block], scale[block].neg())
        if grad_logits is not None:
            inner.add_(grad_logits[block])
        inner = inner.to(x.dtype)
        if trains_x:
            torch.mm(inner, weight, out=grad_x[block])
        if trains_weight and x.dtype == grad_weight.dtype:
            grad_weight.addmm_(inner.t(), x[block])
        elif trains_weight:
            grad_weight.add_(inner.t() @ x[block])
    return grad_x, grad_weight.to(weight.dtype)


@_backward_op.register_fake
def _(grad, grad_logits, x, weight, label, logits, ignore_index, trains_x, trains_weight):
    return x.new_empty(x.shape if trains_x else 0), weight.new_empty(weight.shape if trains_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, label, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)  # of the logits, which the loss alone does not need
    ctx.save_for_backward(x, weight, label, output[1])


def _backward(ctx, grad, grad_logits):
    if grad is None and grad_logits is None:
        return (None,) * 4
    trains_x, trains_weight, *_ = ctx.needs_input_grad
    grad_x, grad_weight = _backward_op(
        grad, grad_logits, *ctx.saved_tensors, ctx.ignore_index, trains_x, trains_weight
    )
    return grad_x if trains_x else None, grad_weight if trains_weight else None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scratch(logits: Tensor) -> Tensor:
    return logits.new_empty(_rows_per_block(logits), logits.size(1), dtype=_precision(logits))


def _rows_per_block(logits: Tensor) -> int:
    values = BLOCK_VALUES.get(logits.device.type, BLOCK_VALUES["cuda"])
    if logits.device.type == "cpu":
        values *= torch.get_num_threads()
    return min(max(BLOCK_ROWS, values // max(logits.size(1), 1)), logits.size(0))


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(_rows_per_block(logits), 1)
    return (slice(start, min(start + step, logits.size(0))) for start in range(0, logits.size(0), step))
