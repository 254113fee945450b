r"""Names of node and edge types, and the plain tuples that travel between layers.

Shape letters, here and in every ``# [N, k, F]`` comment of the library:

==  ==========================================  ==  ================================
N   tokens (batch and time flattened) or nodes  B   sequences in a batch
E   experts (primary and ghost)                 T   steps of a sequence
G   ghost experts                               F   hidden channels
k   routing edges a token                       D   input and output channels
R   routing edges                               M   edges of any graph
H   hyperedges                                  L   layers
==  ==========================================  ==  ================================
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

TOKEN, EXPERT, HYPEREDGE, SLOT, NEURON = "token", "expert", "hyperedge", "slot", "neuron"

ATTENDS = (TOKEN, "attends", TOKEN)
ROUTES = (TOKEN, "routes", EXPERT)
COUPLES = (EXPERT, "couples", EXPERT)
JOINS = (EXPERT, "joins", HYPEREDGE)
SPREADS = (HYPEREDGE, "spreads", EXPERT)
RETURNS = (EXPERT, "returns", TOKEN)
WRITES = (TOKEN, "writes", SLOT)
ANSWERS = (SLOT, "answers", TOKEN)
PRECEDES = (SLOT, "precedes", SLOT)
FEEDS = (NEURON, "feeds", NEURON)

NEVER = -1e4
"""Router logit of an edge that must not exist: finite, and exactly 0 after a softmax in fp32."""


class Routing(NamedTuple):
    """The edges ``token --routes--> expert``, sorted by expert.

    An absent edge (masked token, dormant ghost, score under a threshold) is a sentinel: ``expert == E``,
    stored behind ``ptr[E]``, with weight 0. Shapes are therefore static: ``R = N * k``, or where experts
    choose and a token may have any number of edges, ``R = E * C``.

    Attributes:
        token: Source of each edge, ``[R]`` int64.
        expert: Target of each edge, ``[R]`` int64, ascending, ``E`` for an absent edge.
        weight: Routing weight of each edge, ``[R]``.
        logits: Router scores, ``[N, E]``, finite.
        ptr: Row offsets of the experts, ``[E + 1]`` int64.
        perm: Place of each edge in token order, ``[R]`` int64: ``n * k + slot`` where every token has ``k``.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    logits: Tensor
    ptr: Tensor
    perm: Tensor

    @property
    def num_experts(self) -> int:
        return self.logits.size(1)

    @property
    def k(self) -> int:
        """Places for edges a token, rounded down where tokens differ in it."""
        return self.token.numel() // max(self.logits.size(0), 1)

    @property
    def edge_index(self) -> EdgeIndex:
        """The present edges ``token -> expert`` as an :class:`EdgeIndex` sorted by expert."""
        live = int(self.ptr[-1])
        size = (self.logits.size(0), self.num_experts)
        return EdgeIndex(
            torch.stack([self.token[:live], self.expert[:live]]), sparse_size=size, sort_order="col"
        )

    @property
    def rows(self) -> EdgeIndex:
        """The edges ``token -> row``: every routing edge seen as a node, ``[2, R]``."""
        row = torch.arange(self.token.numel(), device=self.token.device)
        size = (self.logits.size(0), self.token.numel())
        return EdgeIndex(torch.stack([self.token, row]), sparse_size=size, sort_order="col")


class Record(NamedTuple):
    """What one MoE layer did in one forward pass; losses, loads and plots are functions of it.

    Attributes:
        routing: The routing edges.
        expert_mean: Mean output of each expert over its rows, ``[E, D]`` (0 without rows), or
            ``None`` where the layer never holds the rows of an expert.
        attention: Attention of collaborating rows, ``[rounds, N, heads, nodes, nodes]`` (target, source),
            or ``None`` unless the layer is asked to keep it. The nodes are the ``k`` rows of a token in
            slot order, then the mediator, if there is one.
        dropped: Number of edges dropped by a capacity limit, int64 scalar.
        unexplained: Variance of ``x - mean_e o_e`` over tokens, averaged over channels, scalar,
            or ``None``.
        residual_mean: Mean of ``x - mean_e o_e`` over tokens, ``[D]``, or ``None``: what it takes to put
            the variances of several batches together.
        overflow: The edges dropped by a capacity limit, ``[N, E]`` bool, or ``None`` without a limit.
        gate: Share of the mediator in what returns to each token, ``[N]``, or ``None`` without one.
        mask: Nodes that take part, ``[N]`` bool, or ``None`` where all do: padding is no token that nobody
            chose.
    """

    routing: Routing
    expert_mean: Tensor | None
    attention: Tensor | None
    dropped: Tensor
    unexplained: Tensor | None
    residual_mean: Tensor | None = None
    overflow: Tensor | None = None
    gate: Tensor | None = None
    mask: Tensor | None = None


class MemoryState(NamedTuple):
    """What a memory holds after some steps of each sequence; going on from it is one long sequence.

    Attributes:
        slots: Contents, ``[B, S, F]``.
        steps: Tokens that each sequence has passed, ``[B]`` int64.
    """

    slots: Tensor
    steps: Tensor


class MemoryRecord(NamedTuple):
    """What one memory layer did in one forward pass.

    Attributes:
        routing: The edges ``token -> slot`` of ``N = B * T`` tokens; a slot is what elsewhere is an expert.
            A token reads and writes along the same ones.
        read: Attention of each token to its slots, ``[N, heads, k]`` in the order of its edges; 0 for an
            absent one.
        gate: How much each token wrote, ``[N]`` in [0, 1]: 0 for one that may not write.
        mask: Tokens that take part, ``[N]`` bool, or ``None`` where all do.
    """

    routing: Routing
    read: Tensor
    gate: Tensor
    mask: Tensor | None = None


class MocaRecord(NamedTuple):
    """What one layer of slots and experts did in one forward pass.

    Attributes:
        memory: What its memory did, or ``None`` without one.
        experts: What its experts did, or ``None`` with a single one.
        usage: Effective edges of each token as a fraction of those it may have, mean over both routers,
            ``[N]`` with a gradient, or ``None`` without a router.
        kept: Edges left of those that the routers chose, as a fraction, mean over both, ``[N]``, or ``None``
            without a router.
        budget: What each token is allowed of its edges, ``[N]`` in [0, 1], or ``None`` without budgets.
        mask: Tokens that take part, ``[N]`` bool, or ``None`` where all do.
    """

    memory: MemoryRecord | None
    experts: Record | None
    usage: Tensor | None
    kept: Tensor | None
    budget: Tensor | None
    mask: Tensor | None = None
