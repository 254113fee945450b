"""Collaboration of the experts of a token, forward and backward, against its bare matrix products, and its
attention against PyG's ``TransformerConv`` and scaled dot-product attention.

All forms hold the same weights, and their outputs are compared before times are taken. The peers of the
attention see the same graphs, complete ones of the rows of every token and its mediator; for
``TransformerConv`` they are one block-diagonal edge list. Nothing can be faster than the products with its
weights, ``GEMM ideal``. Where those take most of the time they hide the rest, so the attentions are also
compared alone, on given queries, keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import TransformerConv

from benchmarks.coupling import block_diagonal
from benchmarks.timing import forward_backward, side_by_side
from graphmoe.graph import complete
from graphmoe.nn import CollabConv, RowAttention, edge_form
from graphmoe.ops.collaborate import plain_collaborate
from graphmoe.ops.row_attention import row_attention

IDEAL, COLLAB, DENSE = "GEMM ideal", "CollabConv", "CollabConv, dense form"
ATTENTION, TRANSFORMER, SDPA = "RowAttention", "PyG TransformerConv", "SDPA"
EDGES, ALONE = "CollabConv, edge form", ", alone"

# First over second, and what is aimed at.
TARGETS = (
    (COLLAB, IDEAL, "at most 1.4"),
    (DENSE, COLLAB, "at least 1"),
    (TRANSFORMER, ATTENTION, "at least 1"),
    (SDPA, ATTENTION, "at least 1"),
    (TRANSFORMER + ALONE, ATTENTION + ALONE, "at least 3"),
    (SDPA + ALONE, ATTENTION + ALONE, "at least 1"),
)
EXPERT_WIDTHS = (1024, 256)


@dataclass(frozen=True)
class Shape:
    """Tokens, channels, experts, experts a token, rounds, heads."""

    tokens: int
    channels: int
    experts: int
    k: int
    rounds: int = 2
    heads: int = 4

    @property
    def nodes(self) -> int:
        """Rows of a token and its mediator."""
        return self.k + 1

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.channels} k={self.k} R={self.rounds}, mediator"


SHAPES = (Shape(2048, 256, 8, 2), Shape(2048, 256, 8, 4))


class Collaboration(nn.Module):
    """``CollabConv`` with the expert ids of its rows, or its edge form."""

    def __init__(self, conv: CollabConv, expert: Tensor, *, edges: bool = False):
        super().__init__()
        self.conv, self.edges = conv, edges
        self.register_buffer("expert", expert)

    def forward(self, x: Tensor) -> Tensor:
        if not self.edges:
            return self.conv(x, expert=self.expert)
        with edge_form(self.conv):
            return self.conv(x, expert=self.expert)


class Dense(nn.Module):
    """The same by plain maths: what one writes with batched products."""

    def __init__(self, conv: CollabConv):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        nodes = torch.cat([x, conv.mediator.expand(len(x), 1, -1)], dim=1)
        maps = (conv.attention.lin_qkv, conv.attention.lin_out, conv.attention_norm, conv.feed_forward_norm)
        weights = (layer.weight for layer in (*maps, conv.gate_up_proj, conv.down_proj))
        return plain_collaborate(
            nodes, None, *weights, heads=conv.attention.heads, rounds=conv.rounds, eps=1e-6
        )


class Attention(nn.Module):
    """The attention of the kernel on queries, keys and values ``[T, nodes, 3 * F]``."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:
        return row_attention(qkv, self.heads)[0]


class ScaledDotProduct(Attention):
    """The same by torch's operator."""

    def forward(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2)


