r"""Weighted sums over the edges of a graph, :math:`y_i = \sum_{j \to i} w_{ji} x_j`, with both gradients.

Sparse rows times a dense matrix forward; the same by source, without a transposition at every step, for the
gradient of the nodes; and for the gradient of the weights the scalar products of both ends of each edge.
"""

import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphmoe.errors import GraphError
from graphmoe.ops.memory import empty
from graphmoe.ops.topology import Topology, topology_of

_BAG_CHANNELS = 16
_BAG_BYTES = 1 << 25  # from here on malloc returns what is freed to the system

with warnings.catch_warnings():  # torch says once that its CSR tensors are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), [], [], (0, 0), check_invariants=False)


def spmm(
    edge_index: Tensor | Topology,
    weight: Tensor | None,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    num_targets: int | None = None,
) -> Tensor:
    r"""Sum the features of the sources of each target, each times the weight of its edge,

    .. math::
        y_i = b_i + \sum_{j \to i} w_{ji} x_j .

    Differentiable once, in ``weight``, ``x`` and ``bias``; deterministic on a CPU. A target without edges
    gets its bias, or 0. In half precision sums are taken in float32.

    Args:
        edge_index: An :class:`~torch_geometric.EdgeIndex`, which is checked and laid out when it is first
            seen; a :class:`~graphmoe.ops.topology.Topology`, for which that is done; or a tensor ``[2, M]``
            in any order, for which it is done at every call.
        weight: Weight of each edge, ``[M]``; ``None``: all 1.
        x: Features of the sources, ``[N, F]``.
        bias: What each target adds to all its features, ``[targets]``; ``None``: nothing.
        num_targets: Number of targets. Default: that of the ``EdgeIndex`` or topology, else ``N``.

    Returns:
        ``[targets, F]``.

    Raises:
        GraphError: An id out of range, or weights, features or a bias of other sizes.
    """
    if x.dim() != 2:
        raise GraphError("not features of nodes", "x", "[N, F]", tuple(x.shape))
    graph = topology_of(edge_index, (x.size(0), num_targets))
    if weight is None:
        weight = x.new_ones(graph.num_edges)
    check_weights(graph, weight)
    check_bias(bias, graph.num_targets)
    dtype = torch.promote_types(weight.dtype, x.dtype)
    if not dtype.is_floating_point:
        raise GraphError("no floating-point numbers", "x", "float32 or float64", str(x.dtype))
    inner = torch.float32 if dtype.itemsize < 4 else dtype
    weight, x = weight.to(inner), x.to(inner).contiguous()
    if bias is not None:
        bias = bias.to(inner)
    if not torch.compiler.is_compiling():
        return _SpMM.apply(weight, x, bias, *graph.tensors()).to(dtype)
    out = _spmm(weight, x, *graph.tensors())
    return (out if bias is None else out + bias.unsqueeze(1)).to(dtype)


def check_weights(graph: Topology, weight: Tensor) -> None:
    """Raise a :class:`~graphmoe.errors.GraphError` unless there is one weight an edge."""
    if weight.shape != (graph.num_edges,):
        raise GraphError("not one weight an edge", "weight", f"[{graph.num_edges}]", tuple(weight.shape))


def check_bias(bias: Tensor | None, targets: int) -> None:
    """Raise a :class:`~graphmoe.errors.GraphError` if there are biases, but not one a target."""
    if bias is not None and bias.shape != (targets,):
        raise GraphError("not one bias a target", "bias", f"[{targets}]", tuple(bias.shape))


