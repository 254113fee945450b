"""Classify the nodes of a graph with few labels, with and without a mixture of experts in the GNN.

``python -m examples.gnn_moe_nodes``

The same GNN every time: a graph convolution, a feed-forward branch, a graph convolution. The branch is
absent, a dense layer, or a mixture whose experts together are as wide for a node as the dense layer is.
Every seed draws other labelled nodes and other weights; all models of a seed get the same labelled nodes.
There is no validation set: nothing is chosen by looking at the nodes that are scored.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub, Planetoid
from torch_geometric.nn import GCNConv
from torch_geometric.nn.models import LabelPropagation

from analysis.style import PRIMARIES, QUIET, new_figure, styled
from graphmoe import loss, metrics
from graphmoe.errors import ConfigError, DataError
from graphmoe.nn import FeedForward, MoELayer
from graphmoe.train.command import exit_code
from graphmoe.typing import Record

try:
    from examples.common import Flags, mean_and_spread, print_table, save_json, verdict
except ModuleNotFoundError:  # called as a file, not with -m
    from common import Flags, mean_and_spread, print_table, save_json, verdict

DATASETS = ("KarateClub", "Cora", "CiteSeer", "PubMed")
MIXTURES = {"mixture, top-k": "topk", "mixture, expert choice": "expert_choice"}
DENSE, PLAIN = "dense branch", "no branch"
DRAWN = 300  # nodes


class NodeGNN(nn.Module):
    """``last(h + branch(norm(h)))`` with ``h = relu(first(x))``; ``first`` and ``last`` convolve the graph.

    Args:
        branch: From the channels to the channels of a node, or ``None``.
        channels: Of a node between the convolutions.
        num_classes: Channels out.
        dropout: Before each convolution, in training.
    """

    def __init__(self, branch: nn.Module | None, channels: int, num_classes: int, *, dropout: float):
        super().__init__()
        self.first, self.last = GCNConv(-1, channels), GCNConv(channels, num_classes)
        self.norm = nn.LayerNorm(channels)
        self.branch, self.dropout = branch, nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Record | None]:
        """Scores ``[N, classes]``, and what the mixture did, if there is one."""
        x, record = self.first(self.dropout(x), edge_index).relu(), None
        if isinstance(self.branch, MoELayer):
            added, record = self.branch(self.norm(x), return_record=True)
            x = x + added
        elif self.branch is not None:
            x = x + self.branch(self.norm(x))
        return self.last(self.dropout(x), edge_index), record


def make_branch(name: str, args: Namespace) -> nn.Module | None:
    """The feed-forward branch called ``name``; all have the same width that is active at a node."""
    if name == PLAIN:
        return None
    if name == DENSE:
        return FeedForward(args.channels, args.k * args.expert_channels)
    return MoELayer(
        args.channels, args.num_experts, args.k, hidden_channels=args.expert_channels, router=MIXTURES[name]
    )


def load(name: str, root: str | None, *, download: bool) -> Data:
    """The graph called ``name``.

    Raises:
        DataError: Its files are not in ``root``, cannot be had or cannot be read.
    """
    if name == "KarateClub":
        return KarateClub()[0]
    if root is None:
        raise ConfigError(f"{name} does not come with PyG", "--data_dir", "the folder it is or shall be in")
    where = Path(root) / name
    present = (where / "processed" / "data.pt").is_file() or (where / "raw").is_dir()
    if not (present or download):
        hint = f"the eight files ind.{name.lower()}.* in {where / 'raw'}, or --download"
        raise DataError(f"{name} is not there", where, hint)
    try:
        return Planetoid(root, name)[0]
    except Exception as error:  # of the network, of pickles, of PyG
        what = f"{name} can neither be read nor downloaded"
        raise DataError(what, where, "its files, or a network", f"{type(error).__name__}: {error}") from error


def split(y: Tensor, labelled: int, generator: torch.Generator) -> Tensor:
    """``labelled`` random nodes of each class, ``[N]`` bool; the others are scored."""
    train = torch.zeros_like(y, dtype=torch.bool)
    for c in y.unique():
        members = (y == c).nonzero().flatten()
        if len(members) <= labelled:
            most = int(y.bincount()[y.unique()].min()) - 1
            raise ConfigError(
                "no node of a class is left to score", "--labelled", f"at most {most}", labelled
            )
        train[members[torch.randperm(len(members), generator=generator)[:labelled]]] = True
    return train


def train(model: nn.Module, data: Data, known: Tensor, args: Namespace) -> tuple[float, Record | None]:
    """Accuracy on the nodes that are not ``known``, in [0, 1], after ``--steps`` steps, and the record."""
    model.eval()
    with torch.no_grad():
        model(data.x, data.edge_index)  # channels are those of the data
    optimiser = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=5e-4)
    model.train()
    for _ in range(args.steps):
        scores, record = model(data.x, data.edge_index)
        total = F.cross_entropy(scores[known], data.y[known])
        if record is not None and model.branch.router.causal:
            total = total + 0.01 * loss.balance(
                record.routing
            )  # experts that choose are balanced as they are
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        scores, record = model(data.x, data.edge_index)
    return accuracy(scores, data.y, known), record


def accuracy(scores: Tensor, y: Tensor, known: Tensor) -> float:
    """Share of the nodes that are not ``known`` whose class scores highest, in [0, 1]."""
    return (scores[~known].argmax(dim=1) == y[~known]).double().mean().item()


def baselines(data: Data, known: Tensor, args: Namespace) -> dict[str, float]:
    """Accuracies without a GNN: the best constant answer, labels spread along edges, features alone."""
    classes = int(data.y.max()) + 1
    spread = LabelPropagation(num_layers=50, alpha=0.9)(data.y, data.edge_index, mask=known)
    linear = nn.Linear(data.x.size(1), classes)
    optimiser = torch.optim.Adam(linear.parameters(), lr=args.lr, weight_decay=5e-4)
    for _ in range(args.steps):
        optimiser.zero_grad()
        F.cross_entropy(linear(data.x[known]), data.y[known]).backward()
        optimiser.step()
    with torch.no_grad():
        scores = linear(data.x)
    return {
        "chance: largest class": data.y[~known].bincount().max().item() / int((~known).sum()),
        "label propagation": accuracy(spread, data.y, known),
        "features alone, linear": accuracy(scores, data.y, known),
    }


def serving(record: Record, y: Tensor) -> Tensor:
    """Share of the nodes of each class that each expert serves, ``[classes, E]``."""
    routing, classes = record.routing, int(y.max()) + 1
    live = int(routing.ptr[-1])
    counts = torch.zeros(classes, routing.num_experts)
    counts.index_put_((y[routing.token[:live]], routing.expert[:live]), torch.ones(live), accumulate=True)
    return counts / y.bincount(minlength=classes).unsqueeze(1)


def top_expert(record: Record) -> Tensor:
    """Expert of largest weight of each node, ``[N]``; ``E`` for a node that no expert serves."""
    routing = record.routing
    live = int(routing.ptr[-1])
    weight = torch.zeros_like(routing.logits)
    weight[routing.token[:live], routing.expert[:live]] = routing.weight[:live].to(weight.dtype)
    return torch.where(weight.amax(dim=1) > 0, weight.argmax(dim=1), routing.num_experts)


def information(record: Record, y: Tensor) -> tuple[float, float]:
    """Bits that the expert of an edge tells of the class of its node, and with experts shuffled."""
    routing = record.routing
    of_edges = (routing.expert, y[routing.token], routing.num_experts, int(y.max()) + 1)
    return float(metrics.mutual_information(*of_edges)), float(metrics.shuffled_mutual_information(*of_edges))


@styled
def draw(data: Data, records: dict[str, Record], title: str) -> Figure:
    """Experts against classes, and the graph coloured by class beside coloured by top expert."""
    fig = new_figure(12, 8, title)
    grid = fig.add_gridspec(2, 6, height_ratios=[1, 1.5])
    panels = []
    for column, (name, record) in enumerate(records.items()):
        share = serving(record, data.y)
        ax = fig.add_subplot(grid[0, 3 * column : 3 * column + 3])
        ax.grid(False)
        image = ax.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, values in enumerate(share.tolist()):
            for expert, value in enumerate(values):
                ink = "white" if value > 0.6 else "black"
                ax.text(expert, row, f"{value:.0%}", ha="center", va="center", color=ink, size=8)
        ax.set(title=name, xlabel="expert", ylabel="class")
        ax.set_xticks(range(share.size(1)))
        ax.set_yticks(range(share.size(0)))
        panels.append(ax)
    fig.colorbar(image, ax=panels, label="share of the class's nodes\nthat the expert serves")
    graph, kept, place = layout(data)
    colours = {"class": ("class", data.y)}
    colours |= {f"top expert, {name}": ("expert", top_expert(record)) for name, record in records.items()}
    for column, (name, (word, ids)) in enumerate(colours.items()):
        ax = fig.add_subplot(grid[1, 2 * column : 2 * column + 2])
        ax.set_title(f"by {name}")
        ax.axis("off")
        nx.draw_networkx_edges(graph, place, ax=ax, edge_color=QUIET, width=0.5, alpha=0.5)
        experts = records[name.removeprefix("top expert, ")].routing.num_experts if word == "expert" else None
        for value in ids[kept].unique().tolist():
            nodes = [node for node in graph if ids[node] == value]
            label = "no expert" if value == experts else f"{word} {value}"
            colour = "white" if value == experts else PRIMARIES[value % len(PRIMARIES)]
            drawn = nx.draw_networkx_nodes(
                graph, place, nodes, ax=ax, node_size=55, node_color=colour, edgecolors=QUIET, label=label
            )
            drawn.set_linewidth(0.6)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, columnspacing=1)
    return fig


def layout(data: Data) -> tuple[nx.Graph, Tensor, dict]:
    """The graph to draw, its nodes and their places: of a large one the nodes of highest degree."""
    degree = data.edge_index[1].bincount(minlength=data.num_nodes)
    kept = degree.argsort(descending=True, stable=True)[:DRAWN].sort().values
    graph = nx.Graph()
    graph.add_nodes_from(kept.tolist())
    inside = torch.isin(data.edge_index, kept).all(dim=0)
    graph.add_edges_from(data.edge_index[:, inside].t().tolist())
    return graph, kept, nx.spring_layout(graph, seed=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example.

    Raises:
        ConfigError: A flag that cannot be used.
        DataError: A data set that is not there, or a folder that cannot be made.
    """
    flags = Flags("gnn_moe_nodes", __doc__.splitlines()[0], seeds=20, steps=200)
    flags.add_argument("--dataset", choices=DATASETS, default="KarateClub", help="KarateClub comes with PyG")
    data_dir = "folder of the Planetoid data sets; their files are pickles, so take them from whom you trust"
    flags.add_argument("--data_dir", default=None, help=data_dir)
    flags.add_argument("--download", action="store_true", help="get what is not in --data_dir")
    flags.number("--labelled", 2, "labelled nodes of each class")
    flags.number("--channels", 16, "channels of a node between the convolutions")
    flags.number("--num_experts", 4, "experts of a mixture")
    flags.number("--k", 2, "experts a node, in the mean")
    flags.number("--expert_channels", 16, "channels inside an expert")
    flags.add_argument("--dropout", type=float, default=0.5, help="before each convolution")
    flags.add_argument("--lr", type=float, default=0.01, help="of Adam")
    args = flags.read(argv)
    data = load(args.dataset, args.data_dir, download=args.download)
    classes = int(data.y.max()) + 1
    print(
        f"{args.dataset}: {data.num_nodes} nodes, {data.num_edges} edges, {classes} classes, {args.labelled} "
        f"labelled nodes a class, the others scored; {args.seeds} seeds, {args.steps} steps"
    )
    names = (PLAIN, DENSE, *MIXTURES)
    scores: dict[str, list[float]] = {}
    told: dict[str, list[tuple[float, float]]] = {name: [] for name in MIXTURES}
    first: dict[str, Record] = {}
    sizes = {}
    for seed in range(args.seeds):
        known = split(data.y, args.labelled, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        for name, value in baselines(data, known, args).items():
            scores.setdefault(name, []).append(value)
        for name in names:
            torch.manual_seed(seed)
            model = NodeGNN(make_branch(name, args), args.channels, classes, dropout=args.dropout)
            value, record = train(model, data, known, args)
            scores.setdefault(name, []).append(value)
            sizes[name] = parameters(model)
            if record is not None:
                told[name].append(information(record, data.y))
                first.setdefault(name, record)
    notes = {
        name: f"{total} parameters, {active} active at a node" for name, (total, active) in sizes.items()
    }
    print_table(scores, notes)
    for name in MIXTURES:
        print(verdict(name, scores[name], DENSE, scores[DENSE]))
    print(verdict(DENSE, scores[DENSE], PLAIN, scores[PLAIN]))
    for name, values in told.items():
        (bits, spread), (chance, _) = (mean_and_spread(column) for column in zip(*values, strict=True))
        print(f"{name}: the expert tells {bits:.2f} ± {spread:.2f} bits of the class, shuffled {chance:.2f}")
    part = "" if data.num_nodes <= DRAWN else f", its {DRAWN} nodes of highest degree"
    path = args.out_dir / "gnn_moe_nodes.png"
    draw(data, first, f"Experts and classes of {args.dataset}{part} (seed 0)").savefig(path, dpi=150)
    save_json(args.out_dir, {"dataset": args.dataset, "accuracy": scores, "bits": told, "parameters": sizes})
    print(f"figure: {path}")


def parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are active at a node that has ``k`` experts."""
    total = sum(p.numel() for p in model.parameters())
    if not isinstance(model.branch, MoELayer):
        return total, total
    experts = sum(p.numel() for p in model.branch.experts.parameters())
    layer = model.branch
    return total, total - experts + experts * layer.k // layer.num_experts


if __name__ == "__main__":
    sys.exit(exit_code(main))
