"""Training steps of a sparse network against the dense one and against PyG's message passing.

The network is ``SparseMLP`` without dropout, the dense one has ``nn.Linear`` layers of the same sizes, the
third one the same edges as ``SparseLinear`` in its edge form, which is how PyG passes messages. A step is
a forward and a backward pass; with AdamW it is compared too, since the optimiser of a dense network moves all
its weights. The memory is that of weights, ids of edges, what is laid out for the products, gradients and
moments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.timing import side_by_side
from graphmoe.models import SparseMLP, SparseMLPConfig
from graphmoe.nn import SparseLinear, edge_form

OURS, DENSE, EDGES, ADAM = "SparseMLP", "dense", "PyG message passing", ", with AdamW"
BATCH = 128


@dataclass(frozen=True)
class Shape:
    """Channels of the layers, density, and what is aimed at: over dense, and over PyG if anything is."""

    sizes: tuple[int, ...]
    density: float
    over_dense: float
    over_edges: float | None

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))} at {100 * self.density:g} %, batch {BATCH}"


MNIST, WIDE = (784, 1000, 1000, 1000, 10), (4000, 4000, 4000)
SHAPES = (
    Shape(MNIST, 0.05, 2.4, 12.0),
    Shape(MNIST, 0.01, 4.5, None),
    Shape(WIDE, 0.05, 3.5, 12.0),
    Shape(WIDE, 0.01, 12.0, 12.0),
)


def build(shape: Shape, density: float) -> SparseMLP:
    """A network of these layers."""
    config = SparseMLPConfig(
        input_size=shape.sizes[0],
        hidden_sizes=list(shape.sizes[1:-1]),
        num_labels=shape.sizes[-1],
        density=density,
        # Ten outputs of a thousand neurons are a third of all edges at 1 %.
        dense_output=shape.sizes[-1] == 10 and density >= 0.05,
        dropout=0.0,
    )
    return SparseMLP(config)


def bytes_of(model: nn.Module) -> int:
    """Memory of weights, their gradients, two moments each, ids, and what sparse products need."""
    found = sum(4 * p.numel() * p.itemsize for p in model.parameters())
    found += sum(b.numel() * b.itemsize for b in model.buffers())
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            found += sum(t.numel() * t.itemsize for t in layer.topology().tensors() if t is not None)
    return found


def step(model: SparseMLP, *, adam: bool = False, edges: bool = False) -> Callable[[], None]:
    """One training step on random data."""
    sizes = model.config.shapes()
    x, labels = torch.randn(BATCH, sizes[0][0]), torch.randint(sizes[-1][1], (BATCH,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x, labels=labels).loss.backward()
        if adam:
            optimizer.step()

    def run_edges() -> None:
        with edge_form(model):
            run()

    return run_edges if edges else run


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form, how far outputs are apart, and memory."""
    torch.manual_seed(0)
    ours, dense = build(shape, shape.density), build(shape, 1.0)
    x = torch.randn(8, shape.sizes[0])
    with torch.no_grad():
        for sparse, full in zip(ours.layers, dense.layers, strict=True):
            full.weight.copy_(sparse.dense_weight() if isinstance(sparse, SparseLinear) else sparse.weight)
        difference = (ours(x).logits - dense(x).logits).abs().max().item()
    work = {OURS: step(ours), DENSE: step(dense)}
    work |= {OURS + ADAM: step(ours, adam=True), DENSE + ADAM: step(dense, adam=True)}
    work[EDGES] = step(ours, edges=True)
    times = side_by_side(work, rounds=rounds)
    memory = {OURS: bytes_of(ours), DENSE: bytes_of(dense)}
    edges = ours.num_edges()
    return {"shape": str(shape), "edges": edges, "ms": times, "bytes": memory, "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times, memory = result["ms"], result["bytes"]
        print(f"\nTraining step, {shape}: {result['edges']:,} edges")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            print(f"{name:24} {value:9.2f} ms {value / times[OURS]:8.2f}x")
        print(f"{DENSE} / {OURS}: {times[DENSE] / times[OURS]:.2f} (aim: at least {shape.over_dense:g})")
        print(f"{DENSE} / {OURS}{ADAM}: {times[DENSE + ADAM] / times[OURS + ADAM]:.2f}")
        aim = f" (aim: at least {shape.over_edges:g})" if shape.over_edges else ""
        print(f"{EDGES} / {OURS}: {times[EDGES] / times[OURS]:.2f}{aim}")
        each = memory[OURS] / result["edges"]
        print(
            f"memory: {memory[OURS] / 1e6:.1f} MB ({each:.0f} bytes an edge), "
            f"dense {memory[DENSE] / 1e6:.1f} MB ({memory[DENSE] / memory[OURS]:.1f}x)"
        )
        print(f"outputs of both: at most {result['difference']:.1e} apart")
        results.append(result)
    return results
