r"""The expert MLPs of all routing edges, differentiable and opaque to ``torch.compile``.

Gather, activation, routing weight and the sum back to nodes happen inside one operator, so that
autograd keeps one tensor: the hidden rows before the activation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.errors import ConfigError, GraphError
from graphmoe.ops.expert_grouped_mm import apply_grouped, back_grouped, suits_grouped_mm
from graphmoe.ops.expert_loop import HALVES, apply_loop, back_loop, read_offsets
from graphmoe.ops.memory import empty

# A half-precision product on a CPU without instructions for it is 10 to 100 times slower than float32.
_NATIVE_ON_CPU = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def grouped_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ptr: Tensor,
    *,
    token: Tensor | None = None,
    weight: Tensor | None = None,
    perm: Tensor | None = None,
    reduce: bool = False,
    activation: str = "swiglu",
) -> Tensor:
    r"""Apply to every row the MLP of its expert; rows are sorted by expert.

    .. math::
        y_r = w_r\, W^{down}_e \bigl(\mathrm{SiLU}(W^{gate}_e x_r) \odot W^{up}_e x_r\bigr),
        \qquad \mathrm{ptr}_e \le r < \mathrm{ptr}_{e+1}

    (``swiglu``), or :math:`w_r W^{down}_e\,\mathrm{GELU}(W^{up}_e x_r)` with the exact GELU (``gelu``).
    Rows from ``ptr[E]`` on are absent: they give 0 and receive 0. Differentiable once, in ``x``, both
    projections and ``weight``; the gradient of an expert without rows is 0. Deterministic on CPU.

    On CUDA in bfloat16, with channels that are multiples of 8, offsets stay on the device; otherwise
    ``ptr`` is read by the host. Under autocast, ``x`` and the projections are cast first.

    Args:
        x: Rows ``[R, D]``, or with ``token`` the nodes ``[N, D]`` to gather them from.
        gate_up_proj: ``[E, 2F, D]``, gate above up (``swiglu``), or ``[E, F, D]`` (``gelu``).
        down_proj: ``[E, D_out, F]``.
        ptr: Row offsets of the experts, ``[E + 1]`` int64, ascending from 0 to at most ``R``.
        token: Node of each row, ``[R]`` int64 in ``[0, N)``, absent rows included.
        weight: Routing weight of each row, ``[R]``.
        perm: Place ``n * k + slot`` of each row, ``[R]`` int64, where every node has ``k`` rows: saves
            the sort that summing by ``token`` otherwise needs.
        reduce: Sum the rows of each node; needs ``token``.
        activation: ``swiglu`` or ``gelu``.

    Returns:
        ``[R, D_out]``, or ``[N, D_out]`` with ``reduce``.

    Raises:
        ConfigError: An unknown activation, ``reduce`` without ``token``, or projections that do not fit.
        GraphError: ``ptr`` does not hold ascending offsets into the rows (checked where it is read).
    """
    _check(x, gate_up_proj, down_proj, ptr, token, reduce, activation)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
    order = bounds = None
    if token is not None:
        order, bounds = _rows_by_node(token, perm, x.size(0))
    inputs = (x, gate_up_proj, down_proj, weight)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, _ = _forward_op(
        x, gate_up_proj, down_proj, ptr, token, weight, order, bounds, reduce, activation, keep
    )
    return out


def _check(
    x: Tensor, gate_up: Tensor, down: Tensor, ptr: Tensor, token: Tensor | None, reduce: bool, activation: str
) -> None:
    if activation not in HALVES:
        raise ConfigError("unknown activation", "activation", f"one of {', '.join(HALVES)}", activation)
    if reduce and token is None:
        raise ConfigError("rows are summed by node", "token", "the node of each row", None)
    fits = (down.size(0), HALVES[activation] * down.size(2), x.size(1))
    if gate_up.shape != fits:
        raise ConfigError(
            "projection does not fit x and down_proj", "gate_up_proj", fits, tuple(gate_up.shape)
        )
    if ptr.shape != (down.size(0) + 1,):
        raise GraphError("one offset per expert and the end", "ptr", (down.size(0) + 1,), tuple(ptr.shape))


def _rows_by_node(token: Tensor, perm: Tensor | None, nodes: int) -> tuple[Tensor, Tensor]:
    """The rows in node order ``[R]``, and the offsets of the nodes in it ``[N + 1]``."""
    ids = torch.arange(nodes + 1, device=token.device)
    if perm is not None:
        row = torch.arange(token.numel(), device=token.device)
        return torch.empty_like(perm).scatter_(0, perm, row), ids * (token.numel() // max(nodes, 1))
    ordered, order = token.sort(stable=True)
    return order, torch.searchsorted(ordered, ids)


@torch.library.custom_op("graphmoe::grouped_mlp", mutates_args=())
def _forward_op(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ptr: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    reduce: bool,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and with ``keep`` the hidden rows before the activation (else nothing)."""
    dtype = _working_dtype(x)
    count = x.size(0) if token is None else token.size(0)
    weights = gate_up.to(dtype), down.to(dtype), ptr, activation, keep
    if suits_grouped_mm(x, down, dtype):
        out, hidden = apply_grouped(_gather(x.to(dtype), token), *weights)
    else:
        live = read_offsets(ptr, count)[-1]
        token, weight, order, bounds = _present(live, x.size(0), token, weight, order, bounds)
        rows = _gather(x.to(dtype)[:live] if token is None else x.to(dtype), token)
        out, hidden = apply_loop(rows, *weights, places=count)
        if reduce:
            out = out[:live]
    if reduce:
        out = _sum_by_node(out, weight, order, bounds)
    elif weight is not None:
        out[: weight.numel()].mul_(weight.unsqueeze(1))
    return out.to(x.dtype), hidden


