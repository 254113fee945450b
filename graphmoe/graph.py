"""Edge builders, validation and assembly of the typed graph.

Builders return plain ``edge_index`` tensors ``[2, M]`` (source, target), int64, sorted by target,
without duplicates. Wrap one in :class:`torch_geometric.EdgeIndex` to carry its size and order.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from numbers import Integral

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData
from torch_geometric.typing import Adj
from torch_geometric.utils import is_sparse, to_edge_index

from graphmoe.errors import ConfigError, GraphError

STRATEGIES = ("all_pairs", "all_triplets", "all")


def complete(num_nodes: int, *, loops: bool = False, device: torch.device | None = None) -> Tensor:
    """Edges between every ordered pair of ``num_nodes`` nodes, with self-loops if ``loops``."""
    adjacency = torch.ones(num_nodes, num_nodes, dtype=torch.bool, device=device)
    if not loops:
        adjacency.fill_diagonal_(False)
    target, source = adjacency.nonzero(as_tuple=True)
    return torch.stack([source, target])


def causal(batch_size: int, length: int, *, past: int = 0, device: torch.device | None = None) -> Tensor:
    """Edges from every token to itself and all later tokens of its sequence.

    Args:
        batch_size: Number of sequences ``B``.
        length: Tokens ``T`` of each sequence that receive messages (targets ``b * T + t``).
        past: Tokens before them that only send. Sources are ``b * (past + T) + s``.
    """
    total = past + length
    allowed = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)
    return dense_to_edges(allowed.expand(batch_size, length, total))


def to_edges(adj: Adj, num_nodes: int | tuple[int, int | None] | None = None) -> Tensor:
    """``edge_index [2, M]`` of any adjacency PyG accepts.

    Args:
        adj: ``edge_index [2, M]``, an :class:`~torch_geometric.EdgeIndex` in any order, or a sparse matrix
            ``adj_t [targets, sources]``, the transposed one as everywhere in PyG: torch's COO, CSR or CSC, or
            ``torch_sparse.SparseTensor``.
        num_nodes: Number of nodes, or ``(sources, targets)`` with ``None`` for as many targets as there are:
            check the ids. Only where this waits for no device and breaks no compiled graph: on the CPU and
            in eager mode.

    Returns:
        int64 ``[2, M]`` (source, target); the edges of a sparse matrix in its own order.

    Raises:
        GraphError: Not an adjacency, a matrix of another size, or an id out of range.
    """
    return weighted_edges(adj, None, num_nodes)[0]


def weighted_edges(
    adj: Adj, edge_weight: Tensor | None, num_nodes: int | tuple[int, int | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`to_edges`, and weights ``[M]``: the values of a sparse matrix if none are given."""
    sizes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
    if is_sparse(adj):
        (target, source), values = to_edge_index(adj)
        found = (adj.size(1), adj.size(0))
        if num_nodes is not None and any(
            size not in (None, has) for size, has in zip(sizes, found, strict=True)
        ):
            expected, got = f"{list(sizes[::-1])} (targets, sources)", list(found[::-1])
            raise GraphError("sparse matrix of another size", "adj_t", expected, got)
        return torch.stack([source, target]), values if edge_weight is None else edge_weight
    if isinstance(adj, EdgeIndex):
        adj = adj.as_tensor()
    if torch.compiler.is_compiling():
        return adj, edge_weight
    if not isinstance(adj, Tensor) or adj.dim() != 2 or adj.size(0) != 2:
        made_by = "from_networkx, from_scipy_sparse_matrix or dense_to_sparse of torch_geometric.utils"
        expected = f"a tensor [2, M], as {made_by} make it, or a sparse adj_t"
        got = tuple(adj.shape) if isinstance(adj, Tensor) else type(adj).__name__
        raise GraphError("not an edge list", "edge_index", expected, got)
    checked = num_nodes is not None and adj.device.type == "cpu"
    return validate(adj, sizes if checked else None).long(), edge_weight


