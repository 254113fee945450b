"""A stack of maps, sparse or dense, with ReLU between them.

With few edges a product takes less time than what surrounds it: calls of modules, checks, a node of autograd
for each small operator. Here the stack is one node, and what is in between is done in place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphmoe.errors import GraphError
from graphmoe.ops.spmm import check_bias, check_weights, end_products, sparse_product, transposed_product
from graphmoe.ops.topology import Topology


class Map(NamedTuple):
    """One layer: its edges, ``None`` for a dense one; weights ``[M]``, sorted by target, or ``[out, in]``;
    and biases ``[out]``."""

    graph: Topology | None
    weight: Tensor
    bias: Tensor


def sparse_layers(x: Tensor, maps: Sequence[Map], masks: Sequence[Tensor] = ()) -> Tensor:
    r"""Apply layers one after the other,

    .. math::
        h_0 = x, \qquad h_{l+1} = m_l \odot \mathrm{ReLU}(W_l h_l + b_l), \qquad y = W_L h_L + b_L .

    Differentiable once, in ``x``, weights and biases; deterministic on a CPU. In half precision sums are
    taken in float32.

    Args:
        x: Samples are columns, ``[in, B]``.
        maps: The layers.
        masks: Those of dropout, ``[neurons, B]``, none negative, one for each layer but the last; empty:
            all are 1.

    Returns:
        ``[out, B]``.

    Raises:
        GraphError: A layer that does not take what the one before it gives, or of other numbers of weights or
            biases than of edges and neurons.
    """
    channels = x.size(0)
    for one in maps:
        channels = _check(one, channels)
    dtype = torch.promote_types(x.dtype, maps[0].weight.dtype)
    inner = torch.promote_types(dtype, torch.float32)
    weights = [tensor.to(inner) for one in maps for tensor in (one.weight, one.bias)]
    graphs = [one.graph for one in maps]
    return _SparseLayers.apply(x.to(inner).contiguous(), graphs, masks, *weights).to(dtype)


def _check(one: Map, channels: int) -> int:
    """Channels that come out of a layer, if ``channels`` may go in."""
    graph, weight, bias = one
    sources, targets = reversed(weight.shape) if graph is None else (graph.num_sources, graph.num_targets)
    if sources != channels:
        raise GraphError("layer of other channels", "maps", f"{channels} sources", sources)
    if graph is not None:
        check_weights(graph, weight)
    check_bias(bias, targets)
    return targets


class _SparseLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, graphs: list[Topology | None], masks: Sequence[Tensor], *weights) -> Tensor:
        inputs, last = [x], len(graphs) - 1
        for index, graph in enumerate(graphs):
            weight, bias = weights[2 * index], weights[2 * index + 1].unsqueeze(1)
            if graph is None:
                out = torch.addmm(bias, weight, inputs[-1])
            else:
                out = sparse_product(graph.ptr, graph.source, weight, inputs[-1]).add_(bias)
            if index < last:
                inputs.append(out.relu_().mul_(masks[index]) if masks else out.relu_())
        if any(ctx.needs_input_grad):
            ctx.graphs = graphs
            # What lays edges out anew moves the weights, too, which autograd notices.
            ctx.save_for_backward(*weights[::2], *inputs, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, (of_x, _, _, *needed) = len(ctx.graphs), ctx.needs_input_grad
        saved = ctx.saved_tensors
        weights, inputs, masks = saved[:count], saved[count : 2 * count], saved[2 * count :]
        grads: list[Tensor | None] = [None] * (2 * count)
        for index in reversed(range(count)):
            graph, weight, x, grad = ctx.graphs[index], weights[index], inputs[index], grad.contiguous()
            if needed[2 * index]:
                dense = graph is None
                grads[2 * index] = grad @ x.t() if dense else end_products(graph.ptr, graph.source, grad, x)
            if needed[2 * index + 1]:
                grads[2 * index + 1] = grad.sum(dim=1)
            if not (of_x or any(needed[: 2 * index])):
                break
            if graph is None:
                grad = weight.t() @ grad
            else:
                grad = transposed_product(graph.ptr_t, graph.target_t, graph.perm, weight, grad)
            if index:
                # A masked value is 0, as one that ReLU has cut is.
                torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
                grad = grad.mul_(masks[index - 1]) if masks else grad
        return grad if of_x else None, None, None, *grads