def sparse_product(ptr: Tensor, index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """A sparse matrix times ``x [N, F]``, without gradients. Its rows begin at ``ptr [R + 1]``, its columns
    are ``index [M]``, both int32 and checked before; its values are ``weight [M]``. Returns ``[R, F]``."""
    rows = ptr.numel() - 1
    if _as_bags(rows, x) and index.numel():
        return torch.embedding_bag(x, index, ptr, False, 0, False, weight, True)[0]
    out = empty(x, rows, x.size(1)).zero_()
    if index.numel() == 0 or x.numel() == 0:
        return out
    matrix = torch.sparse_csr_tensor(ptr, index, weight, (rows, x.size(0)), check_invariants=False)
    return out.addmm_(matrix, x)


def transposed_product(ptr_t: Tensor, target_t: Tensor, perm: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The transposed matrix of :func:`sparse_product` times ``x [R, F]``, by the compressed form of a
    :class:`Topology` by source, to which ``perm`` takes the weights. Returns ``[N, F]``."""
    return sparse_product(ptr_t, target_t, weight.index_select(0, perm), x)


def _as_bags(rows: int, x: Tensor) -> bool:
    """Whether to sum weighted bags of an embedding, for which torch has a kernel of its own on CPUs: up to
    twice as fast as its sparse product, but for narrow rows, and for outputs so large that their memory would
    be fresh each time."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    return x.size(1) >= _BAG_CHANNELS and rows * x.size(1) * x.itemsize < _BAG_BYTES


def _in_order(weight: Tensor, order: Tensor | None) -> Tensor:
    return weight if order is None else weight.index_select(0, order)


def _gradients(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    ptr: Tensor,
    source: Tensor,
    order: Tensor | None,
    ptr_t: Tensor,
    target_t: Tensor,
    perm: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weights ``[M]`` and of ``x [N, F]``, where needed."""
    grad, grad_weight, grad_x = grad.contiguous(), None, None
    if needed[0]:
        found = end_products(ptr, source, grad, x)
        grad_weight = found if order is None else torch.empty_like(found).index_copy_(0, order, found)
    if needed[1]:
        grad_x = transposed_product(ptr_t, target_t, perm, weight, grad)
    return grad_weight, grad_x


def end_products(ptr: Tensor, source: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Scalar product of the rows of both ends of each edge, ``[M]``: of ``grad [R, F]`` at its target, which
    ``ptr [R + 1]`` says, and of ``x [N, F]`` at its ``source [M]``, both int32 and checked before."""
    count, (targets, sources) = source.numel(), (grad.size(0), x.size(0))
    if count == 0 or x.size(1) == 0:
        return x.new_zeros(count)
    if count > targets * sources:  # torch's operator makes do with one edge for each pair of nodes
        ids = torch.arange(targets, device=x.device).repeat_interleave(ptr.diff())
        return (grad.index_select(0, ids) * x.index_select(0, source)).sum(dim=1)
    found = empty(x, count).zero_()
    edges = torch.sparse_csr_tensor(ptr, source, found, (targets, sources), check_invariants=False)
    torch.sparse.sampled_addmm(edges, grad, x.t(), beta=0.0, out=edges)  # else it copies all ids
    return edges.values()


class _SpMM(torch.autograd.Function):
    # No setup_context: with one torch binds arguments by signature, which takes as long as a small product.
    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor, bias: Tensor | None, *laid_out: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x, *laid_out)
        ptr, source, order = laid_out[:3]
        out = sparse_product(ptr, source, _in_order(weight, order), x)
        return out if bias is None else out.add_(bias.unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_bias = grad.sum(dim=1) if ctx.needs_input_grad[2] else None
        return *_gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad[:2]), of_bias, *[None] * 6


# The same as an operator that torch.compile does not look into. Called directly it takes longer to begin.
@torch.library.custom_op("graphmoe::spmm", mutates_args=())
def _spmm(
    weight: Tensor,
    x: Tensor,
    ptr: Tensor,
    source: Tensor,
    order: Tensor | None,
    ptr_t: Tensor,
    target_t: Tensor,
    perm: Tensor,
) -> Tensor:
    return sparse_product(ptr, source, _in_order(weight, order), x)


@_spmm.register_fake
def _(weight: Tensor, x: Tensor, ptr: Tensor, *rest: Tensor | None) -> Tensor:
    return x.new_empty(ptr.numel() - 1, x.size(1))


@torch.library.custom_op("graphmoe::spmm_back", mutates_args=())
def _spmm_back(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    ptr: Tensor,
    source: Tensor,
    order: Tensor | None,
    ptr_t: Tensor,
    target_t: Tensor,
    perm: Tensor,
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, weight, x, ptr, source, order, ptr_t, target_t, perm, (True, True))


@_spmm_back.register_fake
def _(grad: Tensor, weight: Tensor, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(x)


_spmm.register_autograd(
    lambda ctx, grad: (*_spmm_back(grad, *ctx.saved_tensors), *[None] * 6),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
