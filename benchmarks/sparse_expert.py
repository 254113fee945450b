"""``MoELayer`` with sparse experts, forward and backward, against experts that are matrices.

``dense`` has matrices of the same width, and in the comparison of outputs the same weights, with zeros where
there is no edge; ``narrow`` has matrices with as many weights as there are edges; the edge form passes
messages along the edges inside the experts, as PyG does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.timing import forward_backward, side_by_side
from graphmoe.nn import MoELayer, edge_form

DENSE, NARROW, EDGES = "dense", "narrow", "PyG message passing"
DENSITIES = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Shape:
    """Tokens, channels, experts, channels inside an expert, experts a token."""

    tokens: int
    channels: int
    experts: int
    hidden: int
    k: int

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.channels} E={self.experts} ff={self.hidden} k={self.k}"


SHAPES = (Shape(1024, 128, 6, 640, 3), Shape(2048, 256, 8, 1024, 2), Shape(1024, 512, 8, 2048, 2))


def build(shape: Shape, *, hidden: int | None = None, density: float | None = None) -> MoELayer:
    """A layer of this shape."""
    width = hidden or shape.hidden
    return MoELayer(shape.channels, shape.experts, shape.k, hidden_channels=width, expert_density=density)


@torch.no_grad()
def copy_weights(sparse: MoELayer, dense: MoELayer) -> None:
    """Give a dense layer the router and the edges of a sparse one."""
    dense.router.load_state_dict(sparse.router.state_dict())
    for name in ("gate_up_proj", "down_proj"):
        matrices = [layer.dense_weight() for layer in getattr(sparse.experts, name)]
        getattr(dense.experts, name).copy_(torch.stack(matrices))


def edge_by_edge(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """A step in the edge form."""
    step = forward_backward(module, x, grad)

    def run() -> None:
        with edge_form(module):
            step()

    return run


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form, and how far outputs are apart."""
    torch.manual_seed(0)
    x = torch.randn(shape.tokens, shape.channels, requires_grad=True)
    grad, dense = torch.randn_like(x), build(shape)
    work, difference = {DENSE: forward_backward(dense, x, grad)}, 0.0
    for density in DENSITIES:
        sparse, name = build(shape, density=density), f"{100 * density:g} %"
        copy_weights(sparse, dense)
        with torch.no_grad():
            difference = max(difference, (sparse(x) - dense(x)).abs().max().item())
        narrow = build(shape, hidden=round(density * shape.hidden))
        work[f"{name} of the edges"] = forward_backward(sparse, x, grad)
        work[f"{NARROW}, {name}"] = forward_backward(narrow, x, grad)
        if density == DENSITIES[0] and shape == SHAPES[0]:
            work[f"{EDGES}, {name}"] = edge_by_edge(sparse, x, grad)
    return {"shape": str(shape), "ms": side_by_side(work, rounds=rounds), "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        print(f"\nMoELayer with sparse experts, {shape}")
        for name, value in result["ms"].items():
            print(f"{name:28} {value:9.2f} ms {result['ms'][DENSE] / value:8.2f} times as fast as {DENSE}")
        print(f"outputs of both: at most {result['difference']:.1e} apart")
        results.append(result)
    return results
