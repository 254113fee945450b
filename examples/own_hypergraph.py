"""A hypergraph of one's own: between nodes, with a learned weight a hyperedge, and between experts.

``python -m examples.own_hypergraph``

Both tasks are synthetic, so that what should be found is known.

Nodes: sensors stand in groups. What a sensor has to tell apart follows from the mean signals of its groups,
but only half of the groups count. A :class:`HyperCoupleConv` over the groups learns one weight for each.
Beside it: equal weights, and a network of the same width that sees no groups. Sensors that are in no group
that counts are not scored: they have nothing to tell.

Experts: a frozen mixture whose four experts talk in three hyperedges, written out, is imitated by one with
the same hyperedges, by one whose experts talk in pairs, and by one whose experts do not talk.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.style import BLUE, ORANGE, QUIET, new_figure, styled
from graphmoe.errors import ConfigError
from graphmoe.graph import incidence
from graphmoe.nn import HyperCoupleConv, MoELayer
from graphmoe.train.command import exit_code

try:
    from examples.common import Flags, mean_and_spread, print_table, save_json, verdict
except ModuleNotFoundError:  # called as a file, not with -m
    from common import Flags, mean_and_spread, print_table, save_json, verdict

EXPERT_HYPEREDGES = [[0, 1, 2], [2, 3], [0, 3]]
LEARNED, EQUAL, ALONE = "hyperedges, learned weights", "hyperedges, equal weights", "no hyperedges"
TALKS = {
    "the hyperedges of the teacher": {"coupling": "hyper", "hyperedges": EXPERT_HYPEREDGES},
    "all pairs": {"coupling": "hyper", "strategy": "all_pairs"},
    "no talk": {"coupling": "none"},
}
CHANNELS = 8
UNSCORED = -100  # what F.cross_entropy leaves out


class Sensors(NamedTuple):
    """A hypergraph of sensors and what they measure.

    Attributes:
        edges: Incidence ``[2, nnz]`` (sensor, group).
        counts: Whether a group counts, ``[H]`` bool.
        x: Signals ``[B, N, F]``.
        y: What each sensor has to tell apart, 0 or 1, ``[B, N]``; ``UNSCORED`` of one with nothing to tell.
    """

    edges: Tensor
    counts: Tensor
    x: Tensor
    y: Tensor


def draw_sensors(args: Namespace, seed: int) -> Sensors:
    """Random groups of ``--group`` sensors, of which every second one counts, and random signals."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(args.nodes, generator=generator) for _ in range(args.hyperedges)]
    edges = incidence([order[: args.group].tolist() for order in orders], args.nodes)
    counts = torch.arange(args.hyperedges) % 2 == 0
    x = torch.randn(args.train_signals + args.test_signals, args.nodes, CHANNELS, generator=generator)
    direction = torch.randn(CHANNELS, generator=generator)
    member = torch.zeros(args.nodes, args.hyperedges).index_put_(tuple(edges), torch.ones(edges.size(1)))
    mean = (member / member.sum(dim=0)).t() @ x  # [B, H, F]
    heard = (member * counts) @ mean @ direction  # [B, N]
    y = torch.where((member * counts).any(dim=1), (heard > 0).long(), UNSCORED)
    return Sensors(edges, counts, x, y)


