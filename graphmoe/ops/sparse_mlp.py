"""Expert MLPs whose matrices are edges.

Rows are cut into pieces that stay in the cache from the first product to the last; autograd keeps their
hidden values before the activation.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphmoe.ops.expert_loop import HALVES, activate, activate_back, read_offsets
from graphmoe.ops.memory import empty
from graphmoe.ops.spmm import end_products, sparse_product, transposed_product
from graphmoe.ops.topology import Topology

PIECE_ROWS = 192
"""Rows served at once: sparse products of more fall out of the cache, of fewer spend their time on edges."""


def sparse_mlp(
    rows: Tensor,
    ptr: Tensor,
    gate_up: Sequence[tuple[Topology, Tensor]],
    down: Sequence[tuple[Topology, Tensor]],
    *,
    activation: str = "swiglu",
) -> Tensor:
    r"""Apply to every row the sparse MLP of its expert; rows are sorted by expert.

    The formula is that of :func:`~graphmoe.ops.grouped_mlp`; rows from ``ptr[E]`` on are absent: they give 0
    and receive 0. Differentiable once, in ``rows`` and the weights; the gradient of an expert without rows is
    0. Deterministic on a CPU. In half precision sums are taken in float32. ``ptr`` is read by the host.

    Args:
        rows: ``[R, D]``.
        ptr: Row offsets of the experts, ``[E + 1]`` int64, ascending from 0 to at most ``R``.
        gate_up: Edges from ``D`` to ``2F`` neurons (``swiglu``, gate above up) or ``F`` (``gelu``) and their
            weights ``[M]``, sorted by target, of each expert.
        down: The same from ``F`` to ``D``.
        activation: ``swiglu`` or ``gelu``.

    Returns:
        ``[R, D]``.

    Raises:
        GraphError: ``ptr`` does not hold ascending offsets into the rows.
    """
    offsets = read_offsets(ptr, rows.size(0))
    graphs = [graph for graph, _ in (*gate_up, *down)]
    weights = [weight for _, weight in (*gate_up, *down)]
    dtype = torch.promote_types(weights[0].dtype, torch.promote_types(rows.dtype, torch.float32))
    weights = [weight.to(dtype) for weight in weights]
    return _SparseMLP.apply(rows.to(dtype), offsets, graphs, activation, *weights).to(rows.dtype)


class _SparseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, offsets: list[int], graphs: list[Topology], activation: str, *weights):
        experts, out = len(offsets) - 1, torch.zeros_like(rows)
        kept = []
        for expert, here in _pieces(offsets):
            first, second = graphs[expert], graphs[experts + expert]
            pre = sparse_product(first.ptr, first.source, weights[expert], rows[here].t().contiguous())
            active = empty(rows, second.num_sources, pre.size(1))
            activate(activation, pre.chunk(HALVES[activation]), active)
            out[here] = sparse_product(second.ptr, second.source, weights[experts + expert], active).t()
            kept.append(pre)
        if any(ctx.needs_input_grad):
            ctx.offsets, ctx.graphs, ctx.activation = offsets, graphs, activation
            ctx.save_for_backward(rows, *weights, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        experts = len(ctx.offsets) - 1
        rows, *saved = ctx.saved_tensors
        weights, kept = saved[: 2 * experts], saved[2 * experts :]
        grad_rows, grads = torch.zeros_like(rows), [torch.zeros_like(weight) for weight in weights]
        for (expert, here), pre in zip(_pieces(ctx.offsets), kept, strict=True):
            first, second = ctx.graphs[expert], ctx.graphs[experts + expert]
            one, two = expert, experts + expert
            grad_out, x = grad[here].t().contiguous(), rows[here].t().contiguous()
            grad_active = transposed_product(
                second.ptr_t, second.target_t, second.perm, weights[two], grad_out
            )
            active, spare, grad_pre = (empty(pre, *t.shape) for t in (grad_active, grad_active, pre))
            halves = HALVES[ctx.activation]
            activate_back(
                ctx.activation, pre.chunk(halves), grad_active, active, spare, grad_pre.chunk(halves), None
            )
            grads[two] += end_products(second.ptr, second.source, grad_out, active)
            grads[one] += end_products(first.ptr, first.source, grad_pre, x)
            grad_rows[here] = transposed_product(
                first.ptr_t, first.target_t, first.perm, weights[one], grad_pre
            ).t()
        return grad_rows, None, None, None, *grads


def _pieces(offsets: list[int]) -> list[tuple[int, slice]]:
    """Experts with their rows, in pieces of about equal size, at most :data:`PIECE_ROWS`."""
    found = []
    for expert, (start, end) in enumerate(pairwise(offsets)):
        count = -(-(end - start) // PIECE_ROWS)
        cuts = [start + (end - start) * piece // max(count, 1) for piece in range(count + 1)]
        found += [(expert, slice(low, high)) for low, high in pairwise(cuts)]
    return found
