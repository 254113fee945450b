"""Which nodes feed which, checked once and laid out for sparse products in both directions."""

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from graphmoe.errors import GraphError
from graphmoe.graph import validate

_MOST = 2**31 - 1
_CACHE = "_graphmoe_topology"


class Topology:
    """Edges by target, and by source: the two compressed forms that a weighted sum and its gradient need.

    The constructor is the one place where ids are read and checked: a sparse product with an id out of range
    reads foreign memory. Make one where edges are reused; the edges of a weight go with it in the order in
    which they were given. Several edges between the same two nodes are kept apart.

    Args:
        edge_index: ``[2, M]`` (source, target), in any order.
        num_nodes: Numbers of sources and of targets.

    Attributes:
        ptr: Where the edges of each target begin, ``[targets + 1]`` int32.
        source: Source of each edge, by target, ``[M]`` int32.
        order: Place of these edges among those given, ``[M]`` int64; ``None`` if it is their own.
        ptr_t, target_t: The same by source, ``[sources + 1]`` and ``[M]`` int32.
        perm: Place of the edges by source among those given, ``[M]`` int32.

    Raises:
        GraphError: Not an edge list, an id out of range, or more edges or nodes than int32 can count.
    """

    __slots__ = ("num_sources", "num_targets", "order", "perm", "ptr", "ptr_t", "source", "target_t")

    def __init__(self, edge_index: Tensor, num_nodes: tuple[int, int]):
        self.num_sources, self.num_targets = num_nodes
        edges = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
        validate(edges, num_nodes)
        count = max(edges.size(1), *num_nodes)
        if count > _MOST:
            raise GraphError("too large for a sparse product", "edge_index", f"at most {_MOST}", count)
        source, target = edges[0], edges[1]
        self.order = None
        if bool((target.diff() < 0).any()):
            target, self.order = target.sort(stable=True)
            source = source.index_select(0, self.order)
        self.ptr, self.source = _offsets(target, self.num_targets), source.int().contiguous()
        by_source, perm = source.sort(stable=True)
        self.ptr_t = _offsets(by_source, self.num_sources)
        self.target_t = target.index_select(0, perm).int()
        self.perm = (perm if self.order is None else self.order.index_select(0, perm)).int()

    @property
    def num_edges(self) -> int:
        return self.source.numel()

    def edge_index(self) -> Tensor:
        """The edges as they were given, ``[2, M]`` int64."""
        targets = torch.arange(self.num_targets, device=self.ptr.device)
        edges = torch.stack([self.source.long(), targets.repeat_interleave(self.ptr.diff())])
        return edges if self.order is None else torch.empty_like(edges).index_copy_(1, self.order, edges)

    def copy_(self, other: "Topology") -> "Topology":
        """Become another topology of as many nodes and sorted edges, in place: compiled code sees the same
        tensors."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            if mine is not None:
                mine.copy_(new)
        return self

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the operator takes."""
        return self.ptr, self.source, self.order, self.ptr_t, self.target_t, self.perm

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_edges} edges, {self.num_sources} -> {self.num_targets})"


def topology_of(edge_index: Tensor | Topology, num_nodes: tuple[int, int | None]) -> Topology:
    """The topology of an edge list, which an :class:`~torch_geometric.EdgeIndex` keeps for the next time.

    Args:
        edge_index: ``[2, M]``; a :class:`Topology` is returned as it is.
        num_nodes: Numbers of sources and of targets; without the latter, that of an ``EdgeIndex`` that knows
            its size, or else as many as sources.

    Raises:
        GraphError: See :class:`Topology`; or one of other numbers of nodes.
    """
    sources, targets = num_nodes
    if isinstance(edge_index, Topology):
        found = edge_index.num_sources, edge_index.num_targets
        if sources != found[0] or targets not in (None, found[1]):
            raise GraphError("topology of other nodes", "edge_index", f"{num_nodes} nodes", found)
        return edge_index
    if not isinstance(edge_index, EdgeIndex):
        return Topology(edge_index, (sources, sources if targets is None else targets))
    known = edge_index.sparse_size()
    if targets is None:
        targets = sources if known[1] is None else known[1]
    for size, given, role in zip((sources, targets), known, ("sources", "targets"), strict=True):
        if given is not None and size != given:
            raise GraphError(f"another number of {role}", "edge_index", f"{given} {role}", size)
    key = (edge_index.as_tensor()._version, sources, targets)
    kept = getattr(edge_index, _CACHE, (None, None))
    if kept[0] != key:
        kept = (key, Topology(edge_index, (sources, targets)))
        setattr(edge_index, _CACHE, kept)
    return kept[1]


def _offsets(ids: Tensor, count: int) -> Tensor:
    """Where each of ``count`` ids begins in ``ids [M]``, which are ascending, ``[count + 1]`` int32."""
    counts = torch.bincount(ids, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