class OneGraph(nn.Module):
    """The same by ``TransformerConv`` on the graphs of all tokens, its linear maps taken out."""

    def __init__(self, channels: int, heads: int, edge_index: Tensor):
        super().__init__()
        self.conv = TransformerConv(channels, channels // heads, heads, bias=False, root_weight=False)
        for part, name in enumerate(("lin_query", "lin_key", "lin_value")):
            setattr(self.conv, name, Part(part))
        self.register_buffer("edge_index", edge_index)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.conv(qkv.flatten(0, 1), self.edge_index).view(*qkv.shape[:2], -1)


class Part(nn.Module):
    """Queries, keys or values."""

    def __init__(self, part: int):
        super().__init__()
        self.part = part

    def forward(self, qkv: Tensor) -> Tensor:
        return qkv.chunk(3, dim=-1)[self.part]


class WithMaps(nn.Module):
    """An attention between the linear maps of ``RowAttention``."""

    def __init__(self, attention: RowAttention, alone: nn.Module):
        super().__init__()
        self.attention, self.alone = attention, alone

    def forward(self, x: Tensor) -> Tensor:
        return self.attention.lin_out(self.alone(self.attention.lin_qkv(x)))


def gemm_ideal(layers: Sequence[nn.Linear], rows: int, rounds: int) -> Callable[[], None]:
    """The products with the weights of linear layers in all rounds and their backward pass, in place."""
    weights = [layer.weight.detach() for layer in layers]
    inputs = [w.new_ones(rows, w.size(1)).normal_() for w in weights]
    outputs = [w.new_ones(rows, w.size(0)).normal_() for w in weights]
    results = [[torch.empty_like(t) for t in part] for part in (inputs, outputs, weights)]

    def products() -> None:
        for _ in range(rounds):
            for x, out, w, to_x, to_out, to_w in zip(inputs, outputs, weights, *results, strict=True):
                torch.mm(x, w.t(), out=to_out)
                torch.mm(out, w, out=to_x)
                torch.mm(out.t(), x, out=to_w)

    return products


def linear_maps(conv: CollabConv) -> tuple[nn.Linear, ...]:
    """The linear layers of a round."""
    return conv.attention.lin_qkv, conv.attention.lin_out, conv.gate_up_proj, conv.down_proj


def flops(conv: CollabConv, shape: Shape) -> dict[str, float]:
    """GFLOP of one forward and backward pass: of the collaboration, and of SwiGLU experts by their width."""
    rows = shape.tokens * shape.nodes
    maps = linear_maps(conv)
    attention = 2 * shape.nodes * shape.channels  # multiply-adds of a row: scores, and what is heard
    collaboration = rows * shape.rounds * (sum(lin.weight.numel() for lin in maps) + attention)
    experts = {f"experts, ff={f}": shape.tokens * shape.k * 3 * shape.channels * f for f in EXPERT_WIDTHS}
    # Two operations a multiply-add, and the backward pass has two products for one of the forward pass.
    return {name: 6e-9 * count for name, count in {"collaboration": collaboration, **experts}.items()}


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form at one shape, and how far outputs are apart that should be equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    conv = CollabConv(
        shape.channels, shape.experts, heads=shape.heads, rounds=shape.rounds, mediator=True
    ).to(device)
    expert = torch.rand(shape.tokens, shape.experts, device=device).argsort(dim=1)[:, : shape.k]
    edges = block_diagonal(complete(shape.nodes, loops=True), shape.tokens, (shape.nodes, shape.nodes))
    alone = {
        ATTENTION: Attention(shape.heads),
        SDPA: ScaledDotProduct(shape.heads),
        TRANSFORMER: OneGraph(shape.channels, shape.heads, edges).to(device),
    }
    with_maps = {name: WithMaps(conv.attention, form) for name, form in alone.items()}
    with_maps[ATTENTION] = conv.attention
    on_rows = {COLLAB: Collaboration(conv, expert), DENSE: Dense(conv)}
    rows = torch.randn(shape.tokens, shape.k, shape.channels, device=device, requires_grad=True)
    nodes = torch.randn(shape.tokens, shape.nodes, shape.channels, device=device, requires_grad=True)
    qkv = torch.randn(shape.tokens, shape.nodes, 3 * shape.channels, device=device, requires_grad=True)
    grad = torch.randn_like(nodes)
    with torch.no_grad():
        same = {DENSE: on_rows[DENSE], EDGES: Collaboration(conv, expert, edges=True)}
        apart = {f"{name} and {COLLAB}": form(rows) - on_rows[COLLAB](rows) for name, form in same.items()}
        peers = (SDPA, TRANSFORMER)
        apart |= {f"{n} and {ATTENTION}": with_maps[n](nodes) - conv.attention(nodes) for n in peers}
        difference = {names: gap.abs().max().item() for names, gap in apart.items()}
    work = {IDEAL: gemm_ideal(linear_maps(conv), shape.tokens * shape.nodes, shape.rounds)}
    work |= {name: forward_backward(form, rows, grad) for name, form in on_rows.items()}
    work |= {name: forward_backward(form, nodes, grad) for name, form in with_maps.items()}
    work |= {name + ALONE: forward_backward(form, qkv, grad) for name, form in alone.items()}
    times = side_by_side(work, rounds=rounds)
    return {"shape": str(shape), "ms": times, "gflop": flops(conv, shape), "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times, gflop = result["ms"], result["gflop"]
        print(f"\nCollaboration, forward + backward, {shape}")
        print(f"{'':26} {'ms':>8} {'/ ideal':>9} {'/ attention':>12}")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            print(f"{name:26} {value:8.1f} {value / times[IDEAL]:8.2f}x {value / times[ATTENTION]:11.2f}x")
        for first, second, aim in TARGETS:
            print(f"{first} / {second}: {times[first] / times[second]:.2f} (aim: {aim})")
        own, *experts = gflop.items()
        others = ", ".join(f"{name} {value:.1f} ({own[1] / value:.2f}x)" for name, value in experts)
        print(f"GFLOP: {own[0]} {own[1]:.1f}; of the same layer {others}")
        for names, gap in result["difference"].items():
            print(f"outputs of {names}: at most {gap:.1e} apart")
        results.append(result)
    return results