class SensorNet(nn.Module):
    """Scores of each sensor from what its groups measure, or from its own signal alone.

    Args:
        num_hyperedges: ``H``; 0: a network without hyperedges.
        learned: Whether every hyperedge has a weight of its own, or all the same.
    """

    def __init__(self, num_hyperedges: int, *, learned: bool = False):
        super().__init__()
        self.conv = HyperCoupleConv(-1) if num_hyperedges else nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.raw = nn.Parameter(torch.zeros(num_hyperedges), requires_grad=learned)
        self.head = nn.Sequential(nn.Linear(CHANNELS, 32), nn.GELU(), nn.Linear(32, 2))

    def weights(self) -> Tensor:
        """Positive weights of the hyperedges, ``[H]``, of mean 1: only their ratios matter."""
        weight = F.softplus(self.raw)
        return weight / weight.mean()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Scores ``[B, N, 2]`` of signals ``[B, N, F]`` on one incidence for all."""
        if isinstance(self.conv, HyperCoupleConv):
            x = self.conv(x, edges, edge_weight=self.weights())
        else:
            x = self.conv(x)
        return self.head(x)


def tell_apart(model: SensorNet, sensors: Sensors, args: Namespace) -> float:
    """Train on the first signals; accuracy on the others, in [0, 1]."""
    known = slice(args.train_signals)
    model(sensors.x[:1], sensors.edges)  # channels are those of the signals
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(args.steps):
        optimiser.zero_grad()
        scores = model(sensors.x[known], sensors.edges)
        target = sensors.y[known].flatten()
        F.cross_entropy(scores.flatten(0, 1), target, ignore_index=UNSCORED).backward()
        optimiser.step()
    y = sensors.y[args.train_signals :]
    with torch.no_grad():
        found = model(sensors.x[args.train_signals :], sensors.edges).argmax(dim=-1)
    return (found == y)[y != UNSCORED].double().mean().item()


def dense_formula(conv: HyperCoupleConv, x: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    r""":math:`D^{-1} B W C^{-1} B^\top X \Theta` with dense matrices, ``[B, N, F]``."""
    member = torch.zeros(x.size(-2), len(weight), dtype=x.dtype)
    member[edges[0], edges[1]] = 1.0
    degree = (member @ weight).unsqueeze(1)
    spread = member * weight / torch.where(degree > 0, degree, 1)
    return spread @ ((member / member.sum(dim=0)).t() @ (x @ conv.lin.weight.t()))


def difference(model: SensorNet, sensors: Sensors) -> float:
    """Largest difference of the convolution from the dense formula, in fp64."""
    conv, weight, x = model.conv.double(), model.weights().detach().double(), sensors.x[:4].double()
    with torch.no_grad():
        ours = conv(x, sensors.edges, edge_weight=weight)
        found = (ours - dense_formula(conv, x, sensors.edges, weight)).abs().max().item()
    conv.float()
    return found


def make_mixture(options: dict) -> MoELayer:
    """Four experts that all serve every input, and talk as ``options`` say."""
    return MoELayer(CHANNELS, 4, 4, hidden_channels=16, **options)


def imitate(args: Namespace, seed: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Explained variance of a teacher's outputs by each student, at most 1, on new inputs; the connections
    ``[E, E]`` (target, source) of the teacher and of the student with its hyperedges."""
    torch.manual_seed(seed)
    teacher = make_mixture(TALKS["the hyperedges of the teacher"])
    with torch.no_grad():
        teacher.couplers[0].weight.copy_(torch.tensor([3.0, -3.0, 1.0]))  # before the softplus
        for parameter in (teacher.experts.down_proj, teacher.couplers[0].lin.weight):
            parameter.mul_(4)  # loud enough for the nonlinearity behind the hyperedges to matter
        x, new = torch.randn(512, CHANNELS), torch.randn(512, CHANNELS)
        y, wanted = teacher(x), teacher(new)
    explained, connections = {}, None
    for name, options in TALKS.items():
        torch.manual_seed(seed + 1)
        student = make_mixture(options)
        optimiser = torch.optim.Adam(student.parameters(), lr=0.01)
        for _ in range(args.steps):
            optimiser.zero_grad()
            F.mse_loss(student(x), y).backward()
            optimiser.step()
        with torch.no_grad():
            error = F.mse_loss(student(new), wanted)
            explained[name] = 1 - (error / (wanted - y.mean(dim=0)).square().mean()).item()
            connections = student.connections() if connections is None else connections
    return explained, teacher.connections().detach(), connections


