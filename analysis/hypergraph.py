"""The hypergraph of experts: who belongs to which hyperedge, and how much each one weighs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from analysis import style
from analysis.hyperedges import hyperedge_members, strategy
from analysis.series import array, expert_names, has, live, num_ghosts, series, steps
from graphmoe.checkpoint import RunRecord

MAX_HYPEREDGES = 36
"""Hyperedges a panel shows; of more, the strongest."""
WEIGHTS = LinearSegmentedColormap.from_list("weights", ("#bcd0e5", "#3f86c0", "#08264f"))


class _Drawing(NamedTuple):
    """What one panel shows: all experts, and the hyperedges to draw, weakest first.

    Of many hyperedges whose members are all live (``awake``) only the strongest are drawn.
    """

    names: list[str]
    primaries: int
    alive: np.ndarray
    edges: list[tuple[list[int], float]]
    awake: int

    @classmethod
    def of(
        cls,
        names: list[str],
        primaries: int,
        members: list[list[int]],
        alive: np.ndarray,
        weight: np.ndarray | None,
    ) -> "_Drawing":
        """Choose the hyperedges of one layer whose members are all live, ``alive [E]``, ``weight [H]``."""
        awake = [edge for edge, ids in enumerate(members) if alive[ids].all()]
        strength = np.ones(len(members)) if weight is None else weight
        order = sorted(awake, key=lambda edge: -np.nan_to_num(strength[edge], nan=-np.inf))
        edges = [(members[edge], float(strength[edge])) for edge in order[:MAX_HYPEREDGES][::-1]]
        return cls(names, primaries, alive, edges, len(awake))


@style.styled
def hypergraph(record: RunRecord) -> Figure:
    """Experts on a circle, and every hyperedge as a square that is joined to its members."""
    members, weight = _hyperedges(record)
    layers, names = (len(weight) if weight is not None else _layers(record)), expert_names(record)
    alive, primaries = live(record, layers)[-1], len(names) - num_ghosts(record)
    shown = style.shown_layers(layers)
    rows, columns = style.grid_shape(len(shown), 3.6)
    title = f"Hypergraph of experts, {strategy(record)}{len(names)} experts, step {steps(record)[-1]}"
    width, height = max(3.6 * columns + 0.9, 6.4), 3.7 * rows + 1.0
    fig = style.new_figure(width, height, title)
    axes = style.panels(fig, len(shown), columns)
    drawings = [_Drawing.of(names, primaries, members, alive[layer], _row(weight, layer)) for layer in shown]
    norm = None
    if weight is not None:
        norm = Normalize(*style.value_range(np.array([w for drawing in drawings for _, w in drawing.edges])))
    for ax, layer, drawing in zip(axes, shown, drawings, strict=True):
        _panel(ax, drawing, norm)
        ax.set_title(_title(layer, drawing, len(members), weighted=weight is not None))
    if weight is not None:
        bar = fig.colorbar(
            ScalarMappable(norm, WEIGHTS), ax=axes, label="hyperedge weight", aspect=25 * rows, pad=0.02
        )
        bar.outline.set_visible(False)
    handles = _legend(ghosts=bool(alive[shown, primaries:].any()), asleep=not alive[shown].all())
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def spread(places: np.ndarray, fixed: np.ndarray, gap: float, rounds: int = 150) -> np.ndarray:
    """Move points apart until no two of them, and none of them and a fixed one, are nearer than ``gap``.

    Centres of hyperedges coincide wherever members lie opposite each other on the circle. Each round
    moves every point half of what it lacks, and a little back to where it came from.

    Args:
        places: ``[H, 2]``.
        fixed: Points that stay where they are, ``[M, 2]``.
        gap: Least distance aimed at, in the same unit.
        rounds: How often to move.

    Returns:
        ``[H, 2]``; crowded points may stay nearer than ``gap``.
    """
    turn = 2.4 * np.arange(len(places))  # any angles that differ tell coinciding points apart
    moved = places + 0.02 * gap * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for _ in range(rounds):
        away = moved[:, None] - np.concatenate([moved, fixed])[None]  # [H, H + M, 2]
        distance = np.linalg.norm(away, axis=-1, keepdims=True)
        lacking = np.where(distance > 0, np.maximum(gap - distance, 0) / np.maximum(distance, 1e-9), 0)
        moved = moved + (0.5 * away * lacking).sum(axis=1) + 0.05 * (places - moved)
    return moved


def _hyperedges(record: RunRecord) -> tuple[list[list[int]], np.ndarray | None]:
    """The members of each hyperedge, and its weight at the end, ``[L, H]``, where one was learned."""
    if has(record, "hyperedge_weight"):
        weight = series(record, "hyperedge_weight")[-1]
        return hyperedge_members(record, weight.shape[1]), weight
    incidence = array(record, "incidence", ndim=2)
    return hyperedge_members(record, len(np.unique(incidence[-1]))), None


def _row(weight: np.ndarray | None, layer: int) -> np.ndarray | None:
    return None if weight is None else weight[layer]


def _layers(record: RunRecord) -> int:
    """Number of layers of a run that has recorded no hyperedge weights."""
    return next((series(record, key).shape[1] for key in ("coupling", "load") if has(record, key)), 1)


def _panel(ax: Axes, drawing: _Drawing, norm: Normalize | None) -> None:
    """Draw one layer; without ``norm`` all hyperedges look alike."""
    import networkx  # needed for this picture alone

    experts, edges = range(len(drawing.names)), drawing.edges
    graph = networkx.Graph()
    graph.add_nodes_from(experts, bipartite=0)
    for edge, (members, _) in enumerate(edges):
        graph.add_edges_from((("hyperedge", edge), expert) for expert in members)
    circle = networkx.circular_layout(list(experts))
    at = np.array([circle[expert] for expert in experts])[:, ::-1]  # first expert on top
    size = float(np.clip(1.9 / len(experts), 0.03, 0.13))  # radius of an expert
    centres = np.array([at[members].mean(axis=0) for members, _ in edges]).reshape(-1, 2)
    # Less room than between neighbours on the circle, or their hyperedge would be pushed out of it.
    gap = min(0.2, 0.8 / np.sqrt(max(len(edges), 1)) + 0.02, 0.9 * np.sin(np.pi / len(experts)))
    centres = spread(centres, at, gap=gap)
    place = dict(zip(experts, at, strict=True))
    place |= {("hyperedge", edge): centre for edge, centre in enumerate(centres)}
    looks = [_look(weight, norm) for _, weight in edges]
    with_ghost = [members[-1] >= drawing.primaries for members, _ in edges]
    for edge, (colour, width) in enumerate(looks):  # weakest first, so that strong ones lie on top
        lines = [(place["hyperedge", edge], place[expert]) for expert in graph["hyperedge", edge]]
        dashes = (0, (3, 1.5)) if with_ghost[edge] else "solid"
        ax.add_collection(LineCollection(lines, colors=[colour], linewidths=width, linestyles=[dashes]))
    if edges:
        rim = [style.ORANGE if ghost else "white" for ghost in with_ghost]
        colours = [colour for colour, _ in looks]
        ax.scatter(*centres.T, marker="s", s=26, c=colours, edgecolors=rim, linewidths=1.1, zorder=3)
    _experts(ax, drawing, at, size)
    ax.set_aspect("equal")
    ax.set_xlim(-1.2, 1.2)
    ax.set_ylim(-1.2, 1.2)
    ax.axis("off")


def _look(weight: float, norm: Normalize | None) -> tuple[Sequence[float] | str, float]:
    """Colour and line width of a hyperedge; one that diverged is grey."""
    if norm is None:
        return "#6f9fc8", 1.4
    if not np.isfinite(weight):
        return style.EMPTY, 0.8
    return WEIGHTS(norm(weight)), 0.7 + 2.3 * float(norm(weight))


def _experts(ax: Axes, drawing: _Drawing, at: np.ndarray, size: float) -> None:
    """Draw and name the experts: primaries, ghosts, and empty circles for dormant ghosts."""
    for expert, (name, (x, y)) in enumerate(zip(drawing.names, at, strict=True)):
        rim = style.ORANGE if expert >= drawing.primaries else style.INK
        awake = drawing.alive[expert]
        look = {"edgecolor": rim if awake else style.QUIET, "facecolor": rim if awake else "white"}
        ax.add_patch(Circle((x, y), size, zorder=4, linestyle="-" if awake else ":", **look))
        ink = "white" if awake else style.QUIET
        if size > 0.05:
            ax.text(x, y, name, ha="center", va="center", color=ink, fontsize=8, zorder=5)
        else:
            ax.text(1.12 * x, 1.12 * y, name, ha="center", va="center", color=rim, fontsize=6, zorder=5)


def _title(layer: int, drawing: _Drawing, hyperedges: int, *, weighted: bool) -> str:
    """``layer 0``, and how many hyperedges are not drawn, and why."""
    parts, drawn = [f"layer {layer}"], len(drawing.edges)
    if drawn < drawing.awake:
        parts.append(f"{'strongest' if weighted else 'first'} {drawn} of {drawing.awake}")
    if drawing.awake < hyperedges:
        parts.append(f"{hyperedges - drawing.awake} of {hyperedges} dormant")
    return " · ".join(parts)


def _legend(*, ghosts: bool, asleep: bool) -> list[Line2D]:
    def mark(shape: str, label: str, face: str, rim: str, size: float = 9) -> Line2D:
        look = {"markerfacecolor": face, "markeredgecolor": rim, "markersize": size}
        return Line2D([], [], linestyle="", marker=shape, label=label, **look)

    middle = WEIGHTS(0.5)
    handles = [
        mark("o", "primary expert", style.INK, style.INK),
        mark("s", "hyperedge, joined to its members", middle, "white", 6),
    ]
    if ghosts:
        handles.append(mark("o", "ghost", style.ORANGE, style.ORANGE))
        handles.append(mark("s", "hyperedge with a ghost (dashed)", middle, style.ORANGE, 6))
    if asleep:
        handles.append(mark("o", "dormant ghost", "white", style.QUIET))
    return handles