def both_ends(x: Tensor | tuple[Tensor, Tensor | None], name: str = "x") -> tuple[Tensor, Tensor]:
    """Features of the sources and of the targets of messages: a pair, or twice those of all nodes.

    Raises:
        GraphError: A pair without features of the targets.
    """
    if isinstance(x, Tensor):
        return x, x
    if len(x) != 2 or not all(isinstance(part, Tensor) for part in x):
        got = tuple(type(part).__name__ for part in x)
        raise GraphError("a pair needs features of sources and of targets", name, "(x_src, x_dst)", got)
    return x[0], x[1]


def one_end(x: Tensor, why: str) -> Tensor:
    """Features of nodes, where there is no place for a pair of sources and targets.

    Raises:
        GraphError: Something else, such as the pair of a bipartite graph.
    """
    if not isinstance(x, Tensor):
        raise GraphError(why, "x", "features of nodes of one type, a tensor", type(x).__name__)
    return x


def dense_to_edges(allowed: Tensor) -> Tensor:
    """Edges of a boolean mask ``[B, T, S]`` (target, source); sequences keep their own node ids."""
    batch, target, source = allowed.nonzero(as_tuple=True)
    return torch.stack([batch * allowed.size(2) + source, batch * allowed.size(1) + target])


def co_active(expert: Tensor, num_experts: int) -> Tensor:
    """Edges between the rows of each token.

    Args:
        expert: Expert of each row in token order, ``[N, k]``; ``num_experts`` marks an absent row,
            which gets no edge.
        num_experts: ``E``.

    Returns:
        ``[2, M]`` over the ``N * k`` rows, row ``n * k + slot``.
    """
    present = expert < num_experts  # [N, k]
    pair = present.unsqueeze(2) & present.unsqueeze(1)  # [N, k, k]
    pair = pair & ~torch.eye(expert.size(1), dtype=torch.bool, device=expert.device)
    return dense_to_edges(pair)


