"""``MoELayer``, forward and backward, against transformers' Mixtral block and PyG's message passing.

All peers hold the same weights, and their outputs are compared before they are timed. ``GEMM ideal`` is the
time of the bare matrix products of a perfectly balanced layer: nothing can be faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import HeteroLinear
from torch_geometric.utils import scatter
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from benchmarks.timing import forward_backward, side_by_side
from graphmoe.nn import MoELayer, edge_form


@dataclass(frozen=True)
class Shape:
    """Tokens, channels, experts, channels inside an expert, experts a token, precision."""

    tokens: int
    channels: int
    experts: int
    hidden: int
    k: int = 2
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"T={self.tokens} d={self.channels} E={self.experts} ff={self.hidden} k={self.k}{kind}"


SHAPES = (
    Shape(2048, 256, 8, 1024),
    Shape(2048, 256, 64, 512),
    Shape(8192, 256, 8, 1024),
    Shape(2048, 256, 8, 1024, dtype=torch.bfloat16),
)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class Hetero(nn.Module):
    """The same layer from PyG's parts: ``HeteroLinear`` on sorted rows and ``scatter``."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        experts = layer.experts
        self.router = layer.router
        sizes = (experts.in_channels, experts.hidden_channels, experts.num_experts)
        self.first = HeteroLinear(sizes[0], 2 * sizes[1], sizes[2], is_sorted=True, bias=False)
        self.second = HeteroLinear(sizes[1], sizes[0], sizes[2], is_sorted=True, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(experts.gate_up_proj.transpose(1, 2))
            self.second.weight.copy_(experts.down_proj.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x)
        gate, up = self.first(x[routing.token], routing.expert).chunk(2, dim=-1)
        rows = self.second(F.silu(gate) * up, routing.expert)
        weight = routing.weight.to(rows.dtype).unsqueeze(-1)
        return scatter(weight * rows, routing.token, dim_size=x.size(0), reduce="sum")


class Edges(nn.Module):
    """``MoELayer`` in its edge form: PyG's ``MessagePassing``, message by message."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with edge_form(self.layer):
            return self.layer(x)


class Mixtral(nn.Module):
    """transformers' block with one of its experts implementations."""

    def __init__(self, layer: MoELayer, implementation: str):
        super().__init__()
        experts = layer.experts
        config = MixtralConfig(
            hidden_size=experts.in_channels,
            intermediate_size=experts.hidden_channels,
            num_local_experts=experts.num_experts,
            num_experts_per_tok=layer.k,
        )
        config._experts_implementation = implementation
        self.block = MixtralSparseMoeBlock(config).to(experts.down_proj.dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(layer.router.weight)
            self.block.experts.gate_up_proj.copy_(experts.gate_up_proj)
            self.block.experts.down_proj.copy_(experts.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unsqueeze(0)).squeeze(0)


def gemm_ideal(shape: Shape, device: torch.device) -> Callable[[], None]:
    """The nine matrix products of a balanced layer and its backward pass, in place."""
    rows = shape.tokens * shape.k // shape.experts
    options = {"dtype": shape.dtype, "device": device}
    x, wide = torch.randn(rows, shape.channels, **options), torch.randn(rows, 2 * shape.hidden, **options)
    hidden, out = torch.randn(rows, shape.hidden, **options), torch.empty(rows, shape.channels, **options)
    first = torch.randn(shape.experts, 2 * shape.hidden, shape.channels, **options)
    second = torch.randn(shape.experts, shape.channels, shape.hidden, **options)
    grads = [torch.empty_like(first), torch.empty_like(second)]

    def products() -> None:
        for w1, w2, g1, g2 in zip(first, second, *grads, strict=True):
            torch.mm(x, w1.t(), out=wide)
            torch.mm(hidden, w2.t(), out=out)
            torch.mm(x, w2, out=hidden)
            torch.mm(x.t(), hidden, out=g2)
            torch.mm(wide, w1, out=out)
            torch.mm(wide.t(), x, out=g1)

    return products


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form at one shape, and how far their outputs are apart."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layer = MoELayer(shape.channels, shape.experts, shape.k, hidden_channels=shape.hidden)
    layer = layer.to(device, shape.dtype)
    # batched_mm copies the weights of an expert for every row, and their gradients as well.
    fits = shape.tokens * shape.k * shape.channels * shape.hidden * 3 * 4 < 2**31
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or fits]
    peers: dict[str, nn.Module] = {f"transformers {name}": Mixtral(layer, name).to(device) for name in names}
    peers["PyG HeteroLinear"] = Hetero(layer).to(device, shape.dtype)
    peers["PyG MessagePassing (edge form)"] = Edges(layer)
    x = torch.randn(shape.tokens, shape.channels, dtype=shape.dtype, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    with torch.no_grad():
        ours = layer(x)
        apart = {name: (peer(x) - ours).abs().max().item() for name, peer in peers.items()}
    work = {"GEMM ideal": gemm_ideal(shape, device), "graphmoe": forward_backward(layer, x, grad)}
    work |= {name: forward_backward(peer, x, grad) for name, peer in peers.items()}
    times = side_by_side(work, rounds=rounds)
    left_out = [f"transformers {name}" for name in IMPLEMENTATIONS if name not in names]
    return {"shape": str(shape), "ms": times, "difference": apart, "left_out": left_out}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times = result["ms"]
        ours, ideal = times["graphmoe"], times["GEMM ideal"]
        print(f"\nMoE layer, forward + backward, {shape}")
        print(f"{'':32} {'ms':>8} {'peer / ours':>12} {'of GEMM ideal':>14} {'difference':>11}")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            apart = result["difference"].get(name)
            far = "" if apart is None else f"{apart:.1e}"
            print(f"{name:32} {value:8.1f} {value / ours:11.2f}x {100 * ideal / value:12.0f} % {far:>11}")
        for name in result["left_out"]:
            print(f"{name:32} left out: it would gather more than 2 GiB of weights")
        results.append(result)
    return results
