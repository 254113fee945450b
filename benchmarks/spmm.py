"""Weighted sums over the edges of a graph, forward and backward, with gradients to nodes and to edge weights.

Peers are PyG's message passing edge by edge, as its layers do it on a plain ``edge_index``, and torch's own
sparse product with its own gradient. All forms get the same graph and weights; outputs and gradients are
compared before times are taken. Graphs are random; edges are sorted by target, which PyG likes best.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import side_by_side
from graphmoe.nn import WeightedSumConv
from graphmoe.nn.sparse.places import draw_places
from graphmoe.ops.topology import Topology

OURS, EDGES, CSR = "WeightedSumConv", "PyG message passing", "torch CSR, its own gradient"


@dataclass(frozen=True)
class Shape:
    """Nodes, edges, channels."""

    nodes: int
    edges: int
    channels: int
    aim: str

    def __str__(self) -> str:
        return f"{self.nodes:,} nodes, {self.edges:,} edges, {self.channels} channels"


SHAPES = (Shape(65_536, 1_000_000, 64, "at least 20"), Shape(4_096, 100_000, 64, "none"))


def forms(shape: Shape) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """``(x, weight) -> out``, by name, on one random graph."""
    # Different pairs of nodes: torch's own gradient cannot do with edges that are there twice.
    place = draw_places(shape.nodes**2, shape.edges)
    edges = torch.stack([place % shape.nodes, place.div(shape.nodes, rounding_mode="floor")])
    conv, topology = WeightedSumConv(), Topology(edges, (shape.nodes, shape.nodes))
    ptr, source = topology.ptr.long(), topology.source.long()
    size = (shape.nodes, shape.nodes)

    def csr(x: Tensor, weight: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(ptr, source, weight, size, check_invariants=False) @ x

    return {
        OURS: lambda x, weight: conv(x, topology, weight),
        EDGES: lambda x, weight: conv(x, edges, weight),
        CSR: csr,
    }


def step(form: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> Callable:
    """One forward and one backward pass."""

    def run() -> tuple[Tensor, ...]:
        out = form(x, weight)
        return out.detach(), *torch.autograd.grad(out, (x, weight), grad)

    return run


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form, and how far its outputs and gradients are from ours."""
    torch.manual_seed(0)
    x = torch.randn(shape.nodes, shape.channels, requires_grad=True)
    weight = torch.randn(shape.edges, requires_grad=True)
    grad = torch.randn(shape.nodes, shape.channels)
    work = {name: step(form, x, weight, grad) for name, form in forms(shape).items()}
    ours = work[OURS]()
    difference = {
        name: max((a - b).abs().max().item() for a, b in zip(ours, run(), strict=True))
        for name, run in work.items()
        if name != OURS
    }
    return {"shape": str(shape), "ms": side_by_side(work, rounds=rounds), "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times = result["ms"]
        print(f"\nWeighted sum, forward + backward, {shape}")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            print(f"{name:28} {value:9.2f} ms {value / times[OURS]:8.2f}x")
        print(f"{EDGES} / {OURS}: {times[EDGES] / times[OURS]:.1f} (aim: {shape.aim})")
        for name, gap in result["difference"].items():
            print(f"outputs and gradients of {name} and {OURS}: at most {gap:.1e} apart")
        results.append(result)
    return results
