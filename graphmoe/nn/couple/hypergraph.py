"""The fixed hypergraph of a coupling: its incidence, its checks, and which weights it can use."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.graph import STRATEGIES, hyperedges, incidence


class Hypergraph(NamedTuple):
    """What a coupling needs to know of its hyperedges.

    Attributes:
        edges: Incidence ``[2, nnz]`` (expert, hyperedge), sorted by hyperedge.
        incidence: The same, dense ``[E, H]``.
        group: Group of each hyperedge ``[H]``: of primaries only, of ghosts only, mixed, numbered in
            this order without gaps.
        sizes: Members of the smallest and of the largest hyperedge.
        overlap: An expert can lie in two different hyperedges that act on one token. Otherwise the
            weights of hyperedges cancel.
        mixed: Such an expert can lie in hyperedges of two groups. Otherwise the weights of groups cancel.
    """

    edges: Tensor
    incidence: Tensor
    group: Tensor
    sizes: tuple[int, int]
    overlap: bool
    mixed: bool


def check_strategy(strategy: str, hyperedges: Sequence[Sequence[int]] | None, num_experts: int | None) -> str:
    """The strategy, ``custom`` where hyperedges are given.

    Raises:
        ConfigError: ``custom`` without hyperedges, or hyperedges beside another strategy than the default
            or without a number of experts.
    """
    if hyperedges is None:
        if strategy == "custom":
            raise ConfigError("custom hyperedges are missing", "hyperedges", "the experts of each hyperedge")
        return strategy
    if strategy in ("all_triplets", "all"):
        raise ConfigError("contradicts the hyperedges given", "strategy", "custom", strategy)
    if num_experts is None:
        raise ConfigError("hyperedges need their experts", "num_experts", "the number of experts", None)
    return "custom"


def build_hypergraph(
    num_experts: int,
    strategy: str,
    *,
    k: int,
    num_ghosts: int = 0,
    members: Sequence[Sequence[int]] | None = None,
    max_hyperedges: int = 4096,
) -> Hypergraph:
    """Check and build the hyperedges of ``strategy``, or those of ``members`` (``custom``).

    Raises:
        ConfigError: A number that makes no sense, a strategy that does not fit ``E`` or ``k``, more
            hyperedges than the budget, a hyperedge that can never act, or a ghost outside all hyperedges.
    """
    if num_experts < 1:
        raise ConfigError("no expert", "num_experts", "at least 1", num_experts)
    if not 0 <= num_ghosts < num_experts:
        raise ConfigError(
            "at least one expert is no ghost", "num_ghosts", f"0 <= num_ghosts < {num_experts}", num_ghosts
        )
    if not 1 <= k <= num_experts:
        raise ConfigError("k must not exceed the number of experts", "k", f"1 <= k <= {num_experts}", k)
    # A large strategy must be refused before it takes the memory.
    _check_budget(*_count(num_experts, strategy, num_ghosts, members), max_hyperedges)
    if members is not None:
        edges = incidence(members, num_experts)
    else:
        edges = hyperedges(num_experts, strategy)
    dense = torch.zeros(num_experts, int(edges[1, -1]) + 1)
    dense[edges[0], edges[1]] = 1.0
    size = dense.sum(dim=0)
    if strategy == "custom":
        _check_members(dense, size, k, num_ghosts)
    else:
        # The rows of a token form the hyperedge of "all", whichever experts they are.
        least = 2 if strategy == "all" else max(int(size[0]), 2)
        if k < least:
            raise ConfigError(f"{strategy} needs more rows a token", "k", f"at least {least}", k)
    ghosts = dense[num_experts - num_ghosts :].sum(dim=0)
    kind = torch.where(ghosts == 0, 0, torch.where(ghosts == size, 1, 2))
    _, group = kind.unique(return_inverse=True)
    sizes = (int(size.min()), int(size.max()))
    overlap = _meet(dense, k)
    return Hypergraph(edges, dense, group, sizes, overlap, overlap and _meet(dense, k, group))


def _count(
    num_experts: int, strategy: str, num_ghosts: int, members: Sequence[Sequence[int]] | None
) -> tuple[int, int]:
    """Hyperedges of all experts, and of the primaries alone."""
    primaries = num_experts - num_ghosts
    if members is not None:
        edges = incidence(members, num_experts)
        touched = edges[1, edges[0] >= primaries].unique().numel()
        return len(members), len(members) - touched
    if strategy not in STRATEGIES or strategy == "all":
        return 1, 1  # an unknown one is refused where it is built
    size = {"all_pairs": 2, "all_triplets": 3}[strategy]
    return comb(num_experts, size), comb(primaries, size)


def _check_budget(total: int, primary: int, budget: int) -> None:
    if budget < 1:
        raise ConfigError("no room for a hyperedge", "max_hyperedges", "at least 1", budget)
    if primary > budget:
        raise ConfigError("more hyperedges than the budget", "max_hyperedges", f"at least {primary}", budget)
    if total > budget:
        raise ConfigError(
            "ghosts have no room in the hyperedge budget",
            "num_ghosts",
            f"fewer ghosts, or max_hyperedges of at least {total}",
            f"{primary} hyperedges of primaries and {total - primary} with ghosts, max_hyperedges={budget}",
        )


def _check_members(dense: Tensor, size: Tensor, k: int, num_ghosts: int) -> None:
    if size.max() > k:
        h = int(size.argmax())
        raise ConfigError(
            f"hyperedge {h} can never act: a token has {k} rows",
            "hyperedges",
            f"at most {k} members",
            int(size[h]),
        )
    alone = (dense[dense.size(0) - num_ghosts :].sum(dim=1) == 0).nonzero()
    if len(alone):
        ghost = dense.size(0) - num_ghosts + int(alone[0])
        raise ConfigError("a ghost lies in no hyperedge", "hyperedges", f"one with expert {ghost}")


def _meet(dense: Tensor, k: int, kind: Tensor | None = None) -> bool:
    """Whether an expert lies in two different hyperedges that fit into ``k`` rows, of two kinds if given."""
    if dense.size(1) == 1 or (kind is not None and kind.max() == 0):
        return False
    size = dense.sum(dim=0)
    for row in dense:
        around = row.nonzero().squeeze(1)
        members = dense[:, around]
        common = members.t() @ members
        union = size[around].unsqueeze(1) + size[around] - common
        meet = (common < union) & (union <= k)
        if kind is not None:
            meet &= kind[around].unsqueeze(1) != kind[around]
        if meet.any():
            return True
    return False
