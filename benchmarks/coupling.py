"""The couplers, forward and backward, against bare linear layers and PyG's convolutions.

The peers see the same expert graphs, those of all tokens in one block-diagonal edge list. Where a peer
can express the operator of a coupler its weights are copied, and outputs are compared before times are taken.
A coupler cannot be faster than the products with its weights: one ``nn.Linear`` for ``HyperCoupleConv``,
two for ``CoupleConv``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, HypergraphConv, TransformerConv

from benchmarks.timing import forward_backward, side_by_side
from graphmoe.graph import complete, hyperedges
from graphmoe.nn import CoupleConv, HyperCoupleConv, edge_form

HYPER, ATTENTION, COUPLE = "HyperCoupleConv", "HyperCoupleConv, attention", "CoupleConv"
LINEAR, LINEARS = "nn.Linear", "two nn.Linear"
GCN, CACHED, HYPERGRAPH = "PyG GCNConv", "PyG GCNConv, cached", "PyG HypergraphConv"
GAT, TRANSFORMER = "PyG GATConv", "PyG TransformerConv"

# First over second, and what is aimed at.
TARGETS = (
    (HYPER, LINEAR, "at most 1.2"),
    (COUPLE, LINEARS, "at most 1.4"),
    (GCN, HYPER, "at least 3.5"),
    (HYPERGRAPH, HYPER, "at least 3.5"),
    (GCN, COUPLE, "at least 3.5"),
    (HYPERGRAPH, COUPLE, "at least 3.5"),
    (TRANSFORMER, ATTENTION, "at least 3"),
)


@dataclass(frozen=True)
class Shape:
    """Tokens, channels, experts, experts a token."""

    tokens: int
    channels: int
    experts: int
    k: int

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.channels} E={self.experts} k={self.k}"


SHAPES = (Shape(2048, 256, 8, 8), Shape(2048, 256, 8, 3))


class Coupler(nn.Module):
    """One of our couplers with the expert ids of its rows, in its fast form or its edge form."""

    def __init__(self, conv: nn.Module, expert: Tensor | None, *, edges: bool = False):
        super().__init__()
        self.conv, self.expert, self.edges = conv, expert, edges

    def forward(self, x: Tensor) -> Tensor:
        if not self.edges:
            return self.conv(x, expert=self.expert)
        with edge_form(self.conv):
            return self.conv(x, expert=self.expert)


class OneGraph(nn.Module):
    """A convolution of PyG on the expert graphs of all tokens."""

    def __init__(self, conv: nn.Module, edge_index: Tensor):
        super().__init__()
        self.conv, self.edge_index = conv, edge_index

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1), self.edge_index).view_as(x)


class TwoLinears(nn.Module):
    """The products with the weights of ``CoupleConv`` and nothing else."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Linear(channels, channels, bias=False)
        self.second = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def block_diagonal(edge_index: Tensor, tokens: int, sizes: tuple[int, int]) -> Tensor:
    """The edges of one token, repeated for all of them with node ids of their own."""
    offset = torch.arange(tokens).view(1, -1, 1) * torch.tensor(sizes).view(2, 1, 1)
    return (edge_index.unsqueeze(1) + offset).flatten(1)


def build(shape: Shape) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every form by name, and which coupler those are compared with that compute the same."""
    d, k = shape.channels, shape.k
    expert = None
    if k < shape.experts:
        expert = torch.rand(shape.tokens, shape.experts).argsort(dim=1)[:, :k]
    ours = {
        HYPER: HyperCoupleConv(d, shape.experts, k=k),
        ATTENTION: HyperCoupleConv(d, shape.experts, k=k, attention=True),
        COUPLE: CoupleConv(d, shape.experts),
    }
    edges = block_diagonal(complete(k), shape.tokens, (k, k))
    pairs = hyperedges(k)
    pairs = block_diagonal(pairs, shape.tokens, (k, int(pairs[1, -1]) + 1))
    hypergraph = HypergraphConv(d, d, bias=False)
    with torch.no_grad():
        hypergraph.lin.weight.copy_(ours[HYPER].lin.weight)  # hyperedge weights start uniform
    forms: dict[str, nn.Module] = {LINEAR: nn.Linear(d, d, bias=False), LINEARS: TwoLinears(d)}
    forms |= {name: Coupler(conv, expert) for name, conv in ours.items()}
    forms |= {f"{name}, edge form": Coupler(conv, expert, edges=True) for name, conv in ours.items()}
    forms |= {
        GCN: OneGraph(GCNConv(d, d, bias=False), edges),
        CACHED: OneGraph(GCNConv(d, d, bias=False, cached=True), edges),
        HYPERGRAPH: OneGraph(hypergraph, pairs),
        GAT: OneGraph(GATConv(d, d, bias=False), edges),
        TRANSFORMER: OneGraph(TransformerConv(d, d, bias=False), edges),
    }
    return forms, {f"{name}, edge form": name for name in ours} | {HYPERGRAPH: HYPER}


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form at one shape, and how far outputs are apart that should be equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    forms, same = build(shape)
    for form in forms.values():
        form.to(device)
        for name in ("expert", "edge_index"):
            if isinstance(getattr(form, name, None), Tensor):
                setattr(form, name, getattr(form, name).to(device))
    x = torch.randn(shape.tokens, shape.k, shape.channels, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    with torch.no_grad():
        difference = {f"{a} and {b}": (forms[a](x) - forms[b](x)).abs().max().item() for a, b in same.items()}
    # The edge forms are there to be compared, not timed: they take gigabytes, and after them the allocator
    # would have to ask the system for the memory of everybody else's turn.
    work = {n: forward_backward(f, x, grad) for n, f in forms.items() if "edge form" not in n}
    times = side_by_side(work, rounds=rounds)
    return {"shape": str(shape), "ms": times, "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure both densities and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times = result["ms"]
        print(f"\nCouplers, forward + backward, {shape}")
        print(f"{'':28} {'ms':>8} {'/ hyper':>9} {'/ couple':>9}")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            print(f"{name:28} {value:8.1f} {value / times[HYPER]:8.2f}x {value / times[COUPLE]:8.2f}x")
        for first, second, aim in TARGETS:
            print(f"{first} / {second}: {times[first] / times[second]:.2f} (aim: {aim})")
        for names, apart in result["difference"].items():
            print(f"outputs of {names}: at most {apart:.1e} apart")
        results.append(result)
    return results