@styled
def draw(
    scores: dict[str, list[float]], counts: Tensor, weight: Tensor, teacher: Tensor, student: Tensor
) -> Figure:
    """Learned hyperedge weights, accuracies of all seeds, and how the experts are connected."""
    fig = new_figure(13, 4.2, "A hypergraph of one's own")
    bars, dots, left, right = fig.subplots(1, 4, width_ratios=[1.5, 1.3, 1, 1])
    order = weight.argsort(descending=True)
    colours = [BLUE if counts[h] else ORANGE for h in order]
    bars.bar(range(len(order)), weight[order].tolist(), color=colours)
    bars.axhline(1, color=QUIET, lw=1, ls="--")
    for colour, label in ((BLUE, "counts"), (ORANGE, "does not count")):
        bars.bar([0], [0], color=colour, label=label)
    bars.legend()
    bars.set(title="learned weights (seed 0; dashed: equal)", xlabel="hyperedge, by weight", ylabel="weight")
    for row, (_, values) in enumerate(scores.items()):
        mean, spread = mean_and_spread(values)
        dots.plot(values, [row] * len(values), "o", color=QUIET, ms=3, alpha=0.5)
        dots.errorbar(mean, row, xerr=spread, fmt="s", color=BLUE, ms=5, capsize=3)
    dots.set_yticks(range(len(scores)), [name.replace(", ", ",\n") for name in scores])
    dots.invert_yaxis()
    dots.set(title="accuracy on new signals", xlabel="each seed, mean ± standard deviation")
    for ax, matrix, title in ((left, teacher, "experts of the teacher"), (right, student, "of the student")):
        ax.grid(False)
        ax.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in ((divmod(i, 4), v) for i, v in enumerate(matrix.flatten().tolist())):
            ink = "white" if value > 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=8)
        ax.set(title=title, xlabel="speaking", ylabel="listening", xticks=range(4), yticks=range(4))
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example.

    Raises:
        ConfigError: A flag that cannot be used.
        DataError: A folder that cannot be made.
    """
    flags = Flags("own_hypergraph", __doc__.splitlines()[0], seeds=10, steps=300)
    flags.number("--nodes", 60, "sensors", least=2)
    flags.number("--hyperedges", 24, "groups of sensors", least=2)
    flags.number("--group", 5, "sensors of a group", least=2)
    flags.number("--train_signals", 24, "signals to learn from")
    flags.number("--test_signals", 100, "signals to score")
    args = flags.read(argv)
    if args.group > args.nodes:
        raise ConfigError("a group has more sensors than there are", "--group", args.nodes, args.group)
    print(
        f"nodes: {args.nodes} sensors in {args.hyperedges} groups of {args.group}, every second group "
        f"counts; {args.seeds} seeds, {args.steps} steps"
    )
    scores: dict[str, list[float]] = {"chance: commoner answer": []}
    told: dict[str, list[float]] = {}
    apart, exact, pictures = [], [], None
    for seed in range(args.seeds):
        sensors = draw_sensors(args, seed)
        new = sensors.y[args.train_signals :]
        share = new[new != UNSCORED].double().mean().item()
        scores["chance: commoner answer"].append(max(share, 1 - share))
        models = {}
        for name, (count, learned) in {
            ALONE: (0, False),
            EQUAL: (args.hyperedges, False),
            LEARNED: (args.hyperedges, True),
        }.items():
            torch.manual_seed(seed)
            models[name] = SensorNet(count, learned=learned)
            scores.setdefault(name, []).append(tell_apart(models[name], sensors, args))
        weight = models[LEARNED].weights().detach()
        apart.append((weight[sensors.counts].mean() / weight[~sensors.counts].mean()).item())
        exact.append(difference(models[LEARNED], sensors))
        explained, teacher, student = imitate(args, seed)
        for name, value in explained.items():
            told.setdefault(name, []).append(value)
        if pictures is None:
            pictures = sensors.counts, weight, teacher, student
    print_table(scores, {})
    print(verdict(LEARNED, scores[LEARNED], ALONE, scores[ALONE]))
    print(verdict(LEARNED, scores[LEARNED], EQUAL, scores[EQUAL]))
    mean, spread = mean_and_spread(apart)
    print(f"weights of groups that count over those of the others: {mean:.1f} ± {spread:.1f} (equal: 1)")
    print(f"largest difference from the dense formula: {max(exact):.1e}")
    print("experts: variance of a teacher's outputs that a student explains (a constant answer: 0)")
    print_table(told, {})
    first, *others = told
    for other in others:
        print(verdict(first, told[first], other, told[other]))
    path = args.out_dir / "own_hypergraph.png"
    draw(scores, *pictures).savefig(path, dpi=150)
    save_json(
        args.out_dir, {"accuracy": scores, "explained": told, "weight_ratio": apart, "difference": exact}
    )
    print(f"figure: {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
