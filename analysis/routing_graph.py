"""The graph of experts that serve the same tokens more often than independent choice lets them."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.routing import Routed, routed, tokens_of
from graphmoe.checkpoint import RunRecord

MAX_EDGES = 60
"""Pairs that a panel shows; of more, those that meet most often beyond chance."""
ALPHA = 0.05
"""Probability that a panel has any edge where experts are chosen independently."""
_MOST = 3.0  # the colours end at a factor of 2 ** 3
_REACH = 1.45  # half a panel, where the circle of experts has radius 1: names lie outside the largest
RATIOS = LinearSegmentedColormap.from_list("ratios", ("#f3c98b", "#d55e00", "#6b1d00"))


@style.styled
def routing_graph(record: RunRecord) -> Figure:
    """Pairs of experts that serve the same tokens more often than if each were chosen independently.

    Experts, as large as their load, lie on a circle, in a layer of many with those that meet beside one
    another. A line is drawn where independent choice with the same loads would let two meet as often with a
    probability below 5 % over all pairs of the layer (binomial test; Bonferroni). Tokens count as
    independent of one another, which those of one text are not quite: repeated words repeat their experts.
    """
    found = routed(record)
    panels = [_Panel(found, place) for place in range(len(found.compared))]
    side = 2.7 if found.live.sum(axis=1).max() <= 16 else 3.4
    rows, columns = style.grid_shape(len(panels), side)
    title = f"Experts that serve the same tokens ({tokens_of(found)})"
    fig = style.new_figure(max(side * columns + 1.0, 6.6), (side + 0.2) * rows + 0.9, title)
    axes = style.panels(fig, len(panels), columns)
    ratios = np.concatenate([panel.ratio for panel in panels])
    top = float(np.clip(np.log2(ratios).max(initial=0), np.log2(1.25), _MOST))
    norm = Normalize(0, top)
    for ax, panel in zip(axes, panels, strict=True):
        panel.draw(ax, norm)
    if len(ratios):
        bar = fig.colorbar(
            ScalarMappable(norm, RATIOS),
            ax=axes,
            label="meetings, times what independent choice gives",
            aspect=25 * rows,
            pad=0.02,
            extend="max" if np.log2(ratios).max() > _MOST else "neither",
            extendfrac=0.03,
        )
        ticks = [tick for tick in (1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8) if np.log2(tick) <= top]
        ticks = [tick for tick in ticks if tick in (1, 2, 4, 8)] if top > 2 else ticks
        bar.set_ticks(np.log2(ticks), labels=[f"{tick:g}" for tick in ticks])
        bar.outline.set_visible(False)
    fig.legend(handles=_legend(), loc="outside lower center", ncols=3)
    return fig


def more_than_chance(count: np.ndarray, chance: np.ndarray, num_tokens: int) -> np.ndarray:
    r"""Probability that a binomial number of meetings is at least as large as the counted one.

    .. math:: P(X \ge \mathrm{count}), \qquad X \sim \mathrm{Binomial}(N, \mathrm{chance})

    Args:
        count: Meetings, ``[M]``.
        chance: Probability of one, ``[M]``.
        num_tokens: ``N``.

    Returns:
        ``[M]``.
    """
    number = np.arange(num_tokens + 1)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(number[1:]))])
    ways = factorial[-1] - factorial - factorial[::-1]
    p = np.clip(chance, 1e-12, 1 - 1e-12)[:, None]
    tail = np.empty(len(count))
    for start in range(0, len(count), 256):  # [256, N + 1] at a time
        part = slice(start, start + 256)
        log = ways + number * np.log(p[part]) + (num_tokens - number) * np.log1p(-p[part])
        tail[part] = np.where(number >= count[part, None], np.exp(log), 0).sum(axis=1)
    return tail.clip(0, 1)


class _Panel:
    """What one layer shows: the pairs beyond chance, the strongest last, and where the experts lie."""

    def __init__(self, found: Routed, place: int):
        layer = found.compared[place]
        self.experts = np.flatnonzero(found.live[layer])
        self.load = found.load[layer, self.experts] / max(np.nanmean(found.load[layer]), 1e-9)
        both = np.ix_(self.experts, self.experts)
        together, chance = found.together[place][both], found.independent[place][both]
        source, target = np.triu_indices(len(self.experts), 1)
        served, together, chance = int(found.served[layer]), together[source, target], chance[source, target]
        open_ = (chance > 0) & (chance < 1)  # others meet never or always, whoever chooses
        more = np.flatnonzero(open_ & (together > chance))
        count = np.round(together[more] * served)
        chosen = more[more_than_chance(count, chance[more], served) < ALPHA / max(open_.sum(), 1)]
        ratio = together[chosen] / chance[chosen]
        order = np.argsort(ratio, kind="stable")[-MAX_EDGES:]
        self.pairs = np.stack([source[chosen], target[chosen]], axis=1)[order]
        self.ratio = ratio[order]
        where = f"layer {found.layers[layer]}"
        shown = f"strongest {len(order)} of {len(chosen)}" if len(order) < len(chosen) else f"{len(chosen)}"
        self.title = f"{where} · {shown} of {open_.sum():,} pairs" if open_.any() else f"{where} · no choice"

    def draw(self, ax: Axes, norm: Normalize) -> None:
        count = len(self.experts)
        order = np.arange(count) if count <= 12 else neighbours(count, self.pairs, np.log2(self.ratio))
        angle = np.empty(count)
        angle[order] = np.pi / 2 - 2 * np.pi * np.arange(count) / count
        at = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        strength = norm(np.log2(self.ratio)).clip(0, 1)
        lines = [at[pair] for pair in self.pairs]
        ax.add_collection(LineCollection(lines, colors=RATIOS(strength), linewidths=0.8 + 2.6 * strength))
        most = 0.62 * np.pi / count  # radius of the busiest, so that neighbours do not touch
        unit = min(most / np.sqrt(max(self.load.max(), 1)), 0.13)
        busy = self.load > 0
        radius = unit * np.sqrt(np.maximum(self.load, 0))
        sizes = np.maximum((2 * _points(ax) * radius) ** 2, 7)  # a rare expert is still seen
        ax.scatter(*at[busy].T, s=sizes[busy], color=style.BLUE, edgecolors="white", linewidths=0.5, zorder=3)
        ax.scatter(*at[~busy].T, s=9, facecolors="white", edgecolors=style.QUIET, linewidths=0.8, zorder=3)
        self._names(ax, at, angle, radius)
        ax.set_title(self.title)
        ax.set_aspect("equal")
        ax.set_xlim(-_REACH, _REACH)
        ax.set_ylim(-_REACH, _REACH)
        ax.axis("off")

    def _names(self, ax: Axes, at: np.ndarray, angle: np.ndarray, radius: np.ndarray) -> None:
        """Write the experts' numbers around the circle; of very many only of those that meet."""
        count = len(self.experts)
        size = 8.0 if count <= 16 else 6.5 if count <= 40 else 5.5
        named = range(count) if count <= 72 else np.unique(self.pairs)
        for expert in named:
            gap = 0.13 if count <= 16 else 0.1
            x, y = at[expert] * (1 + max(radius[expert] + gap, 0.2 if count <= 16 else 0.14))
            turn = np.degrees(angle[expert]) if count > 40 else 0.0
            turn = (turn + 90) % 180 - 90  # never upside down
            text = str(self.experts[expert])
            ax.text(x, y, text, ha="center", va="center", fontsize=size, rotation=turn, in_layout=False)