@_forward_op.register_fake
def _(x, gate_up, down, ptr, token, weight, order, bounds, reduce, activation, keep):
    rows = x.size(0) if token is None else token.size(0)
    out = x.new_empty(x.size(0) if reduce else rows, down.size(1))
    return out, x.new_empty((rows, gate_up.size(1)) if keep else 0, dtype=_working_dtype(x))


@torch.library.custom_op("graphmoe::grouped_mlp_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ptr: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    hidden: Tensor,
    reduce: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, both projections and ``weight`` (empty without one)."""
    dtype = _working_dtype(x)
    grouped, places = suits_grouped_mm(x, down, dtype), hidden.size(0)
    if not grouped:
        live = read_offsets(ptr, places)[-1]
        token, weight, order, bounds = _present(live, x.size(0), token, weight, order, bounds)
        hidden, grad = hidden[:live], grad if reduce else grad[:live]
        inputs = x[:live] if token is None else x
    else:
        inputs = x
    grad = _gather(grad.to(dtype), token if reduce else None)
    rows, scaled = _gather(inputs.to(dtype), token), grad
    if weight is not None:
        # Scaling the rows on the way in and out touches D values a row, scaling inside touches F.
        scale = weight.to(dtype).unsqueeze(1)
        rows = torch.mul(rows, scale, out=empty(rows, *rows.shape) if token is None else rows)
        scaled = torch.mul(grad, scale, out=empty(grad, *grad.shape))
    back = back_grouped if grouped else back_loop
    grad_x, grad_gate_up, grad_down, grad_weight = back(
        grad, scaled, rows, gate_up.to(dtype), down.to(dtype), ptr, hidden, activation
    )
    if token is not None:
        grad_x = _sum_by_node(grad_x, weight, order, bounds)
    elif weight is not None:
        grad_x.mul_(scale)
    grad_weight = x.new_empty(0) if weight is None else _padded(grad_weight.to(weight.dtype), places)
    if token is None:
        grad_x = _padded(grad_x, places)
    return grad_x.to(x.dtype), grad_gate_up.to(x.dtype), grad_down.to(x.dtype), grad_weight


@_backward_op.register_fake
def _(grad, x, gate_up, down, ptr, token, weight, order, bounds, hidden, reduce, activation):
    grad_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), gate_up.new_empty(gate_up.shape), down.new_empty(down.shape), grad_weight


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reduce, ctx.activation, _ = inputs
    hidden = output[1]
    # Otherwise autograd would make a gradient of zeros as large as the hidden rows.
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, hidden)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # read once: under checkpointing each read recomputes
    *grads, grad_weight = _backward_op(grad, *saved, ctx.reduce, ctx.activation)
    return *grads, None, None, None if saved[5] is None else grad_weight, *(None,) * 5


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _working_dtype(x: Tensor) -> torch.dtype:
    slow = x.device.type == "cpu" and not _NATIVE_ON_CPU.get(x.dtype, True)
    return torch.float32 if slow else x.dtype


def _present(
    live: int,
    nodes: int,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The first ``live`` rows, which are all that are not absent: where tokens have places for more experts
    than serve them, most rows are, and to gather and sum them would take longer than the experts do."""
    weight = None if weight is None else weight[:live]
    if token is None or live == token.numel():
        return token, weight, order, bounds
    token = token[:live]
    return token, weight, *_rows_by_node(token, None, nodes)


def _padded(rows: Tensor, places: int) -> Tensor:
    """``rows``, and behind them zeros up to ``places``."""
    if rows.size(0) == places:
        return rows
    return torch.cat([rows, rows.new_zeros(places - rows.size(0), *rows.shape[1:])])


def _gather(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x.contiguous()
    return torch.index_select(x, 0, index, out=empty(x, index.numel(), x.size(1)))


def _sum_by_node(rows: Tensor, weight: Tensor | None, order: Tensor, bounds: Tensor) -> Tensor:
    if weight is not None:
        weight = weight.to(rows.dtype).index_select(0, order)
    return F.embedding_bag(
        order, rows, bounds, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