def hyperedges(num_experts: int, strategy: str = "all_pairs") -> Tensor:
    """Incidence ``[2, nnz]`` (expert, hyperedge) of a hyperedge strategy, sorted by hyperedge.

    Args:
        num_experts: ``E``.
        strategy: ``all_pairs`` (``E`` choose 2), ``all_triplets`` (``E`` choose 3) or ``all``
            (one hyperedge of every expert).

    Raises:
        ConfigError: Unknown strategy, or too few experts for one hyperedge.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(
            "unknown strategy", "hyperedge_strategy", f"one of {', '.join(STRATEGIES)}", strategy
        )
    size = {"all_pairs": 2, "all_triplets": 3, "all": num_experts}[strategy]
    if num_experts < max(size, 2):
        raise ConfigError(
            f"{strategy} needs more experts", "num_experts", f"at least {max(size, 2)}", num_experts
        )
    members = list(combinations(range(num_experts), size))
    expert = torch.tensor(members, dtype=torch.long).flatten()
    return torch.stack([expert, torch.arange(len(members)).repeat_interleave(size)])


def incidence(members: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """Incidence ``[2, nnz]`` (expert, hyperedge) of hyperedges written out, sorted by hyperedge.

    Args:
        members: The experts of each hyperedge; hyperedges keep their order, members are sorted.
        num_experts: ``E``.

    Raises:
        ConfigError: No hyperedge, an empty one, an id outside ``[0, E)``, an expert twice in one
            hyperedge, or something else than lists of integers.
    """
    name, plain = "hyperedges", "a list of lists of expert ids"
    if not isinstance(members, list | tuple):
        raise ConfigError("not a list of hyperedges", name, plain, type(members).__name__)
    if not members:
        raise ConfigError("no hyperedge", name, "at least one")
    for h, experts in enumerate(members):
        if not isinstance(experts, list | tuple) or not all(_is_integer(e) for e in experts):
            raise ConfigError(f"hyperedge {h} is not a list of expert ids", name, plain, experts)
        if not experts:
            raise ConfigError(f"hyperedge {h} is empty", name, "at least one expert")
        outside = [e for e in experts if not 0 <= e < num_experts]
        if outside:
            raise ConfigError(
                f"hyperedge {h} has an expert id out of range", name, f"ids in [0, {num_experts})", outside[0]
            )
        if len(set(experts)) < len(experts):
            raise ConfigError(f"hyperedge {h} has an expert twice", name, "different experts", experts)
    expert = torch.tensor([e for experts in members for e in sorted(experts)], dtype=torch.long)
    size = torch.tensor([len(experts) for experts in members])
    return torch.stack([expert, torch.arange(len(members)).repeat_interleave(size)])


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def validate(
    edge_index: Tensor,
    num_nodes: int | tuple[int | None, int | None] | None,
    *,
    name: str = "edge_index",
    sorted_by_target: bool = False,
) -> Tensor:
    """Check a user's ``edge_index`` once, at the border, and return it.

    Args:
        edge_index: ``[2, M]``, integer.
        num_nodes: Number of nodes, or ``(sources, targets)`` of a bipartite graph; ``None`` for one that any
            id from 0 on fits. As a whole ``None`` leaves the ids unread.
        name: What the error calls it.
        sorted_by_target: Require targets in ascending order.

    Raises:
        GraphError: Wrong shape or type, an id out of range, or targets out of order.
    """
    if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.size(0) != 2:
        got = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise GraphError("not an edge list", name, "a tensor [2, M]", got)
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise GraphError("node ids must be integers", name, "int64", str(edge_index.dtype))
    if edge_index.numel() == 0:
        return edge_index
    if num_nodes is None:
        return edge_index
    sizes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
    for ids, role, size in zip(edge_index, ("source", "target"), sizes, strict=True):
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or (size is not None and high >= size):
            expected = "ids from 0 on" if size is None else f"ids in [0, {size})"
            raise GraphError(f"{role} id out of range", name, expected, low if low < 0 else high)
    if sorted_by_target and bool((edge_index[1].diff() < 0).any()):
        raise GraphError("targets are not in ascending order", name, "edges sorted by target")
    return edge_index


def to_hetero(
    num_nodes: Mapping[str, int],
    edges: Mapping[tuple[str, str, str], Tensor],
    attributes: Mapping[tuple[str, str, str], Mapping[str, Tensor]] | None = None,
    node_attributes: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> HeteroData:
    """Assemble a validated :class:`HeteroData`.

    Args:
        num_nodes: Nodes of each type.
        edges: ``edge_index`` of each edge type.
        attributes: Tensors ``[M, ...]`` of each edge type, by name.
        node_attributes: Tensors ``[num_nodes, ...]`` of each node type, by name.

    Raises:
        GraphError: An edge type over unknown nodes, an id out of range, or an attribute whose
            length differs from what it describes.
    """
    data = HeteroData()
    for node_type, count in num_nodes.items():
        data[node_type].num_nodes = count
    for node_type, named in (node_attributes or {}).items():
        for key, value in named.items():
            _check_length(value, num_nodes[node_type], f"{node_type}.{key}")
            data[node_type][key] = value
    for edge_type, edge_index in edges.items():
        label = "__".join(edge_type)
        missing: Sequence[str] = [t for t in (edge_type[0], edge_type[2]) if t not in num_nodes]
        if missing:
            raise GraphError("edge type over unknown nodes", label, f"one of {sorted(num_nodes)}", missing[0])
        validate(edge_index, (num_nodes[edge_type[0]], num_nodes[edge_type[2]]), name=label)
        data[edge_type].edge_index = edge_index
        for key, value in (attributes or {}).get(edge_type, {}).items():
            _check_length(value, edge_index.size(1), f"{label}.{key}")
            data[edge_type][key] = value
    return data


def _check_length(value: Tensor, length: int, name: str) -> None:
    if value.size(0) != length:
        raise GraphError("attribute of the wrong length", name, length, value.size(0))