def neighbours(count: int, pairs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Order experts so that those which meet are near: each connected group by its Fiedler vector.

    Args:
        count: Experts.
        pairs: Those that meet, ``[M, 2]``.
        weight: How strongly, ``[M]``.

    Returns:
        ``[count]``: groups, the largest first, and then whoever meets nobody, by number.
    """
    import networkx  # needed for this picture alone

    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_weighted_edges_from((int(a), int(b), float(w)) for (a, b), w in zip(pairs, weight, strict=True))
    order: list[int] = []
    for group in sorted(map(sorted, networkx.connected_components(graph)), key=lambda g: (-len(g), g)):
        if len(group) > 2:
            weights = networkx.to_numpy_array(graph, nodelist=group)
            fiedler = np.linalg.eigh(np.diag(weights.sum(axis=1)) - weights)[1][:, 1]
            fiedler *= np.sign(fiedler[np.abs(fiedler).argmax()])  # either sign solves it
            group = [group[place] for place in np.argsort(fiedler, kind="stable")]
        order += group
    return np.array(order)


def _points(ax: Axes) -> float:
    """About how many points one unit of a panel's axes takes."""
    fig, grid = ax.get_figure(), ax.get_gridspec()
    width, height = fig.get_size_inches()
    return 72 * min((width - 1.0) / grid.ncols, (height - 0.9) / grid.nrows - 0.3) / (2 * _REACH)


def _legend() -> list[Line2D]:
    look = {"linestyle": "", "marker": "o"}
    return [
        Line2D([], [], color=style.BLUE, markersize=7, label="expert (area: load)", **look),
        Line2D([], [], color=style.QUIET, markerfacecolor="white", markersize=4, label="idle expert", **look),
        Line2D([], [], color=RATIOS(0.5), linewidth=2, label="meet more often than chance allows"),
    ]
